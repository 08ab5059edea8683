"""`plan`: from a spec and what can be rented now to a choice and its price. Changes nothing, rents nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import exits
from orchestrator.errors import NoOffer, OverBudget
from orchestrator.figures import count, dollars, duration
from runs.store import Store, default_home

if TYPE_CHECKING:
    from orchestrator.begin import Limits
    from provisioning.base import Provider
    from runs.facts import Offer
    from runs.sections import RunSpec


@dataclass(frozen=True)
class Choice:
    """An offer and what the run would be on it."""

    offer: Offer
    nodes: int
    predicted: dict[str, Any]

    @property
    def usd_per_hour(self) -> float:
        """Dollars an hour of all nodes."""
        return self.offer.usd_per_hour * self.nodes

    def document(self) -> dict[str, Any]:
        """The offer as `plan --json` shows it."""
        offer = self.offer
        return {
            "provider": offer.provider, "instance_type": offer.instance_type, "region": offer.region, "gpu": offer.gpu,
            "gpus": offer.gpus, "nodes": self.nodes, "usd_per_hour": self.usd_per_hour, "available": offer.available,
            "estimated": offer.tariff.estimated,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What would be rented, and what that would come to."""

    spec: RunSpec
    rented: bool
    choices: tuple[Choice, ...]
    """In the order in which they would be tried; those that are sold out included."""
    max_usd: float | None
    warnings: tuple[str, ...] = field(default=())

    @property
    def chosen(self) -> Choice | None:
        """The first that is free; the first at all where none is."""
        free = [choice for choice in self.choices if choice.offer.available]
        return next(iter(free or self.choices), None)

    @property
    def over_usd(self) -> float | None:
        """By how many dollars the prediction exceeds the budget; None where it does not, or nothing is known."""
        cost = self.chosen.predicted.get("cost_usd") if self.chosen else None
        if cost is None or self.max_usd is None or cost <= self.max_usd:
            return None
        return float(cost - self.max_usd)

    @property
    def price_text(self) -> str:
        """The price of the choice in words."""
        if self.chosen is None:
            return "nothing"
        cost = self.chosen.predicted.get("cost_usd")
        about = f"about {dollars(cost)} in all" if cost is not None else "an unknown total"
        limit = f", never more than {dollars(self.max_usd)}" if self.max_usd is not None else ""
        return f"{dollars(self.chosen.usd_per_hour)}/h, {about}{limit}"

    @property
    def exit_code(self) -> int:
        """5 where nothing fits: no offer at all, or over the budget."""
        return exits.NO_OFFER if self.chosen is None or self.over_usd is not None else exits.OK

    def lines(self) -> list[str]:
        """The plan in short."""
        if self.chosen is None:
            return ["no offer fits the spec's hardware"]
        offer, told = self.chosen.offer, self.chosen.predicted
        where = (
            f"{offer.instance_type} in {offer.region}"
            if self.rented
            else f"{offer.instance_type} ({offer.description})"
        )
        lines = [f"plan: {where} at {dollars(self.chosen.usd_per_hour)}/h; {count(told['parameters'])} parameters, "
                 f"{count(self.spec.tokens)} tokens, {self.spec.steps} steps"]  # fmt: skip
        if told.get("cost_usd") is not None:
            hours = (told["training_hours"] + told["overhead_hours"]) * 3600
            lines.append(f"predicted: {duration(hours)} and {dollars(told['cost_usd'])} ({told['basis']})")
        return lines + [f"warning: {text}" for text in self.warnings]

    def document(self) -> dict[str, Any]:
        """`plan --json`."""
        chosen = self.chosen
        rest = [choice for choice in self.choices if choice is not chosen]
        return {
            "offer": chosen.document() if chosen else None,
            "alternatives": [{**choice.document(), "predicted": choice.predicted} for choice in rest],
            "predicted": chosen.predicted if chosen else None,
            "max_usd": self.max_usd,
            "over_budget_usd": self.over_usd,
            "warnings": list(self.warnings),
        }


def read(path: Path, assignments: Sequence[str]) -> RunSpec:
    """The spec of a file with `--set` applied. Raises SpecError."""
    from runs import spec

    return spec.load(path, list(assignments))


def quiet_store() -> Store | None:
    """The store where there is one: planning makes none."""
    home = default_home()
    return Store(home) if (home / "llmctl.db").exists() else None


def provider_of(spec: RunSpec, store: Store | None) -> Provider:
    """The provider that the spec names. Raises ProviderError."""
    from provisioning import open_provider
    from provisioning.base import Home

    home = Home(store.home, store.owner) if store else Home(default_home(), "planning")
    return open_provider(spec.hardware.provider, home, hardware(spec))


def hardware(spec: RunSpec) -> dict[str, object]:
    """The spec's hardware section as providers take it."""
    return dict(spec.hardware.model_dump(mode="json"))


def make(store: Store | None, spec: RunSpec, limits: Limits | None = None) -> Plan:
    """Ask for offers and predict the run on each. Raises ProviderError, ConfigError."""
    provider = provider_of(spec, store)
    offers = provider.offers(hardware(spec))
    limit = limits.max_usd if limits and limits.max_usd is not None else spec.budget.max_usd
    choices = tuple(Choice(offer, spec.hardware.nodes, predict(spec, offer, store)) for offer in offers)
    made = Plan(spec, provider.traits.rented, choices, limit)
    return Plan(spec, provider.traits.rented, choices, limit, tuple(_warnings(made)))


def predict(spec: RunSpec, offer: Offer, store: Store | None) -> dict[str, Any]:
    """What the run would be on that offer."""
    from trainer import flops

    del store, offer
    return {"parameters": flops.parameters(spec.model), "flops_per_token": flops.flops_per_token(spec.model)}


def _warnings(plan: Plan) -> list[str]:
    said = []
    chosen = plan.chosen
    if chosen is not None and not chosen.offer.available:
        said.append("nothing of this is free now; `--wait 6h` waits for capacity")
    if chosen is not None and chosen.offer.tariff.estimated:
        said.append("the price is from a dated list, not from the provider just now")
    if chosen is not None and chosen.predicted.get("fits") is False:
        said.append("the model does not fit into the GPU's memory, even with a microbatch of one")
    return said


def refuse(plan: Plan) -> None:
    """Raise where launching could only lose money: nothing fits the spec, or the run cannot fit the budget."""
    if plan.chosen is None:
        raise NoOffer(
            f"no offer of {plan.spec.hardware.provider} fits the spec's hardware section",
            "`llmctl offers --all` shows what there is",
        )
    over = plan.over_usd
    if over is not None and plan.max_usd is not None:
        raise OverBudget(
            f"predicted to cost {dollars(plan.max_usd + over)}, which is {dollars(over)} over the limit of {dollars(plan.max_usd)}",
            "train fewer tokens, take a cheaper offer (`llmctl offers SPEC`), or raise budget.max_usd or --max-usd",
        )
