"""Queues, and which task goes to which."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Container, Mapping
from typing import Any

from celery.app import routes
from kombu.entity import Exchange, Queue

from celery_platform.settings import PREFIX, Settings, as_written
from celery_platform.versions import CELERY_DELAYED_DELIVERY_EXCHANGE, MAX_NUMBER_OF_BITS_TO_USE

logger = logging.getLogger(__name__)

#: What a delay puts before a routing key.
DELAY = re.compile(rf"^(?:[01]\.){{{MAX_NUMBER_OF_BITS_TO_USE}}}")


def celery_config(settings: Settings) -> dict[str, Any]:
    """Return Celery's own settings for queues and routes."""
    config: dict[str, Any] = {
        "task_default_queue": settings.default_queue,
        "task_queues": [_queue(queue.name, settings) for queue in settings.queues],
        # A misspelt queue is an error for the sender, not a queue that nobody consumes.
        "task_create_missing_queues": False,
        "task_routes": (Router(settings),),
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


class Router:
    """Names queue and priority of a task, as Celery calls it: by the settings, or else by the application's own routes.

    Args:
        settings: Their routes come first.
        own: What the application has as `task_routes`. A queue that is not declared is warned of, and not used.
    """

    def __init__(self, settings: Settings, own: Any = None) -> None:
        self.settings = settings
        self.own = own
        self._routes = routes.prepare(own)
        self._priorities = {queue.name: queue.priority for queue in settings.queues}
        # A message that no queue takes is an error for the sender, not lost.
        self._common = {"mandatory": True} if settings.uses_rabbitmq else {}
        self._warned: set[tuple[str, str]] = set()

    def __call__(self, name: str, args: Any, kwargs: Any, options: dict[str, Any], task: Any = None, **_: Any) -> dict[str, Any]:
        """Return the route of a task."""
        names = self._priorities
        found = next((route for pattern, route in self.settings.routes.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if found:
            queue, priority = found.queue, found.priority
        else:
            queue, priority = self._of_application(name, args, kwargs, options, task)
        # The queue is always named: without it, Celery 5.7.0 fails on every countdown with quorum queues.
        queue = options.get("queue") or addressed(options, names) or queue or self.settings.default_queue
        queue = getattr(queue, "name", queue)
        if priority is None:
            priority = names.get(queue)
        return {"queue": queue} | self._common | ({"priority": priority} if priority is not None else {})

    def _of_application(self, name: str, args: Any, kwargs: Any, options: dict[str, Any], task: Any) -> tuple[str | None, int | None]:
        route = routes.Router(self._routes).lookup_route(name, args, kwargs, options, task) or {}
        route = {"queue": route} if isinstance(route, str) else route
        wanted = getattr(route.get("queue"), "name", route.get("queue"))
        queue = wanted if wanted in self._priorities else addressed(route, self._priorities)
        if wanted and not queue and (name, wanted) not in self._warned:
            self._warned.add((name, wanted))
            logger.warning("task_routes of the application sends %s to %s, which is none of %sQUEUES", name, wanted, PREFIX)
        return queue, route.get("priority")

    def shown(self) -> list[Any]:
        """Return the routes as an operator reads them, in their order."""
        own = self.own if isinstance(self.own, list | tuple) else [self.own]
        return [item for item in (as_written(self.settings.routes), *own) if item]


def misdirected(own: Any, settings: Settings) -> dict[str, str]:
    """Return which queues that are not declared an application's routes name, by patterns; routers of code are not asked."""
    names = {queue.name for queue in settings.queues}
    maps = [item for item in (own if isinstance(own, list | tuple) else [own]) if isinstance(item, Mapping)]
    wanted = {str(pattern): route.get("queue") if isinstance(route, Mapping) else route for item in maps for pattern, route in item.items()}
    found = {pattern: str(getattr(queue, "name", queue)) for pattern, queue in wanted.items() if queue}
    return {pattern: queue for pattern, queue in found.items() if queue not in names}


def undeclared(own: Any, settings: Settings) -> list[str]:
    """Return what an application's `task_queues` has that the declared queues have not: names, exchanges, arguments."""
    names = {queue.name for queue in settings.queues}
    queues = [Queue.from_dict(name, **options) for name, options in own.items()] if isinstance(own, Mapping) else list(own)
    wrong = []
    for queue in queues:
        name = getattr(queue, "name", queue)
        keys = {getattr(queue, "routing_key", ""), getattr(getattr(queue, "exchange", None), "name", "")} - {None, "", name}
        if name not in names:
            wrong.append(str(name))
        elif keys or getattr(queue, "queue_arguments", None) or getattr(queue, "bindings", None):
            wrong.append(f"exchange, routing key or arguments of {name}")
    return wrong


def addressed(options: dict[str, Any], names: Container[str]) -> str | None:
    """Return the one of these queues that a task's exchange and routing key stand for; None if that is none.

    Some applications name those. A retry does, too, with those that its message came by (signature_from_request in
    celery/app/task.py): without this it would leave the queue that it was sent to.
    """
    key = DELAY.sub("", options.get("routing_key") or "")
    exchange = options.get("exchange")
    exchange = getattr(exchange, "name", exchange)
    return key if key in names and exchange in (None, "", key, CELERY_DELAYED_DELIVERY_EXCHANGE) else None
