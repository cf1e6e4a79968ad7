"""A host under test, as the tests of all scenarios see it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import redis
import testinfra.host
import yaml

from helpers import REPOSITORY
from helpers.waiting import wait_for as wait_for


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
        return subprocess.run(self.ssh("python3", "-", *arguments), input=script, text=True, check=True, capture_output=True).stdout

    def ssh(self, *command: str) -> list[str]:
        """Return the command that runs a command on the host, as root."""
        key, options = self.variables["ansible_ssh_private_key_file"], shlex.split(self.variables["ansible_ssh_common_args"])
        return ["ssh", "-i", key, *options, f"root@{self.address}", shlex.join(command)]

    def booted(self) -> None:
        """Wait until the host has booted, and none of its units has failed."""

        def up() -> bool:
            try:
                return self.host.run("systemctl is-system-running").rc == 0
            except RuntimeError:
                return False  # ssh is not there yet

        wait_for("the host", up, seconds=60)

    def celery_python(self, script: str) -> str:
        """Run a Python script as the application's services run; it has the application as `app`. Return what it prints."""
        script = f"from celery_platform.worker import app\n{script}"
        return self.host.run_expect([0], "celery-exec python -c %s", script).stdout.strip()

    def write(self, path: str, text: str) -> None:
        """Write a file that all may read, and the folders above it."""
        self.host.check_output("install -D -m 0644 /dev/null %s && printf %%s %s > %s", path, text, path)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit as systemd prints them."""
        out = self.host.check_output("systemctl show %s --property=%s", unit, ",".join(properties))
        return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)

    def converge(self, *arguments: str, playbook: str = "site.yml") -> dict[str, Any]:
        """Run a playbook against the inventory under test; return Ansible's own counts for this host, and its tasks.

        Raises AssertionError, with the messages, if a task failed.
        """
        run = self.run_playbook(*arguments, playbook=playbook, callback="ansible.posix.json")
        assert run.stdout.startswith("{"), run.stdout + run.stderr
        result = json.loads(run.stdout)
        tasks = {(t["task"]["name"], name): outcome for p in result["plays"] for t in p["tasks"] for name, outcome in t["hosts"].items()}
        assert run.returncode == 0, [(task, outcome.get("msg")) for task, outcome in tasks.items() if outcome.get("failed")]
        return {"changed": [task for (task, _), outcome in tasks.items() if outcome.get("changed")], **result["stats"]}

    def run_playbook(
        self, *arguments: str, playbook: str = "site.yml", callback: str = "ansible.builtin.default"
    ) -> subprocess.CompletedProcess[str]:
        """Run a playbook against the inventory under test, whatever comes of it."""
        return subprocess.run(
            [Path(sys.executable).with_name("ansible-playbook"), "-i", self.inventory, playbook, *arguments],
            cwd=REPOSITORY,
            env=os.environ | {"ANSIBLE_STDOUT_CALLBACK": callback, "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg")},
            text=True,
            capture_output=True,
        )

    def redis(self, user: str | None, password: str | None, **options: Any) -> redis.Redis:
        """Return a client that comes from the controller, over the network."""
        return redis.Redis(self.address, 6379, username=user, password=password, decode_responses=True, socket_timeout=5, **options)

    def redis_admin(self) -> redis.Redis:
        """Return a client of the all-powerful user."""
        return self.redis("default", self.secrets["vault_redis_requirepass"])
