"""What README says to type, typed in a terminal: `make ssh`, `make demo`, `make status`."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest
from celery import Celery

from helpers import REPOSITORY
from helpers.nodes import Node, wait_for

testinfra_hosts = ["ansible://celery_worker"]


def typed(node: Node, target: str, keys: str = "") -> tuple[str, int]:
    """Return what a terminal shows of a target of the Makefile, without colours, and its exit code."""
    make = f"make --no-print-directory {target} INVENTORY={node.inventory.relative_to(REPOSITORY)}"
    run = subprocess.run(["script", "-qec", make, "/dev/null"], cwd=REPOSITORY, input=keys, text=True, capture_output=True, timeout=120)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", run.stdout.replace("\r\n", "\n"))
    return "\n".join(line.split("\x1b[K")[-1] for line in shown.split("\n")), run.returncode


def test_a_shell_on_a_host_has_a_terminal(node: Node) -> None:
    shown, code = typed(node, "ssh", "tty; exit 7\n")
    assert re.search(r"^/dev/pts/\d+$", shown, re.MULTILINE), shown
    assert code == 2
    assert "Error 7" in shown


def test_the_demo_sends_tasks_through_all_queues(node: Node) -> None:
    shown, code = typed(node, "demo")
    assert code == 0, shown
    assert re.findall(r"^│ (\w+) +│ 20 +│ 20 +│ 0 ", shown, re.MULTILINE) == ["critical", "default", "batch"]


def test_the_status_of_a_site_in_order(node: Node) -> None:
    shown, code = typed(node, "status")
    assert code == 0, shown
    for name in (
        "celery-orders-beat",
        "celery-orders-worker@batch",
        "celery-orders-worker@critical",
        "celery-orders-worker@default",
        "redis-server",
    ):
        assert re.search(rf"^\S+ +{name} +running +\S", shown, re.MULTILINE), shown
    assert re.findall(r"^(\w+) +\d+ +1$", shown, re.MULTILINE) == ["critical", "default", "batch"]
    assert re.search(r"^dead letters +\d+", shown, re.MULTILINE)


@pytest.fixture
def broken_worker(node: Node) -> Iterator[None]:
    """Let the worker of the queue `batch` end each time it starts."""
    broken = "[Service]\nExecStart=\nExecStart=/bin/sh -c 'echo the disk is on fire; exit 1'\n"
    node.write("/run/systemd/system/celery-orders-worker@batch.service.d/broken.conf", broken)
    node.host.check_output("systemctl daemon-reload && systemctl restart --no-block celery-orders-worker@batch")
    try:
        wait_for("the second start", lambda: int(node.show("celery-orders-worker@batch", "NRestarts")["NRestarts"]) >= 2, seconds=30)
        yield
    finally:
        node.host.check_output("rm -r /run/systemd/system/celery-orders-worker@batch.service.d && systemctl daemon-reload")
        node.host.check_output("systemctl restart celery-orders-worker@batch")


@pytest.mark.usefixtures("broken_worker")
def test_the_status_names_what_is_wrong_and_why(node: Node, orders: Celery) -> None:
    sent = [orders.send_task("orders.tasks.batch_report", ("2026-11-20", 3)) for _ in range(2)]
    shown, code = typed(node, "status")
    assert code == 2, shown
    assert re.search(r"celery-orders-worker@batch +FAILED +restarted \d+ times; the disk is on fire", shown), shown
    assert re.search(r"^batch +2 +0 +NO CONSUMER$", shown, re.MULTILINE), shown
    assert "2 things are wrong:" in shown
    assert re.search(r"- celery-orders-worker@batch on \S+ is failed", shown)
    assert "- queue batch has 2 tasks and no consumer" in shown
    for result in sent:
        result.forget()
