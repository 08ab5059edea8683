"""Questions that `pieces` answers on the node, in JSON. A process that stays there takes a line and answers with a line: a
question costs one exchange, and no shell and no Python has to start for it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

from orchestrator.remote import pieces
from orchestrator.remote.connection import CommandFailed, CommandTimeout, ConnectionLost, Result
from orchestrator.remote.node import Remote
from orchestrator.remote.session import BLOCK, Session

ANSWER_SECONDS = 3600.0
"""Reading hundreds of gigabytes for their hashes takes its time."""
_SOURCE = Path(pieces.__file__).read_text(encoding="utf-8")


def node_side(operation: str) -> list[str]:
    """The command that serves one operation of `pieces` on the node."""
    return ["python3", "-I", "-c", _SOURCE, operation]


def ask(remote: Remote, operation: str, **asked: object) -> Any:
    """The answer of an operation of `pieces`. Of several questions at once each has a process; one stays for the next
    question. Raises CommandFailed, CommandTimeout, ConnectionLost, NodeUnreachable."""
    idle = cast("list[_Answerer]", remote.memory.setdefault("answerers", []))
    while True:
        kept = _taken(idle)
        answerer = kept or _Answerer(remote)
        try:
            told = answerer.answer({**asked, "operation": operation})
        except BaseException as error:
            answerer.close()
            if kept and isinstance(error, CommandFailed | ConnectionLost):
                continue  # it or its link may have ended long ago; nothing is asked that does harm when asked twice
            raise
        if idle:
            answerer.close()
        else:
            idle.append(answerer)
        if "error" in told:
            raise CommandFailed(f"pieces {operation}", Result(b"", told["error"].encode(), 1))
        return told["answer"]


def _taken(idle: list[_Answerer]) -> _Answerer | None:
    try:
        return idle.pop()
    except IndexError:
        return None


class _Answerer:
    """`pieces serve` on the node."""

    def __init__(self, remote: Remote) -> None:
        self._context: AbstractContextManager[Session] = remote.session(node_side("serve"))
        self.session = self._context.__enter__()

    def answer(self, question: Mapping[str, object]) -> dict[str, Any]:
        """{"answer": …} or {"error": …}. Raises CommandFailed where it ended instead."""
        what = f"pieces {question['operation']}"
        unsent = memoryview(json.dumps(question).encode() + b"\n")
        answer, said, deadline = bytearray(), b"", time.monotonic() + ANSWER_SECONDS
        while unsent or not answer.endswith(b"\n"):
            try:
                unsent = unsent[self.session.send(unsent[:BLOCK]) :] if unsent else unsent
            except BrokenPipeError:
                unsent = unsent[:0]  # why it takes no more is still to be read
            piece = self.session.receive(0.002 if unsent else 1.0)
            if piece is None:
                status = self.session.exit_code(10)
                raise CommandFailed(what, Result(b"", said, -1 if status is None else status))
            answer += piece[0]
            said = (said + piece[1])[-4000:]
            if time.monotonic() > deadline:
                raise CommandTimeout(what, ANSWER_SECONDS, Result(b"", said, -1))
        return dict(json.loads(answer))

    def close(self) -> None:
        """Let go: it reads the end of its input, and ends."""
        self._context.__exit__(None, None, None)
