"""What ends up stuck, without a broker or dead recovers by itself, or is kept for the operator."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from helpers.nodes import Node, wait_for

testinfra_hosts = ["ansible://celery_worker"]

#: Faults for the application's processes to load: no code of ours, and none of the application's.
FAULTS = """
import os, pathlib, time
from celery import shared_task
from celery.worker.control import control_command

@control_command()
def stick(state):
    time.sleep(3600)

@shared_task
def poison():
    if not pathlib.Path("/run/faults/fixed").exists():
        os.kill(os.getpid(), 9)
    return "fixed"
"""
UNIT = "celery-orders-worker@batch.service"
#: Seconds; shorter than an operator would have it, for a test to wait for.
WATCHDOG = 6


@pytest.fixture(scope="module", autouse=True)
def faults(node: Node) -> Iterator[None]:
    """Let the workers load our faults, and give them a short watchdog."""
    drop_in = f"[Service]\nEnvironment=PYTHONPATH=/run/faults\nWatchdogSec={WATCHDOG}\n"
    # Python loads a module of this name at its start.
    node.write("/run/faults/sitecustomize.py", FAULTS)
    node.write("/run/systemd/system/celery-orders-worker@.service.d/faults.conf", drop_in)
    node.host.check_output("systemctl daemon-reload && systemctl restart 'celery-orders-worker@*'")
    yield
    node.host.check_output("rm -r /run/faults /run/systemd/system/celery-orders-worker@.service.d")
    node.host.check_output("systemctl daemon-reload && systemctl restart 'celery-orders-worker@*'")


def test_a_stuck_worker_is_restarted_by_the_watchdog(node: Node) -> None:
    before = node.show(UNIT, "MainPID", "NRestarts")
    since = node.host.check_output("date +%s.%N")
    node.celery_python("app.control.broadcast('stick', destination=[name for name in app.control.inspect().ping() if 'batch' in name])")
    wait_for("a restart", lambda: node.show(UNIT, "NRestarts") == {"NRestarts": str(int(before["NRestarts"]) + 1)}, seconds=4 * WATCHDOG)
    journal = node.host.check_output("journalctl --no-pager --output=short-unix --since=@%s --unit=%s", since, UNIT)
    stuck = next(line for line in journal.splitlines() if "Watchdog timeout" in line)
    # It may have given its last sign of life a third of the period before it was stuck; the host may be busy.
    assert float(stuck.split()[0]) - float(since) < WATCHDOG * 1.5 + 3
    # Its stack tells where: celery's own loop was in our control command.
    assert "in stick" in journal
    wait_for(
        "a worker that consumes", lambda: node.show(UNIT, "ActiveState", "SubState") == {"ActiveState": "active", "SubState": "running"}
    )
    assert node.celery_python("print(app.send_task('orders.tasks.batch_report', ('2026-11-20', 10)).get(timeout=30)['total'])") == "45"


def test_nobody_is_restarted_while_the_broker_is_away(node: Node) -> None:
    """For three periods of the watchdog."""
    units = [*(f"celery-orders-worker@{name}" for name in ("critical", "default", "batch")), "celery-orders-beat"]
    before = [node.show(unit, "MainPID", "NRestarts") for unit in units]
    node.host.check_output("systemctl stop redis-server")
    try:
        time.sleep(3 * WATCHDOG)
        assert node.show(UNIT, "StatusText") == {"StatusText": "Looking for the broker"}
    finally:
        node.host.check_output("systemctl start redis-server")
    assert node.celery_python("print(app.send_task('orders.tasks.batch_report', ('2026-11-20', 10)).get(timeout=90)['total'])") == "45"
    assert [node.show(unit, "MainPID", "NRestarts") for unit in units] == before


def test_a_task_that_kills_its_process_is_kept_and_succeeds_once_when_it_is_fixed(node: Node) -> None:
    def runs(line: str) -> int:
        return node.host.file("/var/log/celery/orders/batch.log").content_string.count(f"{task}{line}")

    def dead_letters() -> dict[str, dict[str, object]]:
        listed = json.loads(node.host.check_output("celery-exec celery-platform dead-letters list --json"))
        return {letter["id"]: letter for letter in listed}

    task = node.celery_python("print(app.send_task('sitecustomize.poison', queue='batch'))")
    letter = wait_for("the dead letter", lambda: dead_letters().get(task), seconds=60, every=1)
    assert (letter["reason"], letter["runs"], letter["queue"]) == ("worker-lost", 3, "batch")
    assert runs("] received") == 3

    node.write("/run/faults/fixed", "")
    assert node.host.check_output("celery-exec celery-platform dead-letters replay %s", task) == "1 replayed"
    wait_for("its success", lambda: runs("] succeeded"))
    assert task not in dead_letters()
    assert (runs("] received"), runs("] succeeded")) == (4, 1)
