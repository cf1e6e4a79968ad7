"""The application of what looks at the broker and runs no task: `celery-platform exporter`, and Flower.

That is `celery -A celery_platform.monitor:app flower`. `bare` is what CELERY_PLATFORM_APPLICATION names where the user's own
application is not installed.
"""

from __future__ import annotations

import os
import sys

from celery import Celery

from celery_platform import broker, configuration, guards, redis_transport
from celery_platform.settings import BadSettings, load_settings

bare = Celery("monitor")


def load() -> Celery:
    """Give the bare application its settings and its way to the broker, and nothing of what a worker does.

    Raises:
        BadSettings: if the settings cannot be worked with.
    """
    settings = load_settings()
    configuration.apply(bare, settings)
    for part in (broker, guards, redis_transport):
        part.install(bare, settings)
    if settings.uses_redis_broker:
        # Else, while it waits for workers' replies, kombu looks for tasks to redeliver, which is theirs to do.
        bare.conf.broker_transport_options |= {"ack_emulation": False}
    return bare


try:
    app = load()
except BadSettings as error:
    print(error, file=sys.stderr)
    sys.exit(os.EX_CONFIG)
