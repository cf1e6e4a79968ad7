"""Lets a process send an application's tasks without a change of its code: web servers, cron jobs, shells.

`CELERY_LOADER=celery_platform.producer:Loader` in its environment is all. Celery takes from there the loader of each application
that names none itself (celery/app/base.py, `_get_default_loader`, 5.7.0), and that one waits until the application's
configuration is read, wherever it comes from and however late that is.

A producer sets up no logs and ends no process: settings that cannot be worked with are a BadSettings for who sends the first
task. An application that shall keep a broker of its own is made with `loader="app"`.
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import Any
from weakref import WeakSet

from celery import Celery
from celery.loaders.app import AppLoader
from celery.utils.dispatch import Signal
from kombu import pools

from celery_platform import broker, configuration, guards, redis_transport, serialization, versions
from celery_platform.settings import Settings, load_settings

#: What senders of tasks and readers of results share with workers.
PARTS = (versions, broker, guards, redis_transport, serialization)
#: Seconds for which a task is tried to be published, unless the setting says otherwise: a request of a user waits for it, and
#: web servers give up after 30 (gunicorn's `timeout`). A failover takes 6 to 20.
PUBLISH_TIMEOUT = 10

_producers: WeakSet[Celery] = WeakSet()
_lock = threading.Lock()
#: Connections of the parent process. Were they collected, py-amqp would shut them down for the parent, too (amqp/transport.py, __del__).
_of_parent: list[Any] = []


class Loader(AppLoader):  # type: ignore[misc]
    """Configures an application as soon as its own configuration is read."""

    def __init__(self, app: Celery, **options: Any) -> None:
        super().__init__(app, **options)
        app.on_after_configure.__class__ = AfterConfigure


class AfterConfigure(Signal):  # type: ignore[misc]
    """The signal that a configuration was read. What its receivers raise is only logged, and bad settings must not be."""

    def send(self, sender: Celery, **arguments: Any) -> Any:
        """Configure the application, then tell the receivers.

        Raises:
            BadSettings: if the settings cannot be worked with.
        """
        configure(sender)
        return super().send(sender, **arguments)


def configure(app: Celery) -> None:
    """Give an application the broker, the result backend, the queues and the routes of the deployment; again if it is configured anew.

    Raises:
        BadSettings: if the settings cannot be worked with. The application's configuration is left unread, so that who tries next is
            told, too.
    """
    try:
        given = of_producers(load_settings())
        settings = configuration.with_own(app, given)
        configuration.apply(app, given)
        wait_for_results(app, settings.publish_timeout)
        broker.override_environment()
        with _lock:
            if app not in _producers:
                for part in PARTS:
                    part.install(app, settings)
                _producers.add(app)
            elif settings.encryption_keys is not None:
                serialization.use_serializer(app, settings)
    except BaseException:
        app._conf = None
        raise


def of_producers(settings: Settings) -> Settings:
    """Return the settings with the defaults of a process that others wait for."""
    return settings if "publish_timeout" in settings.given else replace(settings, publish_timeout=PUBLISH_TIMEOUT)


def wait_for_results(app: Celery, seconds: float) -> None:
    """Let who sends a task, which asks Redis to tell of its result, or waits for one, try again for so many seconds while Redis is away."""
    options = app.conf.result_backend_transport_options
    if "retry_policy" in options:
        app.conf.result_backend_transport_options = options | {"retry_policy": broker.LOOK_INTERVAL | {"timeout": seconds}}


def leave_connections() -> None:
    """Let a forked process make its own connections, as those of gunicorn with `--preload` and of uwsgi must.

    Celery and kombu do so in processes of `multiprocessing` only.
    """
    global _lock
    _lock = threading.Lock()
    for group in (pools.connections, pools.producers):
        _of_parent.extend(group.values())
        group.clear()
    for app in _producers:
        _of_parent.append((app._backend_cache, vars(app._local).pop("backend", None)))
        app._backend_cache = None
        app._after_fork()


os.register_at_fork(after_in_child=leave_connections)
