"""`launch --dry-run`: the plan, the first effects that the driver would choose, the provider's request with its secrets
blanked, and the bytes to send. The same `decide` as the driver's, on a record that is never stored."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from orchestrator.actions import kept
from orchestrator.actions import plan as planning
from orchestrator.clock import SystemClock
from orchestrator.life import world as w
from orchestrator.life.rules import decide
from runs import events as e
from runs.facts import Offer
from runs.fold import fold_all
from runs.nodefold import fold_node
from runs.record import view
from runs.rows import MICRO
from runs.store import Store, default_home

if TYPE_CHECKING:
    from orchestrator.actions.limits import Limits
    from provisioning.base import Provider
    from runs.record import RunRecord
    from runs.sections import RunSpec

REHEARSED = "rehearsal"


@dataclass(frozen=True)
class Rehearsal:
    """What `launch` would do first."""

    plan: planning.Plan
    effects: tuple[dict[str, Any], ...]
    request: dict[str, Any] | None
    """What the provider would be sent, secrets replaced."""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        data = self.plan.data
        return {
            "plan": self.plan.document(),
            "effects": list(self.effects),
            "request": self.request,
            "bytes_to_send": data.local_bytes if data else None,
            "bytes_the_node_fetches": data.remote_bytes if data else None,
            "files": [
                {
                    "name": item.node_name,
                    "bytes": item.bytes,
                    "path": str(item.path) if item.path else None,
                    "url": item.url,
                }
                for item in (data.shards if data else [])
            ],
        }


def rehearse(spec: RunSpec, limits: Limits, on: str | None = None) -> Rehearsal:
    """Plan, and ask `decide` what it would do with a fresh run and the offers of this moment. Changes nothing."""
    store = planning.quiet_store()
    node = kept.find(store or Store(default_home()), on) if on is not None else None
    plan = planning.make(store, spec, limits, node)
    spec = plan.spec
    provider = planning.provider_of(spec, store)
    now = SystemClock().now()
    run = fold_all([_created(spec, limits, now, node.key if node else None), *_started(now)])
    assert run is not None
    run = view(run, (node,)) if node is not None else run
    offers = tuple(provider.offers(planning.hardware(spec)))
    effects, launch = first_effects(run, w.World(traits=provider.traits, offers=offers, offers_at=now), now)
    request = _request(provider, launch, run, store) if launch is not None else None
    return Rehearsal(plan, tuple(plain(effect) for effect in effects), request)


def _created(spec: RunSpec, limits: Limits, now: datetime, on: str | None = None) -> e.RunCreated:
    limit = limits.max_usd if limits.max_usd is not None else spec.budget.max_usd
    return e.RunCreated(
        at=now, run=f"{spec.name}-0000", spec=spec.to_dict(), steps=spec.steps,
        max_micro_usd=round(limit * MICRO) if limit is not None else None,
        max_seconds=spec.budget.max_hours * 3600 if spec.budget.max_hours is not None else None,
        wait_seconds=limits.wait_seconds, on=on,
    )  # fmt: skip


def _started(now: datetime) -> list[e.RunEvent]:
    return [e.DriverStarted(at=now, epoch=1, pid=1, start_time=0.0, boot_id=REHEARSED)]


def first_effects(run: RunRecord, world: w.World, now: datetime) -> tuple[list[w.Effect], w.Launch | None]:
    """What `decide` chooses, each effect imagined to have worked, up to the launch of every node of the first attempt."""
    effects: list[w.Effect] = []
    launch: w.Launch | None = None
    for _ in range(100):
        answer = decide(run, world, now)
        if isinstance(answer, w.Wait | w.Done):
            break
        effects.append(answer)
        if isinstance(answer, w.BeginAttempt):
            run = _begun(run, answer, now)
        elif isinstance(answer, w.Launch):
            launch = launch or answer
            run = _launched(run, answer, now)
        else:
            break
    return effects, launch


def _begun(run: RunRecord, effect: w.BeginAttempt, now: datetime) -> RunRecord:
    from runs.fold import fold_run

    run = fold_run(run, e.OfferChosen(at=now, attempt=effect.attempt, offer=effect.offer))
    started = e.AttemptStarted(at=now, attempt=effect.attempt, keys=effect.keys, from_step=effect.from_step,
                               world_size=effect.world_size)  # fmt: skip
    return fold_run(run, started)


def _launched(run: RunRecord, effect: w.Launch, now: datetime) -> RunRecord:
    from runs.facts import Marker, lease_minutes

    marker = Marker(
        run=run.run, attempt=effect.attempt, index=effect.index, lease_end=lease_minutes(effect.lease_end)
    )
    intended = e.LaunchIntended(
        at=now, key=marker.key, run=run.run, provider=run.provider, marker=marker, offer=effect.offer
    )
    node = fold_node(fold_node(None, intended), e.LaunchAnswered(at=now, id=REHEARSED))
    return view(run, (*run.nodes, node))


def _request(provider: Provider, launch: w.Launch, run: RunRecord, store: Store | None) -> dict[str, Any]:
    """The request as it would be sent; with placeholders for the keys, which are made at launch."""
    from provisioning.base import LaunchRequest
    from runs.facts import Marker, lease_minutes

    marker = Marker(
        run=run.run, attempt=launch.attempt, index=launch.index, lease_end=lease_minutes(launch.lease_end)
    )
    request = LaunchRequest(
        marker=marker, offer=launch.offer, owner=store.owner if store else f"(made by the first launch in {default_home()})",
        public_key="(this home's public key)", host_private_key="(made at launch)", host_public_key="(made at launch)",
        options=dict(run.spec["hardware"]),
    )  # fmt: skip
    return dict(provider.redacted(request))


def plain(value: Any) -> Any:
    """Effects and offers as plain JSON values."""
    from dataclasses import asdict, is_dataclass

    if is_dataclass(value) and not isinstance(value, type):
        return {"effect": type(value).__name__, **{name: plain(item) for name, item in asdict(value).items()}}
    if isinstance(value, Offer):
        return value.model_dump(mode="json")
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value
