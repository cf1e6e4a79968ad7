#!/usr/bin/python
"""Ansible module `rabbitmq_info`: which RabbitMQ a host has, and which cluster its node sees."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rabbitmq_info
short_description: Tell which RabbitMQ a host has, and which cluster its node sees
description: Changes nothing.
options:
  node: {description: The node's name., type: str, required: true}
  package: {description: Name of the package., type: str, default: rabbitmq-server}
  cookie_file: {description: File with the cookie., type: path, default: /var/lib/rabbitmq/.erlang.cookie}
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rabbitmq_cli import Rabbit


def versions(module: AnsibleModule, package: str) -> dict[str, str]:
    """Return the versions of the package that is installed and that could be: '' for none."""
    _, out, _ = module.run_command(["apt-cache", "policy", package], environ_update={"LC_ALL": "C"})
    found = dict(re.findall(r"^ +(Installed|Candidate): ([0-9.]+)", out, re.MULTILINE))
    return {"installed": found.get("Installed", ""), "candidate": found.get("Candidate", "")}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "node": {"type": "str", "required": True},
            "package": {"type": "str", "default": "rabbitmq-server"},
            "cookie_file": {"type": "path", "default": "/var/lib/rabbitmq/.erlang.cookie"},
        },
        supports_check_mode=True,
    )
    node, cookie = module.params["node"], Path(module.params["cookie_file"])
    result: dict[str, Any] = {"node": node, "running": False, "nodes": [], "running_nodes": [], "holds_anything": False}
    result |= versions(module, module.params["package"])
    result["cookie_hash"] = hashlib.sha256(cookie.read_bytes().strip()).hexdigest() if cookie.exists() else ""
    if result["installed"] and (status := (rabbit := Rabbit(module, node)).status()):
        result |= status | {"running": True, "holds_anything": rabbit.holds_anything()}
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
