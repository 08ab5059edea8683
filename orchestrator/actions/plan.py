"""`plan` and `offers`: from a spec and what can be rented now to a choice and its price. Rents nothing, creates no run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import exits
from orchestrator.errors import NoOffer, NoSuchRun, OverBudget
from orchestrator.figures import count, dollars, duration
from runs.store import Store, default_home

if TYPE_CHECKING:
    from orchestrator.actions.limits import Limits
    from orchestrator.data.sources import DataPlan
    from provisioning.base import Provider
    from runs.facts import Offer
    from runs.history import Past
    from runs.predict import Prediction, Transfer, Verdict
    from runs.record import NodeRecord, RunRecord
    from runs.sections import RunSpec

TELLING_BYTES = 5_000_000
"""So much must have been sent for its speed to say something about the uplink."""
PAST_RUNS = 200
"""Earlier runs of the provider that a prediction looks at, the newest."""


UNGUARDED = (
    "the limits hold while a driver lives here: if this machine sleeps or is off, nothing ends the node."
    " `llmctl reap --yes` as a cron job elsewhere does, or node.self_terminate: true"
)


@dataclass(frozen=True)
class Plan:
    """What would be rented, and what that would come to."""

    spec: RunSpec
    rented: bool
    chosen: Prediction | None
    """The first offer of the spec's hardware section that is free; the first at all where none is."""
    others: tuple[Prediction, ...]
    """Every other offer on which the run could be made, cheapest first."""
    verdict: Verdict
    max_usd: float | None
    max_hours: float | None
    data: DataPlan | None = None
    transfer: Transfer | None = None
    warnings: tuple[str, ...] = field(default=())
    on: NodeRecord | None = None
    """The kept node that the run takes over."""

    @property
    def question(self) -> str:
        """What is asked before money is spent."""
        return (
            f"Rent it, for {self.price_text}?"
            if self.on is None
            else f"Use {self.on.key}, for {self.price_text}?"
        )

    @property
    def nodes(self) -> int:
        """Nodes of the run."""
        return self.spec.hardware.nodes

    @property
    def exit_code(self) -> int:
        """5 where nothing fits: no offer at all, or over the budget."""
        return exits.NO_OFFER if self.chosen is None or self.verdict.refused else exits.OK

    @property
    def trades(self) -> list[str]:
        """What a cheaper and a faster offer that are free would change, in words."""
        from runs import predict

        free = [item for item in self.others if item.offer.available and item.fits is not False]
        return predict.trades(self.chosen, free) if self.chosen else []

    @property
    def price_text(self) -> str:
        """The price of the choice in words."""
        if self.chosen is None:
            return "nothing"
        cost = self.chosen.cost_usd
        about = f"about {dollars(cost)} in all" if cost is not None else "an unknown total"
        limit = f", never more than {dollars(self.max_usd)}" if self.max_usd is not None else ""
        return f"{dollars(self.chosen.offer.usd_per_hour * self.nodes)}/h, {about}{limit}"

    def lines(self) -> list[str]:
        """The plan in short."""
        if self.chosen is None:
            return [f"no offer of {self.spec.hardware.provider} fits the spec's hardware section"]
        offer, told = self.chosen.offer, self.chosen
        where = f"{offer.instance_type} {place(offer) if self.rented else f'({offer.description})'}"
        nodes = f"{self.nodes} × " if self.nodes > 1 else ""
        work = (
            f"{count(self.spec.tokens)} tokens in {self.spec.steps} steps"
            if self.spec.tokens
            else "no training"
        )
        size = f"{count(told.parameters)} parameters, {work}"
        lines = [f"plan: {nodes}{where} at {dollars(offer.usd_per_hour * self.nodes)}/h; {size}"]
        if told.hours is not None:
            error = f" ± {told.error:.0%}" if told.error is not None else ""
            lines.append(
                f"predicted: {duration(told.hours * 3600)} and {dollars(told.cost_usd)}{error}, from {told.basis}"
            )
        return lines + [f"warning: {text}" for text in self.warnings]

    def document(self) -> dict[str, Any]:
        """`plan --json`."""
        chosen = self.chosen
        return {
            "offer": offer_document(chosen.offer, self.nodes) if chosen else None,
            "alternatives": [
                {**offer_document(item.offer, self.nodes), "predicted": item.document()}
                for item in self.others
            ],
            "predicted": chosen.document() if chosen else None,
            "max_usd": self.max_usd,
            "max_hours": self.max_hours,
            "fits_budget": not self.verdict.refused,
            "bytes_to_send": self.data.local_bytes if self.data else None,
            "warnings": list(self.warnings),
        }


