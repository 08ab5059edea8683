"""What a command can end with instead of a result, and how any error of the program is read at its one boundary.

    CommandError              what happened, why, what to do now; exit_code 1
    ├── Usage                 2: arguments that do not go together, or a question that nobody can answer
    ├── Invalid               3: a file, a folder or a setting that cannot serve
    ├── NoOffer               5: nothing that can be rented is what the spec asks for
    ├── OverBudget            5: the plan does not fit the limits
    ├── Unverified            7: bytes that are not what their manifest says
    ├── MayBill               8: a termination that was not confirmed
    └── NoSuchRun             102

The other floors have families of their own (SpecError, ProviderError, StoreError, KeyFileError, RemoteError, …): each carries
`exit_code`, and where it has them `code` and `hint`. `failure` reads them all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator import exits


class CommandError(Exception):
    """Base: `message` says what happened and why, `hint` what to do now."""

    exit_code = exits.UNEXPECTED
    code = "error"

    def __init__(
        self, message: str, hint: str = "", *, run: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.hint, self.run = hint, run
        self.code = code or type(self).code


class Usage(CommandError):
    """Arguments that do not go together, or a question that nobody can answer."""

    exit_code = exits.USAGE
    code = "usage"


class Invalid(CommandError):
    """A file, a folder or a setting that cannot serve."""

    exit_code = exits.INVALID
    code = "invalid"


class NoOffer(CommandError):
    """Nothing that can be rented is what the spec asks for."""

    exit_code = exits.NO_OFFER
    code = "no-offer"


class OverBudget(CommandError):
    """The plan does not fit the limits."""

    exit_code = exits.NO_OFFER
    code = "over-budget"


class Unverified(CommandError):
    """Bytes that are not what their manifest says."""

    exit_code = exits.VERIFICATION
    code = "unverified"


class MayBill(CommandError):
    """A termination that was not confirmed."""

    exit_code = exits.MAY_BILL
    code = "may-still-bill"


class NoSuchRun(CommandError):
    """No run of that id or name."""

    exit_code = exits.NO_SUCH_RUN
    code = "no-such-run"


@dataclass(frozen=True)
class Failure:
    """An error as it is shown."""

    exit_code: int
    code: str
    message: str
    hint: str = ""
    run: str | None = None
    expected: bool = True
    """False: a defect of the program, or of its surroundings; `--debug` shows where."""

    def document(self) -> dict[str, object]:
        """The JSON form."""
        error = {"code": self.code, "message": self.message, "hint": self.hint or None, "run": self.run}
        return {"error": error}

    def text(self) -> str:
        """The human form: what happened, why, and what to do next."""
        lines = self.message.splitlines() or [self.code]
        body = [f"error: {lines[0]}", *(f"       {line}" for line in lines[1:])]
        return "\n".join([*body, *([f"  try: {self.hint}"] if self.hint else [])])


_NAMES = {2: "usage", 3: "invalid", 4: "credentials", 5: "no-offer", 6: "unreachable", 7: "unverified"}


def failure(error: BaseException) -> Failure:
    """How `error` is shown and which exit code it has."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        spoken = getattr(error, "format_message", None)
        message = spoken() if callable(spoken) else str(error)
        name = getattr(error, "code", None)
        return Failure(
            exit_code=code,
            code=name if isinstance(name, str) else _NAMES.get(code, _dashed(type(error).__name__)),
            message=message,
            hint=str(getattr(error, "hint", "") or ""),
            run=getattr(error, "run", None),
        )
    if isinstance(error, KeyboardInterrupt):
        return Failure(exits.INTERRUPTED, "interrupted", "interrupted; nothing was changed")
    if type(error).__name__ == "ConfigError":
        return Failure(exits.INVALID, "invalid", str(error), "correct the spec, then `llmctl plan` it again")
    if isinstance(error, OSError):
        return _system(error)
    return Failure(
        exits.UNEXPECTED,
        "unexpected",
        f"{type(error).__name__}: {error}" if str(error) else type(error).__name__,
        "this is a defect of llmctl: run the command again with --debug and report what it prints",
        expected=False,
    )


def _system(error: OSError) -> Failure:
    where = f"{error.filename}: " if error.filename else ""
    hint = {28: "free some disk space, then do it again", 13: "check who owns it and its permissions"}.get(
        error.errno or 0, "run the command again with --debug to see what it was doing"
    )
    return Failure(exits.UNEXPECTED, "system", f"{where}{error.strerror or error}", hint, expected=False)


def _dashed(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name.removesuffix("Error")).lower() or "error"
