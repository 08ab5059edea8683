"""The account: moto behind a front that knows tokens, capacity, quotas, prices, signatures and faults."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

from tests.aws_server.market import Market
from tests.aws_server.nodes import AwsNodes, Metadata
from tests.aws_server.wire import (
    IMAGE,
    PACE,
    PRICES,
    REGION,
    SECRET,
    Answer,
    body_of,
    drop,
    ec2,
    error,
    half,
    name_of,
    narrow,
    refuse,
    unsigned,
    user_data,
)


class AwsServer(Market):
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
        self.denied_regions: set[str] = set()
        """Regions in which it may do nothing."""
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
                    ec2(REGION).describe_images(
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
        return [item for region in sorted(self._regions) for item in ec2(region).all_instances()]

    def alive(self) -> list[str]:
        """Ids of instances that bill."""
        return [item.id for item in self.instances() if item.state not in {"terminated", "shutting-down"}]

    def subnets(self) -> list[Any]:
        """The subnets of the first region."""
        return list(ec2(REGION).describe_subnets())

    def sent(self, match: str) -> list[dict[str, Any]]:
        """Requests whose name contains `match`: {name, parameters}."""
        return [row for row in self.requests if match in row["name"]]

    def kill(self, node_id: str, reason: str = "Server.InternalError") -> None:
        """The instance dies by itself."""
        for region in self._regions:
            for item in ec2(region).all_instances():
                if item.id == node_id:
                    ec2(region).terminate_instances([node_id])
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
        body = body_of(environ)
        name, parameters, region = name_of(environ, body)
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
            return refuse(start_response, name, fault["code"], fault.get("status", 400))
        if kind == "lose-request":
            return drop(environ)
        status, headers, answer = self._answer(environ, name, parameters, region)
        if kind == "lose-answer":
            return drop(environ)
        if kind == "lie":
            return refuse(start_response, name, fault.get("code", "InternalError"), fault.get("status", 500))
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
            return half(environ, answer)
        start_response(status, headers)
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else answer]

    def _answer(self, environ: dict[str, Any], name: str, parameters: dict[str, str], region: str) -> Answer:
        service, _, action = name.partition(" ")
        action = action.split(" ")[0] if service != "s3" else action
        if action in self.denied or (service == "ec2" and region in self.denied_regions):
            return error(
                service, "UnauthorizedOperation" if service == "ec2" else "AccessDeniedException", 403
            )
        if service == "s3" and (problem := unsigned(environ)):
            return error("s3", problem, 403)
        if service == "pricing":
            return self._price_list(parameters)
        if name == "ssm GetParameters":
            return self._ssm(json.loads(environ["wsgi.input"].getvalue()))
        if service == "ec2":
            special = self._ec2_special(action, parameters, region)
            if special is not None:
                return special
        if action in {"DescribeInstanceTypes", "DescribeInstanceTypeOfferings"}:
            narrow(environ, parameters)
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

    def _forward(self, environ: dict[str, Any]) -> Answer:
        told: list[Any] = []
        answer = b"".join(self._moto(environ, lambda status, headers, *_: told.append((status, headers))))
        return told[0][0], told[0][1], answer

    # ------------------------------------------------------------ nodes

    def _poll(self) -> None:
        while not self._over.wait(0.05):
            if self._nodes is None:
                continue
            for region in list(self._regions):
                for item in ec2(region).all_instances():
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
                key = ec2(region).key_pairs[item.key_name].material_public.decode()
                env = {"LLMCTL_IMDS": self.metadata[item.id].url}
                self._nodes.start(item.id, key, user_data(item.user_data), env, ignored=self.ignore_user_data)
        elif item.state == "terminated" and item.id in self._started and item.id not in self._ended:
            self._ended.add(item.id)
            self._nodes.end(item.id)
