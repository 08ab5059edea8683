"""The report in a real browser: it renders, sorts, takes a run out and in, says nothing on the console and asks nobody."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import report
from tests.browser import BINARY, Page, browser
from tests.seeds import Seed, at

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]


def seeded(home: Path, count: int) -> Seed:
    """`count` finished runs, each with curves, dollars and a validation loss of its own; the first is not the cheapest."""
    for number in range(count):
        seed = Seed(home, f"demo-{number:04}", usd_per_hour=20.0 + (number * 7) % count)
        seed.rented().trained(validation_loss=2.0 + (number * 3) % count / count).released().ended().logged()
    return seed


@pytest.fixture(params=[2, 50])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Page, int, Path]]:
    file = tmp_path / "report.html"
    file.write_text(
        report.html(seeded(tmp_path / "home", request.param).store, now=at(1000)), encoding="utf-8"
    )
    with browser(tmp_path / "profile") as opened:
        opened.open(file)
        yield opened, request.param, file


def column(page: Page, key: str) -> list[str]:
    """The cells of a column, of the user's own runs, from top to bottom."""
    script = (
        f"const at = [...document.querySelectorAll('#table th')].findIndex((th) => th.querySelector('[data-key={key}]'));"
        "return [...document.querySelectorAll('#table tbody tr:not(.published)')].map((tr) => tr.cells[at].textContent)"
    )
    found: list[str] = page.run(f"(() => {{ {script} }})()")
    return found


def count(page: Page, selector: str) -> int:
    found: int = page.run(f"document.querySelectorAll({json.dumps(selector)}).length")
    return found


def click(page: Page, selector: str) -> None:
    page.run(f"document.querySelector({json.dumps(selector)}).click()")


def test_it_renders_sorts_and_takes_a_run_out(page: tuple[Page, int, Path]) -> None:
    shown, runs, file = page
    assert count(shown, "#table tbody tr:not(.published)") == runs
    assert count(shown, "#table tbody tr.published") > 5
    assert count(shown, "#chart .curve path") == runs
    assert count(shown, "#pareto .points circle") == runs
    assert count(shown, "#phases .bars rect") >= 3 * runs
    # Every curve lies inside its picture.
    inside = "[...document.querySelectorAll('#chart .curve path')].every((one) => { const b = one.getBBox(); return b.width > 100 && b.x >= 0 && b.y >= 0 && b.x + b.width <= 1100 && b.y + b.height <= 420; })"
    assert shown.run(inside) is True
    assert len(set(shown.run("[...document.querySelectorAll('#chart .curve path')].map((one) => one.getAttribute('stroke'))"))) == runs  # fmt: skip

    click(shown, "[data-key=cost_usd]")
    dollars = [float(text.lstrip("$")) for text in column(shown, "cost_usd")]
    assert dollars == sorted(dollars) and dollars[0] < dollars[-1]
    click(shown, "[data-key=cost_usd]")
    assert [float(text.lstrip("$")) for text in column(shown, "cost_usd")] == dollars[::-1]
    assert shown.run("document.querySelector('[data-key=cost_usd]').closest('th').ariaSort") == "descending"

    click(shown, "[aria-label='show demo-0001']")
    assert count(shown, "#chart .curve path") == runs - 1
    assert (
        count(shown, "#chart .curve [aria-label=demo-0001]")
        == count(shown, "#pareto .points [aria-label=demo-0001]")
        == 0
    )
    click(shown, "[aria-label='show demo-0001']")
    assert count(shown, "#chart .curve [aria-label=demo-0001]") == 1
    click(shown, "#none")
    assert count(shown, "#chart .curve path") == 0 and "No run" in shown.run("document.querySelector('#chart').textContent")  # fmt: skip
    click(shown, "#all")
    for axis in ("steps", "tokens", "hours", "dollars"):
        shown.run(f"(() => {{ const s = document.getElementById('axis'); s.value = '{axis}'; s.dispatchEvent(new Event('change')); }})()")  # fmt: skip
        assert count(shown, "#chart .curve path") == runs and axis in shown.run("document.querySelector('#chart svg').textContent")  # fmt: skip

    shown.run("location.hash = 'demo-0001'; document.getElementById('demo-0001').open = true")
    shown.run("new Promise(requestAnimationFrame)")
    assert set(shown.requests) == {file.as_uri()} | {url for url in shown.requests if url == "data:,"}
    assert shown.complaints == []


def test_the_page_follows_light_and_dark(page: tuple[Page, int, Path]) -> None:
    shown, _, _ = page
    colours = []
    for on in (False, True):
        shown.dark(on)
        colours.append(shown.run("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color].join()"))  # fmt: skip
    assert colours[0] != colours[1]
    assert shown.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth") is True


def test_a_request_and_an_error_would_be_seen(tmp_path: Path) -> None:
    """The two observers of the tests above, on a page that offends."""
    file = tmp_path / "bad.html"
    file.write_text("<script>fetch('http://127.0.0.1:9/x').catch(() => {}); nothing();</script>")
    with browser(tmp_path / "profile") as shown:
        shown.open(file)
        shown.run("1")
        assert "http://127.0.0.1:9/x" in shown.requests
        assert any("nothing is not defined" in text for text in shown.complaints)
