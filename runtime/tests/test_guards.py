"""Defects of Celery, kombu and py-amqp: each is shown without its guard, and gone with it."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import redis
from amqp.exceptions import AccessRefused, NotFound
from celery import Celery
from celery.exceptions import QueueNotFound
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from kombu import Connection, Exchange, Producer, Queue, transport
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp
from sites import Site, free_port, wait_for

from celery_platform import broker, configuration, guards
from celery_platform.settings import BadSettings, Settings

RabbitMQ = tuple[str, Callable[..., str]]


@pytest.fixture(autouse=True)
def _without_guards() -> Iterator[None]:
    """Take the guards' transport away from the tests that follow."""
    aliases, cache = dict(transport.TRANSPORT_ALIASES), dict(transport._transport_cache)
    yield
    for kept, now in ((aliases, transport.TRANSPORT_ALIASES), (cache, transport._transport_cache)):
        now.clear()
        now.update(kept)


def settings(**values: Any) -> Settings:
    return Settings(application="shop:app", **{"broker_password": "guest"} | values)


def guarded(**values: Any) -> Celery:
    app = Celery("shop", set_as_current=False)
    configuration.apply(app, settings(**values))
    guards.install(app, settings(**values))
    return app


def bare(url: str, queues: list[str], **conf: Any) -> Celery:
    """As Celery's documentation sets up quorum queues."""
    app = Celery("shop", broker=url.replace("guest@", "guest:guest@"), set_as_current=False)
    arguments = {"x-queue-type": "quorum"}
    app.conf.task_queues = [Queue(name, Exchange(name, type="topic"), name, queue_arguments=arguments) for name in queues]
    app.conf.task_default_queue = queues[0]
    app.conf.broker_transport_options = {"confirm_publish": True}
    app.conf.update(conf)
    return app


def messages(app: Celery, queue: str) -> list[str]:
    """Return the names of the tasks that wait in a queue, and take them from it."""
    with app.connection_for_read() as connection:
        bound = app.amqp.queues[queue](connection.default_channel)
        return [message.headers["task"] for message in iter(lambda: bound.get(no_ack=True), None)]


# --- Countdowns to quorum queues ---

SHOP = """
import time
from celery import Celery
app = Celery("shop")
app.conf.task_routes = {"*": {"routing_key": "default"}}  # As in Celery's documentation of quorum queues.

@app.task(name="runs", bind=True)
def runs(self, name, due):
    with open("ran", "a") as file:
        print(name, time.time() - due, self.request.delivery_info["routing_key"].rpartition(".")[2], file=file)
    if name == "retry" and not self.request.retries:
        self.retry(args=(name, time.time() + 1.3), countdown=1.3)
"""
SENDER = """
import sys, time
from datetime import UTC, datetime, timedelta
from celery_platform.worker import app
from shop import runs

def now(seconds):
    return time.time() + seconds

app.send_task("runs", ("zero", now(0)), countdown=0)
app.send_task("runs", ("fraction", now(0.2)), countdown=0.2)
app.send_task("runs", ("one", now(1)), {}, 1)
app.send_task("runs", ("eta", now(0.3)), eta=datetime.now(UTC) + timedelta(seconds=0.3))
for _ in range(20):  # An ETA of a second is in less than one when Celery looks.
    app.send_task("runs", ("second", now(1)), eta=(datetime.now(UTC) + timedelta(seconds=1.0001)).isoformat())
runs.apply_async(("long", now(2.5)), countdown=2.5)
runs.apply_async(("key", now(1)), routing_key="critical", countdown=1)
runs.apply_async(("exchange", now(0.5)), exchange="critical", routing_key="critical", countdown=0.5)
app.send_task("runs", ("retry", now(0)), queue="critical")
"""


def test_countdowns_of_any_length_reach_their_queues(site: Site, rabbitmq: RabbitMQ) -> None:
    url, _ = rabbitmq
    app = bare(url, ["default", "critical"], task_routes={"*": {"routing_key": "default"}})
    with pytest.raises(KeyError, match="exchange_type"):
        app.send_task("runs", countdown=2)
    app.conf.task_routes = None
    app.amqp.flush_routes()
    del app.amqp.router
    for delay in ({"countdown": 0.2}, {"eta": datetime.now(UTC) + timedelta(seconds=0.8)}):
        with pytest.raises(ValueError, match="countdown must be a positive number"):
            app.send_task("runs", **delay)
    with pytest.raises(NotFound, match="celery_delayed_27"):
        app.send_task("runs", countdown=2)

    site.write(SHOP)
    site.set(broker_url=url, queues='["default", "critical"]', publish_max_retries="3")
    site.secret(broker_password="guest")
    site.run("python", "-c", SENDER)  # No worker has ever run.
    path = site.folder / "ran"
    with site.worker("--queues=default,critical"):
        wait_for("the tasks", lambda: path.exists() and len(path.read_text().splitlines()) == 29)
    ran = [line.split() for line in path.read_text().splitlines()]
    assert min(float(late) for _, late, _ in ran) >= 0
    assert sorted((name, queue) for name, _, queue in ran if queue != "default") == [
        ("exchange", "critical"),
        ("key", "critical"),
        ("retry", "critical"),
        ("retry", "critical"),
    ]


def test_a_countdown_to_an_unknown_exchange_is_an_error_for_the_sender(rabbitmq: RabbitMQ) -> None:
    app = guarded(broker_url=rabbitmq[0], queues=["default"])
    with pytest.raises(QueueNotFound, match="'other'"):
        app.send_task("runs", exchange="other", routing_key="default", countdown=2)


def test_who_may_not_declare_may_still_delay(rabbitmq: RabbitMQ) -> None:
    url, control = rabbitmq
    # As research/celery.md, 3.4, has it for producers.
    control("set_permissions", "guest", "^$", "^celery_delayed_27$", "^$")
    app = guarded(broker_url=url, queues=["default"], publish_max_retries=1)
    app.conf.task_send_sent_event = False
    with pytest.raises(NotFound, match="celery_delayed_27"):
        app.send_task("runs", countdown=1)

    control("set_permissions", "guest", ".*", ".*", ".*")
    guards.declare_delays(app)
    control("set_permissions", "guest", "^$", "^celery_delayed_27$", "^$")
    unguarded = guarded(broker_url=url, queues=["default"], publish_max_retries=1)
    unguarded.conf.task_send_sent_event = False
    with pytest.raises(AccessRefused):
        unguarded.send_task("runs")
    unguarded.send_task("runs", countdown=1)


def test_queues_whose_delayed_messages_would_mix_are_refused(rabbitmq: RabbitMQ) -> None:
    url, _ = rabbitmq
    app = bare(url, ["eu.orders", "orders"])
    guards.declare_delays(app)  # As a worker does.
    app.send_task("runs", countdown=1)
    assert wait_for("the message", lambda: messages(app, "eu.orders")) == ["runs"]
    assert wait_for("the other", lambda: messages(app, "orders")) == ["runs"]

    with pytest.raises(BadSettings, match="QUEUES has orders and eu.orders"):
        guarded(broker_url=url, queues=["orders", "eu.orders"], default_queue="orders")
    guarded(broker_url=url, queues=["orders", "orders.eu", "old-orders"], default_queue="orders")
