#!/usr/bin/python
"""Ansible module `rabbitmq_join`: make a node part of its cluster, once."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rabbitmq_join
short_description: Make a RabbitMQ node part of its cluster
description:
  - A node that is part of a cluster stays as it is. One that is alone joins the cluster that others form; where all are alone,
    they join the one that holds queues, or else the first. Its own queues would be lost, so it must have none.
  - A node that was rebuilt under its old name takes the place that it had. To be run on one host at a time.
options:
  node: {description: The node's name., type: str, required: true}
  nodes: {description: Names of all nodes., type: list, elements: str, required: true}
  known: {description: What rabbitmq_info told of each node that answers., type: list, elements: dict, required: true}
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rabbitmq_cli import Rabbit, RabbitError

#: Seconds that a node may take to start and to copy its queues.
START_TIME = 300


def target_of(node: str, nodes: list[str], known: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return the node to join; None if there is nothing to join.

    Raises:
        RabbitError: if that cannot be told, or if it would cost queues.
    """
    own = known[node]
    if len(own["nodes"]) > 1 or len(nodes) == 1:
        return None
    others = [known[name] for name in nodes if name in known and name != node and known[name]["running"]]
    target = next((other for other in others if len(other["nodes"]) > 1), None)
    if target is None:
        missing = [name for name in nodes if not known.get(name, {}).get("running")]
        if missing:
            raise RabbitError(f"{', '.join(missing)}: no answer. A cluster is formed when all its nodes run.")
        first = next((name for name in nodes if known[name]["holds_anything"]), nodes[0])
        if first == node:
            return None
        target = known[first]
    if own["holds_anything"]:
        told = f"{node} is no part of the cluster of {target['node']}, but has queues or vhosts, which it would lose by joining."
        raise RabbitError(f"{told} If they may go, on its host: rabbitmqctl stop_app && rabbitmqctl reset && rabbitmqctl start_app")
    return target


def join(rabbit: Rabbit, target: dict[str, Any]) -> None:
    """Let a node join the cluster of another, and take members of its quorum queues."""
    cluster = rabbit.at(target["node"])
    status = cluster.status() or target
    rabbit("stop_app")
    try:
        if rabbit.node in status["nodes"]:
            cluster("forget_cluster_node", rabbit.node)
        rabbit("join_cluster", target["node"])
    finally:
        rabbit("start_app", timeout=START_TIME)
    rabbit.await_startup(START_TIME)
    cluster("grow", rabbit.node, "all", tool="rabbitmq-queues", timeout=START_TIME)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "node": {"type": "str", "required": True},
            "nodes": {"type": "list", "elements": "str", "required": True},
            "known": {"type": "list", "elements": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    node = module.params["node"]
    known = {info["node"]: info for info in module.params["known"]}
    try:
        target = target_of(node, module.params["nodes"], known)
        if target and not module.check_mode:
            join(Rabbit(module, node), target)
    except RabbitError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=target is not None, joined=target and target["node"])


if __name__ == "__main__":
    main()
