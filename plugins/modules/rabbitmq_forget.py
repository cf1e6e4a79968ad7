#!/usr/bin/python
"""Ansible module `rabbitmq_forget`: take nodes that are no longer wanted out of a cluster."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rabbitmq_forget
short_description: Take nodes that are no longer wanted out of a RabbitMQ cluster
description:
  - One that still runs is stopped, once no quorum queue would lose its majority by that. To be run on one node.
options:
  node: {description: Name of the node that it is run on., type: str, required: true}
  nodes: {description: Names of all nodes that are wanted., type: list, elements: str, required: true}
"""

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rabbitmq_cli import START_TIME, Rabbit, RabbitError


def forget(rabbit: Rabbit, node: str, runs: bool) -> None:
    """Take a node out of the cluster and of all its queues, once the queues can do without it.

    It is reached through the cluster: its names and ports may be closed to commands from other hosts by now. The functions are
    those that `rabbitmq-upgrade await_online_quorum_plus_one` and `rabbitmqctl stop_app` call.

    Raises:
        RabbitError: if they cannot.
    """
    if runs:
        wait = f"rpc:call('{node}', rabbit_upgrade_preparation, await_online_quorum_plus_one, [{START_TIME * 1000}])."
        if (told := rabbit("eval", wait, seconds=START_TIME).strip()) != "true":
            raise RabbitError(f"{node} stays in the cluster, since quorum queues still need it ({told})")
        if (told := rabbit("eval", f"rpc:call('{node}', rabbit, stop, []).").strip()) != "ok":
            raise RabbitError(f"{node} cannot be stopped: {told}")
    rabbit("forget_cluster_node", node)


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
