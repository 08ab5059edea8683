"""What the GPUs of this node do, as nvidia-smi tells it: use, memory, heat and power, for the live display. Standard library only."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import threading
from collections import deque
from collections.abc import Iterable, Mapping

EVERY_SECONDS = 10.0
TIMEOUT_SECONDS = 8.0
SAMPLES = 6
"""A minute's: validation and checkpoints would make a single look jump between 0 and 100%."""
QUERY = "--query-gpu=utilization.gpu,memory.used,temperature.gpu,power.draw"
NAMES = ("utilisation", "memory_gib", "celsius", "watts")
_UNITS = (100.0, 1024.0, 1.0, 1.0)  # nvidia-smi tells percent and MiB
_DIGITS = (3, 2, 1, 1)


def parse(text: str) -> dict[str, float]:
    """Means over the GPUs of one answer of nvidia-smi, by NAMES: utilisation (0 to 1), memory_gib, celsius, watts.

    What a GPU does not tell (`[N/A]`, as with MIG) counts for nothing, and is left out where none tells it. Pure.
    """
    columns: list[list[float]] = [[] for _ in NAMES]
    for line in text.splitlines():
        words = line.split(",")
        if len(words) != len(NAMES):
            continue
        for column, word, unit in zip(columns, words, _UNITS, strict=True):
            try:
                column.append(float(word) / unit)
            except ValueError:
                continue
    return {name: statistics.fmean(column) for name, column in zip(NAMES, columns, strict=True) if column}


def mean(samples: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure over the samples that have it, rounded to what is shown. Pure."""
    known = list(samples)
    return {
        name: round(statistics.fmean(values), digits)
        for name, digits in zip(NAMES, _DIGITS, strict=True)
        if (values := [sample[name] for sample in known if name in sample])
    }


class Utilisation(threading.Thread):
    """Asks nvidia-smi every few seconds, beside the supervisor's loop; `figures` is the last minute's mean, {} where there
    is nothing to tell. An nvidia-smi that hangs (it does when a GPU has fallen off the bus) holds up this thread alone."""

    def __init__(self, visible: str | None = None) -> None:
        """`visible`: the trainer's CUDA_VISIBLE_DEVICES; None for all GPUs."""
        super().__init__(name="utilisation", daemon=True)
        self.figures: dict[str, float] = {}
        self._command = [shutil.which("nvidia-smi") or "", QUERY, "--format=csv,noheader,nounits"]
        if visible:
            self._command.append(f"--id={visible}")
        self._samples: deque[dict[str, float]] = deque(maxlen=SAMPLES)
        self._closed = threading.Event()

    def run(self) -> None:
        """Look until `close` is called; at once over where there is no nvidia-smi."""
        while self._command[0] and not self._closed.is_set():
            self._samples.append(self._look())
            self.figures = mean(self._samples)
            self._closed.wait(EVERY_SECONDS)

    def _look(self) -> dict[str, float]:
        try:
            answer = subprocess.run(self._command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
                                    errors="replace", timeout=TIMEOUT_SECONDS, env={**os.environ, "LC_ALL": "C"})  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return {}
        return parse(answer.stdout)

    def close(self) -> None:
        """End the looking."""
        self._closed.set()
