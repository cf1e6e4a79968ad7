"""RabbitMQ's own commands, as our modules call them on a node's host."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from ansible.module_utils.basic import AnsibleModule

#: Seconds that a command may take.
COMMAND_TIME = 60
#: Seconds that a node may take to start, to copy its queues, or to be dispensable.
START_TIME = 360


class RabbitError(Exception):
    """A command failed; the text is what it printed."""


class Rabbit:
    """A node of a cluster, by RabbitMQ's commands on the host of this module."""

    def __init__(self, module: AnsibleModule, node: str) -> None:
        self.module = module
        self.node = node

    def __call__(self, command: str, *arguments: str, tool: str = "rabbitmqctl", seconds: int = COMMAND_TIME) -> str:
        """Run a command of a tool against the node; return what it prints.

        Raises:
            RabbitError: if it fails.
        """
        line = [tool, "--silent", "--node", self.node, "--timeout", str(seconds), command, *arguments]
        code, out, errors = self.module.run_command(line)
        if code:
            raise RabbitError(f"{tool} {command} on {self.node}: {(errors or out).strip()}")
        return str(out)

    def at(self, node: str) -> Rabbit:
        """Return another node of the cluster."""
        return Rabbit(self.module, node)

    def ask(self, command: str, *arguments: str) -> Any:
        """Return what a command of rabbitmqctl prints as JSON.

        Raises:
            RabbitError: if it fails.
        """
        return json.loads(self(command, *arguments, "--formatter=json"))

    def status(self) -> dict[str, Any] | None:
        """Return the cluster as the node sees it: `nodes`, `running_nodes`, `version`; None if it does not serve."""
        if not self.module.get_bin_path("rabbitmqctl"):
            return None
        try:
            found = self.ask("cluster_status")
        except RabbitError:
            return None
        return {
            "nodes": sorted(found["disk_nodes"] + found["ram_nodes"]),
            "running_nodes": sorted(found["running_nodes"]),
            "version": found["versions"].get(self.node, {}).get("rabbitmq_version", ""),
        }

    def holds_anything(self) -> bool:
        """Tell whether the node has vhosts or queues beside the vhost that it may have made itself.

        Raises:
            RabbitError: if it does not answer.
        """
        vhosts = [vhost["name"] for vhost in self.ask("list_vhosts", "name")]
        return vhosts not in ([], ["/"]) or (bool(vhosts) and bool(self.ask("list_queues", "--vhost=/", "name")))

    def await_startup(self) -> None:
        """Wait until the node serves.

        Raises:
            RabbitError: if it does not in START_TIME.
        """
        wait_for(lambda: self.status() is not None, START_TIME, f"{self.node} does not serve")
        self("await_startup", seconds=START_TIME)

    def await_dispensable(self, seconds: int) -> None:
        """Wait until all quorum queues of this node have more members in touch than they need.

        Raises:
            RabbitError: if they have not in so many seconds.
        """
        self("await_online_quorum_plus_one", tool="rabbitmq-upgrade", seconds=seconds)


def wait_for(found: Callable[[], bool], seconds: float, problem: str) -> None:
    """Return once a function returns true; ask each second.

    Raises:
        RabbitError: with this problem, if it does not in so many seconds.
    """
    end = time.monotonic() + seconds
    while not found():
        if time.monotonic() > end:
            raise RabbitError(f"{problem} within {seconds:.0f} seconds")
        time.sleep(1)
