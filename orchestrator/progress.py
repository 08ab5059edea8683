"""A progress bar on stderr; nothing where stderr is no terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class bar:  # noqa: N801  used as a context, like open()
    """Shows how many bytes of which file are done; gone again at its end."""

    def __enter__(self) -> bar:
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of `what` are done."""
        if total <= 0 or not sys.stderr.isatty():
            return
        progress = self._progress or self._begin()
        if what not in self._tasks:
            self._tasks[what] = progress.add_task(what, total=total)
        progress.update(self._tasks[what], completed=done, total=total, visible=done < total)

    def _begin(self) -> Progress:
        from rich import progress as rich
        from rich.console import Console

        self._progress = rich.Progress(
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.DownloadColumn(binary_units=True),
            rich.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._progress.start()
        return self._progress

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
