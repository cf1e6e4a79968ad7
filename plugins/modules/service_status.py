#!/usr/bin/python
"""Ansible module `service_status`: what a host's services do, and why one does not run. Runs on the host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: service_status
short_description: Read the state of a host's services, judge it, and say why one does not run
description:
  - Reads the units that are in memory, and those that are enabled. A unit that is neither active nor enabled nor failed is
    left out. Changes nothing.
options:
  units: {description: "Names of units, with globs.", type: list, elements: str, required: true}
author: Celery Platform
"""

RETURN = r"""
services:
  description: The services, by name. Each has its C(name) without type, its C(state) in a word, what it says of itself or
    the last line of its log (C(what)), and whether it is C(wrong).
  returned: always
  type: list
"""

import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

PROPERTIES = (
    "Id",
    "Description",
    "LoadState",
    "ActiveState",
    "SubState",
    "Result",
    "UnitFileState",
    "StatusText",
    "Transient",
    "NRestarts",
    "ActiveEnterTimestampMonotonic",
)
#: A service that systemd restarted so often, the last time so few seconds ago, counts as one that cannot stay up.
LOOP_RESTARTS, LOOP_SECONDS = 3, 60
#: Characters of a text that are shown; it comes from a service, and what that logs may come from anybody.
LONGEST_TEXT = 300


def plain(text: str) -> str:
    """Return the last line of a text as a terminal may show it: without control characters, and not too long."""
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in lines[-1].strip())
    return line if len(line) <= LONGEST_TEXT else line[: LONGEST_TEXT - 1] + "…"


def parse(output: str) -> list[dict[str, str]]:
    """Return the properties of each unit from what `systemctl show` prints."""
    blocks = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in output.split("\n\n")]
    return [block for block in blocks if block.get("Id")]


def judge(unit: dict[str, str], uptime: float) -> tuple[str, bool] | None:
    """Return a unit's state in a word and whether that is wrong; None for one that need not run.

    Args:
        unit: its properties, as systemd names them.
        uptime: seconds since the boot.
    """
    active, restarts = unit["ActiveState"], int(unit.get("NRestarts") or 0)
    # Transient are the commands that operators run by celery-exec.
    if unit["LoadState"] != "loaded" or unit.get("Transient") == "yes":
        return None
    if active == "inactive" and unit["UnitFileState"] not in ("enabled", "enabled-runtime"):
        return None
    if active == "failed" or unit["SubState"] == "auto-restart" or (active == "activating" and restarts):
        return "failed", True
    if active in ("active", "reloading"):
        since = uptime - int(unit.get("ActiveEnterTimestampMonotonic") or 0) / 1e6
        if restarts >= LOOP_RESTARTS and since < LOOP_SECONDS:
            return "restarting", True
        return unit["SubState"], False
    return {"inactive": "stopped", "activating": "starting", "deactivating": "stopping"}.get(active, active), True


def describe(unit: dict[str, str], state: str, log: str) -> str:
    """Return what is to be known of a service: what it says of itself, or, if it is wrong, why it does not run."""
    restarts = int(unit.get("NRestarts") or 0)
    if state in ("failed", "restarting"):
        begin = "restarted once" if restarts == 1 else f"restarted {restarts} times" if restarts else unit.get("Result") or "failed"
        return f"{begin}; {log}" if log else begin
    if state in ("stopped", "starting", "stopping") and log:
        return log
    return plain(unit.get("StatusText") or unit.get("Description") or "")


def main() -> None:
    """Run the module."""
    module = AnsibleModule({"units": {"type": "list", "elements": "str", "required": True}}, supports_check_mode=True)

    def run(*command: str) -> str:
        return str(module.run_command(list(command))[1])

    names = [f"{name}.service" for name in module.params["units"]]
    enabled = [line.split()[0] for line in run("systemctl", "list-unit-files", "--plain", "--no-legend", *names).splitlines()]
    # `show` knows globs of those in memory only.
    instances = [name for name in enabled if not name.endswith("@.service")]
    shown = parse(run("systemctl", "show", "--property=" + ",".join(PROPERTIES), "--", *names, *instances))
    units = {unit["Id"]: unit for unit in shown}

    def log(name: str) -> str:
        journal = ("journalctl", "--no-pager", "--output=cat", "--lines=3")
        # What the service said itself; what systemd says of it only if it said nothing.
        return plain(run(*journal, f"_SYSTEMD_UNIT={name}") or run(*journal, f"--unit={name}"))

    services: list[dict[str, Any]] = []
    for name, unit in sorted(units.items()):
        if judged := judge(unit, time.clock_gettime(time.CLOCK_MONOTONIC)):
            state, wrong = judged
            what = describe(unit, state, log(name) if wrong else "")
            services.append({"name": name.removesuffix(".service"), "state": state, "what": what, "wrong": wrong})
    module.exit_json(changed=False, services=services)


if __name__ == "__main__":
    main()
