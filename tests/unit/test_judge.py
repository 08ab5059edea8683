"""The judge against a local OpenAI-compatible endpoint that is busy, talks nonsense and breaks off."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import Usage
from orchestrator.models import judge_prompt, judge_table
from orchestrator.models.judge import Endpoint, JudgeError, Question, judge
from orchestrator.models.judge_client import _retry_after, micro_usd
from orchestrator.models.judge_file import Lines

QUESTIONS = [Question(f"q{i}", f"Task {i}", reference=f"answer {i}") for i in range(4)]
WORTH = {"good": 90, "fair": 60, "poor": 15}
"""What the stub thinks of an answer that says which model made it."""
RESPONSES = {name: {q.id: f"{name} says {q.id}" for q in QUESTIONS} for name in WORTH}
USAGE = {"prompt_tokens": 100, "completion_tokens": 10}

Reply = tuple[int, dict[str, str], str]


def completion(content: str, usage: dict[str, int] | None = USAGE) -> Reply:
    body = {"choices": [{"message": {"content": content}}], **({"usage": usage} if usage else {})}
    return 200, {}, json.dumps(body)


def graded(body: dict[str, Any], shift: int = 0) -> str:
    """Honest scores: the worth of each answer, plus the task's number."""
    text = body["messages"][1]["content"]
    number = int(re.search(r"Task (\d)", text)[1])  # type: ignore[index]
    found = re.findall(r"Answer (\w+):\n(\w+) says", text)
    return json.dumps({label: WORTH[model] + number + shift for label, model in found})


