#!/usr/bin/python
"""Ansible module `rabbitmq_forget`: take nodes that are no longer wanted out of a cluster."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rabbitmq_forget
short_description: Take nodes that are no longer wanted out of a RabbitMQ cluster
description:
  - One that still runs is stopped and emptied, unless a quorum queue would lose its majority by that. To be run on one node.
options:
  node: {description: Name of the node that it is run on., type: str, required: true}
  nodes: {description: Names of all nodes that are wanted., type: list, elements: str, required: true}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rabbitmq_cli import START_TIME, Rabbit, RabbitError


def forget(rabbit: Rabbit, node: str, runs: bool) -> None:
    """Take a node out of the cluster and of all its queues, once the queues can do without it.

    Raises:
        RabbitError: if they cannot.
    """
    old = rabbit.at(node)
    if runs:
        old.await_dispensable(START_TIME)
        old("stop_app")
    rabbit("forget_cluster_node", node)
    if runs:
        # It knows nothing of the cluster any more, and could join it again.
        old("force_reset")


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "node": {"type": "str", "required": True},
            "nodes": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    rabbit = Rabbit(module, module.params["node"])
    status = rabbit.status()
    if status is None:
        module.fail_json(msg=f"{rabbit.node} does not serve. Look at: journalctl -u rabbitmq-server")
    forgotten = sorted(set(status["nodes"]) - set(module.params["nodes"]))
    try:
        for node in forgotten if not module.check_mode else []:
            forget(rabbit, node, node in status["running_nodes"])
    except RabbitError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=bool(forgotten), forgotten=forgotten)


if __name__ == "__main__":
    main()
