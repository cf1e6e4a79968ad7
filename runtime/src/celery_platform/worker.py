"""The application that the services run: `celery -A celery_platform.worker:app …`.

It is the user's own application, named by CELERY_PLATFORM_APPLICATION, with this package's settings applied.
"""

from __future__ import annotations

from celery import Celery
from celery.app.utils import find_app

from celery_platform import limits, logs, systemd
from celery_platform.settings import Settings


def load() -> Celery:
    """Load the user's application and give it what production needs."""
    settings = Settings()
    app: Celery = find_app(settings.application)
    app.conf.update(settings.celery_config())
    limits.install(app, settings)
    logs.connect()
    systemd.connect()
    return app


app = load()
