"""Tests of several beats with one schedule: one is active, another takes over."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
import redis

from celery_platform.beat import celery_config
from celery_platform.settings import load_settings
from helpers.managers import Manager
from helpers.sites import Site, wait_for

SHOP = """
from celery import Celery

app = Celery("shop")
app.conf.beat_schedule = {"count": {"task": "count", "schedule": 1}}
app.conf.redbeat_lock_timeout = 4
"""
ACTIVE, STANDBY = "STATUS=Next task", "STATUS=Standing by"
#: Seconds of silence after which systemd would restart it.
WATCHDOG = 6


@pytest.fixture
def shop(site: Site, redis_url: str) -> Site:
    site.write(SHOP)
    site.set(broker_url=f"{redis_url}/0", key_prefix="shop:")
    return site


@contextmanager
def beat(
    site: Site, folder: Path, scheduler: str = "redbeat.RedBeatScheduler", log: IO[bytes] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], Manager]]:
    """Run a beat that looks at its schedule at least every second, and reports to a manager of its own."""
    folder.mkdir()
    manager = Manager(folder)
    command = [Path(sys.executable).with_name("celery"), "-A", "celery_platform.worker:app", "beat", "--max-interval=1", "--pidfile="]
    environment = os.environ | site.environment | {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": f"{WATCHDOG}000000"}
    command += [f"--scheduler={scheduler}"]
    with subprocess.Popen(command, env=environment, cwd=site.folder, stdout=log, stderr=log) as process:
        try:
            wait_for("READY", lambda: manager.last("READY=1"))
            yield process, manager
        finally:
            process.kill()


def test_a_beat_alone_is_not_asked_for_a_lock(shop: Site, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, beat(shop, tmp_path / "alone", "celery.beat.PersistentScheduler", log) as (_, manager):
        wait_for("a tick", lambda: manager.last(ACTIVE))
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_one_of_several_beats_is_active_and_another_takes_over(shop: Site, redis_url: str, tmp_path: Path) -> None:
    queue = redis.Redis.from_url(f"{redis_url}/0")

    def sent() -> int:
        return int(queue.llen("shop:default"))

    with beat(shop, tmp_path / "first") as (first, _), beat(shop, tmp_path / "second") as (second, standby):
        wait_for("a task", sent)
        wait_for("a beat that stands by", lambda: standby.last(STANDBY))
        begun, before = time.monotonic(), sent()
        while sent() < before + 5:
            # It is alive, though it does not tick.
            assert standby.silent() < WATCHDOG
            time.sleep(0.1)
        # Two beats would have sent twice as many.
        assert time.monotonic() - begun > 3.5
        assert not standby.last(ACTIVE)
        assert queue.keys("redbeat*") == []

        first.kill()
        wait_for("a takeover", lambda: standby.last(ACTIVE), seconds=15)
        before = sent()
        wait_for("tasks of the second", lambda: sent() > before + 2)

        with beat(shop, tmp_path / "third") as (_, third):
            wait_for("a beat that stands by", lambda: third.last(STANDBY))
            # It gives the lock back.
            second.terminate()
            wait_for("a takeover", lambda: third.last(ACTIVE), seconds=3.5)


def test_a_beat_that_lost_its_lock_ends(shop: Site, redis_url: str, tmp_path: Path) -> None:
    queue = redis.Redis.from_url(f"{redis_url}/0")
    with beat(shop, tmp_path / "first") as (first, active):
        wait_for("a tick", lambda: active.last(ACTIVE))
        queue.set("shop:redbeat::lock", "another's")
        assert first.wait(10) != 0


def test_without_redis_there_is_no_lock(environment: Callable[..., None]) -> None:
    environment(broker_url="amqp://shop@rabbitmq.example")
    assert celery_config(load_settings()) == {}


def test_behind_sentinel_with_tls_it_is_reached_as_the_broker_is(environment: Callable[..., None], tmp_path: Path) -> None:
    ca = tmp_path / "ca.crt"
    ca.write_text("")
    environment(
        broker_url="sentinel://shop@one:26379/0;sentinel://shop@two:26380/0",
        sentinel_master="main",
        tls_ca_file=str(ca),
        secrets={"broker_password": "p%/ss", "sentinel_password": "sentinels"},
    )
    config = celery_config(load_settings())
    options = config["redbeat_redis_options"]
    assert (options["sentinels"], options["service_name"], options["db"]) == ([("one", 26379), ("two", 26380)], "main", 0)
    assert (options["username"], options["password"]) == ("shop", "p%/ss")
    assert (options["sentinel_kwargs"]["password"], options["sentinel_kwargs"]["ssl"]) == ("sentinels", True)
    assert config["redbeat_redis_use_ssl"]["ssl_ca_certs"] == str(ca)
