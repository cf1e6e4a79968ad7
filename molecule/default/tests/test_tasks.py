"""Tasks run, whatever happens to the services around them."""

from __future__ import annotations

import gzip
import re
import threading
import time

import pytest
from celery import Celery

from helpers.nodes import Node, wait_for

testinfra_hosts = ["ansible://celery_worker"]


def test_tasks_sent_from_another_host_run_in_their_queues(node: Node, orders: Celery) -> None:
    results = {
        "critical": orders.send_task("orders.tasks.process_payment", (1,), {"cents": 4200}),
        "default": orders.send_task("orders.tasks.update_stock", ("lamp", -1)),
        "batch": orders.send_task("orders.tasks.batch_report", ("2026-11-20", 10)),
    }
    values = {queue: result.get(timeout=20) for queue, result in results.items()}
    assert values == {"critical": {"order": 1, "charged": 4200}, "default": "lamp: -1", "batch": {"day": "2026-11-20", "total": 45}}
    for queue, result in results.items():
        wait_for(
            f"{result.id} in the log of {queue}",
            lambda q=queue, r=result: r.id in node.host.file(f"/var/log/celery/orders/{q}.log").content_string,
        )


def test_a_failing_task_is_reported_as_failed(orders: Celery) -> None:
    result = orders.send_task("orders.tasks.decline_payment", (7,))
    with pytest.raises(Exception, match="order 7"):
        result.get(timeout=20)
    assert result.state == "FAILURE"


def test_a_slow_task_is_interrupted_at_its_soft_limit(orders: Celery) -> None:
    result = orders.send_task("orders.tasks.batch_import", (60,))
    assert re.fullmatch(r"interrupted with 5\d s to go", result.get(timeout=30))


def test_a_task_is_run_again_when_its_worker_is_killed(node: Node, orders: Celery) -> None:
    unit = "celery-orders-worker@batch.service"
    log = node.host.file("/var/log/celery/orders/batch.log")
    before = node.show(unit, "MainPID", "NRestarts")
    result = orders.send_task("orders.tasks.batch_import", (3,))
    runs = re.compile(rf"{result.id} #\d[^\]]*\] import started")
    wait_for("the first run", lambda: runs.search(log.content_string))
    node.host.check_output("kill -KILL %s", before["MainPID"])

    assert result.get(timeout=60) == "finished"
    assert len(runs.findall(log.content_string)) == 2
    after = node.show(unit, "MainPID", "NRestarts", "ActiveState")
    assert after["ActiveState"] == "active"
    assert after["MainPID"] != before["MainPID"]
    assert int(after["NRestarts"]) == int(before["NRestarts"]) + 1


def test_a_stopping_worker_finishes_its_task(node: Node, orders: Celery) -> None:
    log = node.host.file("/var/log/celery/orders/batch.log")
    result = orders.send_task("orders.tasks.batch_import", (4,))
    wait_for("the task's start", lambda: f"{result.id} #1] import started" in log.content_string)
    node.host.check_output("systemctl stop celery-orders-worker@batch")
    try:
        assert node.show("celery-orders-worker@batch", "Result")["Result"] == "success"
        assert f"{result.id} #1] import finished" in log.content_string
        assert result.get(timeout=5) == "finished"
    finally:
        node.host.check_output("systemctl start celery-orders-worker@batch")
    assert log.content_string.count(f"{result.id} #1] import started") == 1


def test_beat_stops_and_starts_without_touching_a_worker_and_keeps_its_schedule(node: Node) -> None:
    def workers() -> list[dict[str, str]]:
        return [
            node.show(f"celery-orders-worker@{name}", "MainPID", "ActiveEnterTimestampMonotonic")
            for name in ("critical", "default", "batch")
        ]

    def runs_in_schedule() -> int:
        script = "import shelve; print(shelve.open('/tmp/schedule-copy/schedule')['entries']['expire-carts'].total_run_count)"
        node.host.check_output("rm -rf /tmp/schedule-copy && cp -r /var/lib/celery-beat/orders /tmp/schedule-copy")
        return int(node.host.check_output("cd /opt/celery/orders/current/app && ../venv/bin/python -c %s", script))

    def runs_in_log() -> int:
        return node.host.file("/var/log/celery/orders/beat.log").content_string.count("Sending due task expire-carts")

    before = workers()
    wait_for("a periodic task", runs_in_log, seconds=15)
    try:
        node.host.check_output("systemctl stop celery-orders-beat")
        counted, logged = runs_in_schedule(), runs_in_log()
        assert counted > 0
        node.host.check_output("systemctl start celery-orders-beat")
        wait_for("the next periodic task", lambda: runs_in_log() > logged, seconds=15)
        node.host.check_output("systemctl stop celery-orders-beat")
        assert runs_in_schedule() == counted + runs_in_log() - logged
    finally:
        node.host.check_output("systemctl start celery-orders-beat")
    assert workers() == before


def test_logs_rotated_under_a_stream_of_tasks_lose_no_line(node: Node, orders: Celery) -> None:
    units = [f"celery-orders-worker@{name}" for name in ("critical", "default", "batch")]
    before = [node.show(unit, "MainPID", "NRestarts") for unit in units]
    sent: list[str] = []
    stop = threading.Event()

    def stream() -> None:
        while not stop.is_set():
            sent.append(orders.send_task("orders.tasks.send_email", (len(sent),), ignore_result=True).id)
            time.sleep(0.01)

    sender = threading.Thread(target=stream)
    sender.start()
    try:
        for _ in range(3):
            time.sleep(2)
            node.host.check_output("logrotate --force /etc/logrotate.d/celery-orders")
        time.sleep(1)
    finally:
        stop.set()
        sender.join()

    assert len(sent) > 200
    log = node.host.file("/var/log/celery/orders/critical.log")
    wait_for("the last task", lambda: f"{sent[-1]}] succeeded" in log.content_string)
    time.sleep(0.5)
    newest = "\n".join(node.host.file(f"/var/log/celery/orders/critical.log{suffix}").content_string for suffix in ("", ".1"))
    older = node.host.check_output("zcat /var/log/celery/orders/critical.log.2.gz /var/log/celery/orders/critical.log.3.gz")
    for line in (r"\] received", r" #1\] email for order", r"\] succeeded"):
        logged = set(re.findall(rf"([0-9a-f-]{{36}}){line}", newest + older))
        assert set(sent) - logged == set(), f"lost lines: {line}"
    assert node.host.file("/var/log/celery/orders/critical.log.2.gz").content[:2] == gzip.compress(b"")[:2]
    assert [node.show(unit, "MainPID", "NRestarts") for unit in units] == before
    journal = node.host.check_output("journalctl --no-pager --output=cat --unit=celery-orders-worker@critical")
    assert all(f"[{task}] succeeded" in journal for task in sent)


def test_nothing_of_all_this_was_refused_by_redis(node: Node) -> None:
    """Runs last: a full task life needs no right that the application's user lacks."""
    refused = {(entry["username"], entry["reason"], entry["object"]) for entry in node.redis_admin().acl_log()}
    assert {entry for entry in refused if entry[0] == "orders" and entry[1] != "auth"} == set()
