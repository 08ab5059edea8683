"""Records by the events that make them, for tests of single rules."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from orchestrator.life import world as w
from orchestrator.life.rules import decide
from provisioning.base import Traits
from runs import events as e
from runs.facts import Inventory, Marker, NodeFacts, NodeStatus, Offer, Tariff
from runs.fold import fold_run
from runs.nodefold import fold_node
from runs.record import NodeRecord, RunRecord, view

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
RUN = "demo-0001"
KEY = f"llmctl-{RUN}-a1-n0"
TARIFF = Tariff(micro_usd_per_hour=36_000_000, granularity_seconds=60)
OFFER = Offer(provider="sim", instance_type="big", region="east", gpu=None, gpus=0, tariff=TARIFF)
OTHER = OFFER.model_copy(update={"region": "west"})


def at(seconds: float) -> datetime:
    """A moment of the story."""
    return T0 + timedelta(seconds=seconds)


def spec(**node: Any) -> dict[str, Any]:
    """The part of a spec that decisions read."""
    return {
        "name": "demo",
        "hardware": {"provider": "sim", "nodes": node.pop("nodes", 1)},
        "checkpoint": {"fetch": node.pop("fetch", "latest")},
        "train": {"processes_per_node": None, "device": "cpu", "global_batch_size": 8},
        "node": {"on_finish": "terminate", "boot_timeout": "30m", "replace": True, "max_restarts": 3, **node},
    }


class Story:
    """What happened so far. Every method commits events at `self.t` seconds, and returns the story."""

    def __init__(
        self,
        *,
        max_micro_usd: int | None = None,
        max_seconds: float | None = None,
        wait: float = 0.0,
        **node: Any,
    ) -> None:
        self.t = 0.0
        self.run: RunRecord | None = None
        self.nodes: dict[str, NodeRecord] = {}
        self.changes: list[tuple[str, e.RunEvent | e.NodeEvent]] = []
        self.tell(e.RunCreated(at=at(0), run=RUN, spec=spec(**node), steps=100, max_micro_usd=max_micro_usd,
                               max_seconds=max_seconds, wait_seconds=wait))  # fmt: skip
        self.tell(e.DriverStarted(at=at(0), epoch=1, pid=1, start_time=0.0, boot_id="b"))

    def tell(self, event: Any, key: str = KEY) -> Story:
        """One event, of the run or of the node `key`."""
        stream = (
            e.run_stream(RUN) if isinstance(event, e.RunEvent.__args__[0].__args__) else e.node_stream(key)
        )  # type: ignore[attr-defined]
        self.changes.append((stream, event))
        if stream.startswith("run:"):
            self.run = fold_run(self.run, event)
        else:
            self.nodes[key] = fold_node(self.nodes.get(key), event)
        return self

    def after(self, seconds: float) -> Story:
        """Time passes."""
        self.t += seconds
        return self

    @property
    def now(self) -> datetime:
        return at(self.t)

    @property
    def record(self) -> RunRecord:
        assert self.run is not None
        return view(self.run, tuple(self.nodes.values()))

    def begun(self, attempt: int = 1, nodes: int = 1, offer: Offer = OFFER) -> Story:
        """An attempt is open."""
        keys = tuple(f"llmctl-{RUN}-a{attempt}-n{index}" for index in range(nodes))
        self.tell(e.OfferChosen(at=self.now, attempt=attempt, offer=offer))
        step = self.record.resume_step
        return self.tell(
            e.AttemptStarted(at=self.now, attempt=attempt, keys=keys, from_step=step, world_size=nodes)
        )

    def intended(self, attempt: int = 1, index: int = 0) -> Story:
        """A launch is intended; its outcome is not known."""
        marker = Marker(run=RUN, attempt=attempt, index=index, lease_end=at(86400))
        intent = e.LaunchIntended(
            at=self.now, key=marker.key, run=RUN, provider="sim", marker=marker, offer=OFFER
        )
        return self.tell(intent, marker.key)

    def launched(self, attempt: int = 1, index: int = 0) -> Story:
        """A node is there and boots."""
        self.intended(attempt, index)
        return self.tell(
            e.LaunchAnswered(at=self.now, id=f"i-{attempt}{index}"), f"llmctl-{RUN}-a{attempt}-n{index}"
        )

    def observed(self, status: NodeStatus = "active", key: str = KEY, **more: Any) -> Story:
        """The provider shows it."""
        return self.tell(e.NodeObserved(at=self.now, status=status, ip="10.0.0.1", **more), key)

    def ready(self, key: str = KEY) -> Story:
        """Active, and a login worked."""
        return self.observed(key=key).tell(e.NodeReady(at=self.now, boot_id="1"), key)

    def prepared(self, key: str = KEY) -> Story:
        """All lanes are done."""
        for lane in ("ready", "data"):
            self.tell(e.LaneDone(at=self.now, key=key, lane=lane, hash="h"))
        return self

    def training(self) -> Story:
        """From nothing to a trainer that runs."""
        self.begun().launched().after(10).ready().after(10).prepared()
        return self.tell(e.TrainerStarted(at=self.now, attempt=1, token=f"{RUN}-a1"))

    def seen(self, step: int, *, here: bool = False) -> Story:
        """A checkpoint was announced; and is on this side."""
        self.tell(e.CheckpointSeen(at=self.now, step=step, sha256=f"s{step}", bytes=10))
        return self.verified(step) if here else self

    def verified(self, step: int, **more: Any) -> Story:
        """A checkpoint is on this side."""
        return self.tell(
            e.CheckpointVerified(at=self.now, step=step, path=f"p{step}", sha256=f"s{step}", bytes=10, **more)
        )

    def ended(self, reason: str) -> Story:
        """The trainer ended."""
        return self.tell(e.TrainerEnded(at=self.now, attempt=1, reason=reason, step=100))

    def stop(self, *, checkpoint: bool = True) -> Story:
        """The user wants the end."""
        return self.tell(e.StopRequested(at=self.now, reason="user", checkpoint=checkpoint))

    def terminated(self, reason: str = "trainer-failed", key: str = KEY, *, accepted: bool = True) -> Story:
        """Its end was asked for."""
        self.tell(e.TerminateIntended(at=self.now, reason=reason), key)
        return self.tell(e.TerminateAnswered(at=self.now, accepted=accepted), key)

    def gone(self, key: str = KEY) -> Story:
        """The provider has it no more."""
        return self.tell(e.NodeGone(at=self.now, evidence="not found"), key)

    def attempt_ended(self, reason: str, attempt: int = 1) -> Story:
        """The attempt is over."""
        return self.tell(e.AttemptEnded(at=self.now, attempt=attempt, reason=reason))

    # ------------------------------------------------------------ what is seen, and what follows

    def facts(
        self, status: NodeStatus = "active", key: str = KEY, node_id: str = "i-10", **more: Any
    ) -> NodeFacts:
        """A node as an inventory shows it."""
        return NodeFacts(id=node_id, name="", key=key, status=status, provider="sim", **more)

    def looks(self, *nodes: NodeFacts, **more: Any) -> w.World:
        """A world whose inventory was read just now."""
        return w.World(inventory=Inventory(at=self.now, nodes=nodes), looked_at=self.now, **more)

    def trains(self, state: Any = "running", *, job: w.Job | None = None, **more: Any) -> w.World:
        """A world in which the first node is healthy and its supervisor says `state`."""
        trainer = w.TrainerView(state, f"{RUN}-a1", self.now, **more)
        return self.looks(self.facts(), trainer=trainer, jobs={"collect": job} if job else {})

    def decide(self, world: w.World | None = None) -> w.Effect | w.Wait | w.Done:
        """What happens next."""
        return decide(self.record, world or w.World(), self.now)


def absences(story: Story, key: str, *ago: float, world: w.World | None = None) -> w.World:
    """A world in which the inventories of `ago` seconds before now did not show `key`."""
    times = tuple(story.now - timedelta(seconds=seconds) for seconds in ago)
    base = world or story.looks()
    return w.World(**{**vars(base), "absent": {key: times}})


def offers(story: Story, *items: Offer) -> w.World:
    """A world whose offers were read just now."""
    return w.World(traits=Traits(), offers=tuple(items), offers_at=story.now, looked_at=story.now)


def streams(story: Story) -> Sequence[tuple[str, e.RunEvent | e.NodeEvent]]:
    """The events of a story with their streams."""
    return story.changes
