"""The exit codes of llmctl, and which of them a run's record means. Imports nothing heavy: `--help` lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runs.record import RunRecord

OK = 0
UNEXPECTED = 1
USAGE = 2
INVALID = 3
CREDENTIALS = 4
NO_OFFER = 5
UNREACHABLE = 6
VERIFICATION = 7
MAY_BILL = 8
RUN_FAILED = 100
UNFINISHED = 101
NO_SUCH_RUN = 102
STOPPED = 103
INTERRUPTED = 130
READER_GONE = 141
"""What a shell reports of a program that SIGPIPE ended; not one of ours, so not in the table."""

MEANINGS = {
    OK: "ok",
    UNEXPECTED: "unexpected",
    USAGE: "usage",
    INVALID: "spec or config invalid",
    CREDENTIALS: "credentials or account refused",
    NO_OFFER: "no offer (capacity, price cap, budget)",
    UNREACHABLE: "node unreachable",
    VERIFICATION: "verification failed",
    MAY_BILL: "an instance may still be billing (outranks the others)",
    RUN_FAILED: "run failed or lost",
    UNFINISHED: "run not finished (also: stopped following)",
    NO_SUCH_RUN: "no such run",
    STOPPED: "run stopped (by the user, the budget, the deadline)",
    INTERRUPTED: "interrupted before anything was rented",
}

_ACCOUNT = (
    "credentials", "no-key", "insecure-url", "global/invalid-api-key", "global/account-inactive",
    "global/invalid-address", "global/forbidden", "AuthFailure", "UnauthorizedOperation", "ExpiredToken",
    "InvalidClientTokenId", "OptInRequired", "Blocked", "PendingVerification", "NoCredentials",
)  # fmt: skip
"""Codes with which providers refuse an account rather than a request."""


def exit_code_of(run: RunRecord) -> int:
    """What a command that followed `run` to here ends with."""
    if may_still_bill(run):
        return MAY_BILL
    if run.outcome is None:
        return UNFINISHED
    if run.outcome == "succeeded":
        return OK
    if run.outcome == "stopped":
        rented = any(node.answer == "known" for node in run.nodes)
        return INTERRUPTED if run.cancelled and not rented else STOPPED
    return _failure(run.reason or "")


def may_still_bill(run: RunRecord) -> bool:
    """A node was asked to end and nothing has confirmed it; or the run is over and a node that nobody keeps (any more) is not."""
    for node in run.owned:
        left = run.outcome is not None and not run.keeps(node)
        if not node.settled and (node.terminate_tries > 0 or left):
            return True
    return False


def _failure(reason: str) -> int:
    """The code of a failed run's reason: `END: CODE: words`, `CODE: words`, or `END`."""
    words = [part.strip() for part in reason.split(":")][:2]
    if any(word in _ACCOUNT for word in words):
        return CREDENTIALS
    if words[0] in {"no-capacity", "no-node", "budget", "refused"}:
        return NO_OFFER
    if words[0] in {"host-key", "unreachable", "boot-timeout"}:
        return UNREACHABLE
    if words[0] in {"gpu", "instance_type"}:
        return INVALID
    return RUN_FAILED


def epilog() -> str:
    """The exit codes as the last paragraph of `--help`."""
    return "Exit codes: " + " · ".join(f"{code} {meaning}" for code, meaning in MEANINGS.items())
