"""The account behind the server: instances, keys, filesystems, the audit log, and the provider's own ledger. No HTTP."""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.lambda_server.catalogue import CAPACITY, REGIONS, TYPES, region
from tests.lambda_server.nodes import Nodes, cloud_config
from tests.lambda_server.switches import Switches

GONE = "global/object-does-not-exist"
INVALID = "global/invalid-parameters"


class RefusalError(Exception):
    """An answer that is not a 200."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass
class Machine:
    """One instance; times are the server's real seconds, None where it has not come to that."""

    id: str
    request: dict[str, Any]
    launched: float
    boots_until: float
    ip: str
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    name: str | None = None
    active: float | None = None
    listening: bool = False
    died: float | None = None
    died_as: str = ""
    terminate_accepted: float | None = None
    terminates: int = 0
    lies: int = 0

    def status(self, at: float, terminating_seconds: float) -> str | None:
        """What was true at that time; None before the launch and for one that vanished."""
        if at < self.launched:
            return None
        if self.terminate_accepted is not None and at >= self.terminate_accepted:
            over = at >= self.terminate_accepted + terminating_seconds
            return "terminated" if over else "terminating"
        if self.died is not None and at >= self.died:
            return None if self.died_as == "vanished" else self.died_as
        return "active" if self.active is not None and at >= self.active else "booting"

    def over(self, terminating_seconds: float) -> float | None:
        """When there was nothing left of it."""
        if self.terminate_accepted is not None:
            return self.terminate_accepted + terminating_seconds
        return self.died if self.died_as in ("terminated", "preempted", "vanished") else None

    def billed(self, now: float) -> tuple[float, float] | None:
        """The billed interval so far: from passing the health checks to the accepted terminate, or to its death."""
        if self.active is None:
            return None
        ends = [at for at in (self.terminate_accepted, self.over(0.0)) if at is not None]
        return self.active, max(self.active, min(ends, default=now))


