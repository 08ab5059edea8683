"""The report is one file: what it shows is in it, and nothing in it asks for anything else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from runs import events as e
from runs import report
from runs.curves import at as reading
from runs.curves import curve
from tests.seeds import Seed, at


def island(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    value: dict[str, object] = json.loads(found[1])
    return value


def test_the_page_holds_every_run_and_asks_for_nothing(tmp_path: Path) -> None:
    seed = Seed(tmp_path).finished().logged()
    Seed(tmp_path, "other-0002").driven().ended("failed", "no-capacity")
    page = report.html(seed.store, now=at(1000))
    data = island(page)
    assert [item["run"] for item in data["runs"]] == ["demo-0001", "other-0002"]  # type: ignore[index,union-attr,attr-defined]
    one = data["runs"][0]  # type: ignore[index]
    assert one["phases"]["training"] == {"usd": 2.0, "seconds": 200.0}
    assert len(one["curves"]["training"]["loss"]) == 100
    assert {"steps", "tokens", "hours", "dollars", "loss"} == set(one["curves"]["training"])
    assert any(row["source"] == "published" for row in data["rows"])  # type: ignore[union-attr,attr-defined]
    without = page
    for name in (
        report.CHARTS
    ):  # a library with loaders that nobody calls; the page's policy and the browser test see to that
        without = without.replace((Path(report.__file__).parent / "page" / "vendor" / name).read_text(), "")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", without)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", without)
    assert "default-src 'none'" in page


def test_text_of_a_run_never_becomes_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028"
    seed = Seed(tmp_path).finished()
    seed.tell(
        e.EvaluationRecorded(at=at(250), name="sample 0", step=100, result={"prompt": evil, "text": evil})
    )
    page = report.html(seed.store)
    assert page.count("</script>") == 3
    assert "<img" not in page and "\u2028" not in page
    assert evil in str(island(page)["runs"][0]["evaluations"][0]["text"])  # type: ignore[index]


def test_losses_that_are_no_numbers_are_null_and_not_zero(tmp_path: Path) -> None:
    seed = Seed(tmp_path).rented().trained(loss=None, train_loss=None, validation_loss=None)
    (seed.directory / "metrics.jsonl").write_text(
        '{"kind": "step", "step": 1, "tokens": 1, "time": 1, "loss": NaN, "step_seconds": 1.0}\nbroken\n'
    )
    data = island(report.html(seed.store, published=False))
    (row,) = data["rows"]  # type: ignore[misc]
    assert row["validation_loss"] is None and row["train_loss"] is None
    assert data["runs"][0]["curves"]["training"]["loss"] == []  # type: ignore[index]


def test_no_runs_make_a_page_too(tmp_path: Path) -> None:
    from runs.store import Store

    assert island(report.html(Store(tmp_path), published=False))["rows"] == []


def test_a_curve_over_dollars_ends_at_the_bill_of_its_last_step(tmp_path: Path) -> None:
    seed = Seed(tmp_path).finished().logged()
    spent, losses = curve(seed.store, seed.run, "dollars")
    assert spent == sorted(spent) and len(spent) == len(losses) == 100
    assert spent[-1] == pytest.approx(0.01 * 240, abs=0.02), (
        "step 100 is at second 250, 240 billed at a cent a second"
    )
    hours, _ = curve(seed.store, seed.run, "hours")
    assert hours[-1] == pytest.approx(240 / 3600, abs=1e-3)
    with pytest.raises(KeyError):
        curve(seed.store, seed.run, "miles")


def test_a_meter_is_read_between_its_marks() -> None:
    marks = [(0.0, 0.0), (10.0, 1.0), (20.0, 1.0), (30.0, 3.0)]
    assert reading(marks, [-5, 0, 5, 15, 25, 40]) == [0.0, 0.0, 0.5, 1.0, 2.0, 3.0]
    assert reading([], [1, 2]) == [0.0, 0.0]
