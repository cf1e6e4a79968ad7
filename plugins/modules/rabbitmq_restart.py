#!/usr/bin/python
"""Ansible module `rabbitmq_restart`: restart or upgrade a node such that the cluster goes on."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rabbitmq_restart
short_description: Restart a RabbitMQ node whose files are newer than its process, or upgrade it
description:
  - Waits until no quorum queue needs the node, hands its queues over, restarts it, and waits until its queues are in sync again.
  - To be run on one host at a time. Whether a restart is due is seen from the host, so a run that stopped in between goes on.
options:
  service: {description: The systemd unit., type: str, required: true}
  node: {description: The node's name., type: str, required: true}
  files: {description: Files that the node reads at its start., type: list, elements: path, default: []}
  package: {description: "Upgrade this package to what apt offers, if that is newer.", type: str}
  force: {description: Restart it in any case., type: bool, default: false}
  patience: {description: Seconds to wait until no quorum queue needs the node., type: int, default: 120}
"""

import os
from datetime import datetime

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rabbitmq_cli import Rabbit, RabbitError, wait_for

#: Seconds that a node may take to start, and its queues to be in sync again.
START_TIME = 300


def started(module: AnsibleModule, service: str) -> float:
    """Return when the service's process started, in seconds since 1970."""
    _, out, _ = module.run_command(
        ["systemctl", "show", service, "--property=ExecMainStartTimestamp", "--value", "--timestamp=us+utc"], check_rc=True
    )
    return datetime.strptime(out.strip() + "+0000", "%a %Y-%m-%d %H:%M:%S.%f UTC%z").timestamp() if out.strip() else 0


def newer_version(module: AnsibleModule, package: str | None) -> bool:
    """Tell whether apt offers a newer version of the package."""
    if not package:
        return False
    _, out, _ = module.run_command(["apt-get", "--simulate", "install", "--only-upgrade", package], check_rc=True)
    return f"\nInst {package} " in out


def restart(module: AnsibleModule, upgrade: bool) -> None:
    """Restart the node, or upgrade its package in between.

    Raises:
        RabbitError: if queues need the node, or if it or its queues do not come back.
    """
    service, patience = module.params["service"], module.params["patience"]
    rabbit = Rabbit(module, module.params["node"])
    status = rabbit.status()
    others = [rabbit.at(node) for node in (status["nodes"] if status else []) if node != rabbit.node]
    if others:
        wait_for(lambda: not rabbit.is_critical(), patience, f"{rabbit.node} is not restarted, since quorum queues still need it")
        rabbit("drain", tool="rabbitmq-upgrade")
    if upgrade:
        module.run_command(["systemctl", "stop", service], check_rc=True)
        command = ["apt-get", "install", "--yes", "--only-upgrade", "--option=Dpkg::Options::=--force-confold", module.params["package"]]
        module.run_command(command, check_rc=True, environ_update={"DEBIAN_FRONTEND": "noninteractive"})
    module.run_command(["systemctl", "restart", service], check_rc=True)
    rabbit.await_startup(START_TIME)
    # Whether the others could do without each other tells whether this one is back in its queues.
    for other in others:
        if other.status():
            wait_for(lambda other=other: not other.is_critical(), START_TIME, f"The queues of {rabbit.node} are not in sync again")


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "service": {"type": "str", "required": True},
            "node": {"type": "str", "required": True},
            "files": {"type": "list", "elements": "path", "default": []},
            "package": {"type": "str"},
            "force": {"type": "bool", "default": False},
            "patience": {"type": "int", "default": 120},
        },
        supports_check_mode=True,
    )
    since = started(module, module.params["service"])
    stale = [file for file in module.params["files"] if os.path.exists(file) and os.stat(file).st_mtime > since]
    upgrade = newer_version(module, module.params["package"])
    due = bool(stale) or upgrade or module.params["force"]
    if due and not module.check_mode:
        try:
            restart(module, upgrade)
        except RabbitError as error:
            module.fail_json(msg=f"{error}\nLook at: journalctl -u {module.params['service']}")
    module.exit_json(changed=due, because=stale, upgraded=upgrade)


if __name__ == "__main__":
    main()