def offer_document(offer: Offer, nodes: int = 1) -> dict[str, Any]:
    """An offer as JSON."""
    return {
        "provider": offer.provider, "instance_type": offer.instance_type, "region": offer.region, "gpu": offer.gpu,
        "gpus": offer.gpus, "nodes": nodes, "usd_per_hour": offer.usd_per_hour * nodes, "available": offer.available,
        "estimated": offer.tariff.estimated,
    }  # fmt: skip


def place(offer: Offer) -> str:
    """Where it is, in words."""
    return f"in {offer.region}" if offer.region else "(sold out everywhere)"


# ---------------------------------------------------------------- reading


def read(path: Path, assignments: Sequence[str]) -> RunSpec:
    """The spec of a file with `--set` applied. Raises SpecError."""
    from runs import spec

    return spec.load(path, list(assignments))


def quiet_store() -> Store | None:
    """The store where there is one: planning makes none."""
    home = default_home()
    return Store(home) if (home / "llmctl.db").exists() else None


def provider_of(spec: RunSpec, store: Store | None) -> Provider:
    """The provider that the spec names. Raises ProviderError, KeyFileError for a key that cannot log in."""
    from provisioning import keys, open_provider
    from provisioning.base import Home

    home = Home(store.home, store.owner) if store else Home(default_home(), "planning")
    section = {**hardware(spec), "self_terminate": spec.node.self_terminate}
    if identity := section.get("identity_file"):
        keys.public_key(Path(str(identity)))
    return open_provider(spec.hardware.provider, home, section)


def hardware(spec: RunSpec) -> dict[str, object]:
    """The spec's hardware section as providers take it."""
    from orchestrator.life import terms

    return terms.hardware(spec.to_dict())


def history(store: Store | None, provider: str) -> list[Past]:
    """What earlier runs at the provider measured, oldest first."""
    from runs import charges
    from runs.history import past
    from runs.store import utcnow

    if store is None:
        return []
    rows = [row for row in store.summaries() if row["provider"] == provider and row["tokens_per_second"]]
    found = []
    for row in reversed(rows[:PAST_RUNS]):
        record = store.record(row["run"])
        if record is not None:
            seconds = charges.totals(record, record.ended_at or utcnow()).seconds_by_phase
            item = past({**row, "seconds_by_phase": seconds, "uplink": _uplink(record)}, record.spec)
            found += [item] if item is not None else []
    return found


def _uplink(record: RunRecord) -> float | None:
    """Bytes a second at which a run's data left this machine; None where it sent too little to tell."""
    lanes = [
        lane for attempt in record.attempts for name, lane in attempt.lanes.items() if name.endswith("/data")
    ]
    sent = [lane for lane in lanes if lane.sent_bytes >= TELLING_BYTES and lane.seconds > 0]
    return sent[-1].sent_bytes / sent[-1].seconds if sent else None


def completed(store: Store | None, spec: RunSpec) -> RunSpec:
    """The spec, with what follows from its base where it has `tune`; a run's checkpoint is fetched if it is not here.

    Raises DataError, Invalid, NoSuchRun, NothingToFetch, SpecError.
    """
    if spec.tune is None:
        return spec
    from orchestrator.actions import named
    from orchestrator.data import bases, needed

    if store is None and not named.is_path(spec.tune.base):
        raise NoSuchRun(spec.tune.base)
    found = named.find(store, spec.tune.base) if store is not None else None
    asked = spec.tune.tokenizer if spec.tune.method == "evaluate" else spec.tune.data.tokenizer
    path = found.path if found is not None else spec.tune.base
    base = bases.look(path, asked or (found.tokenizer if found is not None else None))
    home = store.home if store else default_home()
    run, step = (found.run, found.step) if found is not None else (None, None)
    return needed.complete(spec, base, home / "cache", run=run, step=step)


def data_plan(spec: RunSpec, home: Path) -> tuple[DataPlan | None, list[str]]:
    """The files that the run reads, as far as that can be said without the network; and what could not be looked at.

    Raises DataError for data that cannot serve.
    """
    from orchestrator.data import needed
    from orchestrator.data.errors import Offline
    from orchestrator.progress import bar

    try:
        with bar() as progress:
            data = needed.files(spec, home / "cache", pinned=False, progress=progress)
    except Offline as error:
        return None, [f"the data could not be looked at: {error}"]
    return data, list(data.warnings)


