"""AWS for tests: moto's standalone server over real HTTP, with what moto lacks in front of it, and real SSH nodes behind its instances.

In a test module or a conftest:

    from tests.aws_server import aws, aws_factory  # noqa: F401

`aws` is an account whose instances exist on paper; `aws_factory(real_nodes=True)` makes one whose instances are embedded SSH nodes that
run their lease guard and have a metadata service each. The front honours client tokens, knows capacity, quotas and
prices, refuses what is not signed (version 4, in date), and does what `fault` asks for. Its teardown fails the test when a
fault never happened, or when an instance is left that the test did not declare with `may_bill()`.
"""

from __future__ import annotations

import fnmatch
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode

import pytest

from provisioning.ec2_guard import DIRECTORY
from tests.lambda_server.nodes import Nodes, cloud_config

ACCOUNT = "123456789012"
REGION = "us-east-1"
PACE = 0.02
IMAGE = "/aws/service/deeplearning/ami/x86_64/oss-nvidia-driver-gpu-pytorch-2.9-ubuntu-24.04/latest/ami-id"
PRICES = {
    "g5.xlarge": 1.006,
    "g5.2xlarge": 1.212,
    "g6.xlarge": 0.8048,
    "p4d.24xlarge": 21.957642,
    "p5.48xlarge": 55.04,
}
REGIONS = ("us-east-1", "us-east-2", "us-west-2")
SOLD = (*PRICES, "g5.48xlarge", "p4de.24xlarge", "p5en.48xlarge", "g4dn.xlarge", "g5g.xlarge", "t3.micro")
"""The types that exist here, of moto's thousand."""
SECRET = "wJalrXUtnFEMI-llmctl-tests-EXAMPLEKEY"


class Metadata:
    """The metadata service of one instance: its tags, and a spot interruption where one is announced."""

    def __init__(self, tags: Callable[[], dict[str, str]]) -> None:
        metadata = self
        self.interruption: dict[str, str] | None = None
        self.off = False

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self._answer(b"token")

            def do_GET(self) -> None:
                name = self.path.removeprefix("/latest/meta-data/")
                if self.headers.get("X-aws-ec2-metadata-token") != "token" or metadata.off:
                    self.send_error(401)
                elif name.startswith("tags/instance/") and name.removeprefix("tags/instance/") in tags():
                    self._answer(tags()[name.removeprefix("tags/instance/")].encode())
                elif name == "spot/instance-action" and metadata.interruption:
                    self._answer(json.dumps(metadata.interruption).encode())
                else:
                    self.send_error(404)

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class AwsNodes(Nodes):
    """Nodes whose guard is EC2's: it reads the lease from the metadata service and powers the machine off."""

    def start(
        self, node_id: str, authorized_key: str, user_data: str | None, env: dict[str, str], *, ignored: bool
    ) -> None:
        super().start(node_id, authorized_key, user_data, env, ignored=ignored)
        self._guards.pop(node_id, None)
        if ignored:
            return
        directory = self._guard_directory(node_id)
        directory.mkdir(parents=True, exist_ok=True)
        for file in cloud_config(user_data).get("write_files", ()):
            if file["path"].startswith(DIRECTORY):
                (directory / Path(file["path"]).name).write_text(file["content"], encoding="utf-8")
        self._guards[node_id] = None
        self._guard_due[node_id] = 0.0
        (directory / "imds").write_text(env["LLMCTL_IMDS"])

    def run_guards(self, every: float) -> None:
        for node_id, process in list(self._guards.items()):
            if (process is None or process.poll() is not None) and time.monotonic() >= self._guard_due[
                node_id
            ]:
                self._guard_due[node_id] = time.monotonic() + every
                directory = self._guard_directory(node_id)
                env = {"PATH": os.environ["PATH"], "LLMCTL_GUARD_DIRECTORY": str(directory),
                       "LLMCTL_IMDS": (directory / "imds").read_text(), "LLMCTL_POWEROFF": f"touch {directory}/poweroff"}  # fmt: skip
                with (directory / "log").open("ab") as log:
                    self._guards[node_id] = subprocess.Popen(
                        [sys.executable, "-S", str(directory / "guard.py")], env=env, stdout=log, stderr=log
                    )

    def powered_off(self) -> list[str]:
        """Nodes that ended themselves."""
        return [
            node_id
            for node_id in list(self._guards)
            if (self._guard_directory(node_id) / "poweroff").exists()
        ]


