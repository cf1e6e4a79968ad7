#!/usr/bin/python
"""Ansible module `rabbitmq_join`: make a node part of its cluster, once."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rabbitmq_join
short_description: Make a RabbitMQ node part of its cluster
description:
  - A node that is part of a cluster stays as it is. One that is alone joins the cluster that others form; where all are alone,
    they join the one that holds something, or else the first. Its own queues would be lost, so it must have none.
  - A node that was rebuilt under its old name takes the place that it had. To be run on one host at a time.
options:
  node: {description: The node's name., type: str, required: true}
  nodes: {description: Names of all nodes., type: list, elements: str, required: true}
  known: {description: What rabbitmq_info told of each node that answers., type: list, elements: dict, required: true}
  names_file: {description: "Erlang's file of the nodes' addresses, which a running node must read again.", type: path, required: true}
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rabbitmq_cli import START_TIME, Rabbit, RabbitError


def target_of(rabbit: Rabbit, nodes: list[str], known: dict[str, dict[str, Any]]) -> str:
    """Return the node to join; '' if there is nothing to join.

    Raises:
        RabbitError: if that cannot be told, or if it would cost queues.
    """
    if len(known[rabbit.node]["nodes"]) > 1 or len(nodes) == 1:
        return ""
    running = [name for name in nodes if known.get(name, {}).get("running")]
    target = next((name for name in running if len(known[name]["nodes"]) > 1), "")
    if not target:
        if missing := [name for name in nodes if name not in running]:
            raise RabbitError(f"{', '.join(missing)}: no answer. A cluster is formed when all its nodes run, by a run for all their hosts.")
        target = next((name for name in nodes if rabbit.at(name).holds_anything()), nodes[0])
        if target == rabbit.node:
            return ""
    if rabbit.holds_anything():
        told = f"{rabbit.node} is no part of the cluster of {target}, but has vhosts or queues, which it would lose by joining."
        raise RabbitError(f"{told} If they may go, on its host: rabbitmqctl stop_app && rabbitmqctl reset && rabbitmqctl start_app")
    return target


def learn(rabbit: Rabbit, nodes: list[str], names_file: str) -> None:
    """Let a running node know what its files say of the others (templates inetrc.j2, nodes.conf.j2)."""
    others = ", ".join(f"'{node}'" for node in sorted(nodes) if node != rabbit.node)
    handling = f"application:set_env(rabbit, cluster_partition_handling, {{pause_if_all_down, [{others}], autoheal}})"
    rabbit("eval", f'inet_db:add_rc("{names_file}"){f", {handling}" if others else ""}.')


def resume(rabbit: Rabbit) -> None:
    """Start a node that a run which stopped in between left stopped, or one that was taken out of the cluster.

    Raises:
        RabbitError: if it does not start.
    """
    try:
        rabbit("start_app", seconds=START_TIME)
    except RabbitError as error:
        # The others have forgotten it, so it has nothing that they lack.
        if "inconsistent_cluster" not in str(error):
            raise
        rabbit("force_reset")
        rabbit("start_app", seconds=START_TIME)


def join(rabbit: Rabbit, target: str) -> None:
    """Let a node join the cluster of another, and take members of its quorum queues."""
    cluster = rabbit.at(target)
    status = cluster.status()
    if status is None:
        raise RabbitError(f"{rabbit.node} cannot join: {target} does not serve, or cannot be reached from here")
    rabbit("stop_app")
    try:
        if rabbit.node in status["nodes"]:
            cluster("forget_cluster_node", rabbit.node)
        rabbit("join_cluster", target)
    finally:
        rabbit("start_app", seconds=START_TIME)
    rabbit.await_startup()
    cluster("grow", rabbit.node, "all", tool="rabbitmq-queues", seconds=START_TIME)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "node": {"type": "str", "required": True},
            "nodes": {"type": "list", "elements": "str", "required": True},
            "known": {"type": "list", "elements": "dict", "required": True},
            "names_file": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    rabbit = Rabbit(module, module.params["node"])
    known = {info["node"]: info for info in module.params["known"]}
    try:
        if not known[rabbit.node]["running"] and not module.check_mode:
            resume(rabbit)
        target = target_of(rabbit, module.params["nodes"], known)
        if not module.check_mode:
            learn(rabbit, module.params["nodes"], module.params["names_file"])
            if target:
                join(rabbit, target)
    except RabbitError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=bool(target), joined=target)


if __name__ == "__main__":
    main()
