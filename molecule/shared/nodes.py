"""A host under test, as the tests of all scenarios see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
import testinfra.host
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 30, every: float = 0.2) -> Any:
    """Return the first true value of a condition; raise AssertionError, naming it, if none comes in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(every)
    raise AssertionError(f"not within {seconds} s: {what}")


class Node:
    """A host under test: what its inventory says of it, and what is asked of it beyond testinfra."""

    def __init__(self, host: testinfra.host.Host, inventory: Path) -> None:
        self.host = host
        self.inventory = inventory
        self.variables: dict[str, Any] = host.ansible.get_variables()
        self.address: str = self.variables["ansible_host"]
        self.secrets: dict[str, str] = yaml.safe_load((inventory / "group_vars/all/vault.yml").read_text())

    def python(self, script: str, *arguments: str) -> str:
        """Run a Python script as root; it comes by standard input, so that its secrets are in no command line."""
        command = [
            *("ssh", "-i", self.variables["ansible_ssh_private_key_file"]),
            *self.variables["ansible_ssh_common_args"].split(),
            *(f"root@{self.address}", "python3", "-", *arguments),
        ]
        return subprocess.run(command, input=script, text=True, check=True, capture_output=True).stdout

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit as systemd prints them."""
        out = self.host.check_output("systemctl show %s --property=%s", unit, ",".join(properties))
        return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)

    def converge(self, *arguments: str, playbook: str = "site.yml") -> dict[str, Any]:
        """Run a playbook against the inventory under test; return Ansible's own counts for this host, and its tasks.

        Raises AssertionError, with the messages, if a task failed.
        """
        run = subprocess.run(
            [Path(sys.executable).with_name("ansible-playbook"), "-i", self.inventory, playbook, *arguments],
            cwd=REPOSITORY,
            env=os.environ | {"ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json", "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg")},
            text=True,
            capture_output=True,
        )
        assert run.stdout.startswith("{"), run.stdout + run.stderr
        result = json.loads(run.stdout)
        tasks = {(t["task"]["name"], name): outcome for p in result["plays"] for t in p["tasks"] for name, outcome in t["hosts"].items()}
        assert run.returncode == 0, [(task, outcome.get("msg")) for task, outcome in tasks.items() if outcome.get("failed")]
        return {"changed": [task for (task, _), outcome in tasks.items() if outcome.get("changed")], **result["stats"]}

    def redis(self, user: str | None, password: str | None, **options: Any) -> redis.Redis:
        """Return a client that comes from the controller, over the network."""
        return redis.Redis(self.address, 6379, username=user, password=password, decode_responses=True, socket_timeout=5, **options)

    def redis_admin(self) -> redis.Redis:
        """Return a client of the all-powerful user."""
        return self.redis("default", self.secrets["vault_redis_requirepass"])
