"""Tests of the user's application with production settings: loaded, sending, and as the services run it."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from celery.exceptions import QueueNotFound

from celery_platform import settings

SOURCES = Path(settings.__file__).parents[1]
SHOP = """
from celery import Celery

app = Celery("shop", broker="amqp://forgotten", backend="rpc://")
app.conf.task_acks_late = False
app.conf.accept_content = ["json", "pickle"]
app.conf.beat_schedule = {"hourly": {"task": "shop.count", "schedule": 3600.0}}


# Not shared, or the applications of later tests would have these tasks too.
@app.task(name="shop.pay", shared=False)
def pay(order):
    return order


@app.task(name="shop.count", shared=False)
def count():
    return 0
"""
QUEUES = {"queues": '["critical", "default"]', "routes": '{"shop.pay": {"queue": "critical", "priority": 2}}'}

Load = Callable[..., ModuleType]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: Callable[..., None]) -> Iterator[Load]:
    """Return a function that imports celery_platform.worker afresh, for the application above."""
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.syspath_prepend(tmp_path)

    def run(**values: str) -> ModuleType:
        environment(**({"broker_url": "memory://"} | QUEUES | values))
        return importlib.import_module("celery_platform.worker")

    yield run
    for name in ("celery_platform.worker", "shop"):
        sys.modules.pop(name, None)


def test_the_application_is_the_users_own_with_our_settings(load: Load) -> None:
    app = load().app

    assert app is sys.modules["shop"].app
    assert "shop.pay" in app.tasks
    assert app.conf.beat_schedule["hourly"]["task"] == "shop.count"
    assert app.conf.broker_url == "memory://"
    assert app.conf.result_backend is None
    assert app.conf.task_acks_late is True
    assert app.conf.accept_content == ["json"]
    assert app.conf.task_soft_time_limit is None
    assert list(app.amqp.queues) == ["critical", "default"]


def test_the_password_reaches_the_connection(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broker_password").write_text("p/w@:%#")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))

    connection = load(broker_url="redis://orders@redis.example:6379/0").app.connection_for_write()

    assert (connection.hostname, connection.userid, connection.password) == ("redis.example", "orders", "p/w@:%#")
    assert "p/w" not in connection.as_uri()


@pytest.mark.parametrize(("task", "queue", "priority"), [("shop.pay", "critical", 2), ("shop.count", "default", 0)])
def test_a_task_is_sent_to_the_queue_of_its_route(load: Load, task: str, queue: str, priority: int) -> None:
    app = load().app

    app.tasks[task].apply_async(args=[1] if task == "shop.pay" else [])

    with app.connection_for_read() as connection:
        message = connection.SimpleQueue(app.amqp.queues[queue]).get(block=False)
        message.ack()
    assert message.headers["task"] == task
    assert message.content_type == "application/json"
    assert message.properties["priority"] == priority


def test_a_misspelt_queue_is_an_error_of_the_sender(load: Load) -> None:
    app = load().app

    with pytest.raises(QueueNotFound, match="critcal"):
        app.tasks["shop.pay"].apply_async(args=[1], queue="critcal")
    with pytest.raises(QueueNotFound, match="critcal"):
        app.send_task("shop.count", queue="critcal")


def test_the_settings_are_checked_before_the_application_is_loaded(load: Load) -> None:
    with pytest.raises(ValueError, match="time_limit"):
        load(time_limit="never")

    assert "shop" not in sys.modules


def test_the_application_may_be_a_module(load: Load) -> None:
    assert load(application="shop").app is sys.modules["shop"].app


@pytest.mark.parametrize("application", ["no_such_module:app", "shop:no_such_name"])
def test_an_application_that_is_not_there_is_an_error(load: Load, application: str) -> None:
    with pytest.raises(ImportError, match="no_such"):
        load(application=application)


@pytest.mark.parametrize(
    ("command", "line", "when_stopped"),
    [
        (
            ["worker", "--pool", "solo", "--without-gossip", "--without-mingle"],
            " ready.",
            ["STOPPING=1\nSTATUS=Finishing the running tasks"],
        ),
        (["beat", "--schedule", "schedule"], "beat: Starting...", []),
    ],
    ids=["worker", "beat"],
)
def test_a_service_tells_systemd_and_logs_to_both(
    tmp_path: Path, environment: Callable[..., None], command: list[str], line: str, when_stopped: list[str]
) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    environment(broker_url="memory://", **QUEUES)
    told = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "celery",
                "-A",
                "celery_platform.worker:app",
                *command,
                "--loglevel",
                "INFO",
                "--logfile",
                "service.log",
            ],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{SOURCES}:{tmp_path}", "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        try:
            told.append(manager.recv(1000).decode())
            process.send_signal(signal.SIGTERM)
            _, journal = process.communicate(timeout=30)
        finally:
            process.kill()
        manager.setblocking(False)
        while True:
            try:
                told.append(manager.recv(1000).decode())
            except BlockingIOError:
                break

    assert told == ["READY=1\nSTATUS=Ready", *when_stopped]
    assert process.returncode == 0
    log = (tmp_path / "service.log").read_text()
    assert line in log
    assert {entry for entry in log.splitlines() if entry.startswith("[")} <= set(journal.splitlines())
