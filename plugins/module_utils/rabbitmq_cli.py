"""RabbitMQ's own commands, as our modules call them on a node's host."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ansible.module_utils.basic import AnsibleModule

Found = TypeVar("Found")

#: Seconds that a command may take; starting a node and copying its queues is waited for longer.
COMMAND_TIME = 60


class RabbitError(Exception):
    """A command failed; the text is what it printed."""


class Rabbit:
    """A node of a cluster, by RabbitMQ's commands on the host of this module or of a peer."""

    def __init__(self, module: AnsibleModule, node: str) -> None:
        self.module = module
        self.node = node

    def __call__(self, command: str, *arguments: str, tool: str = "rabbitmqctl", timeout: int = COMMAND_TIME) -> str:
        """Run a command of a tool against the node; return what it prints.

        Raises:
            RabbitError: if it fails.
        """
        line = [tool, "--silent", "--node", self.node, "--timeout", str(timeout), command, *arguments]
        code, out, errors = self.module.run_command(line)
        if code:
            raise RabbitError(f"{tool} {command} on {self.node}: {(errors or out).strip()}")
        return str(out)

    def at(self, node: str) -> Rabbit:
        """Return another node of the cluster."""
        return Rabbit(self.module, node)

    def status(self) -> dict[str, Any] | None:
        """Return the cluster as the node sees it: `nodes`, `running_nodes`, `alarms`, `partitions`; None if it does not run."""
        try:
            found = json.loads(self("cluster_status", "--formatter=json"))
        except RabbitError:
            return None
        return {
            "nodes": sorted(found["disk_nodes"] + found["ram_nodes"]),
            "running_nodes": sorted(found["running_nodes"]),
            "alarms": found["alarms"],
            "partitions": found["partitions"],
            "version": found["versions"].get(self.node, {}).get("rabbitmq_version", ""),
        }

    def holds_anything(self) -> bool:
        """Tell whether the node has queues, or vhosts beside the one that it comes with."""
        return self("eval", "rabbit_amqqueue:count() + length(rabbit_vhost:list_names() -- [<<47>>]).").strip() != "0"

    def is_critical(self) -> str:
        """Say which quorum queues would lose their majority without the node; '' if none would."""
        try:
            self("check_if_node_is_quorum_critical", tool="rabbitmq-queues")
        except RabbitError as error:
            return str(error)
        return ""

    def await_startup(self, seconds: int) -> None:
        """Wait until the node serves.

        Raises:
            RabbitError: if it does not in so many seconds.
        """
        wait_for(lambda: self.status() is not None, seconds, f"{self.node} does not start")
        self("await_startup", timeout=seconds)


def wait_for(found: Callable[[], Found], seconds: float, problem: str) -> Found:
    """Return what a function returns once that is true; ask each second.

    Raises:
        RabbitError: with this problem, if it is not in so many seconds.
    """
    end = time.monotonic() + seconds
    while not (result := found()):
        if time.monotonic() > end:
            raise RabbitError(f"{problem} within {seconds:.0f} seconds")
        time.sleep(1)
    return result