class Stub:
    """The endpoint. `fault(question, times it was asked before)` may replace an answer."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.fault: Callable[[str, int], Reply | None] = lambda _question, _before: None
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        self.together = self.most_together = 0

    def reply(self, body: dict[str, Any]) -> Reply:
        question = re.search(r"Task \d", body["messages"][1]["content"])[0]  # type: ignore[index]
        with self._lock:
            self.seen.append(body)
            before = self._counts.get(question, 0)
            self._counts[question] = before + 1
        return self.fault(question, before) or completion(graded(body))


@pytest.fixture
def stub() -> Iterator[tuple[Stub, str]]:
    state = Stub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            with state._lock:
                state.together += 1
                state.most_together = max(state.most_together, state.together)
            state.keys.add(self.headers.get("Authorization"))
            assert self.path == "/v1/chat/completions"
            status, headers, text = state.reply(
                json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            )
            with state._lock:
                state.together -= 1
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    yield state, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def endpoint(url: str, **more: Any) -> Endpoint:
    return Endpoint(url, "stub-judge", "STUB_KEY", usd_per_million_input=2.5, usd_per_million_output=10.0,
                    **{"attempts": 3, "wait_seconds": 0.001, **more})  # fmt: skip


def rows(table: dict[str, Any]) -> dict[str, float]:
    return {line["model"]: line["score"] for line in table["rows"]}


def test_the_table_is_exact_and_a_second_call_asks_nothing(
    stub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, url = stub
    monkeypatch.setenv("STUB_KEY", "a-key")
    table = judge(QUESTIONS, RESPONSES, endpoint(url), tmp_path, repeats=3)
    assert rows(table) == {"good": 91.5, "fair": 61.5, "poor": 16.5}  # the tasks' numbers add 1.5 on average
    assert [line["model"] for line in table["rows"]] == ["good", "fair", "poor"]
    assert all(line["low"] <= line["score"] <= line["high"] and line["items"] == 4 for line in table["rows"])
    assert all(90 <= table["rows"][0][side] <= 93 for side in ("low", "high"))
    assert all(
        line["judged_with"] == ["fair", "good", "poor"] and line["panel"] == table["panel"]
        for line in table["rows"]
    )
    assert (table["answers"], table["unparsed"], table["unjudged"]) == (12, 0, [])
    assert (table["prompt_tokens"], table["completion_tokens"]) == (1200, 120)
    assert table["cost_usd"] == pytest.approx(12 * (100 * 2.5 + 10 * 10) / 1e6)  # 12 × 350 micro-dollars
    assert state.keys == {"Bearer a-key"} and state.most_together <= 4
    result = judge_table.results(table)["good"]
    assert result["name"] == f"judge stub-judge {table['panel']}" and (result["kind"], result["score"]) == (
        "judge",
        91.5,
    )
    again = judge(QUESTIONS, RESPONSES, endpoint(url), tmp_path, repeats=3)
    assert again == table and len(state.seen) == 12
    more = judge(QUESTIONS, RESPONSES, endpoint(url), tmp_path, repeats=4)
    assert len(state.seen) == 16 and more["answers"] == 16 and more["panel"] == table["panel"]


def test_every_prompt_shows_all_answers_in_an_order_of_its_own(stub: Any, tmp_path: Path) -> None:
    state, url = stub
    judge(QUESTIONS, RESPONSES, endpoint(url), tmp_path, repeats=4)
    orders = set()
    for body in state.seen:
        assert body["model"] == "stub-judge" and "temperature" not in body
        found = re.findall(r"Answer ([A-Z]):\n(\w+) says (q\d)", body["messages"][1]["content"])
        assert [label for label, _, _ in found] == ["A", "B", "C"] and {
            model for _, model, _ in found
        } == set(WORTH)
        assert len({question for _, _, question in found}) == 1
        orders.add(tuple(model for _, model, _ in found))
    assert len(orders) > 3  # of six
    assert judge_prompt.shuffled(["b", "a", "c"], 1, "q", 2) == judge_prompt.shuffled(
        ["c", "b", "a"], 1, "q", 2
    )


def test_faults_cost_what_they_cost_and_change_no_score(stub: Any, tmp_path: Path) -> None:
    state, url = stub

    def fault(question: str, before: int) -> Reply | None:
        faults: dict[tuple[str, int], Reply] = {
            ("Task 0", 0): (429, {"Retry-After": "0"}, "slow down"),
            ("Task 0", 1): (503, {}, ""),
            ("Task 1", 0): completion("I would rather talk about the weather."),  # paid for, and useless
            ("Task 1", 1): completion('{"A": 90, "B": 60'),  # half an answer
            ("Task 2", 0): (200, {}, '{"choices": [{"mess'),  # a body that breaks off
        }
        return faults.get((question, before))

    state.fault = fault
    table = judge(QUESTIONS, RESPONSES, endpoint(url), tmp_path, repeats=1)
    assert rows(table) == {"good": 91.5, "fair": 61.5, "poor": 16.5}
    assert (table["answers"], table["unparsed"], table["unjudged"]) == (6, 2, [])
    assert table["cost_usd"] == pytest.approx(6 * 350 / 1e6)
    assert len(state.seen) == 4 + 5


def test_a_busy_endpoint_is_asked_again_when_it_says_so(stub: Any, tmp_path: Path) -> None:
    import stamina.instrumentation

    state, url = stub
    headers: list[dict[str, str]] = [{"Retry-After": "0.03"}, {}]
    state.fault = lambda _question, before: (429, headers[before], "") if before < 2 else None
    waits: list[float] = []
    hooks = stamina.instrumentation.get_on_retry_hooks()
    stamina.instrumentation.set_on_retry_hooks([lambda details: waits.append(details.wait_for)])
    try:
        judge(QUESTIONS[:1], RESPONSES, endpoint(url, wait_seconds=0.1), tmp_path, repeats=1)
    finally:
        stamina.instrumentation.set_on_retry_hooks(hooks)
    assert waits[0] == 0.03 and 0.1 < waits[1] <= 0.5  # as it said; then by itself, doubled and with jitter


def test_an_item_that_nobody_can_read_has_no_part_in_the_result(stub: Any, tmp_path: Path) -> None:
    state, url = stub
    wrong = [
        '{"A": 90, "B": 60}',
        '{"A": 90, "B": 60, "C": 101}',
        '{"A": 90, "B": 60, "C": "15"}',
    ]  # missing, beyond, text
    state.fault = lambda question, before: completion(wrong[before % 3]) if question == "Task 3" else None
    table = judge(QUESTIONS, RESPONSES, endpoint(url), tmp_path, repeats=1)
    assert rows(table) == {"good": 91.0, "fair": 61.0, "poor": 16.0}  # of tasks 0, 1, 2
    assert (table["unjudged"], table["unparsed"], table["rows"][0]["items"]) == (["q3"], 3, 3)
    asked = len(state.seen)
    assert judge(QUESTIONS, RESPONSES, endpoint(url), tmp_path, repeats=1) == table
    assert len(state.seen) == asked  # three times was enough
    state.fault = lambda _question, _before: completion("no idea")
    nothing = judge(QUESTIONS, RESPONSES, endpoint(url), tmp_path / "other", repeats=1)
    assert [(line["score"], line["low"], line["items"]) for line in nothing["rows"]] == [(None, None, 0)] * 3
    assert judge_table.results(nothing) == {}


def test_what_was_answered_before_a_failure_stays(stub: Any, tmp_path: Path) -> None:
    state, url = stub
    down = threading.Event()
    state.fault = lambda _question, before: (500, {}, "down") if down.is_set() or before >= 1 else None
    with pytest.raises(JudgeError, match=r"did not answer in 3 tries: HTTP 500") as caught:
        judge(QUESTIONS, RESPONSES, endpoint(url, concurrency=1), tmp_path, repeats=2)
    assert "kept" in caught.value.hint
    kept = Lines(tmp_path / "answers.jsonl").rows
    assert [row["repeat"] for row in kept] == [0, 0, 0, 0]
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"panel": "torn')  # killed in the middle of a line
    state.fault = lambda _question, _before: None
    before = len(state.seen)
    table = judge(QUESTIONS, RESPONSES, endpoint(url), tmp_path, repeats=2)
    assert len(state.seen) - before == 4 and table["answers"] == 8 and rows(table)["good"] == 91.5
    assert len([row for row in Lines(tmp_path / "answers.jsonl").rows if row["panel"] == table["panel"]]) == 8


def test_a_refusal_says_what_to_do_and_is_not_tried_again(
    stub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, url = stub
    monkeypatch.delenv("STUB_KEY", raising=False)
    state.fault = lambda _question, _before: (401, {}, '{"error": {"message": "no key"}}')
    with pytest.raises(JudgeError, match=r"refused \(HTTP 401\): no key") as caught:
        judge(QUESTIONS[:1], RESPONSES, endpoint(url), tmp_path, repeats=1)
    assert caught.value.exit_code == 4 and caught.value.hint == "set STUB_KEY to a key of this endpoint"
    assert len(state.seen) == 1 and not Lines(tmp_path / "answers.jsonl").rows and state.keys == {None}
    state.fault = lambda _question, _before: (429, {"Retry-After": "3600"}, "")
    with pytest.raises(JudgeError, match="asks to wait 3600 s"):
        judge(QUESTIONS[:1], RESPONSES, endpoint(url), tmp_path, repeats=1)


def test_no_usage_and_no_prices_mean_no_cost_rather_than_none(stub: Any, tmp_path: Path) -> None:
    state, url = stub
    state.fault = lambda question, _before: (
        completion('{"A": 1, "B": 1, "C": 1}', None) if question == "Task 0" else None
    )
    table = judge(QUESTIONS, RESPONSES, endpoint(url), tmp_path, repeats=1)
    assert (table["answers_without_price"], table["cost_usd"]) == (1, pytest.approx(3 * 350 / 1e6))
    assert micro_usd(Endpoint(url, "m"), 100, 10) is None and micro_usd(endpoint(url), 100, None) is None
    free = Endpoint(url, "stub-judge", usd_per_million_input=0.0, usd_per_million_output=0.0)
    assert micro_usd(free, 100, 10) == 0


def test_scores_of_another_set_of_models_are_of_another_panel() -> None:
    def panel(responses: dict[str, dict[str, str]], judge_name: str = "j") -> dict[str, Any]:
        return {"panel": judge_prompt.panel(judge_name, QUESTIONS, responses)}

    two = {name: RESPONSES[name] for name in ("good", "fair")}
    assert judge_table.comparable(panel(RESPONSES), panel(dict(reversed(RESPONSES.items()))))
    assert not judge_table.comparable(panel(RESPONSES), panel(two))
    assert not judge_table.comparable(panel(RESPONSES), panel(RESPONSES, "another judge"))
    retuned = {**RESPONSES, "good": {**RESPONSES["good"], "q0": "another answer"}}
    assert not judge_table.comparable(panel(RESPONSES), panel(retuned))


def test_the_interval_is_that_of_the_mean_over_items() -> None:
    means = {f"q{i}": {"even": 50.0, "uneven": 100.0 * (i % 2)} for i in range(100)}
    bounds = judge_table.intervals(means, ["even", "uneven"], "seed")
    assert bounds["even"] == (50.0, 50.0)
    low, high = bounds["uneven"]  # mean 50, standard error 5
    assert 37 < low < 43 and 57 < high < 63
    assert judge_table.intervals(means, ["even", "uneven"], "seed") == bounds


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"A": 70, "B": 30.5}', {"x": 70.0, "y": 30.5}),
        ('Here you are:\n```json\n{"A": 0, "B": 100}\n```', {"x": 0.0, "y": 100.0}),
        ('{"A": 70, "B": true}', None),
        ('{"A": 70, "B": -1}', None),
        ('{"A": 70, "B": NaN}', None),
        ('{"A": 70, "B": 30, "C": 1}', None),
        ('{"A": 70} {"B": 30}', None),
        ("70, 30", None),
        ("", None),
    ],
)
def test_only_a_whole_answer_counts(content: str, expected: dict[str, float] | None) -> None:
    assert judge_prompt.scores(content, ["x", "y"]) == expected


def test_retry_after_is_a_number_or_a_date() -> None:
    assert _retry_after("7") == 7.0 and _retry_after(None) is None and _retry_after("soon") is None
    assert _retry_after("Fri, 01 Jan 2100 00:00:00 GMT") > 1e9  # type: ignore[operator]
    assert _retry_after("Mon, 01 Jan 2001 00:00:00 GMT") == 0.0


def test_labels_go_on_beyond_z() -> None:
    assert judge_prompt.labels(28)[-3:] == ["Z", "AA", "AB"]


def test_nothing_to_judge_is_said(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="nothing to judge"):
        judge([], RESPONSES, Endpoint("http://127.0.0.1:1/v1", "m"), tmp_path)
    with pytest.raises(JudgeError, match="is no base URL"):
        judge(QUESTIONS, RESPONSES, Endpoint("api.openai.com", "m"), tmp_path)
