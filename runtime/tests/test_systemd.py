"""Tests of what systemd is told, with a real socket in its place."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_platform import systemd
from helpers.managers import Manager
from helpers.sites import Site, free_port, wait_for


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Listen as a service manager does."""
    address = str(tmp_path / "notify@1") if request.param == "path" else f"@celery-platform-test-{tmp_path}"
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + address[1:] if address.startswith("@") else address)
        listening.settimeout(5)
        yield listening


def test_a_state_is_sent(manager: socket.socket) -> None:
    systemd.notify("READY=1\nSTATUS=Gr\u00fc\u00dfe")

    assert manager.recv(1000).decode() == "READY=1\nSTATUS=Gr\u00fc\u00dfe"


@pytest.mark.parametrize("address", [None, ""])
def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)

    systemd.notify("READY=1")


SHOP = """
import time
from celery import Celery
from celery.worker.control import control_command

app = Celery("shop")

@app.task(name="work")
def work(seconds):
    time.sleep(seconds)

@control_command()
def stick(state, **_):
    time.sleep(60)
"""


@pytest.fixture
def systemd_site(site: Site, redis_url: str, tmp_path: Path) -> tuple[Site, Manager]:
    """Return a site whose services report to a manager that expects a sign of life every 1.5 seconds."""
    site.write(SHOP)
    site.set(broker_url=f"{redis_url}/0", key_prefix="shop:")
    manager = Manager(tmp_path)
    site.environment |= {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1500000"}
    return site, manager


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_is_alive_while_its_loop_turns_and_only_then(systemd_site: tuple[Site, Manager], pool: str) -> None:
    site, manager = systemd_site
    with site.worker(f"--pool={pool}", "--queues=default") as worker:
        wait_for("READY", lambda: manager.last("READY=1"))
        producer = site.producer()
        producer.send_task("work", (3,))
        wait_for("a running task", lambda: manager.last("STATUS=Consuming default; 1 tasks running") or pool == "solo")
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            assert manager.silent() < 1.5
            time.sleep(0.1)
        wait_for("a task that is done", lambda: manager.last("STATUS=Consuming default; 0 tasks running, 1 done"))

        producer.control.broadcast("stick")
        wait_for("silence", lambda: manager.silent() > 2.5, seconds=10)
        worker.send_signal(signal.SIGABRT)
        assert worker.wait(5) == -signal.SIGABRT
    assert re.search(r"shop.py.* in stick", site.log()), "where it was stuck"


SLOW = """
import os, time
from celery import Celery, signals

app = Celery("shop")

@app.task(name="work")
def work():
    return os.getpid()

@signals.worker_process_init.connect(weak=False)
def load(**_):
    # Not the first one.
    if os.path.exists("child"):
        time.sleep(float(os.environ["SLOW"]))
    with open("child", "w") as file:
        file.write(str(os.getpid()))
"""


def test_children_that_start_slowly_are_waited_for(site: Site, redis_url: str) -> None:
    """Celery gives them 4 seconds."""
    site.write(SLOW)
    site.set(broker_url=f"{redis_url}/0", result_backend=f"{redis_url}/1", max_tasks_per_child="1")
    site.environment["SLOW"] = "6"
    with site.worker("--queues=default"):
        app = site.producer()
        sent = [app.send_task("work") for _ in range(2)]
        assert len({task.get(timeout=30) for task in sent}) == 2
    assert "UP message" not in site.log()


@pytest.mark.parametrize("stuck", ["no child comes up", "the child is stopped"])
def test_a_worker_whose_children_do_not_work_is_not_alive(systemd_site: tuple[Site, Manager], stuck: str) -> None:
    site, manager = systemd_site
    site.write(SLOW)
    site.set(child_start_timeout="2", max_tasks_per_child="1")
    site.environment["SLOW"] = "60"
    with site.worker("--queues=default") as worker:
        child = site.folder / "child"
        wait_for("a child", lambda: child.exists() and child.read_text())
        if stuck == "the child is stopped":
            os.kill(int(child.read_text()), signal.SIGSTOP)
        site.producer().send_task("work")
        wait_for("silence", lambda: manager.silent() > 2, seconds=15)
        assert manager.last("STATUS=Stuck")
        worker.kill()
    assert "This worker is stuck: " in site.log()


def test_a_worker_without_broker_is_alive(site: Site, tmp_path: Path) -> None:
    site.write(SHOP)
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    site.set(broker_url=f"redis://127.0.0.1:{port}/0")
    manager = Manager(tmp_path)
    site.environment |= {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1500000"}

    def serve() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path)

    server = serve()
    try:
        with site.worker("--queues=default"):
            server.kill()
            server.wait()
            wait_for("a lost broker", lambda: manager.last("STATUS=Looking for the broker"))
            end = time.monotonic() + 5
            while time.monotonic() < end:
                assert manager.silent() < 1.5
                time.sleep(0.1)
            back = time.monotonic()
            server = serve()
            wait_for("a consumer", lambda: manager.last("STATUS=Consuming") > back)
            site.producer().send_task("work", (0,))
            wait_for("a task that is done", lambda: manager.last("STATUS=Consuming default; 0 tasks running, 1 done"))
        assert manager.last("STOPPING=1")
        assert manager.last("STOPPING=1") > manager.last("STATUS=Looking")
    finally:
        server.kill()
        server.wait()


def test_beat_is_alive_while_its_scheduler_ticks(systemd_site: tuple[Site, Manager], tmp_path: Path) -> None:
    site, manager = systemd_site
    beat = [Path(sys.executable).with_name("celery"), "-A", "celery_platform.worker:app", "beat", "--max-interval=1", "--pidfile="]
    with subprocess.Popen([*beat, f"--schedule={tmp_path}/schedule"], env=os.environ | site.environment, cwd=site.folder) as process:
        wait_for("READY", lambda: manager.last("READY=1"))
        wait_for("several signs of life", lambda: sum("WATCHDOG=1" in message for _, message in manager.heard) > 3)
        process.send_signal(signal.SIGSTOP)
        wait_for("silence", lambda: manager.silent() > 2)
        process.send_signal(signal.SIGCONT)
        process.terminate()
