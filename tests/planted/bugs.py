"""The bugs: what is changed where, and which tests must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """`edits` are (file, old text, new text); each of `seen_by` must fail: `simulation`, or a file of tests."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    seen_by: tuple[str, ...]


LIFE, EFFECTS, VERDICT = (
    "orchestrator/life/rules.py",
    "orchestrator/life/effects.py",
    "orchestrator/life/verdict.py",
)
WORLD, TERMS = "orchestrator/life/world.py", "orchestrator/life/terms.py"
FOLD, NODEFOLD, CHARGES = "runs/fold.py", "runs/nodefold.py", "runs/charges.py"
STORE, LOCK, RECORD = "runs/store.py", "runs/lock.py", "runs/record.py"
TEST_LIFE, TEST_EFFECTS = "tests/unit/test_life.py", "tests/unit/test_effects.py"
TEST_CLAIMS = "tests/unit/test_claims.py"

BUGS = (
    Bug(
        "the call comes before the intent",
        (
            (
                EFFECTS,
                "        stream = e.node_stream(marker.key)\n",
                ("        stream = e.node_stream(marker.key)\n"
                "        early = self.provider.launch(self.request(marker, effect.offer))\n"),
            ),
            (EFFECTS, "            node_id = self.provider.launch(request)\n", "            node_id = early\n"),
        ),
        ("simulation", TEST_EFFECTS),
    ),
    Bug(
        "a launch without an answer is sent again",
        (
            (
                EFFECTS,
                'outcome = e.LaunchAmbiguous(at=self.clock.now(), message=f"{error.code}: {error}")',
                "outcome = e.LaunchAnswered(at=self.clock.now(), id=self.provider.launch(request))",
            ),
        ),
        ("simulation",),
    ),
    Bug(
        "the driver of the run that kept a node goes on ending it",
        ((STORE, "            if writer is not None and writer != node.run:\n", "            if False:\n"),),
        ("tests/simulation/test_simulation.py::test_a_claim_at_every_place", TEST_CLAIMS),
    ),
    Bug(
        "each run of a node pays from the node's first moment",
        ((CHARGES, "        micro_usd=spent[turn + 1] - spent[turn],\n", "        micro_usd=spent[turn + 1],\n"),),
        ("simulation", TEST_CLAIMS),
    ),
    Bug(
        "an accepted termination is taken for the end",
        (
            (
                EFFECTS,
                "answer = e.TerminateAnswered(at=clock.now(), accepted=True)",
                'answer = e.NodeGone(at=clock.now(), evidence="accepted")',
            ),
        ),
        ("simulation", TEST_EFFECTS),
    ),
    Bug(
        "one look is enough to give an intent up",
        (
            (
                WORLD,
                "len(times) >= max(1, self.traits.looks) and times[-1] - since >= enough",
                "len(times) >= 1",
            ),
        ),
        ("simulation", TEST_LIFE),
    ),
    Bug(
        "a node that is missing from one list is gone",
        (
            (
                LIFE,
                "        again = tried + backoff(",
                '        if found is None:\n            return w.DeclareGone(node.key, "not listed")\n        again = tried + backoff(',
            ),
        ),
        (TEST_LIFE,),
    ),
    Bug(
        "a young node that is not found is gone",
        ((EFFECTS, "if not (young and node.status is None):", "if node is not None:"),),
        ("simulation", TEST_EFFECTS),
    ),
    Bug(
        "a superseded driver may write",
        ((STORE, "                if newest > epoch:", "                if newest > epoch + 10**9:"),),
        ("simulation", "tests/unit/test_store.py"),
    ),
    Bug(
        "a late arrival is left alone",
        ((LIFE, "        if since is None:\n", "        if since is None or node.gone_at is None:\n"),),
        ("simulation", TEST_LIFE),
    ),
    Bug(
        "an abandoned name is used again",
        ((VERDICT, "for item in run.attempts), default=0) + 1", "for item in run.attempts), default=1)"),),
        (TEST_LIFE,),
    ),
    Bug(
        "release does not wait for the collection",
        ((LIFE, 'if here and job is not None and job.state == "done":', "if job is None or here:"),),
        ("simulation", TEST_LIFE),
    ),
    Bug(
        "a collection of an earlier attempt is believed",
        ((LIFE, "        job = None  # an earlier attempt's", "        pass"),),
        (TEST_LIFE,),
    ),
    Bug(
        "a stop is ignored while the node boots",
        (
            (
                LIFE,
                "if attempt.token is None and (run.stop is not None or run.cancelled):",
                "if attempt.token is None and run.cancelled:",
            ),
        ),
        ("simulation", TEST_LIFE),
    ),
    Bug(
        "the budget is not looked at",
        (
            (
                TERMS,
                "    if run.max_micro_usd:\n",
                "    if run.max_micro_usd and run.max_micro_usd > 10**15:\n",
            ),
        ),
        ("simulation", TEST_LIFE),
    ),
    Bug(
        "a kept node is kept for ever",
        ((LIFE, "(node.kept_until is not None and now >= node.kept_until)", "node.kept_until == now"),),
        ("simulation", TEST_LIFE),
    ),
    Bug(
        "a run that is asked to stop keeps its node all the same",
        ((RECORD, "return node.kept and self.stop is None and", "return node.kept and"),),
        ("tests/simulation/test_simulation.py::test_a_stop_at_every_place", TEST_LIFE),
    ),
    Bug(
        "nobody looks at a node that trains",
        ((LIFE, "        yield _watch(run, world, now)\n", ""),),
        ("simulation", TEST_LIFE),
    ),
    Bug(
        "a dead trainer is started for ever, and at once",
        (
            (LIFE, "    if attempt.starts > MAX_STARTS:", "    if attempt.starts > 10**9:"),
            (LIFE, "return w.StartTrainer(token, end) if left <= 0 else", "return w.StartTrainer(token, end) if left < 10**9 else"),
        ),
        (TEST_LIFE,),
    ),
    Bug(
        "the bill ends when the node was seen to be gone",
        ((CHARGES, "end = accepted or node.gone_at", "end = node.gone_at"),),
        ("tests/unit/test_charges.py",),
    ),
    Bug(
        "the bill begins when the node was seen to be active, however long nobody looked",
        ((CHARGES, "start = node.active_not_before or node.active_at", "start = node.active_at"),),
        ("simulation", "tests/unit/test_charges.py"),
    ),
    Bug(
        "an acceptance that led to nothing ends the bill",
        (
            (
                NODEFOLD,
                'believed = node.terminate_accepted_at if node.status == "terminating" else None',
                "believed = node.terminate_accepted_at",
            ),
        ),
        ("tests/unit/test_charges.py",),  # in the simulation it is seen running after that, which is enough for the bill
    ),
    Bug(
        "a node that ran on after its accepted end bills until it was last seen running",
        ((CHARGES, "accepted = node.running_until", "accepted = node.running_at"),),
        ("tests/unit/test_charges.py",),
    ),
    Bug(
        "a bill whose end nobody saw is the whole truth",
        ((CHARGES, "return end, _seen_until(node, end)", "return end, True"),),
        ("tests/unit/test_charges.py",),
    ),
    Bug(
        "what its node has let go is waited for",
        ((LIFE, "if finished or item.gone else item.fetched", "if finished else item.fetched"),),
        (TEST_LIFE,),
    ),
    Bug(
        "each phase is rounded by itself",
        (
            (
                CHARGES,
                "micro_usd=until - spent))",
                "micro_usd=price((end - start).total_seconds(), rate)))",
            ),
        ),
        ("simulation", "tests/unit/test_charges.py"),
    ),
    Bug(
        "a second resume takes the stop back",
        ((FOLD, '    if run.outcome in {None, "succeeded"}:', '    if run.outcome == "succeeded":'),),
        ("tests/unit/test_fold.py",),
    ),
    Bug(
        "a checkpoint that was made again is forgotten here",
        ((FOLD, "    if old is not None and old.fetched and not same:", "    if old is not None and not old:"),),
        ("tests/unit/test_fold.py",),
    ),
    Bug(
        "a row is not what its events make of it",
        ((STORE, "            runs[run] = fold_run(before, event)", "            runs[run] = before or fold_run(before, event)"),),
        ("simulation", "tests/unit/test_store.py"),
    ),
    Bug(
        "a failed commit leaves half of itself",
        ((STORE, '        self._db.execute(f"BEGIN {kind}")\n', ""), (STORE, '            self._db.execute("COMMIT")\n', "")),
        ("tests/unit/test_store.py",),
    ),
    Bug(
        "any process with that pid is the old driver",
        ((LOCK, "abs(process.create_time() - self.start_time) < 1.0", "process.pid == self.pid"),),
        ("tests/unit/test_lock.py",),
    ),
)  # fmt: skip