# ---------------------------------------------------------------- planning


def make(
    store: Store | None, spec: RunSpec, limits: Limits | None = None, on: NodeRecord | None = None
) -> Plan:
    """Ask for offers and predict the run on each; with `on`, on that kept node. Raises ProviderError, ConfigError,
    DataError, and what `kept.check` raises."""
    from runs import predict

    provider = provider_of(spec, store)
    spec = completed(store, spec)
    wanted = provider.offers(hardware(spec))
    if on is not None:
        from orchestrator.actions import kept

        kept.check(provider, spec, on, wanted)
        wanted = [on.offer.model_copy(update={"available": True})]
    data, warnings = data_plan(spec, store.home if store else default_home())
    evidence = history(store, spec.hardware.provider)
    sent = transfer(data, provider.traits.rented, evidence)
    free = [offer for offer in wanted if offer.available]
    choice = next(iter(free or wanted), None)
    chosen = predict.predict(spec, choice, evidence, sent) if choice is not None else None
    everything = [*wanted, *(provider.offers({}) if provider.traits.rented else [])]
    others = [predict.predict(spec, offer, evidence, sent) for offer in distinct(spec, everything, choice)]
    limit = limits.max_usd if limits and limits.max_usd is not None else spec.budget.max_usd
    verdict = (
        predict.verdict(chosen, limit, spec.budget.max_hours) if chosen else predict.Verdict(refused=True)
    )
    lease = [UNGUARDED if provider.traits.unguarded else "", provider.traits.risk]
    said = (*dict.fromkeys(warnings), *_warnings(chosen), *filter(None, lease), *verdict.reasons)
    return Plan(spec, provider.traits.rented, chosen, tuple(predict.rank(others)), verdict, limit, spec.budget.max_hours,
                data, sent, said, on)  # fmt: skip


def distinct(spec: RunSpec, offers: Iterable[Offer], besides: Offer | None = None) -> list[Offer]:
    """One offer of each instance type on which the run could be made, a free one before one that is sold out."""
    from runs import predict

    found: dict[str, Offer] = {}
    for offer in predict.fitting(spec, list(offers)):
        if spec.train.device == "cuda" and not offer.gpus:
            continue
        if besides is not None and offer.instance_type == besides.instance_type:
            continue
        if offer.instance_type not in found or (offer.available and not found[offer.instance_type].available):
            found[offer.instance_type] = offer
    return list(found.values())


def transfer(data: DataPlan | None, rented: bool, evidence: Sequence[Past] = ()) -> Transfer:
    """What this machine sends, and how fast: as the newest run that sent enough to tell did."""
    from runs.predict import Transfer

    # To a node on this machine or in this room bytes cost next to nothing; 20 Mbit/s is a home's uplink.
    usual = 2.5e6 if rented else 200e6
    measured = next((item.uplink for item in reversed(evidence) if item.uplink), None)
    speed = measured or usual
    if data is None:
        return Transfer(bytes_per_second=speed, measured=measured is not None)
    first = sum(
        item.bytes or 0 for item in data.shards if item.node_name in data.first and item.path is not None
    )
    return Transfer(data.local_bytes, first, speed, measured is not None)


def _warnings(chosen: Prediction | None) -> list[str]:
    if chosen is None:
        return []
    said = []
    if not chosen.offer.available:
        said.append("nothing of this is free now; `--wait 6h` waits for capacity")
    if chosen.offer.tariff.estimated:
        said.append("the price is from a dated list, not from the provider just now")
    if chosen.fits is False:
        said.append("the model is predicted not to fit into the GPU's memory")
    return said


def refuse(plan: Plan) -> None:
    """Raise where launching could only lose money: nothing fits the spec, or the run cannot fit the budget."""
    if plan.chosen is None:
        raise NoOffer(
            f"no offer of {plan.spec.hardware.provider} fits the spec's hardware section",
            "`llmctl offers --all` shows what there is",
        )
    if plan.verdict.refused:
        raise OverBudget(
            "the run will not fit its budget: " + "; ".join(plan.verdict.reasons),
            "train fewer tokens, take a cheaper offer (`llmctl offers SPEC`), or raise budget.max_usd or --max-usd",
        )
