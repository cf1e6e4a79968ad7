"""The application that the services run: `celery -A celery_platform.worker:app …`.

It is the user's own application, named by CELERY_PLATFORM_APPLICATION, with this package's behaviour added.
"""

from __future__ import annotations

import sys

from celery import Celery
from celery.app.utils import find_app

from celery_platform import (
    alerts,
    beat,
    broker,
    configuration,
    dead_letters,
    guards,
    limits,
    logs,
    redis_transport,
    resilience,
    serialization,
    systemd,
    task_events,
)
from celery_platform.settings import BadSettings, load_settings

#: EX_CONFIG of sysexits.h: the units do not restart a service that ends with it.
EXIT_BAD_SETTINGS = 78
PARTS = (broker, guards, redis_transport, limits, serialization, logs, systemd, beat, resilience, dead_letters, task_events, alerts)


def load() -> Celery:
    """Load the user's application and give it what production needs.

    Raises:
        BadSettings: if the settings cannot be worked with.
    """
    settings = load_settings()
    app: Celery = find_app(settings.application)
    configuration.apply(app, settings)
    for part in PARTS:
        part.install(app, settings)
    return app


try:
    app = load()
except BadSettings as error:
    print(error, file=sys.stderr)
    sys.exit(EXIT_BAD_SETTINGS)
