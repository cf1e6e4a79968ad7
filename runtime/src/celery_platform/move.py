"""Brings what another broker holds to this one, for a site that changes its broker: tasks, delayed tasks and dead letters.

Whatever is brought is acknowledged there once this broker has it. An interruption may bring a task twice; it loses none,
and the next run goes on. The other broker's workers must have ended: what they had taken and did not acknowledge is
brought, too, and one that still ran would run it as well.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any

from celery import Celery
from kombu.entity import Queue

from celery_platform import configuration, guards, redis_transport
from celery_platform.dead_letters import RUNS_HEADER, Original, Store, store_of
from celery_platform.queues import DELAY
from celery_platform.settings import BadSettings, SecretStr, Settings
from celery_platform.versions import MAX_NUMBER_OF_BITS_TO_USE, level_name

#: Messages that are brought before the first of them is acknowledged, at most.
PREFETCH = 100
#: Seconds until a broker that gives nothing is taken to have nothing more; it answers within milliseconds.
SILENCE = 3


def bring(url: str, password: str, app: Celery, store: Store, settings: Settings) -> Counter[str]:
    """Bring everything; return how many tasks of each queue there were, and how many dead letters (`dead-letters`).

    Raises:
        BadSettings: if the URL is no broker's that a site can have, or the one that is in use.
        the errors of kombu and its drivers, if a broker does not answer.
        LookupError: if a delayed task is for a queue that is no more; all others have been brought.
    """
    refused = "The URL to bring tasks from; allowed: one of Redis, Sentinel or RabbitMQ, other than the broker in use"
    try:
        source, found = _other(settings, url, password)
    except BadSettings as error:
        raise BadSettings(refused) from error
    there = store_of(source, found)
    if there is None or url == settings.broker_url:
        raise BadSettings(refused)
    if settings.uses_rabbitmq and settings.declare_queues:
        guards.declare_delays(app)
    brought: Counter[str] = Counter()
    homeless: set[str] = set()
    with source.connection_for_read() as connection:
        connection.ensure_connection(max_retries=3)
        delayed = []
        if found.uses_redis_broker:
            with connection.channel() as channel:
                _give_back(channel)
        else:
            delayed = [Queue(level_name(level)) for level in range(MAX_NUMBER_OF_BITS_TO_USE)]
        for queue in (*source.amqp.queues.values(), *delayed):
            for message in _messages(connection, queue.name, found):
                name = DELAY.sub("", message.delivery_info["routing_key"]) if queue in delayed else queue.name
                if name in app.amqp.queues:
                    _send(Original.of(message, name), store)
                    message.ack()
                    brought[name] += 1
                else:
                    homeless.add(name)
    letters = there.list()
    for letter in letters:
        store.add(letter)
    if letters:
        brought["dead-letters"] = there.remove([letter.id for letter in letters])
    if homeless:
        raise LookupError(f"There is no queue for delayed tasks of: {', '.join(sorted(homeless))}")
    return brought


def _other(settings: Settings, url: str, password: str) -> tuple[Celery, Settings]:
    """Return an application with another broker, whose queues are those of the settings, and its settings."""
    found = replace(settings, broker_url=url, broker_password=SecretStr(password), declare_queues=False)
    app = Celery("other", set_as_current=False)
    app.conf.update(configuration.celery_config(found))
    guards.use_transport()
    redis_transport.install(app, found)
    return app, found


def _messages(connection: Any, name: str, settings: Settings) -> Iterator[Any]:
    """Take as many messages from a queue as it has by now, however many still come; those that are not acknowledged return to it."""
    with connection.channel() as channel:
        left = channel._size(name) if settings.uses_redis_broker else channel.queue_declare(name, passive=True).message_count
        channel.basic_qos(0, PREFETCH, False)
        taken: deque[Any] = deque()
        consumer = connection.Consumer([Queue(name)], channel=channel, auto_declare=False, on_message=taken.append)
        consumer.consume()
        while left:
            if not taken:
                try:
                    connection.drain_events(timeout=SILENCE)
                except TimeoutError:
                    return
            while left and taken:
                yield taken.popleft()
                left -= 1


def _give_back(channel: Any) -> None:
    """Put what the ended workers of a Redis had taken back into the queues, which would otherwise wait for the visibility timeout."""
    with channel.conn_or_acquire() as client:
        for tag in client.zrange(channel.unacked_index_key, 0, -1):
            channel.qos.restore_by_tag(tag.decode(), client)


def _send(original: Original, store: Store) -> None:
    """Put a task on its queue here, or where it waits for its time."""
    original = original.counted(int(original.headers.get(RUNS_HEADER) or 0))
    eta = original.headers.get("eta")
    delay = math.ceil(datetime.fromisoformat(eta).timestamp() - time.time()) if eta else 0
    store.send(replace(original, exchange=original.queue, routing_key=original.queue), max(0, delay))
