"""Puts the settings into an application, beside what the application sets itself."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from celery import Celery, signals

from celery_platform import beat, broker, queues, versions
from celery_platform.application import NO_PICKLE
from celery_platform.settings import PREFIX, BadSettings, Settings

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A setting of Celery, its value, and who chose it: `environment`, `application` or `default`."""

    name: str
    value: Any
    source: str
    #: What the application set instead, and why that is not in force; '' if it set nothing else.
    overridden: Any = None
    reason: str = ""


#: Settings of Celery that follow from one of ours.
FROM_SETTINGS: dict[str, str] = {
    "worker_prefetch_multiplier": "prefetch_multiplier",
    "worker_max_tasks_per_child": "max_tasks_per_child",
    "worker_proc_alive_timeout": "child_start_timeout",
    "result_expires": "result_expires",
    "result_chord_expires": "chord_expires",
}
#: Those that decide about other settings, too: with_own.
DECISIVE: dict[str, str] = {
    "task_soft_time_limit": "soft_time_limit",
    "task_time_limit": "time_limit",
    "task_default_queue": "default_queue",
}
#: All that are in force as they are in the environment, if they are there.
SETTING_OF: dict[str, str] = {
    **FROM_SETTINGS,
    **DECISIVE,
    "broker_url": "broker_url",
    "broker_pool_limit": "pool_limit",
    "result_backend": "result_backend",
    "result_compression": "result_compression",
    "task_queues": "queues",
    "worker_max_memory_per_child": "max_memory_per_child",
}

#: Results of an application that are kept here are not kept by a service of the deployment's.
OF_DEPLOYMENT = frozenset({"redis", "rediss", "sentinel", "amqp", "amqps", "rpc", "cache", "memory", "disabled"})

#: What an application may set itself, and when that is as safe as what we would set. Without an entry here, a value of
#: the application is overridden: connections, say, belong to the deployment.
AS_SAFE: dict[str, Callable[[Any, Settings], bool]] = {
    "accept_content": lambda value, _: set(value) <= {"json", "application/json"},
    "result_accept_content": lambda value, _: set(value) <= {"json", "application/json"},
    "task_serializer": lambda value, _: value == "json",
    "result_serializer": lambda value, _: value == "json",
    "event_serializer": lambda value, _: value == "json",
    "task_acks_late": lambda value, _: bool(value),
    "task_reject_on_worker_lost": lambda value, _: bool(value),
    "task_track_started": lambda value, _: True,
    "worker_prefetch_multiplier": lambda value, _: bool(value),
    "worker_max_tasks_per_child": lambda value, _: bool(value),
    "worker_max_memory_per_child": lambda value, _: bool(value),
    "worker_proc_alive_timeout": lambda value, _: bool(value),
    "worker_send_task_events": lambda value, _: True,
    "task_send_sent_event": lambda value, _: True,
    "broker_pool_limit": lambda value, _: bool(value),
    "result_backend": lambda value, _: isinstance(value, str) and re.split("[:+]", value)[0] not in OF_DEPLOYMENT,
    "result_expires": lambda value, _: value is not None,
    "result_chord_expires": lambda value, _: True,
    "result_compression": lambda value, _: True,
    "timezone": lambda value, _: True,
    "enable_utc": lambda value, _: bool(value),
    "beat_sync_every": lambda value, _: True,
    "redbeat_lock_timeout": lambda value, _: bool(value),
    "task_ignore_result": lambda value, _: True,
    "task_queues": lambda value, settings: not queues.undeclared(value, settings),
    "task_routes": lambda value, settings: not queues.misdirected(value, settings),
}