class World:
    """All state, behind one lock. `clock` gives POSIX seconds; switches give durations in virtual ones."""

    def __init__(self, switches: Switches, clock: Callable[[], float], nodes: Nodes | None) -> None:
        self.lock = threading.RLock()
        self.switches = switches
        self.machines: dict[str, Machine] = {}
        self.keys: list[dict[str, str]] = []
        self.audit: list[tuple[float, dict[str, Any]]] = []
        """When each event happened, and the event."""
        self._clock = clock
        self._nodes = nodes
        self._capacity_since = clock()

    def set(self, changes: dict[str, Any]) -> None:
        """Change switches."""
        with self.lock:
            if "capacity_after" in changes:
                self._capacity_since = self._clock()
            self.switches = self.switches.changed(changes)

    def real(self, virtual: float) -> float:
        """Real seconds of a virtual duration."""
        return virtual * self.switches.pace

    def advance(self) -> None:
        """Let happen what time has brought."""
        now, switches = self._clock(), self.switches
        for machine in self.machines.values():
            if machine.over(self.real(switches.terminating_seconds)) is not None:
                if machine.listening and machine.over(0.0) is not None:
                    machine.listening = False
                    self._power_off(machine)
                continue
            if machine.died is not None:
                continue
            if machine.active is None:
                if now >= machine.boots_until:
                    self._boot(machine, now)
            elif switches.die_after is not None and now >= machine.active + self.real(switches.die_after):
                self.kill(machine.id, switches.die_as)
            elif not machine.listening and now >= machine.active + self.real(switches.ssh_delay):
                self._power_on(machine)
        if self._nodes is not None:
            self._nodes.poll()
            self._nodes.run_guards(self.real(60.0))

    def _boot(self, machine: Machine, now: float) -> None:
        if self.switches.boot_ends_as != "active":
            machine.active = now if self.switches.boot_ends_as == "unhealthy" else None
            machine.died, machine.died_as = now, self.switches.boot_ends_as
            return
        machine.active = now
        if self._nodes is None:
            machine.listening = True
            return
        self._nodes.refuse(machine.id)
        if self.switches.ssh_delay == 0:
            self._power_on(machine)

    def _power_on(self, machine: Machine) -> None:
        machine.listening = True
        if self._nodes is None or self.switches.ssh == "never":
            return
        names = machine.request["ssh_key_names"]
        public = next(key["public_key"] for key in self.keys if key["name"] in names)
        data, ignored = machine.request.get("user_data"), self.switches.user_data_ignored
        self._nodes.start(machine.id, public, data, self.switches.node_env, ignored=ignored)

    def _power_off(self, machine: Machine) -> None:
        if self._nodes is not None:
            self._nodes.end(machine.id)

    def kill(self, machine_id: str, how: str) -> None:
        """The instance dies by itself."""
        machine = self.machines[machine_id]
        machine.died, machine.died_as = self._clock(), how
        machine.listening = False
        self._power_off(machine)

    def launch(self, request: dict[str, Any]) -> dict[str, Any]:
        """POST launch."""
        switches, now = self.switches, self._clock()
        name, place = request["instance_type_name"], request["region_name"]
        if switches.account == "quota":
            raise RefusalError(400, "global/quota-exceeded", "Quota exceeded.")
        if switches.account == "bad-address":
            raise RefusalError(403, "global/invalid-address", "Your billing address is invalid.")
        if len(request["ssh_key_names"]) != 1:
            raise RefusalError(400, INVALID, "Exactly one SSH key must be specified.")
        if request["ssh_key_names"][0] not in [key["name"] for key in self.keys] or name not in TYPES:
            raise RefusalError(404, GONE, "The SSH key or the instance type does not exist.")
        for filesystem in request.get("file_system_names", ()):
            self._check_filesystem(filesystem, place)
        try:
            cloud_config(request.get("user_data"))
        except ValueError as error:
            raise RefusalError(400, INVALID, "The user data is no cloud-init configuration.") from error
        if place not in self.capacity(name) or f"{name}/{place}" in switches.ghost_capacity:
            code = "instance-operations/launch/insufficient-capacity"
            raise RefusalError(400, code, "Not enough capacity to fulfill launch request.")
        boots_until = now + self.real(switches.boot_seconds)
        ip = "127.0.0.1" if self._nodes else f"198.51.100.{len(self.machines) + 1}"
        machine = Machine(secrets.token_hex(16), request, now, boots_until, ip, name=request.get("name"))
        self.machines[machine.id] = machine
        self._log(machine, "launch")
        return {"instance_ids": [machine.id]}

    def _check_filesystem(self, name: str, place: str) -> None:
        places = dict(entry.split("@") for entry in self.switches.filesystems)
        if name not in places:
            raise RefusalError(404, GONE, "The filesystem does not exist.")
        if places[name] != place:
            code = "instance-operations/launch/file-system-in-wrong-region"
            raise RefusalError(400, code, "The filesystem is in another region.")

    def terminate(self, ids: list[str]) -> dict[str, Any]:
        """POST terminate."""
        now, switches = self._clock(), self.switches
        found = [self._existing(machine_id) for machine_id in ids]
        for machine in found:
            machine.terminates += 1
            if now < machine.launched + self.real(switches.terminate_unavailable_seconds):
                raise RefusalError(400, INVALID, "The instance cannot be terminated yet.")
        answers = []
        for machine in found:
            if switches.terminate_lies:
                machine.lies += 1
                self.switches = switches.changed({"terminate_lies": max(switches.terminate_lies - 1, -1)})
            elif machine.over(0.0) is None:
                machine.terminate_accepted = now
                self._log(machine, "terminate")
            answers.append(self._shown(machine, now) | {"status": "terminating"})
        self.advance()
        return {"terminated_instances": answers}

    def rename(self, machine_id: str, request: dict[str, Any]) -> dict[str, Any]:
        """POST instance."""
        machine = self._existing(machine_id)
        if not self.switches.rename_ignored:
            machine.name = request.get("name", machine.name)
        return self._shown(machine, self._clock())

    def instances(self) -> list[dict[str, Any]]:
        """GET instances, as far as the list has come."""
        at = self._clock() - self.real(self.switches.list_lag)
        return [self._shown(machine, at) for machine in self.machines.values() if self._visible(machine, at)]

    def instance(self, machine_id: str) -> dict[str, Any]:
        """GET instance."""
        at = self._clock() - self.real(self.switches.lookup_lag)
        return self._shown(self._existing(machine_id, at), at)

    def _existing(self, machine_id: str, at: float | None = None) -> Machine:
        at = self._clock() if at is None else at
        machine = self.machines.get(machine_id)
        if machine is None or not self._visible(machine, at):
            raise RefusalError(self.switches.gone_status, GONE, "Specified instance does not exist.")
        return machine

    def _visible(self, machine: Machine, at: float) -> bool:
        terminating = self.real(self.switches.terminating_seconds)
        if machine.status(at, terminating) is None:
            return False
        over = machine.over(terminating)
        return over is None or at < over + self.real(self.switches.linger_seconds)

    def types(self) -> dict[str, Any]:
        """GET instance-types."""
        return {
            name: {
                "instance_type": item,
                "regions_with_capacity_available": [region(place) for place in self.capacity(name)],
            }
            for name, item in TYPES.items()
        }

    def capacity(self, name: str) -> list[str]:
        """Regions that have this type now."""
        if self._clock() < self._capacity_since + self.real(self.switches.capacity_after):
            return []
        places = self.switches.capacity
        return places.get(name, []) if places else CAPACITY[name]

    def add_key(self, request: dict[str, Any]) -> dict[str, Any]:
        """POST ssh-keys, with a public key only: llmctl never lets Lambda make one."""
        if "public_key" not in request:
            raise RefusalError(400, INVALID, "This server stores public keys only.")
        if self.switches.unique_key_names and request["name"] in [key["name"] for key in self.keys]:
            raise RefusalError(400, INVALID, "There is a key of that name.")
        self.keys.append(
            {"id": secrets.token_hex(16), "name": request["name"], "public_key": request["public_key"]}
        )
        return self.keys[-1]

    def filesystems(self) -> list[dict[str, Any]]:
        """GET file-systems."""
        user = {"id": "3da5a70a57a7422ea8a7203f98b2198b", "email": "me@example.com", "status": "active"}
        used = {
            name
            for machine in self.machines.values()
            for name in machine.request.get("file_system_names", ())
        }
        return [
            {
                "id": secrets.token_hex(16),
                "name": name,
                "mount_point": f"/lambda/nfs/{name}",
                "created": "2026-01-01T00:00:00+00:00",
                "created_by": user,
                "is_in_use": name in used,
                "region": region(place),
                "bytes_used": 3 * 2**30,
            }
            for name, place in (entry.split("@") for entry in self.switches.filesystems)
        ]

    def ledger(self) -> list[dict[str, Any]]:
        """The provider's own bill: started minutes from `active` to the accepted terminate."""
        rows = []
        for machine in self.machines.values():
            billed = machine.billed(self._clock())
            seconds = billed[1] - billed[0] if billed else 0.0
            minutes = max(1, math.ceil(seconds / 60)) if billed else 0
            cents = TYPES[machine.request["instance_type_name"]]["price_cents_per_hour"]
            open_ended = (
                billed is not None and machine.terminate_accepted is None and machine.over(0.0) is None
            )
            row = {"id": machine.id, "name": machine.name, "minutes": minutes, "usd": minutes * cents / 6000}
            rows.append(row | {"seconds": seconds, "billing": open_ended})
        return rows

    def _shown(self, machine: Machine, at: float) -> dict[str, Any]:
        """An Instance as the API gives it."""
        switches, request = self.switches, machine.request
        status = machine.status(at, self.real(switches.terminating_seconds)) or "terminated"
        early = at < machine.launched + self.real(switches.terminate_unavailable_seconds)
        action: dict[str, Any] = {"available": True}
        blocked = {
            "available": False,
            "reason_code": "vm-has-not-launched",
            "reason_description": "Still launching.",
        }
        actions = dict.fromkeys(("migrate", "rebuild", "restart", "cold_reboot"), action)
        shown: dict[str, Any] = {
            "id": machine.id,
            "name": machine.name,
            "ip": machine.ip if status != "booting" else None,
            "private_ip": "10.19.0.2",
            "status": switches.status_names.get(status, status),
            "ssh_key_names": request["ssh_key_names"],
            "file_system_names": request.get("file_system_names", []),
            "region": region(request["region_name"]),
            "instance_type": TYPES[request["instance_type_name"]],
            "hostname": machine.ip,
            "jupyter_token": machine.token,
            "jupyter_url": f"https://jupyter-{machine.id}.lambdaspaces.com/?token={machine.token}",
            "actions": actions | {"terminate": blocked if early else action},
            "tags": request.get("tags", []),
        }
        hidden = {
            *switches.omit,
            *([] if switches.echo_name else ["name"]),
            *([] if switches.echo_tags else ["tags"]),
        }
        extra = (
            {"is_reserved": False, "new_field": {"anything": [1, None]}} if switches.unknown_fields else {}
        )
        return {key: value for key, value in shown.items() if key not in hidden and value is not None} | extra

    def _log(self, machine: Machine, what: str) -> None:
        lrn = f"lrn:cloud:instance:{machine.id}"
        place, name = machine.request["region_name"], machine.request["instance_type_name"]
        event = {
            "service_name": "cloud",
            "resource_name": "instance",
            "action": self.switches.audit_actions[what],
            "catalog_version": "2025-09-06",
            "event_id": secrets.token_hex(16),
            "event_time": datetime.fromtimestamp(self._clock() - self.switches.audit_skew, UTC)
            .isoformat()
            .replace("+00:00", "Z"),
            "actor_lrn": None,
            "resource_lrns": [lrn],
            "resource_owner_lrn": None,
            "request_api_key_lrn": None,
            "additional_details": {"instance_lrn": lrn, "instance_type": name, "region": place},
        }
        self.audit.append((self._clock(), event))

    def audit_page(self, token: str | None) -> tuple[list[dict[str, Any]], str | None]:
        """GET audit-events, two a page."""
        if self.switches.audit == "forbidden":
            raise RefusalError(403, "global/account-inactive", "Your account may not read the audit log.")
        start = int(token or 0)
        until = self._clock() - self.real(self.switches.audit_lag)
        shown = [event for at, event in self.audit if at <= until]
        return shown[start : start + 2], str(start + 2) if start + 2 < len(shown) else None


assert {place for places in CAPACITY.values() for place in places} <= set(REGIONS)