class AwsServer:
    """One account behind one port."""

    def __init__(self, directory: Path, *, real_nodes: bool = False, pace: float = PACE) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        self.directory, self.pace = directory, pace
        self._nodes = AwsNodes(directory / "nodes") if real_nodes else None
        self._lock = threading.Lock()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self.renew()

        class Quiet(WSGIRequestHandler):
            def log(self, *_: object) -> None:
                """Nothing."""

        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._over = threading.Event()
        self._poller = threading.Thread(target=self._poll, daemon=True)
        self._poller.start()

    def renew(self) -> None:
        """An empty account in which all is well."""
        from moto.moto_api._internal import moto_api_backend

        moto_api_backend.reset()
        self.prices: dict[str, float] | None = dict(PRICES)
        """On-demand dollars an hour in every region; None: the price list may not be asked."""
        self.spot: dict[str, float] = {}
        """Spot dollars an hour by zone; 0.4 elsewhere."""
        self.sold_out: set[str] = set()
        """Zones, or types in zones (`g5.xlarge/us-east-1a`)."""
        self.denied: set[str] = set()
        """Actions (`RunInstances`) that this identity may not do."""
        self.honour_tokens = True
        self.ignore_user_data = False
        self.boots = True
        self.terminate_lies = 0
        """How many accepted terminates do nothing; -1: all."""
        self.requests: list[dict[str, Any]] = []
        self.objects_got: list[str] = []
        self.faults: list[dict[str, Any]] = []
        self.metadata: dict[str, Metadata] = {}
        self._tokens: dict[tuple[str, str], bytes] = {}
        self._may_bill = False
        self._started: set[str] = set()
        self._ended: set[str] = set()
        self._regions: set[str] = set()
        self.parameters: dict[str, str] = {IMAGE: self.image()}
        """Public SSM parameters, the same in every region."""

    # ------------------------------------------------------------ for tests

    def environment(self, home: Path) -> dict[str, str]:
        """What a llmctl process needs to take this server for AWS."""
        ports = {"LLMCTL_TEST_SSH_PORTS": str(self._nodes.ports_file)} if self._nodes else {}
        return {
            "LLMCTL_HOME": str(home),
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "LLMCTL_ADDRESS": "203.0.113.7",
            "LLMCTL_TEST_PACE": str(self.pace),
            "NO_PROXY": "127.0.0.1",
            **ports,
        }

    def client(self, service: str, region: str = REGION) -> Any:
        """The test's own client."""
        import boto3

        session = boto3.session.Session("AKIAIOSFODNN7EXAMPLE", SECRET, region_name=region)
        return session.client(service, endpoint_url=self.url)

    def image(self) -> str:
        """An Ubuntu image of moto's."""
        return str(
            next(
                iter(
                    _ec2(REGION).describe_images(
                        filters={"architecture": ["x86_64"], "root-device-type": ["ebs"]}
                    )
                )
            ).id
        )

    def fault(self, match: str, kind: str, times: int = 1, **more: Any) -> None:
        """What happens to the next `times` requests whose `service Action` or `service METHOD /path` contains `match`:
        refuse (code, status), lose-request, lose-answer, garbage, lie (has its effect and is refused), truncate, corrupt."""
        self.faults.append({"match": match, "kind": kind, "times": times, **more})

    def instances(self) -> list[Any]:
        """Every instance there ever was, as moto has it."""
        return [item for region in sorted(self._regions) for item in _ec2(region).all_instances()]

    def alive(self) -> list[str]:
        """Ids of instances that bill."""
        return [item.id for item in self.instances() if item.state not in {"terminated", "shutting-down"}]

    def subnets(self) -> list[Any]:
        """The subnets of the first region."""
        return list(_ec2(REGION).describe_subnets())

    def sent(self, match: str) -> list[dict[str, Any]]:
        """Requests whose name contains `match`: {name, parameters}."""
        return [row for row in self.requests if match in row["name"]]

    def kill(self, node_id: str, reason: str = "Server.InternalError") -> None:
        """The instance dies by itself."""
        for region in self._regions:
            for item in _ec2(region).all_instances():
                if item.id == node_id:
                    _ec2(region).terminate_instances([node_id])
                    item.state_reason.code = reason

    def may_bill(self) -> None:
        """The test leaves an instance on purpose."""
        self._may_bill = True

    def close(self) -> None:
        """End everything, then complain about what was left."""
        left, unfired = self.alive(), self.unfired()
        self._over.set()
        self._poller.join()
        if self._nodes:
            self._nodes.end_all()
        for item in self.metadata.values():
            item.close()
        self._server.shutdown()
        self._server.server_close()
        self.complain(left, unfired)

    def unfired(self) -> list[dict[str, Any]]:
        """Faults that have not happened."""
        return [item for item in self.faults if item["times"] > 0]

    def complain(self, left: list[str], unfired: list[dict[str, Any]]) -> None:
        """Fail for what was left."""
        assert unfired == [], "these faults never happened: the test shows nothing"
        assert self._may_bill or left == [], "instances are left"

    # ------------------------------------------------------------ HTTP

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        body = _body(environ)
        name, parameters, region = _name(environ, body)
        with self._lock:
            self.requests.append(
                {
                    "name": name,
                    "parameters": parameters,
                    "method": environ["REQUEST_METHOD"],
                    "bytes": len(body),
                }
            )
            self._regions.add(region)
            fault = next((item for item in self.faults if item["times"] > 0 and item["match"] in name), None)
            if fault:
                fault["times"] -= 1
        kind = fault["kind"] if fault else ""
        if kind == "refuse":
            return _refuse(start_response, name, fault["code"], fault.get("status", 400))
        if kind == "lose-request":
            return _drop(environ)
        status, headers, answer = self._answer(environ, name, parameters, region)
        if kind == "lose-answer":
            return _drop(environ)
        if kind == "lie":
            return _refuse(start_response, name, fault.get("code", "InternalError"), fault.get("status", 500))
        if kind == "garbage":
            status, headers, answer = (
                "200 OK",
                [("Content-Type", "text/plain")],
                b"<html>not what you asked for",
            )
        if kind == "corrupt":
            answer = (
                answer[: len(answer) // 2]
                + bytes([answer[len(answer) // 2] ^ 0xFF])
                + answer[len(answer) // 2 + 1 :]
            )
        if kind == "truncate":
            start_response(status, headers)
            return _half(environ, answer)
        start_response(status, headers)
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else answer]

    def _answer(
        self, environ: dict[str, Any], name: str, parameters: dict[str, str], region: str
    ) -> tuple[str, list[tuple[str, str]], bytes]:
        service, _, action = name.partition(" ")
        action = action.split(" ")[0] if service != "s3" else action
        if action in self.denied:
            return _error(
                service, "UnauthorizedOperation" if service == "ec2" else "AccessDeniedException", 403
            )
        if service == "s3" and (problem := _unsigned(environ)):
            return _error("s3", problem, 403)
        if service == "pricing":
            return self._price_list(parameters)
        if name == "ssm GetParameters":
            return self._ssm(json.loads(environ["wsgi.input"].getvalue()))
        if service == "ec2":
            special = self._ec2_special(action, parameters, region)
            if special is not None:
                return special
        if action in {"DescribeInstanceTypes", "DescribeInstanceTypeOfferings"}:
            _narrow(environ, parameters)
        made = self._forward(environ)
        if (
            action == "RunInstances"
            and made[0].startswith("200")
            and self.honour_tokens
            and "ClientToken" in parameters
        ):
            self._tokens[region, parameters["ClientToken"]] = made[2]
        if action == "DescribeInstances" and self._nodes:
            made = (
                made[0],
                made[1],
                re.sub(rb"<ipAddress>[^<]*</ipAddress>", b"<ipAddress>127.0.0.1</ipAddress>", made[2]),
            )
            made = made[0], [item for item in made[1] if item[0].lower() != "content-length"], made[2]
        if service == "s3" and environ["REQUEST_METHOD"] == "GET":
            self.objects_got.append(environ["PATH_INFO"])
        return made

    def _ec2_special(
        self, action: str, parameters: dict[str, str], region: str
    ) -> tuple[str, list[tuple[str, str]], bytes] | None:
        if action == "RunInstances" and "DryRun" not in parameters:
            if (answer := self._tokens.get((region, parameters.get("ClientToken", "")))) is not None:
                return "200 OK", [("Content-Type", "text/xml")], answer
            subnet = parameters.get("NetworkInterface.1.SubnetId", "")
            zone = next(
                (item.availability_zone for item in _ec2(region).describe_subnets() if item.id == subnet), ""
            )
            if self.sold_out & {zone, f"{parameters.get('InstanceType')}/{zone}"}:
                return _error("ec2", "InsufficientInstanceCapacity", 500)
        if action == "TerminateInstances" and "DryRun" not in parameters:
            over = any(
                item.id == parameters["InstanceId.1"] and item.state == "terminated"
                for item in _ec2(region).all_instances()
            )
            if not self.terminate_lies and not over:  # moto cannot end what has ended; EC2 says yes again
                return None
            self.terminate_lies -= 0 if over else 1
            item = f"<item><instanceId>{parameters['InstanceId.1']}</instanceId><currentState><code>32</code><name>shutting-down</name></currentState></item>"
            return (
                "200 OK",
                [("Content-Type", "text/xml")],
                f"<TerminateInstancesResponse><instancesSet>{item}</instancesSet></TerminateInstancesResponse>".encode(),
            )
        if action == "DescribeRegions" and "DryRun" not in parameters:
            names = "".join(f"<item><regionName>{name}</regionName></item>" for name in REGIONS)
            text = f"<DescribeRegionsResponse><regionInfo>{names}</regionInfo></DescribeRegionsResponse>"
            return "200 OK", [("Content-Type", "text/xml")], text.encode()
        if action == "DescribeSpotPriceHistory" and "DryRun" not in parameters:
            return self._spot_history(parameters, region)
        if parameters.get("DryRun") == "true":
            return _error("ec2", "DryRunOperation", 412)
        return None

    def _spot_history(
        self, parameters: dict[str, str], region: str
    ) -> tuple[str, list[tuple[str, str]], bytes]:
        types = [value for key, value in parameters.items() if key.startswith("InstanceType.")]
        zones = (
            [parameters["AvailabilityZone"]]
            if "AvailabilityZone" in parameters
            else [f"{region}{letter}" for letter in "abcdef"]
        )
        items = "".join(
            f"<item><instanceType>{kind}</instanceType><availabilityZone>{zone}</availabilityZone><spotPrice>{self.spot.get(zone, 0.4)}</spotPrice>"
            f"<timestamp>{datetime(2026, 1, 1, tzinfo=UTC).isoformat()}</timestamp></item>"
            for kind in types
            for zone in zones
        )
        text = f"<DescribeSpotPriceHistoryResponse><spotPriceHistorySet>{items}</spotPriceHistorySet></DescribeSpotPriceHistoryResponse>"
        return "200 OK", [("Content-Type", "text/xml")], text.encode()

    def _price_list(self, parameters: dict[str, str]) -> tuple[str, list[tuple[str, str]], bytes]:
        if self.prices is None:
            return _error("pricing", "AccessDeniedException", 400)
        name = parameters.get("instanceType", "")
        dimension = {"unit": "Hrs", "pricePerUnit": {"USD": str(self.prices.get(name, 0))}}
        rows = [
            {"product": {"attributes": {"instanceType": name, "regionCode": region, "marketoption": "OnDemand"}},
             "terms": {"OnDemand": {"X": {"priceDimensions": {"Y": dimension}}}}}
            for region in ("us-east-1", "us-east-2", "us-west-2", "eu-west-1")
        ]  # fmt: skip
        body = json.dumps(
            {"FormatVersion": "aws_v1", "PriceList": [json.dumps(row) for row in rows]}
        ).encode()
        return "200 OK", [("Content-Type", "application/x-amz-json-1.1")], body

    def _ssm(self, wanted: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
        found = [
            {"Name": name, "Value": self.parameters[name]}
            for name in wanted["Names"]
            if name in self.parameters
        ]
        lacking = [name for name in wanted["Names"] if name not in self.parameters]
        body = json.dumps({"Parameters": found, "InvalidParameters": lacking}).encode()
        return "200 OK", [("Content-Type", "application/x-amz-json-1.1")], body

    def _forward(self, environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
        told: list[Any] = []
        answer = b"".join(self._moto(environ, lambda status, headers, *_: told.append((status, headers))))
        return told[0][0], told[0][1], answer

    # ------------------------------------------------------------ nodes

    def _poll(self) -> None:
        while not self._over.wait(0.05):
            if self._nodes is None:
                continue
            for region in list(self._regions):
                for item in _ec2(region).all_instances():
                    self._attend(region, item)
            self._nodes.poll()
            self._nodes.run_guards(60 * self.pace)
            for node_id in self._nodes.powered_off():
                self.kill(node_id, "Client.InstanceInitiatedShutdown")

    def _attend(self, region: str, item: Any) -> None:
        assert self._nodes is not None
        if item.state == "running" and item.id not in self._started:
            self._started.add(item.id)
            self._nodes.refuse(item.id)
            self.metadata[item.id] = Metadata(lambda: {tag["key"]: tag["value"] for tag in item.get_tags()})
            if self.boots:
                key = _ec2(region).key_pairs[item.key_name].material_public.decode()
                env = {"LLMCTL_IMDS": self.metadata[item.id].url}
                self._nodes.start(
                    item.id, key, _user_data(item.user_data), env, ignored=self.ignore_user_data
                )
        elif item.state == "terminated" and item.id in self._started and item.id not in self._ended:
            self._ended.add(item.id)
            self._nodes.end(item.id)


def _ec2(region: str) -> Any:
    """moto's own state."""
    from moto.ec2.models import ec2_backends

    return ec2_backends[ACCOUNT][region]


def _narrow(environ: dict[str, Any], parameters: dict[str, str]) -> None:
    """moto knows no wildcards in the names of types, and is slow with all of its thousand: name those that are sold here."""
    patterns = [value for key, value in parameters.items() if key.startswith("Filter.1.Value.")]
    kept = {key: value for key, value in parameters.items() if not key.startswith("Filter.1.Value.")}
    names = [name for name in SOLD if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)] or [
        "none.at-all"
    ]
    kept |= {f"Filter.1.Value.{index}": name for index, name in enumerate(names, 1)}
    data = urlencode(kept).encode()
    environ["wsgi.input"], environ["CONTENT_LENGTH"] = io.BytesIO(data), str(len(data))


def _user_data(text: Any) -> str | None:
    import base64

    if not text:
        return None
    raw = text if isinstance(text, str) else text.decode()
    return raw if raw.startswith("#") else base64.b64decode(raw).decode()


def _body(environ: dict[str, Any]) -> bytes:
    """Read the body and put it back."""
    if environ.get("HTTP_TRANSFER_ENCODING", "").lower() == "chunked":
        data = environ["wsgi.input"].read()
    else:
        data = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = io.BytesIO(data)
    environ["CONTENT_LENGTH"] = str(len(data))
    return data


def _name(environ: dict[str, Any], body: bytes) -> tuple[str, dict[str, str], str]:
    """(`ec2 RunInstances` or `s3 GET /bucket/key`, parameters, region)."""
    scope = re.search(
        r"Credential=[^/]+/\d+/([^/]+)/([^/]+)/aws4_request", environ.get("HTTP_AUTHORIZATION", "")
    )
    region, service = (scope[1], scope[2]) if scope else (REGION, "s3")
    if service in {"ec2", "sts"}:
        parameters = {
            key: values[0] for key, values in parse_qs(body.decode(), keep_blank_values=True).items()
        }
        where = parameters.get("NetworkInterface.1.SubnetId", "")
        return f"{service} {parameters.get('Action')} {where}".rstrip(), parameters, region
    if "HTTP_X_AMZ_TARGET" in environ:
        raw = json.loads(body or b"{}")
        filters = {item["Field"]: item["Value"] for item in raw.get("Filters", []) if "Field" in item}
        return f"{service} {environ['HTTP_X_AMZ_TARGET'].rpartition('.')[2]}", filters, region
    query = {
        key: values[0]
        for key, values in parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True).items()
    }
    return f"s3 {environ['REQUEST_METHOD']} {unquote(environ['PATH_INFO'])}", query, region


def _unsigned(environ: dict[str, Any]) -> str | None:
    """Why S3 would refuse this, as far as signatures go: none at all, version 2, or too old."""
    query = parse_qs(environ.get("QUERY_STRING", ""))
    if environ.get("HTTP_AUTHORIZATION", "").startswith("AWS4-HMAC-SHA256"):
        return None
    if query.get("X-Amz-Algorithm") != ["AWS4-HMAC-SHA256"] or "X-Amz-Signature" not in query:
        return "AccessDenied"
    at = datetime.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return "AccessDenied" if time.time() > at.timestamp() + int(query["X-Amz-Expires"][0]) else None


def _error(service: str, code: str, status: int) -> tuple[str, list[tuple[str, str]], bytes]:
    words = f"{code} by the test's server"
    if service == "ec2":
        text = f"<Response><Errors><Error><Code>{code}</Code><Message>{words}</Message></Error></Errors><RequestID>0</RequestID></Response>"
    elif service in {"s3", "sts"}:
        inner = f"<Error><Code>{code}</Code><Message>{words}</Message></Error>"
        text = inner if service == "s3" else f"<ErrorResponse>{inner}</ErrorResponse>"
    else:
        body = json.dumps({"__type": code, "message": words}).encode()
        return (
            f"{status} X",
            [("Content-Type", "application/x-amz-json-1.1"), ("x-amzn-errortype", code)],
            body,
        )
    return f"{status} X", [("Content-Type", "text/xml")], text.encode()


def _refuse(start_response: Any, name: str, code: str, status: int) -> list[bytes]:
    line, headers, body = _error(name.partition(" ")[0], code, status)
    start_response(line, headers)
    return [body]


def _drop(environ: dict[str, Any]) -> Any:
    """Close the connection without a word."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionError("dropped for the test")


def _half(environ: dict[str, Any], answer: bytes) -> Iterator[bytes]:
    yield answer[: len(answer) // 2]
    _drop(environ)


@pytest.fixture
def aws_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., AwsServer]]:
    """Makes accounts; all are closed and checked at the end. This process takes the last one for AWS."""
    made: list[AwsServer] = []

    def make(**options: Any) -> AwsServer:
        made.append(AwsServer(tmp_path / f"aws{len(made)}", **options))
        _take(made[-1], tmp_path, monkeypatch)
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def aws(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AwsServer]:
    """An account whose instances exist on paper; one server of a process serves all its tests, empty each time."""
    if _SHARED:
        _SHARED[0].renew()
    else:
        _SHARED.append(AwsServer(tmp_path_factory.mktemp("aws"), pace=0.0001))
    _take(_SHARED[0], tmp_path, monkeypatch)
    yield _SHARED[0]
    _SHARED[0].complain(_SHARED[0].alive(), _SHARED[0].unfired())


_SHARED: list[AwsServer] = []


def _take(server: AwsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process takes the server for AWS."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
