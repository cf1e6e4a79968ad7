"""Queues, and which task goes to which."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Container
from typing import Any

from kombu.entity import Exchange, Queue

from celery_platform.settings import Settings
from celery_platform.versions import CELERY_DELAYED_DELIVERY_EXCHANGE, MAX_NUMBER_OF_BITS_TO_USE

#: What a delay puts before a routing key.
DELAY = re.compile(rf"^(?:[01]\.){{{MAX_NUMBER_OF_BITS_TO_USE}}}")


def celery_config(settings: Settings) -> dict[str, Any]:
    """Return Celery's own settings for queues and routes."""
    config: dict[str, Any] = {
        "task_default_queue": settings.default_queue,
        "task_queues": [_queue(queue.name, settings) for queue in settings.queues],
        # A misspelt queue is an error for the sender, not a queue that nobody consumes.
        "task_create_missing_queues": False,
        "task_routes": (router(settings),),
    }
    if settings.uses_rabbitmq:
        config["task_default_queue_type"] = "quorum"
        config["task_default_exchange_type"] = "topic"
    return config


def _queue(name: str, settings: Settings) -> Queue:
    if settings.uses_rabbitmq:
        # Delayed delivery to quorum queues needs a topic exchange; with a direct one a countdown blocks the worker.
        return Queue(name, Exchange(name, type="topic"), routing_key=name, queue_arguments={"x-queue-type": "quorum"})
    return Queue(name, Exchange(name), routing_key=name)


def router(settings: Settings) -> Any:
    """Return a router as Celery calls it: queue and priority of a task by its name."""
    priorities = {queue.name: queue.priority for queue in settings.queues}
    # A message that no queue takes is an error for the sender, not lost.
    common = {"mandatory": True} if settings.uses_rabbitmq else {}

    def route(name: str, args: Any, kwargs: Any, options: dict[str, Any], task: Any = None, **_: Any) -> dict[str, Any]:
        found = next((route for pattern, route in settings.routes.items() if fnmatch.fnmatchcase(name, pattern)), None)
        # The queue is always named: without it, Celery 5.7.0 fails on every countdown with quorum queues.
        queue = options.get("queue") or addressed(options, priorities) or (found.queue if found else None) or settings.default_queue
        queue = getattr(queue, "name", queue)
        priority = found.priority if found and found.priority is not None else priorities.get(queue)
        return {"queue": queue} | common | ({"priority": priority} if priority is not None else {})

    return route


def addressed(options: dict[str, Any], names: Container[str]) -> str | None:
    """Return the one of these queues that a task's exchange and routing key stand for; None if that is none.

    Some applications name those. A retry does, too, with those that its message came by (signature_from_request in
    celery/app/task.py): without this it would leave the queue that it was sent to.
    """
    key = DELAY.sub("", options.get("routing_key") or "")
    exchange = options.get("exchange")
    exchange = getattr(exchange, "name", exchange)
    return key if key in names and exchange in (None, "", key, CELERY_DELAYED_DELIVERY_EXCHANGE) else None
