"""The server is what it claims to be: its extract agrees with the official document, and it notices what is against it."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.lambda_fixtures import Paper, paper
from tests.lambda_server import schema

__all__ = ["paper"]


def call(
    paper: Paper, method: str, path: str, body: object = None, auth: str | None = None
) -> tuple[int, bytes]:
    headers = {"Authorization": auth if auth is not None else f"Bearer {paper.server.key}"}
    data = None if body is None else json.dumps(body).encode()
    sent = urllib.request.Request(paper.server.url + path, data=data, headers=headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sent, timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def agrees(ours: Any, official: Any, documents: tuple[Any, Any], where: str) -> None:
    """Everything that our extract says is said by the document too, and the same fields are required."""
    for side in (0, 1):
        while "$ref" in (pair := (ours, official))[side]:
            name = pair[side]["$ref"].rsplit("/", 1)[1]
            found = documents[side]["components"]["schemas"][name]
            ours, official = (found, official) if side == 0 else (ours, found)
    if "anyOf" in ours and "anyOf" in official:
        assert len(ours["anyOf"]) == len(official["anyOf"]), where
        return
    for word in ("type", "enum", "const", "pattern", "maxLength", "minLength", "format"):
        if word in ours:
            assert ours[word] == official.get(word), f"{where}: {word}"
    assert set(ours.get("required", ())) == set(official.get("required", ())), f"{where}: required"
    for name, inner in ours.get("properties", {}).items():
        assert name in official["properties"], f"{where}.{name}"
        agrees(inner, official["properties"][name], documents, f"{where}.{name}")
    for word in ("items", "additionalProperties"):
        if isinstance(ours.get(word), dict):
            agrees(ours[word], official[word], documents, f"{where}.{word}")


@pytest.mark.skipif(not schema.OFFICIAL.exists(), reason=f"the official document is not at {schema.OFFICIAL}")
def test_the_extract_agrees_with_the_official_document() -> None:
    official = json.loads(schema.OFFICIAL.read_text())
    documents = (schema.EXTRACT, official)
    for name, ours in schema.SCHEMAS.items():
        agrees(ours, official["components"]["schemas"][name], documents, name)
    for path, methods in schema.PATHS.items():
        for method, ours in methods.items():
            theirs = official["paths"][path][method]
            assert set(ours["responses"]) == set(theirs["responses"]), path
            parts = [(ours["responses"]["200"], theirs["responses"]["200"])]
            if "requestBody" in ours:
                parts.append((ours["requestBody"], theirs["requestBody"]))
            for mine, other in parts:
                contents = [part["content"]["application/json"]["schema"] for part in (mine, other)]
                if path != "/api/v1/ssh-keys" or "requestBody" in str(mine):
                    agrees(*contents, documents, path)


@pytest.mark.parametrize("official", [True, False])
def test_both_sources_notice_the_same_faults(official: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if official and not schema.OFFICIAL.exists():
        pytest.skip(f"the official document is not at {schema.OFFICIAL}")
    if not official:
        monkeypatch.setattr(schema, "document", lambda: schema.EXTRACT)
    schema._validator.cache_clear()
    launch = "/api/v1/instance-operations/launch"
    good = {"region_name": "r", "instance_type_name": "t", "ssh_key_names": ["k"]}
    assert schema.complaint(launch, "POST", "request", good) is None
    for odd in (
        {"region_name": "r"},
        good | {"quantity": 1},
        good | {"name": "x" * 65},
        good | {"ssh_key_names": "k"},
        good | {"tags": [{"key": "Upper", "value": ""}]},
        good | {"tags": [{"key": "llmctl-intent", "value": "x" * 129}]},
        good | {"image": "lambda-stack"},
    ):
        assert schema.complaint(launch, "POST", "request", odd), odd
    assert schema.complaint(launch, "POST", "200", {"data": {"instance_ids": ["a"]}}) is None
    assert schema.complaint(launch, "POST", "200", {"data": {"instance_ids": "a"}})
    assert schema.complaint(launch, "POST", "200", {"data": {"instance_ids": []}, "more": 1})
    assert schema.complaint(launch, "POST", "400", {"error": {"code": "new/code", "message": ""}})
    assert schema.complaint("/api/v1/instances", "GET", "200", {"data": [{"id": "x"}]})
    schema._validator.cache_clear()


def test_every_answer_of_a_life_is_as_documented(paper: Paper) -> None:
    paper.set(filesystems=["cache@us-west-1"])
    assert call(paper, "POST", "/ssh-keys", {"name": "k", "public_key": "ssh-ed25519 AAAA x"})[0] == 200
    body = {
        "region_name": "us-west-1",
        "instance_type_name": "gpu_1x_a10",
        "ssh_key_names": ["k"],
        "name": "n",
    }
    status, text = call(paper, "POST", "/instance-operations/launch", body)
    assert status == 200
    node = json.loads(text)["data"]["instance_ids"][0]
    paper.tick(30)
    for path in (
        "/instances",
        f"/instances/{node}",
        "/instance-types",
        "/ssh-keys",
        "/file-systems",
        "/audit-events",
    ):
        assert call(paper, "GET", path)[0] == 200
    assert call(paper, "POST", f"/instances/{node}", {"name": "m"})[0] == 200
    assert call(paper, "POST", "/instance-operations/terminate", {"instance_ids": [node]})[0] == 200
    assert call(paper, "GET", "/instances/" + "0" * 32)[0] == 404
    assert call(paper, "GET", "/instances/a-name")[0] == 400
    assert call(paper, "GET", "/instances", auth="")[0] == 401
    assert call(paper, "POST", "/instance-operations/launch", body | {"region_name": "us-south-2"})[0] == 400
    assert call(paper, "POST", "/instance-operations/launch", body | {"ssh_key_names": ["none"]})[0] == 404
    assert call(paper, "POST", "/instance-operations/launch", body | {"ssh_key_names": ["k", "k"]})[0] == 400
    assert paper.server.violations == []


def test_a_request_against_the_document_is_refused_and_kept(paper: Paper) -> None:
    paper.may_violate = True
    body = {"region_name": "r", "instance_type_name": "t", "ssh_key_names": ["k"], "quantity": 2}
    assert call(paper, "POST", "/instance-operations/launch", body)[0] == 400
    assert "quantity" in paper.server.violations[0]


def test_an_answer_against_the_document_is_kept(paper: Paper) -> None:
    paper.may_violate = True
    paper.set(omit=["actions"])
    provider = paper.provider()
    from tests.lambda_fixtures import request

    node = provider.launch(request())
    provider.find(node)
    provider.terminate(node)
    assert "actions" in paper.server.violations[0]


def test_both_documented_ways_to_authenticate(paper: Paper) -> None:
    basic = base64.b64encode(f"{paper.server.key}:".encode()).decode()
    assert call(paper, "GET", "/instances", auth=f"Basic {basic}")[0] == 200
    assert call(paper, "GET", "/instances", auth=f"Basic {paper.server.key}")[0] == 200
    assert call(paper, "GET", "/instances", auth="Bearer x")[0] == 401


def test_the_limits_are_kept(paper: Paper) -> None:
    paper.set(rate_limits=True)
    paper.tick(60)
    launch = ("POST", "/instance-operations/launch")
    body = {"region_name": "us-west-1", "instance_type_name": "gpu_1x_a10", "ssh_key_names": ["k"]}
    assert call(paper, "GET", "/instances")[0] == 200
    assert call(paper, "GET", "/instances")[0] == 429
    paper.tick(1.1)
    assert call(paper, *launch, body)[0] == 404
    paper.tick(1.1)
    assert call(paper, *launch, body)[0] == 429
    assert call(paper, "GET", "/instances")[0] == 200
    paper.tick(12)
    assert call(paper, *launch, body)[0] == 404


def test_the_ledger_counts_started_minutes_from_active_to_terminate(paper: Paper) -> None:
    from tests.lambda_fixtures import request

    provider = paper.provider()
    node = provider.launch(request())
    paper.tick(1000)
    assert paper.server.world.ledger()[0] | {"id": node} == {
        "id": node,
        "name": paper.machines[0].name,
        "minutes": 1,
        "usd": pytest.approx(0.0215),
        "seconds": 0.0,
        "billing": True,
    }
    paper.tick(121)
    assert paper.server.world.ledger()[0]["minutes"] == 3
    provider.terminate(node)
    paper.tick(1000)
    row = paper.server.world.ledger()[0]
    assert (row["minutes"], row["billing"]) == (3, False)


def test_a_switch_that_does_not_exist_is_refused(paper: Paper) -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError):
        paper.set(list_lagg=3)
