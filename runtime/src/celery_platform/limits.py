"""Time limits of a worker, for all that it runs and whoever sent it."""

from __future__ import annotations

from typing import Any

from celery import Celery, signals

from celery_platform.settings import Settings


def install(app: Celery, settings: Settings) -> None:
    """Give workers the settings' limits, where their command line names none.

    Celery's own settings for it would go into every message that this application sends, and there they win over the
    limits of the worker that runs the task. A limit that the application sets for one task still does.
    """

    def set_limits(sender: Any, **_: Any) -> None:
        sender.time_limit = sender.time_limit or settings.time_limit
        sender.soft_time_limit = sender.soft_time_limit or settings.soft_time_limit

    # Before the worker makes its pool, which is what enforces them.
    signals.worker_init.connect(set_limits, weak=False)