def celery_config(settings: Settings) -> dict[str, Any]:
    """Return all of Celery's own settings that follow from ours."""
    return {
        "accept_content": ["json"],
        "result_accept_content": None,
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


def own_value(app: Celery, name: str) -> Any:
    """Return what the application itself set, or None."""
    value = app.conf[name] if versions.is_set(app, name) else None
    if name == "task_routes" and isinstance(value, tuple) and value and isinstance(value[0], queues.Router):
        return value[0].own
    return value


def with_own(app: Celery, settings: Settings) -> Settings:
    """Return the settings with what the application sets itself in their places, where they were not set and it fits the others."""
    return _with_own(app, settings)[0]


def _with_own(app: Celery, settings: Settings) -> tuple[Settings, dict[str, str]]:
    """Return also why values of the application do not fit, by field."""
    options = own_value(app, "broker_transport_options") or {}
    wanted: dict[str, Any] = {field: own_value(app, name) for name, field in DECISIVE.items()}
    wanted["visibility_timeout"] = options.get("visibility_timeout") if settings.uses_redis_broker else None
    found: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for field, value in wanted.items():
        if value is not None and field not in settings.given:
            changed: dict[str, Any] = {field: math.ceil(value) if isinstance(value, float) else value}
            try:
                found[field] = getattr(replace(settings, **changed), field)
            except BadSettings as error:
                wrong[field] = str(error)
    # One limit alone: the other one keeps its distance.
    soft, hard = settings.soft_time_limit, settings.time_limit
    alone = (found.keys() | settings.given) & {"soft_time_limit", "time_limit"}
    if alone == {"time_limit"} <= found.keys() and found["time_limit"] <= soft:
        found["soft_time_limit"] = max(1, found["time_limit"] * soft // hard)
    if alone == {"soft_time_limit"} <= found.keys() and found["soft_time_limit"] >= hard:
        found["time_limit"] = found["soft_time_limit"] * hard // soft
    while conflicts := [item for item in replace(settings, **found).conflicts() if item.inputs & found.keys()]:
        for field in conflicts[0].inputs & found.keys():
            wrong[field] = conflicts[0].text
            del found[field]
    return replace(settings, **found), wrong


def apply(app: Celery, settings: Settings) -> list[Choice]:
    """Configure an application, and return what was chosen and by whom.

    A value from the environment wins over one of the application, and that, where it is as safe, over our default.
    """
    folded, wrong = _with_own(app, settings)
    ours = celery_config(folded)
    routes = own_value(app, "task_routes")
    if routes:
        ours["task_routes"] = (queues.Router(folded, routes),)
    choices = [_choice(name, value, own_value(app, name), folded, wrong) for name, value in ours.items()]
    if any(choice.name == "result_backend" and choice.source == "application" for choice in choices):
        choices = [choice for choice in choices if choice.name != "task_ignore_result" or choice.source == "application"]
    versions.put(app, {choice.name: choice.value for choice in choices})
    # An application that used its result backend while it was imported holds one made from its own settings.
    app._backend_cache = None
    vars(app._local).pop("backend", None)
    return choices


def _choice(name: str, value: Any, own: Any, settings: Settings, wrong: dict[str, str]) -> Choice:
    """Return the choice between our value and the application's own; `settings` and `wrong` are those of _with_own."""
    field = SETTING_OF.get(name, "")
    is_set = field in settings.given and not (name == "result_backend" and settings.result_backend_is_default)
    source = "environment" if is_set else "default"
    if name == "broker_transport_options" and own:
        own = {key: item for key, item in own.items() if value.get(key) != item} or None
        return Choice(name, value, source, own, wrong.get("visibility_timeout", "it belongs to the deployment") if own else "")
    if own is not None and name in DECISIVE and not is_set:
        return Choice(name, value, source, own, wrong[field]) if field in wrong else Choice(name, value, "application")
    if own is None or own == value:
        return Choice(name, value, source)
    if name in ("task_queues", "task_routes"):
        # Ours in any case, which the application's are part of where they fit.
        if AS_SAFE[name](own, settings):
            return Choice(name, value, "application" if name == "task_routes" else source)
        odd = queues.undeclared(own, settings) if name == "task_queues" else list(queues.misdirected(own, settings).values())
        return Choice(name, value, source, own, f"none of {PREFIX}QUEUES: {', '.join(map(str, odd))}")
    if is_set:
        return Choice(name, value, source, own, f"{PREFIX}{field.upper()} is set")
    if name in AS_SAFE and AS_SAFE[name](own, settings):
        return Choice(name, own, "application")
    if "pickle" in str(own):
        return Choice(name, value, source, own, NO_PICKLE)
    reason = f"it is less safe than {value!r}" if name in AS_SAFE and name != "result_backend" else "it belongs to the deployment"
    return Choice(name, value, source, own, reason)


def tell(choices: list[Choice]) -> None:
    """Log which values of the application are not in force. They are not shown: there may be passwords in them."""
    for choice in choices:
        if choice.reason:
            logger.warning("%s of the application is overridden (`celery-platform config` shows both): %s", choice.name, choice.reason)


def tell_at_start(choices: list[Choice]) -> None:
    """Let workers and beat log it, once they have set up their logs."""
    signals.celeryd_after_setup.connect(lambda **_: tell(choices), weak=False)
    signals.beat_init.connect(lambda **_: tell(choices), weak=False)


def in_force(choices: list[Choice], settings: Settings) -> list[Choice]:
    """Return choices as an operator reads them: with the limits that workers have, and with what follows from the environment.

    `settings` are those with what the application sets itself.
    """
    scheme = settings.broker_url.partition("://")[0]
    unset = {name: getattr(settings, name) for name in (*DECISIVE.values(), "visibility_timeout") if name not in settings.given}
    bare = celery_config(replace(Settings(application=settings.application, broker_url=f"{scheme}://"), **unset))
    shown = []
    for choice in choices:
        name, value, source = choice[:3]
        chosen = value
        if value is None and name in SETTING_OF:
            chosen = getattr(settings, SETTING_OF[name])
        elif name == "task_routes":
            chosen = value[0].shown()
            source = "environment" if source == "default" and settings.routes else source
        elif source == "default" and (bare.get(name, value) != value or (name == "timezone" and "TZ" in os.environ)):
            source = "environment"
        shown.append(choice._replace(value=chosen, source=source))
    return shown
