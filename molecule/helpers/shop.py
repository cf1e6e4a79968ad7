"""An application whose tasks fail in every way, and the dead letters that come of it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from celery import Celery

from celery_platform.dead_letters import DeadLetter, Original, RabbitStore, RedisStore, Store
from helpers.sites import Site

SHOP = """
import os, signal, time
from pathlib import Path
from celery import Celery, Task
from celery.exceptions import Reject, SoftTimeLimitExceeded

app = Celery("shop")

class Base(Task):  # Not derived from the application's own class.
    pass

def ran(name):
    with open("ran", "a") as file:
        file.write(name + "\\n")
    return Path("ran").read_text().split().count(name)

def fixed():
    return Path("fixed").exists()

@app.task(name="works")
def works():
    ran("works")

@app.task(name="echo")
def echo(text, key=None):
    return [text, key]

@app.task(name="fails", base=Base)
def fails(secret):
    ran("fails")
    if not fixed():
        raise ValueError("no stock")

@app.task(name="retries", bind=True, max_retries=1)
def retries(self):
    ran("retries")
    if not fixed():
        raise self.retry(exc=KeyError("still"), countdown=1)

@app.task(name="rejects")
def rejects():
    raise Reject("never", requeue=False)

@app.task(name="waits", bind=True)
def waits(self):
    runs = ran("waits")
    assert bool(self.request.delivery_info.get("redelivered")) == (runs > 1)
    if runs < 5:
        raise Reject("not yet", requeue=True)

@app.task(name="slow", time_limit=1, soft_time_limit=0.5)
def slow():
    try:
        time.sleep(60)
    except SoftTimeLimitExceeded:
        time.sleep(60)

@app.task(name="early", acks_late=False)
def early():
    raise ValueError("acknowledged before")

@app.task(name="dies")
def dies():
    ran("dies")
    if not fixed():
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def use_broker(request: pytest.FixtureRequest, site: Site, redis_url: str) -> None:
    """Give a site the broker that a fixture's parameter names: redis, or else a RabbitMQ."""
    if request.param == "redis":
        site.set(broker_url=f"{redis_url}/0")
    else:
        site.set(broker_url=request.getfixturevalue("rabbitmq")[0])
        site.secret(broker_password="guest")


@pytest.fixture(params=["redis", "rabbitmq"])
def shop(request: pytest.FixtureRequest, site: Site, redis_url: str) -> Site:
    """A site with tasks that fail, on each broker."""
    use_broker(request, site, redis_url)
    site.set(result_backend=f"{redis_url}/1", key_prefix="shop:", queues='["default"]', publish_timeout="3")
    site.write(SHOP)
    return site


def store_of(app: Celery) -> Store:
    return RabbitStore(app) if app.conf.broker_url.startswith("amqp") else RedisStore(app)


def letter(id: str = "1", **changes: Any) -> DeadLetter:
    headers = {"id": id, "task": "fails", "retries": 2, "expires": "2020-01-01T00:00:00+00:00", "celery_platform_runs": 2}
    body = json.dumps([["s3cret"], {}, {}]).encode()
    route = {"queue": "default", "exchange": "default", "routing_key": "default"}
    kind = {"content_type": "application/json", "content_encoding": "utf-8"}
    original = Original(body=body, headers=headers, properties={"correlation_id": id}, **route, **kind)
    fields = {
        "id": id,
        "task": "fails",
        "reason": "failed",
        "exception": "ValueError",
        "message": "no stock",
        "traceback": "Traceback: here",
    }
    times = {"runs": 1, "retries": 2, "received": time.time(), "failed": time.time(), "hostname": "celery@here"}
    return DeadLetter(**(fields | times | {"original": original} | changes))
