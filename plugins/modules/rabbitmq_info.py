#!/usr/bin/python
"""Ansible module `rabbitmq_info`: which RabbitMQ a host has, and which cluster its node sees."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rabbitmq_info
short_description: Tell which RabbitMQ a host has, and which cluster its node sees
description: Changes nothing.
options:
  node: {description: The node's name., type: str, required: true}
  package: {description: "Name of the package, to tell its versions: installed, candidate.", type: str}
  cookie: {description: The cookie that all nodes shall have., type: str}
  cookie_file: {description: File with the cookie that the node has., type: path}
"""

import re
import socket
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rabbitmq_cli import Rabbit

#: Port of Erlang's port mapper (erlang.org/doc/apps/erts/epmd_cmd).
PORT_MAPPER = 4369


def versions(module: AnsibleModule, package: str) -> dict[str, str]:
    """Return the versions of the package that is installed and that could be: '' for none."""
    _, out, _ = module.run_command(["apt-cache", "policy", package], environ_update={"LC_ALL": "C"})
    found = dict(re.findall(r"^ +(Installed|Candidate): ([0-9.]+)", out, re.MULTILINE))
    return {"installed": found.get("Installed", ""), "candidate": found.get("Candidate", "")}


def port_mapper_listens() -> bool:
    """Tell whether Erlang's port mapper answers, without which no node runs. Any command of RabbitMQ would start one beside systemd's."""
    try:
        socket.create_connection(("127.0.0.1", PORT_MAPPER), 5).close()
    except OSError:
        return False
    return True


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "node": {"type": "str", "required": True},
            "package": {"type": "str"},
            "cookie": {"type": "str", "no_log": True},
            "cookie_file": {"type": "path"},
        },
        supports_check_mode=True,
    )
    arguments = module.params
    result = {"node": arguments["node"], "running": False, "nodes": [], "running_nodes": [], "cookie_differs": False}
    if arguments["package"]:
        result |= versions(module, arguments["package"])
    if arguments["cookie_file"] and (cookie := Path(arguments["cookie_file"])).exists():
        result["cookie_differs"] = cookie.read_text().strip() != arguments["cookie"]
    if port_mapper_listens() and (status := Rabbit(module, arguments["node"]).status()):
        result |= status | {"running": True}
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
