"""A plugin of pytest for Celery's own integration tests: their applications get what the runtime package gives a user's."""

from __future__ import annotations

from typing import Any

from celery.contrib.testing import app as testing

from celery_platform import (
    alerts,
    broker,
    configuration,
    dead_letters,
    guards,
    limits,
    logs,
    resilience,
    serialization,
    systemd,
    task_events,
)
from celery_platform.settings import load_settings

settings = load_settings()
Plain = testing.TestApp
#: What belongs to a process; all else to an application, of which the tests make many.
ONCE = [broker, logs, systemd, resilience, task_events, alerts]


def make(*arguments: Any, **options: Any) -> testing.TestApp:
    """Return a test's application as the workers would load it."""
    app = Plain(*arguments, **options)
    # The suite has one queue, and wants no other.
    app.conf.task_create_missing_queues = False
    configuration.apply(app, settings)
    for part in (*ONCE, guards, limits, serialization, dead_letters):
        part.install(app, settings)
    ONCE.clear()
    return app


testing.TestApp = make
