"""The application that the services run: `celery -A celery_platform.worker:app …`.

It is the user's own application, named by CELERY_PLATFORM_APPLICATION, with this package's behaviour added.
"""

from __future__ import annotations

import os

from celery import Celery

from celery_platform import (
    alerts,
    application,
    beat,
    broker,
    chords,
    configuration,
    daylight_saving,
    dead_letters,
    guards,
    limits,
    logs,
    redis_transport,
    replies,
    resilience,
    results,
    revokes,
    round_trip,
    serialization,
    systemd,
    task_events,
    versions,
)
from celery_platform.settings import load_settings

PARTS = (
    versions,
    broker,
    guards,
    redis_transport,
    limits,
    serialization,
    replies,
    chords,
    results,
    logs,
    systemd,
    beat,
    daylight_saving,
    resilience,
    revokes,
    dead_letters,
    task_events,
    alerts,
    round_trip,
)


def load() -> Celery:
    """Load the user's application and give it what production needs.

    Raises:
        BadSettings: if the settings cannot be worked with.
    """
    # That of producers would configure the application, too.
    os.environ.pop("CELERY_LOADER", None)
    given = load_settings()
    app = application.find(given.application)
    broker.override_environment()
    own_broker = app.conf.broker_url
    settings = configuration.with_own(app, given)
    choices = configuration.apply(app, given)
    configuration.tell_at_start(choices)
    for part in PARTS:
        part.install(app, settings)
    application.serve_twins(app, own_broker)
    return app


# The units do not restart a service that ends with EX_CONFIG.
with application.explained():
    app = load()
