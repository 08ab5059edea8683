"""The client: what each answer means, what is repeated and what never is, and where no secret may appear."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

import pytest

from provisioning import lambda_api
from provisioning.base import Ambiguous, CredentialsError, NoCapacity, ProviderError, Refused, Unavailable
from provisioning.lambda_api import LambdaApi, base_url, find_credentials, redacted
from provisioning.ratelimit import Limiter, Rates
from tests.lambda_fixtures import Paper, paper, request

__all__ = ["paper"]
LAUNCH, TERMINATE = "instance-operations/launch", "instance-operations/terminate"
UNCLEAR: list[dict[str, Any]] = [
    {"kind": "refuse", "status": 500},
    {"kind": "refuse", "status": 503, "code": None},
    {"kind": "refuse", "status": 502, "code": "provider/internal-unavailable"},
    {"kind": "refuse", "status": 400, "code": "provider/internal-unavailable"},
    {"kind": "refuse", "status": 409, "code": "global/internal-error"},
    {"kind": "refuse", "status": 429, "code": None},
    {"kind": "refuse", "status": 429, "code": "global/rate-limit"},
    {"kind": "refuse", "status": 408, "code": None},
    {"kind": "refuse", "status": 403, "code": None},
    {"kind": "lose-request"},
    {"kind": "lose-answer"},
    {"kind": "garbage"},
    {"kind": "lie", "status": 500},
    {"kind": "lie", "status": 429, "code": None},
]


@pytest.mark.parametrize("fault", UNCLEAR)
def test_reads_are_repeated_until_they_succeed(paper: Paper, fault: dict[str, Any]) -> None:
    paper.fault("GET /instances", times=3, **fault)
    assert paper.provider().inventory().nodes == []
    assert len(paper.sent("GET /instances")) == 4


@pytest.mark.parametrize("fault", UNCLEAR)
def test_reads_end(paper: Paper, fault: dict[str, Any]) -> None:
    paper.fault("GET /instances", times=100, **fault)
    with pytest.raises(Unavailable) as caught:
        paper.provider().inventory()
    assert len(paper.sent("GET /instances")) == 5
    assert caught.value.hint
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("fault", UNCLEAR)
def test_a_launch_without_a_clear_answer_is_ambiguous_and_sent_once(
    paper: Paper, fault: dict[str, Any]
) -> None:
    paper.may_bill = True
    provider = paper.provider(ssh_key_name="theirs")
    paper.server.world.add_key({"name": "theirs", "public_key": "ssh-ed25519 AAAA x"})
    paper.fault(LAUNCH, times=100, **fault)
    with pytest.raises(Ambiguous) as caught:
        provider.launch(request())
    assert caught.value.exit_code == 6
    assert len(paper.sent(LAUNCH)) == 1
    happened = fault["kind"] in ("lose-answer", "garbage", "lie")
    assert len(paper.machines) == happened


@pytest.mark.parametrize("fault", UNCLEAR)
def test_a_terminate_without_a_clear_answer_is_ambiguous_and_sent_once(
    paper: Paper, fault: dict[str, Any]
) -> None:
    provider = paper.provider()
    node = provider.launch(request())
    paper.tick(30)
    paper.fault(TERMINATE, **fault)
    with pytest.raises(Ambiguous):
        provider.terminate(node)
    assert len(paper.sent(TERMINATE)) == 1
    if fault["kind"] in ("refuse", "lose-request"):
        assert paper.server.world.ledger()[0]["billing"]
        provider.terminate(node)


@pytest.mark.parametrize(
    ("account", "error"),
    [
        ("inactive", CredentialsError),
        ("forbidden", CredentialsError),
        ("bad-address", CredentialsError),
        ("quota", Refused),
    ],
)
def test_refusals_of_the_account(paper: Paper, account: str, error: type[ProviderError]) -> None:
    paper.server.world.add_key({"name": "theirs", "public_key": "ssh-ed25519 AAAA x"})
    paper.set(account=account)
    with pytest.raises(error) as caught:
        paper.provider(ssh_key_name="theirs").launch(request())
    assert type(caught.value) is error
    assert caught.value.hint
    assert len(paper.sent(LAUNCH)) == 1
    assert paper.machines == []


def test_no_capacity_has_a_class_of_its_own(paper: Paper) -> None:
    paper.set(ghost_capacity=["gpu_1x_a10/us-west-1"])
    with pytest.raises(NoCapacity) as caught:
        paper.provider().launch(request())
    assert caught.value.code == "instance-operations/launch/insufficient-capacity"
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("status", [400, 409, 422])
def test_the_code_decides_not_the_status(paper: Paper, status: int) -> None:
    paper.fault(LAUNCH, "refuse", status=status, code="instance-operations/launch/insufficient-capacity")
    with pytest.raises(NoCapacity):
        paper.provider().launch(request())
    paper.fault("GET /instances", "refuse", status=status, code="global/invalid-api-key")
    with pytest.raises(CredentialsError):
        paper.provider().inventory()


def test_a_code_that_is_new_is_a_refusal(paper: Paper) -> None:
    paper.fault(LAUNCH, "refuse", status=400, code="instance-operations/launch/moon-phase")
    with pytest.raises(Refused, match="moon-phase"):
        paper.provider().launch(request())


def test_a_wrong_key_and_no_key(paper: Paper, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAMBDA_API_KEY", "secret_wrong")
    with pytest.raises(CredentialsError, match="invalid-api-key"):
        paper.provider().inventory()
    monkeypatch.delenv("LAMBDA_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CredentialsError, match="no Lambda API key"):
        paper.provider().inventory()
    assert len(paper.server.requests) == 1


def test_where_a_key_is_found(tmp_path: Path) -> None:
    assert find_credentials({}, tmp_path) is None
    file = tmp_path / ".lambda_cloud" / "lambda_keys"
    file.parent.mkdir()
    file.write_text("other = 1\n  api_key =  secret_file \n")
    found = find_credentials({}, tmp_path)
    assert found is not None
    assert (found.key.get_secret_value(), found.source) == ("secret_file", str(file))
    found = find_credentials({"LAMBDA_API_KEY": " secret_env\n"}, tmp_path)
    assert found is not None
    assert (found.key.get_secret_value(), found.source) == ("secret_env", "LAMBDA_API_KEY")
    for odd in ("two words", "schlüssel", "a\x00b"):
        with pytest.raises(CredentialsError) as caught:
            find_credentials({"LAMBDA_API_KEY": odd}, tmp_path)
        assert odd not in str(caught.value)
    file.write_bytes(b"\xff\xfe")
    assert find_credentials({}, tmp_path) is None


def test_the_key_crosses_no_network_in_the_clear() -> None:
    assert base_url({}) == "https://cloud.lambda.ai/api/v1"
    assert base_url({"LAMBDA_API_BASE_URL": "http://127.0.0.1:8/api/v1/"}) == "http://127.0.0.1:8/api/v1"
    for url in (
        "http://cloud.lambda.ai/api/v1",
        "http://127.0.0.1.evil.example/",
        "ftp://x",
        "cloud.lambda.ai",
    ):
        with pytest.raises(CredentialsError, match="in the clear"):
            base_url({"LAMBDA_API_BASE_URL": url})


class Recorder(Limiter):
    """Notes what it is told instead of waiting."""

    def __init__(self) -> None:
        self.backed_off: list[float] = []
        self.kinds: list[tuple[bool, bool]] = []
        self.finished: list[bool] = []

    def wait(self, *, launch: bool = False, urgent: bool = False) -> None:
        self.kinds.append((launch, urgent))

    def done(self, *, launch: bool = False) -> None:
        self.finished.append(launch)

    def back_off(self, seconds: float) -> None:
        self.backed_off.append(seconds)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0.01", 0.01),
        ("86400", 60.0),
        ("-5", 0.0),
        (None, 0.05),
        ("soon", 0.05),
        ("nan", 0.05),
        ("Thu, 01 Jan 1970 00:00:10 GMT", 7.0),
    ],
)
def test_a_429_holds_back_everyone(paper: Paper, header: str | None, seconds: float) -> None:
    recorder = Recorder()
    api = LambdaApi(find_credentials(), paper.server.url, recorder, pace=0.01, now=lambda: 3.0)
    paper.fault("POST /ssh-keys", "refuse", status=429, code=None, retry_after=header)
    with pytest.raises(Ambiguous):
        api.send("/ssh-keys", {"name": "x", "public_key": "y"})
    assert recorder.backed_off == [pytest.approx(seconds)]


def test_retry_after_is_the_wait_of_the_next_try(paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    api = LambdaApi(find_credentials(), paper.server.url, Recorder(), pace=0.001)
    paper.fault("GET /instances", "refuse", status=503, code=None, retry_after="17")
    api.read("GET", "/instances")
    assert 17.0 in slept


def test_who_goes_first_and_what_counts_as_a_launch(paper: Paper) -> None:
    provider = paper.provider(ssh_key_name="theirs")
    recorder = Recorder()
    provider._api._limiter = recorder
    paper.server.world.add_key({"name": "theirs", "public_key": "ssh-ed25519 AAAA x"})
    node = provider.launch(request())
    provider.find(node)
    provider.terminate(node)
    assert recorder.kinds == [(True, False), (False, False), (False, True)]
    assert recorder.finished == [True, False, False]


def test_a_turn_ends_also_without_an_answer(paper: Paper) -> None:
    recorder = Recorder()
    api = LambdaApi(find_credentials(), paper.server.url, recorder, pace=0.001)
    paper.fault("POST", "lose-request")
    with pytest.raises(Ambiguous):
        api.send("/ssh-keys", {})
    assert recorder.finished == [False]


def test_a_queue_that_is_too_long_is_an_error_before_anything_was_sent(paper: Paper, tmp_path: Path) -> None:
    limiter = Limiter(tmp_path / "turns.json", Rates(patience_seconds=1), sleep=lambda _: None)
    limiter.back_off(60)
    api = LambdaApi(find_credentials(), paper.server.url, limiter)
    with pytest.raises(Unavailable):
        api.read("GET", "/instances")
    with pytest.raises(Ambiguous):
        api.send("/ssh-keys", {})
    assert paper.server.requests == []


def test_no_secret_in_errors_logs_or_reprs(paper: Paper, caplog: pytest.LogCaptureFixture) -> None:
    paper.may_bill = True
    caplog.set_level(logging.DEBUG)
    provider = paper.provider()
    wanted = request(self_terminate=True)
    secrets = [paper.server.key, *(wanted.host_private_key or "").splitlines()[1:3]]
    shown = [
        repr(wanted),
        repr(provider),
        repr(provider._api),
        repr(provider._api.credentials),
        repr(provider.redacted(wanted)),
    ]
    provider.launch(wanted)
    paper.tick(30)
    secrets.append(paper.machines[0].token)
    shown.append(repr(provider.inventory()))
    shown += [path.read_text() for path in (paper.directory / "cache").rglob("*") if path.is_file()]
    faults = [*UNCLEAR, {"kind": "refuse", "status": 400, "code": "global/invalid-parameters"}]
    for fault in faults:
        paper.fault(LAUNCH, **fault)
        with pytest.raises(ProviderError) as caught:
            provider.launch(request())
        shown += [*traceback.format_exception(caught.value), repr(caught.value), caught.value.hint]
    shown += [record.getMessage() for record in caplog.records]
    for secret in secrets:
        assert not [text for text in shown if secret in text]


def test_a_server_that_repeats_secrets_and_escapes_is_cleaned(
    paper: Paper, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = "-----BEGIN OPENSSH PRIVATE KEY-----\nabcdef\n-----END OPENSSH PRIVATE KEY-----\n"
    said = f"bad \x1b[31m{paper.server.key} {pem} and #cloud-config\nrest {'x' * 5000}"
    credentials = find_credentials()
    assert credentials is not None
    text = lambda_api._scrubbed(said, credentials)
    assert text == "bad [31m[key] [private key] and [user data]"
    assert len(lambda_api._scrubbed("x" * 5000, credentials)) == 300


def test_redacted_reaches_into_lists_and_objects() -> None:
    body = {"user_data": "s3", "list": [{"jupyter_token": "s1"}, 2], "in": {"private_key": "s2"}, "name": "n"}
    text = repr(redacted(body))
    assert "s1" not in text
    assert "s2" not in text
    assert "'s3'" not in text
    assert "'name': 'n'" in text
