"""docs/reliability.md, from the outcomes of the cases."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime

from tests.faults.audit import COLUMNS
from tests.faults.harness import Outcome
from tests.faults.kinds import KINDS, SKIPPED

_HEAD = """# What llmctl survives

Written by `python -m tests.faults` (`make faults`). Each case is a tiny run ({steps} steps, two processes of torchrun on the CPU) through the real CLI: a
Lambda-shaped server of its own, nodes that are real SSH machines, one kind of fault at a seeded moment, then `llmctl resume`
(or whatever command was running). What a case ends with is compared with the server's own ledger, with the files on the node, and
with the same run undisturbed.

- *instances leaked*: the server bills on, or a process of driver, node or trainer outlives the case;
- *launches doubled*: two instances of one name, or one that no intent names;
- *calls without an intent on disk*: at each launch and terminate, as the server sees the request, the files of the database are copied and the
  copy is opened: the intent must be its last word about that node;
- *checkpoints lost*: one that was verified is not whole, the newest is not here, or a completed run ends with other weights than the
  undisturbed one, bit for bit;
- *lines lost or doubled*: the mirrored log and metrics are not the node's bytes, a step is missing or twice, or a loss differs from
  the undisturbed run's;
- *dollars wrong*: `show` and the ledger differ by more than one billing minute a node, or the charges do not add up to the cost;
- *wrong exit code*: not the one that the outcome has in the list of codes; *other*: anything else, such as rows of the store that are not
  the fold of its events.
"""


def report(outcomes: Sequence[Outcome], simulated: str) -> str:
    """The page."""
    from tests.faults.harness import STEPS

    names = list(COLUMNS)
    lines = [
        _HEAD.format(steps=STEPS),
        "| fault | times | " + " | ".join(COLUMNS[name] for name in names) + " |",
    ]
    lines.append("|---|" + "---:|" * (len(names) + 1))
    for kind in KINDS.values():
        mine = [outcome for outcome in outcomes if outcome.kind == kind.name]
        counts = " | ".join(str(_cases(mine, name)) for name in names)
        lines.append(f"| {kind.words} | {sum(outcome.injected for outcome in mine)} | {counts} |")
    total = " | ".join(f"**{_cases(outcomes, name)}**" for name in names)
    lines.append(f"| **all** | **{sum(outcome.injected for outcome in outcomes)}** | {total} |")
    lines += ["", *_facts(outcomes), "", "## The simulation", "", simulated, "", *_wrong(outcomes)]
    lines += ["## Not injected here", "", *(f"- {what}: {why}." for what, why in SKIPPED.items()), ""]
    return "\n".join(lines)


def _cases(outcomes: Sequence[Outcome], column: str) -> int:
    return sum(len(outcome.found.get(column, [])) for outcome in outcomes)


def _facts(outcomes: Sequence[Outcome]) -> list[str]:
    seeds = sorted({outcome.seed for outcome in outcomes})
    checked = sum(outcome.announced for outcome in outcomes)
    text = (
        f"{len(outcomes)} cases of {len({outcome.kind for outcome in outcomes})} kinds from the seeds {', '.join(map(str, seeds))}; "
        f"{checked} launches and terminations were found announced in the copied database. "
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"{sum(outcome.seconds for outcome in outcomes) / 60:.0f} minutes of cases."
    )
    return [
        text,
        "",
        "`python -m tests.faults --only KIND:SEED` repeats one case; the kinds are the functions of `tests/faults/here.py` and `there.py`. A seed fixes the",
        "choices and the moments in steps and seconds; what the machine is doing at such a moment it cannot fix.",
    ]


def _wrong(outcomes: Sequence[Outcome]) -> list[str]:
    """What went wrong, case by case."""
    wrong = [
        f"- `{outcome.kind}:{outcome.seed}`: {COLUMNS[column]}: {sentence.splitlines()[0]}"
        for outcome in outcomes
        for column, found in outcome.found.items()
        for sentence in found
    ]
    return ["## What went wrong", "", *wrong, ""] if wrong else []
