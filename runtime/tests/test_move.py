"""A site changes its broker: what the old one holds comes to the new one, and nothing is lost."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from helpers.sites import Site, wait_for
from helpers.targets import only_in_test_all

SHOP = """
import os, time
from celery import Celery

app = Celery("shop")

@app.task(name="note")
def note(text, sent=0, countdown=0):
    early = time.time() < sent + countdown
    with open("ran", "a") as file:
        file.write(f"{text}{'-too-early' if early else ''}\\n")

@app.task(name="stays")
def stays(text):
    if not os.path.exists("go-on"):
        time.sleep(60)
    note(text)

@app.task(name="fails")
def fails(text):
    if not os.path.exists("go-on"):
        raise ValueError(text)
    note(text)
"""
TASKS = [f"task-{number}" for number in range(250)]


def ran(site: Site) -> Counter[str]:
    path = site.folder / "ran"
    return Counter(path.read_text().split() if path.exists() else ())


def send(site: Site, *lines: str) -> None:
    site.run("python", "-c", "\n".join(["import time", "from celery_platform.worker import app", *lines]))


@pytest.mark.parametrize("broker", ["rabbitmq", pytest.param("redis", marks=only_in_test_all)])
def test_all_that_a_broker_holds_is_brought_to_another(site: Site, redis_url: str, rabbitmq: tuple[str, object], broker: str) -> None:
    urls = {"redis": f"{redis_url}/0", "rabbitmq": rabbitmq[0]}
    old = next(name for name in urls if name != broker)
    site.write(SHOP)
    site.set(
        result_backend=f"{redis_url}/1", key_prefix="shop:", queues='["default", "other"]', broker_url=urls[old], visibility_timeout="3000"
    )
    passwords = {"rabbitmq": "guest", "redis": ""}
    site.secret(broker_password=passwords[old])
    with site.worker("--queues=default") as worker:
        send(site, "app.send_task('fails', ('dead',))", "app.send_task('stays', ('taken',))")
        wait_for("a dead letter", lambda: "dead" in site.run("python", "-m", "celery_platform.cli", "dead-letters", "list").stdout)
        wait_for("a taken task", lambda: "stays" in site.log().split("fails")[-1])
        worker.kill()
        worker.wait()
    delays = "[app.send_task('note', (f'later-{seconds}', time.time(), seconds), countdown=seconds) for seconds in (12, 14)]"
    send(site, f"for name in {TASKS}: app.send_task('note', (name,), queue='other', priority=len(name) % 2 * 3)", delays)

    site.set(broker_url=urls[broker])
    site.secret(broker_password=passwords[broker])
    (site.folder / "go-on").touch()
    told = site.run("python", "-m", "celery_platform.cli", "move-tasks", "--from", urls[old], input=f"{passwords[old]}\n").stdout
    assert told.splitlines() == ["dead-letters: 1", "default: 3", f"other: {len(TASKS)}"]
    assert (
        site.run("python", "-m", "celery_platform.cli", "move-tasks", "--from", urls[old], input=f"{passwords[old]}\n").stdout
        == "nothing to bring\n"
    )
    site.run("python", "-m", "celery_platform.cli", "dead-letters", "replay", "--all", "--yes")
    with site.worker("--queues=default,other", "--concurrency=2"):
        expected = {*TASKS, "later-12", "later-14", "taken", "dead"}
        wait_for("all tasks", lambda: ran(site).keys() >= expected, seconds=40)
        time.sleep(1)
    assert ran(site) == Counter(expected)


def test_the_broker_in_use_brings_nothing(site: Site, redis_url: str) -> None:
    site.write(SHOP)
    site.set(broker_url=f"{redis_url}/0")
    for url in (f"{redis_url}/0", "memory://"):
        run = site.run("python", "-m", "celery_platform.cli", "move-tasks", "--from", url, input="\n", check=False)
        assert run.returncode == 1
        assert "allowed: one of Redis, Sentinel or RabbitMQ, other than the broker in use" in run.stderr
