"""Quorum queues and delayed delivery in RabbitMQ for Celery and kombu 5.4, which know neither.

What Celery 5.5 (celery/app/base.py, send_task; celery/worker/consumer/tasks.py, qos_global) and kombu 5.5
(kombu/transport/native_delayed_delivery.py) do, with the same names and arguments in the broker, so that an application can go on
to 5.5 with its tasks there. Can go when 5.4 is no longer supported.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

from celery import Celery, signals
from kombu.entity import Exchange, Queue
from kombu.transport import pyamqp

MAX_NUMBER_OF_BITS_TO_USE = 28
MAX_LEVEL = MAX_NUMBER_OF_BITS_TO_USE - 1
CELERY_DELAYED_DELIVERY_EXCHANGE = "celery_delayed_delivery"


def install(app: Celery, declares: bool) -> None:
    """Let an application's tasks wait in RabbitMQ, and its workers consume from quorum queues."""
    # Such queues refuse a prefetch limit for all consumers of a channel, which Celery sets unless this says otherwise.
    pyamqp.Transport.qos_semantics_matches_spec = lambda *_: True  # type: ignore[method-assign]
    send = app.amqp.send_task_message

    def send_task_message(
        producer: Any, name: str, message: Any, exchange: Any = None, routing_key: str | None = None, queue: Any = None, **options: Any
    ) -> Any:
        if seconds := _seconds(message.headers.get("eta")):
            queue = app.amqp.queues[queue] if isinstance(queue, str) else queue
            routing_key = calculate_routing_key(seconds, queue.routing_key if queue else routing_key or "")
            exchange, queue = Exchange(level_name(MAX_LEVEL), type="topic"), None
        return send(producer, name, message, exchange=exchange, routing_key=routing_key, queue=queue, **options)

    app.amqp.send_task_message = send_task_message
    if declares:
        # Imported here, since it imports this.
        from celery_platform import guards

        signals.worker_init.connect(lambda **_: guards.declare_delays(app), weak=False)


def _seconds(eta: str | None) -> int:
    """Return in how many whole seconds a task is to run; 0 for now."""
    return max(0, math.ceil((datetime.fromisoformat(eta) - datetime.now(UTC)).total_seconds())) if eta else 0


def level_name(level: int, *_: Any) -> str:
    """Return the name of the queue, and of its exchange, in which a message waits 2 to the power of this many seconds."""
    return f"celery_delayed_{level}"


def calculate_routing_key(countdown: int, routing_key: str) -> str:
    """Return the routing key that leads through the queues for so many seconds, a bit each, to where another one leads."""
    return ".".join(f"{countdown:0{MAX_NUMBER_OF_BITS_TO_USE}b}") + f".{routing_key}"


def declare_native_delayed_delivery_exchanges_and_queues(connection: Any, queue_type: str, *_: Any) -> None:
    """Declare the queues in which messages wait, and the exchanges that lead from each to the next."""
    channel = connection.channel()
    for level in range(MAX_LEVEL, -1, -1):
        name, after = level_name(level), level_name(level - 1) if level else CELERY_DELAYED_DELIVERY_EXCHANGE
        Exchange(name, type="topic").bind(channel).declare()
        arguments = {
            "x-queue-type": queue_type,
            "x-overflow": "reject-publish",
            "x-message-ttl": 2**level * 1000,
            "x-dead-letter-exchange": after,
        }
        if queue_type == "quorum":
            arguments["x-dead-letter-strategy"] = "at-least-once"
        queue = Queue(name, queue_arguments=arguments).bind(channel)
        queue.declare()
        queue.bind_to(name, "*." * (MAX_LEVEL - level) + "1.#")
    for level in range(MAX_LEVEL, -1, -1):
        exchange = Exchange(level_name(level - 1) if level else CELERY_DELAYED_DELIVERY_EXCHANGE, type="topic").bind(channel)
        exchange.declare()
        exchange.bind_to(level_name(level), "*." * (MAX_LEVEL - level) + "0.#")


def bind_queue_to_native_delayed_delivery_exchange(connection: Any, queue: Queue) -> None:
    """Let messages for a queue that have waited arrive there."""
    bound = queue.bind(connection.channel())
    key = f"#.{queue.routing_key}"
    bound.exchange.bind_to(CELERY_DELAYED_DELIVERY_EXCHANGE, routing_key=key)
    bound.bind_to(bound.exchange.name, routing_key=key)
