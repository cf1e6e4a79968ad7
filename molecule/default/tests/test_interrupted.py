"""A deployment whose controller is killed, at ten moments: the host reboots and serves, and the next run ends what was begun."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from celery import Celery

from helpers import REPOSITORY
from helpers.nodes import Node, wait_for
from helpers.targets import only_in_test_all

testinfra_hosts = ["ansible://celery_worker"]
UNITS = ["celery-orders-beat", "celery-orders-worker@batch", "celery-orders-worker@critical", "celery-orders-worker@default"]
#: When it is killed: so many seconds after a task has begun.
MOMENTS = [
    ("Create the folder for releases", 0.5),
    ("Copy the packed release", 0.5),
    ("Build the release", 3),
    ("Build the release", 10),
    ("Write the wanted revision, log rotation and celery-exec", 0.5),
    ("Write the wanted revision, log rotation and celery-exec", 0.2),
    ("Write the workers' units", 0.5),
    ("Check that the application starts with its settings", 1),
    ("Switch to the wanted revision, and restart what was started with another one", 0.5),
    ("Switch to the wanted revision, and restart what was started with another one", 1.5),
]


def kill_a_run(node: Node, settings: dict[str, object], task: str, seconds: float) -> None:
    """Start a run and kill its processes on the controller some time after a task has begun.

    Raises:
        AssertionError: if the run ended before.
    """
    run = subprocess.Popen(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", node.inventory, "site.yml", "-e", json.dumps(settings)],
        cwd=REPOSITORY,
        # A task is named when it begins only if skipped ones are shown; else with its first result.
        env=os.environ
        | {"ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "ANSIBLE_DISPLAY_SKIPPED_HOSTS": "true", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    lines = []
    for line in run.stdout:
        lines.append(line)
        if line.startswith("TASK [") and task in line:
            break
    else:
        pytest.fail(f"{task} was not reached:\n{''.join(lines[-40:])}")
    time.sleep(seconds)
    assert run.poll() is None
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def reboot(node: Node) -> None:
    """Reboot the host and wait until it has booted."""
    command = ["podman", "ps", "--filter", f"label=celery-lab={node.inventory}", "--format", "{{.Names}}"]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["podman", "restart", "--time=30", name], check=True, capture_output=True)
    node.booted()


def serves(node: Node, orders: Celery) -> None:
    """Check that all services run, each with what is current, and that each queue is served."""
    for unit in UNITS:
        wait_for(unit, lambda unit=unit: node.host.service(unit).is_running, seconds=60)
    assert node.host.run_expect([0], "celery-exec celery-platform round-trip").rc == 0
    assert orders.send_task("orders.tasks.update_stock", ("tea", 1)).get(timeout=20) is not None


@only_in_test_all
def test_a_run_killed_at_any_of_ten_moments_harms_nothing(node: Node, orders: Celery, tmp_path: Path) -> None:
    for number, (task, seconds) in enumerate(MOMENTS):
        # New code and new settings each time, so that there is everything to do.
        source = tmp_path / str(number) / "orders"
        shutil.copytree(REPOSITORY / "examples/orders", source, ignore=shutil.ignore_patterns("__pycache__"))
        with (source / "orders/tasks.py").open("a") as tasks:
            tasks.write(f"\n\nNUMBER = {number}\n")
        settings: dict[str, object] = {"celery_app_source": str(source), "celery_app_max_tasks_per_child": 900 + number}
        kill_a_run(node, settings, task, seconds)
        reboot(node)
        serves(node, orders)

    # The last one again, to its end: what the killed one has begun is done, and nothing is left to do.
    node.converge("-e", json.dumps(settings))
    line = f'CELERY_PLATFORM_MAX_TASKS_PER_CHILD="{settings["celery_app_max_tasks_per_child"]}"'
    assert line in node.host.file("/etc/celery/orders/celery.env").content_string
    code = node.celery_python("import orders.tasks; print(orders.tasks.NUMBER)")
    assert code.splitlines()[-1] == str(number)
    assert node.converge("-e", json.dumps(settings))["changed"] == []
    serves(node, orders)
    node.converge()
