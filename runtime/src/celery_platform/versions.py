"""What differs between the versions of Celery and kombu that applications may pin: 5.4 to 5.7.

Most of what is guarded elsewhere is in all of them. kombu's transport for Redis is not the same: redis_transport.PROVEN.
"""

from __future__ import annotations

from typing import Any

from celery import VERSION, Celery
from celery.app.utils import Settings as CelerySettings
from kombu.transport import redis

from celery_platform import delays
from celery_platform.settings import Settings

try:
    from kombu.transport.native_delayed_delivery import (
        CELERY_DELAYED_DELIVERY_EXCHANGE,
        MAX_LEVEL,
        MAX_NUMBER_OF_BITS_TO_USE,
        bind_queue_to_native_delayed_delivery_exchange,
        calculate_routing_key,
        declare_native_delayed_delivery_exchanges_and_queues,
        level_name,
    )
except ImportError:
    # kombu 5.4.
    from celery_platform.delays import (  # type: ignore[assignment]
        CELERY_DELAYED_DELIVERY_EXCHANGE,
        MAX_LEVEL,
        MAX_NUMBER_OF_BITS_TO_USE,
        bind_queue_to_native_delayed_delivery_exchange,
        calculate_routing_key,
        declare_native_delayed_delivery_exchanges_and_queues,
        level_name,
    )

__all__ = [
    "CELERY_DELAYED_DELIVERY_EXCHANGE",
    "MAX_LEVEL",
    "MAX_NUMBER_OF_BITS_TO_USE",
    "bind_queue_to_native_delayed_delivery_exchange",
    "calculate_routing_key",
    "declare_native_delayed_delivery_exchanges_and_queues",
    "install",
    "is_set",
    "level_name",
    "put",
]


def install(app: Celery, settings: Settings) -> None:
    """Let all supported versions do what the rest of this package asks of them."""
    if settings.uses_rabbitmq and (int(VERSION.major), int(VERSION.minor)) < (5, 5):
        delays.install(app, settings.declare_queues)
    # Before kombu 5.7 (GlobalKeyPrefixMixin), what is not in this list reads and writes keys without the application's prefix.
    commands = redis.GlobalKeyPrefixMixin.PREFIXED_SIMPLE_COMMANDS
    commands += [command for command in ("ZRANGE",) if command not in commands]


def is_set(app: Celery, name: str) -> bool:
    """Tell whether an application sets a setting of Celery, by its new name, its old one or with a namespace.

    Before 5.7, Celery's own `conf.value_set_for` knows only the new names.
    """
    # Any access by name replaces a configuration that is still to be loaded.
    _ = app.conf["task_acks_late"]
    conf: Any = app.conf
    return name in CelerySettings({}, conf.maps[:-1], conf._keys, conf.prefix)


def put(app: Celery, values: dict[str, Any]) -> None:
    """Put settings of Celery, by their new names, over all that an application sets.

    Before 5.7, one that an application sets with a namespace (`CELERY_ACCEPT_CONTENT`, as Django projects do) wins over one without.
    """
    app.conf.update(values)
    conf: Any = app.conf
    if conf.prefix:
        conf.update({conf._to_keys(name)[0]: value for name, value in values.items()})
