"""Results while their backend is away, as in a failover: the process that runs a task tries again, instead of failing the task."""

from __future__ import annotations

from typing import Any

from celery import Celery, signals

from celery_platform.settings import Settings

#: Tries, and the most milliseconds between two; Celery begins with 10, doubles them, and takes a random part of each
#: (celery/utils/time.py). About half a minute in all, where Sentinel takes 6 to 20 seconds for a failover.
RETRIES = {"always_retry": True, "max_retries": 20, "max_sleep_between_retries_ms": 4000}


def install(app: Celery, settings: Settings) -> None:
    """Let the processes of a worker's pool, and a worker without others, try again to store a state or a result.

    The consumer of a worker must not wait, nor who looks for a result. With the pool `threads`, nobody tries again: its threads share
    the backend with the consumer.
    """

    def keep_trying(**_: Any) -> None:
        if not app.backend.always_retry:
            vars(app.backend).update(RETRIES)

    signals.worker_process_init.connect(keep_trying, weak=False)
