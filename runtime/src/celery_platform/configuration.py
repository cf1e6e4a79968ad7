"""Puts the settings into an application, beside what the application sets itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from celery import Celery

from celery_platform import beat, broker, queues, versions
from celery_platform.settings import PREFIX, Settings

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A setting of Celery, its value, and who chose it: `environment`, `application` or `default`."""

    name: str
    value: Any
    source: str


#: Settings of Celery that follow from one of ours.
FROM_SETTINGS: dict[str, str] = {
    "task_soft_time_limit": "soft_time_limit",
    "task_time_limit": "time_limit",
    "worker_prefetch_multiplier": "prefetch_multiplier",
    "worker_max_tasks_per_child": "max_tasks_per_child",
    "result_expires": "result_expires",
}

#: What an application may set itself, and when that is as safe as what we would set. Without an entry here, a value of
#: the application is overruled: connections and queues, say, belong to the deployment.
AS_SAFE: dict[str, Callable[[Any, Settings], bool]] = {
    "accept_content": lambda value, _: set(value) <= {"json", "application/json"},
    "task_serializer": lambda value, _: value == "json",
    "result_serializer": lambda value, _: value == "json",
    "event_serializer": lambda value, _: value == "json",
    "task_acks_late": lambda value, _: bool(value),
    "task_reject_on_worker_lost": lambda value, _: bool(value),
    "task_track_started": lambda value, _: True,
    "task_soft_time_limit": lambda value, settings: bool(value) and value < settings.time_limit,
    "task_time_limit": lambda value, settings: bool(value) and settings.soft_time_limit < value < settings.visibility_timeout,
    "worker_prefetch_multiplier": lambda value, _: bool(value),
    "worker_max_tasks_per_child": lambda value, _: bool(value),
    "worker_send_task_events": lambda value, _: True,
    "task_send_sent_event": lambda value, _: True,
    "result_expires": lambda value, _: value is not None,
    "result_compression": lambda value, _: True,
    "timezone": lambda value, _: True,
    "enable_utc": lambda value, _: bool(value),
    "beat_sync_every": lambda value, _: True,
    "redbeat_lock_timeout": lambda value, _: bool(value),
    "task_ignore_result": lambda value, _: True,
}


def celery_config(settings: Settings) -> dict[str, Any]:
    """Return all of Celery's own settings that follow from ours."""
    return {
        "accept_content": ["json"],
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "result_compression": None if settings.result_compression == "none" else settings.result_compression,
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "task_track_started": True,
        "worker_max_memory_per_child": settings.max_memory_per_child and settings.max_memory_per_child * 1024,
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        # A killed beat must not send again what it has sent: by default it notes that every three minutes.
        "beat_sync_every": 1,
        "timezone": os.environ.get("TZ", "UTC"),
        "enable_utc": True,
        **{name: getattr(settings, field) for name, field in FROM_SETTINGS.items()},
        # The worker's own (limits.py): here they would go into every message, and win over those of its worker.
        "task_soft_time_limit": None,
        "task_time_limit": None,
        **broker.celery_config(settings),
        **beat.celery_config(settings),
        **queues.celery_config(settings),
    }


def apply(app: Celery, settings: Settings) -> list[Choice]:
    """Configure an application, and return what was chosen and by whom.

    A value from the environment wins over one of the application, and that, where it is as safe, over our default.
    """
    choices = []
    ours = celery_config(settings)
    for name, value in ours.items():
        explicit = FROM_SETTINGS.get(name) in settings.model_fields_set
        own = app.conf[name] if versions.is_set(app, name) else None
        if explicit or own is None or own == value:
            choices.append(Choice(name, value, "environment" if explicit else "default"))
        elif name in AS_SAFE and AS_SAFE[name](own, settings):
            choices.append(Choice(name, own, "application"))
        else:
            if name in AS_SAFE:
                logger.warning("%s of the application is overruled: it is less safe than %r (%s… can set it)", name, value, PREFIX)
            choices.append(Choice(name, value, "default"))
    versions.put(app, {choice.name: choice.value for choice in choices})
    # An application that used its result backend while it was imported holds one made from its own settings.
    app._backend_cache = None
    vars(app._local).pop("backend", None)
    return choices


def in_force(choices: list[Choice], settings: Settings) -> list[Choice]:
    """Return choices as an operator reads them: with the limits that workers have, and with what follows from the environment."""
    scheme = settings.broker_url.partition("://")[0]
    bare = celery_config(Settings.model_construct(application=settings.application, broker_url=f"{scheme}://"))
    shown = []
    for name, value, source in choices:
        chosen, own = value, FROM_SETTINGS.get(name, "")
        if value is None and own:
            chosen = getattr(settings, own)
        elif name == "task_routes" and source == "default":
            chosen = settings.model_dump(mode="json", include={"routes"}, exclude_none=True)["routes"]
            source = "environment" if chosen else source
        elif source == "default" and (bare.get(name, value) != value or (name == "timezone" and "TZ" in os.environ)):
            source = "environment"
        shown.append(Choice(name, chosen, source))
    return shown
