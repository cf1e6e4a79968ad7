#!/usr/bin/python
"""Ansible module `systemd_units`: bring several systemd units into their state, in one run."""

from __future__ import annotations

DOCUMENTATION = r"""
module: systemd_units
short_description: Bring several systemd units into their state in one run
description:
  - Enables and starts units, restarts those whose service was started with other files or settings than there are now, reloads
    those of which only what a reload reads is different, and removes those that are not wanted.
  - What a service was started with is known by a mark that a drop-in of each unit leaves in /run, not by what this run has
    changed, so that a run after an interrupted one finds what that one has left undone.
options:
  units:
    description: The units, brought into their state in this order.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name with type, as in C(prometheus.service).
        type: str
        required: true
      files:
        description: >-
          Files, links and folders that the service reads at its start: settings, secrets, program. Those of the unit itself count
          without being named; one that is not there counts as such.
        type: list
        elements: path
        default: []
      reload_files:
        description: What the service reads again when it is reloaded.
        type: list
        elements: path
        default: []
      state:
        description: >-
          Whether it runs, and does at boot. With C(kept), that is left as it is, and one that runs is restarted for other files.
          With C(absent), a unit of ours is stopped and removed, and one of a package is stopped and loses our drop-ins, if it has
          any; others' are left alone.
        type: str
        choices: [started, kept, stopped, absent]
        default: started
      ready:
        description: What answers once the service of a unit with O(units[].state=started) is ready; waited for, but not in check mode.
        type: dict
        suboptions:
          host:
            description: Address to connect to.
            type: str
            default: 127.0.0.1
          port:
            description: TCP port to connect to. This or O(units[].ready.socket).
            type: int
          socket:
            description: UNIX socket to connect to.
            type: path
          path:
            description: Path of a URL that answers a GET over HTTP with status 200; without it, a connection is enough.
            type: str
          timeout:
            description: Seconds to wait.
            type: int
            default: 60
author: Celery Platform
"""

EXAMPLES = r"""
- name: Run Flower
  systemd_units:
    units:
      - name: flower.service
        files: [/etc/flower/flowerconfig.py]
        ready: {socket: /run/flower/flower.sock}
"""

RETURN = r"""
done:
  description: What was done, or would be, by name of the unit; started, restarted, reloaded, enabled, stopped or removed.
  returned: always
  type: dict
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.systemd_units import Systemd, digest_of, result_of


def bring_all(systemd: Systemd, units: list[dict[str, Any]], check: bool) -> dict[str, Any]:
    """Bring all units into their state and return the module's result.

    Raises:
        UnitError: if one does not come into its state; the units after it are left as they are.
    """
    if not check:
        systemd("daemon-reload")
    done = {}
    for unit in units:
        name = unit["name"]
        if unit["state"] in ("started", "kept"):
            kept = unit["state"] == "kept"
            done[name] = systemd.bring(name, digest_of(unit["files"]), digest_of(unit["reload_files"]), check, kept)
            if unit["ready"] and not check:
                systemd.wait_until_ready(name, unit["ready"])
        elif unit["state"] == "stopped" and systemd.stop(name, check):
            done[name] = "stopped"
        elif unit["state"] == "absent" and systemd.remove(name, check):
            done[name] = "removed"
    done = {name: what for name, what in done.items() if what}
    return {"changed": bool(done), "done": done}


def main() -> None:
    """Run the module."""
    ready = {
        "host": {"type": "str", "default": "127.0.0.1"},
        "port": {"type": "int"},
        "socket": {"type": "path"},
        "path": {"type": "str"},
        "timeout": {"type": "int", "default": 60},
    }
    options = {
        "name": {"type": "str", "required": True},
        "files": {"type": "list", "elements": "path", "default": []},
        "reload_files": {"type": "list", "elements": "path", "default": []},
        "state": {"type": "str", "choices": ["started", "kept", "stopped", "absent"], "default": "started"},
        "ready": {"type": "dict", "options": ready, "mutually_exclusive": [("port", "socket")], "required_one_of": [("port", "socket")]},
    }
    module = AnsibleModule(
        argument_spec={"units": {"type": "list", "elements": "dict", "required": True, "options": options}},
        supports_check_mode=True,
    )
    result_of(module, lambda: bring_all(Systemd(module), module.params["units"], module.check_mode))


if __name__ == "__main__":
    main()
