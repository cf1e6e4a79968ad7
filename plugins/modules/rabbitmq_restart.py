#!/usr/bin/python
"""Ansible module `rabbitmq_restart`: restart or upgrade a node such that the cluster goes on."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rabbitmq_restart
short_description: Restart a RabbitMQ node whose files are newer than its process, or upgrade it
description:
  - Waits until no quorum queue needs the node, hands its queues and clients over, restarts it, and waits until its queues are
    in touch again. In a cluster of three or more nodes; a smaller one cannot do without one.
  - To be run on one host at a time. Whether a restart is due is seen from the host, so a run that stopped in between goes on.
options:
  service: {description: The systemd unit., type: str, required: true}
  node: {description: The node's name., type: str, required: true}
  files: {description: Files that the node reads at its start., type: list, elements: path, default: []}
  package: {description: "Upgrade this package to what apt offers, if that is newer.", type: str}
  patience: {description: Seconds to wait until no quorum queue needs the node., type: int, default: 120}
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rabbitmq_cli import Rabbit, RabbitError


def started(module: AnsibleModule, service: str) -> float:
    """Return when the service's process started, in seconds since 1970."""
    command = ["systemctl", "show", service, "--property=ExecMainStartTimestamp", "--timestamp=us+utc", "--value"]
    _, out, _ = module.run_command(command, check_rc=True)
    _, seconds, _ = module.run_command(["date", "--utc", "+%s.%N", "--date", out.strip()], check_rc=True)
    return float(seconds)


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
    service = module.params["service"]
    rabbit = Rabbit(module, module.params["node"])
    status = rabbit.status()
    can_do_without = status is not None and len(status["nodes"]) > 2
    if can_do_without:
        try:
            rabbit.await_dispensable(module.params["patience"])
        except RabbitError as error:
            told = f"{rabbit.node} is not restarted, since quorum queues still need it. Bring the other nodes back, or replace them"
            raise RabbitError(f"{told} (--tags rabbitmq_preflight,rabbitmq_cluster).\n{error}") from error
        rabbit("drain", tool="rabbitmq-upgrade")
    if upgrade:
        module.run_command(["systemctl", "stop", service], check_rc=True)
        command = ["apt-get", "install", "--yes", "--only-upgrade", "--option=Dpkg::Options::=--force-confold", module.params["package"]]
        module.run_command(command, check_rc=True, environ_update={"DEBIAN_FRONTEND": "noninteractive"})
    # The package starts it by itself.
    module.run_command(["systemctl", "start" if upgrade else "restart", service], check_rc=True)
    rabbit.await_startup()
    if can_do_without:
        rabbit.await_dispensable(module.params["patience"])


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "service": {"type": "str", "required": True},
            "node": {"type": "str", "required": True},
            "files": {"type": "list", "elements": "path", "default": []},
            "package": {"type": "str"},
            "patience": {"type": "int", "default": 120},
        },
        supports_check_mode=True,
    )
    since = started(module, module.params["service"])
    newer = [file for file in module.params["files"] if os.path.exists(file) and os.stat(file).st_mtime > since]
    upgrade = newer_version(module, module.params["package"])
    due = bool(newer) or upgrade
    if due and not module.check_mode:
        try:
            restart(module, upgrade)
        except RabbitError as error:
            module.fail_json(msg=f"{error}\nLook at: journalctl -u {module.params['service']}")
    module.exit_json(changed=due, because=newer, upgraded=upgrade)


if __name__ == "__main__":
    main()
