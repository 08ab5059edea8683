"""The report is one file: what it shows is in it, and nothing in it asks for anything else."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
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
    without = page.replace("http://www.w3.org/2000/svg", "")
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
    assert page.count("</script>") == 2
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


FAKE_PAGE = """
const listeners = [];
class Node {
  constructor(name) { this.name = name; this.tagName = name.toUpperCase(); this.children = []; this.attributes = {}; this.on = {}; this.value = ""; }
  append(...items) { this.children.push(...items); }
  replaceChildren(...items) { this.children = items; }
  setAttribute(key, value) { this.attributes[key] = String(value); }
  addEventListener(name, act) { this.on[name] = act; }
  scrollIntoView() {}
}
const byId = {};
globalThis.document = {
  createElement: (name) => new Node(name), createElementNS: (_, name) => new Node(name),
  getElementById: (id) => (byId[id] ??= new Node("div")),
};
globalThis.window = { addEventListener() {} };
globalThis.location = { hash: "" };
document.getElementById("data").textContent = require("fs").readFileSync(process.argv[2], "utf8");
Object.assign(document.getElementById("axis"), { value: "tokens" });
Object.assign(document.getElementById("curve"), { value: "training" });
Object.assign(document.getElementById("cost"), { value: "cost_usd" });
const all = (node, name) => (node.name === name ? [node] : []).concat(...(node.children || []).filter((c) => c instanceof Node).map((c) => all(c, name)));
const text = (node) => (node instanceof Node ? (node.textContent || "") + node.children.map(text).join("") : String(node));
eval(require("fs").readFileSync(process.argv[3], "utf8") + `
;document.getElementById("set").value = [...sets().keys()][0] || "";
pareto();
const rowsNow = () => all(document.getElementById("table"), "tr").slice(1).map((row) => text(row.children[1]));
const lines = () => all(document.getElementById("chart"), "polyline").length;
const before = rowsNow(), drawn = lines();
all(document.getElementById("table"), "button").find((b) => b.attributes["data-key"] === "cost_usd").on.click();
const sortedRows = rowsNow();
toggle(data.runs[0].run, false);
fill(document.getElementById("details").children[0], data.runs[0]);
console.log(JSON.stringify({ before, sortedRows, drawn, left: lines(), bars: all(document.getElementById("phases"), "rect").length, detail: text(document.getElementById("details").children[0]).length }));
`);
"""


@pytest.mark.skipif(
    shutil.which("node") is None, reason="node is not installed: the page's script cannot be run here"
)
def test_the_pages_script_draws_sorts_and_toggles(tmp_path: Path) -> None:
    seed = Seed(tmp_path / "home").finished().logged()
    Seed(tmp_path / "home", "cheap-0002", usd_per_hour=3.6).finished().logged()
    page = report.html(seed.store, published=False)
    (tmp_path / "data.json").write_text(json.dumps(island(page)))
    (tmp_path / "fake.js").write_text(FAKE_PAGE)
    script = Path(report.__file__).parent / "page" / "report.js"
    done = subprocess.run(
        ["node", "fake.js", "data.json", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert sorted(told["before"]) == ["cheap-0002", "demo-0001"]
    assert told["sortedRows"] == ["cheap-0002", "demo-0001"]
    assert (told["drawn"], told["left"]) == (2, 1)
    assert told["bars"] > 0 and told["detail"] > 500
    assert math.isfinite(told["bars"])
