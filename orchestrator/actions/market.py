"""`offers`: what can be had now at every configured provider, and with a spec what the run would come to on each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.actions import plan as planning
from orchestrator.errors import Invalid
from provisioning.base import ProviderError
from runs.store import Store

if TYPE_CHECKING:
    from runs.facts import Offer
    from runs.predict import Prediction


@dataclass(frozen=True)
class Line:
    """One instance type, the regions that have it, and what a run would be on it."""

    offer: Offer
    regions: tuple[str, ...]
    predicted: Prediction | None = None

    def document(self) -> dict[str, Any]:
        """As JSON."""
        offer = self.offer
        per_gpu = offer.usd_per_hour / offer.gpus if offer.gpus else None
        shown = {**planning.offer_document(offer), "regions": list(self.regions), "usd_per_gpu_hour": per_gpu}
        return {**shown, "predicted": self.predicted.document()} if self.predicted else shown


@dataclass(frozen=True)
class Listing:
    """What `offers` shows."""

    lines: tuple[Line, ...]
    errors: dict[str, str]
    """Provider → why its offers are not known."""

    def document(self) -> list[dict[str, Any]]:
        """As JSON: a list."""
        return [line.document() for line in self.lines]


def listing(store: Store, spec: Path | None, *, gpu: str | None, everything: bool) -> Listing:
    """The offers, cheapest first; with a spec those of its provider, by the dollars that the run would cost."""
    if gpu is not None:
        from trainer.gpus import parse_request

        try:
            parse_request(gpu)
        except ValueError as error:
            raise Invalid(str(error), "for example --gpu H100:8") from None
    if spec is not None:
        return _for_spec(store, planning.read(spec, []), gpu=gpu, everything=everything)
    from orchestrator.actions import inventory

    found: list[Offer] = []
    errors: dict[str, str] = {}
    for name, opened in inventory.open_all(store):
        try:
            if isinstance(opened, ProviderError):
                raise opened
            found += opened.offers({"gpu": gpu} if gpu else {})
        except ProviderError as error:
            errors[name] = str(error)
    return Listing(tuple(_lines(found, everything=everything)), errors)


def _for_spec(store: Store, spec: Any, *, gpu: str | None, everything: bool) -> Listing:
    from runs import predict

    provider = planning.provider_of(spec, store)
    found = provider.offers(
        {"gpu": gpu} if gpu else {} if provider.traits.rented else planning.hardware(spec)
    )
    data, _ = planning.data_plan(spec, store.home)
    evidence = planning.history(store, provider.name)
    sent = planning.transfer(data, provider.traits.rented, evidence)
    usable = {offer.instance_type for offer in planning.distinct(spec, found)}
    lines = {
        line.offer.instance_type: line for line in _lines(found, everything=everything)
        if line.offer.instance_type in usable
    }  # fmt: skip
    ranked = predict.rank([predict.predict(spec, line.offer, evidence, sent) for line in lines.values()])
    return Listing(
        tuple(Line(item.offer, lines[item.offer.instance_type].regions, item) for item in ranked), {}
    )


def _lines(offers: list[Offer], *, everything: bool) -> list[Line]:
    grouped: dict[tuple[str, str, int], list[Offer]] = {}
    for offer in offers:
        grouped.setdefault((offer.provider, offer.instance_type, offer.tariff.micro_usd_per_hour), []).append(
            offer
        )
    lines = []
    for group in grouped.values():
        free = tuple(sorted({offer.region for offer in group if offer.available}))
        one = next((offer for offer in group if offer.available), group[0])
        if everything or (free and (one.gpus or one.provider in {"local", "ssh"})):
            lines.append(Line(one, free))
    return sorted(lines, key=lambda line: (line.offer.usd_per_hour, line.offer.instance_type))
