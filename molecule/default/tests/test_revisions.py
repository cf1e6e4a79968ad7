"""What services run with is switched as a whole: a run that fails, or is killed, leaves what runs as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from helpers import REPOSITORY
from helpers.nodes import Node, wait_for

testinfra_hosts = ["ansible://celery_worker"]
UNITS = ["celery-orders-beat", "celery-orders-worker@batch", "celery-orders-worker@critical", "celery-orders-worker@default"]


def activate(node: Node) -> subprocess.CompletedProcess[str]:
    """Run the role's step that switches to the wanted revision, alone."""
    arguments = ["--inventory", node.inventory, "--become", "celery_worker", "-m", "include_role"]
    return subprocess.run(
        [Path(sys.executable).with_name("ansible"), *arguments, "-a", "name=celery_app tasks_from=activate.yml"],
        cwd=REPOSITORY,
        env=os.environ | {"ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg")},
        text=True,
        capture_output=True,
    )


def state(node: Node) -> dict[str, str]:
    """Return what runs: the current revision, and the main process of each service."""
    pids = {unit: node.show(unit, "MainPID", "ActiveState") for unit in UNITS}
    return {"revision": node.host.check_output("readlink /etc/celery/orders/current"), **{unit: str(shown) for unit, shown in pids.items()}}


@pytest.fixture
def kept(node: Node) -> Iterator[None]:
    """Put the wanted revision back when a test has changed it."""
    node.host.check_output("rm -rf /root/next && cp -a /etc/celery/orders/next /root/next")
    yield
    node.host.check_output("rm -rf /etc/celery/orders/next && mv /root/next /etc/celery/orders/next")
    assert activate(node).returncode == 0


@pytest.mark.usefixtures("kept")
def test_a_run_that_fails_leaves_settings_and_services_as_they_were(node: Node) -> None:
    before = state(node)
    run = node.run_playbook("-e", json.dumps({"celery_app_application": "orders.app:nothing"}))
    assert run.returncode != 0
    assert "The application does not start with its settings; nothing was changed in what runs." in run.stdout
    assert "nothing" in run.stdout.split("does not start with its settings", 1)[1]
    assert state(node) == before
    assert 'CELERY_PLATFORM_APPLICATION="orders.app:app"' in node.host.file("/etc/celery/orders/celery.env").content_string
    node.host.run_expect([0], "celery-exec true")


@pytest.mark.usefixtures("kept")
def test_a_revision_that_does_not_come_up_is_put_back(node: Node, orders: Celery) -> None:
    before = state(node)
    broken = '[Service]\\nExecStartPre=/bin/sh -c "echo out of order; exit 1"\\n'
    unit = "/etc/systemd/system/celery-orders-worker@default.service"
    worker = "units/celery-orders-worker@default.service"
    node.host.check_output(f"cd /etc/celery/orders/next && printf '{broken}' >> {worker} && echo X=1 >> celery.env")
    run = activate(node)
    assert run.returncode != 0
    assert "The new revision does not run; the earlier one runs again." in run.stdout + run.stderr
    assert "out of order" in run.stdout + run.stderr
    after = state(node)
    assert after["revision"] == before["revision"]
    assert "out of order" not in node.host.file(unit).content_string
    assert all(node.host.service(name).is_running for name in UNITS)
    assert orders.send_task("orders.tasks.update_stock", ("tea", 1)).get(timeout=20) is not None


@pytest.mark.usefixtures("kept")
def test_services_that_a_killed_run_left_behind_are_restarted_by_the_next(node: Node) -> None:
    before = state(node)
    # As a run leaves it that was killed after it had switched, before it restarted anything.
    node.host.check_output("echo X=2 >> /etc/celery/orders/next/celery.env")
    revision = "/etc/celery/orders/revisions/half-done"
    node.host.check_output(
        f"cp -a /etc/celery/orders/next {revision} && ln -sfn revisions/half-done /etc/celery/orders/current && systemctl daemon-reload"
    )
    run = activate(node)
    assert run.returncode == 0, run.stdout + run.stderr
    after = state(node)
    assert not {name for name in UNITS if before[name] == after[name]}
    assert "CHANGED" not in activate(node).stdout


def test_only_what_is_different_is_restarted(node: Node) -> None:
    before = state(node)
    node.host.check_output("systemctl kill --signal=KILL celery-orders-worker@batch")
    wait_for(
        "systemd to restart it",
        lambda: (
            state(node)["celery-orders-worker@batch"] not in (before["celery-orders-worker@batch"], "")
            and node.host.service("celery-orders-worker@batch").is_running
        ),
        seconds=30,
    )
    restarted = state(node)
    assert "CHANGED" not in activate(node).stdout
    assert state(node) == restarted
