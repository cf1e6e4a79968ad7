"""Time limits of a worker, for all that it runs and whoever sent it."""

from __future__ import annotations

from typing import Any

from celery import Celery, bootsteps, signals

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
    app.steps["worker"].add(HardLimits)


class HardLimits(bootsteps.Step):  # type: ignore[misc]
    """Kills a task at its hard limit also where its soft one is later.

    That is a task, or a call, that sets only one of them, on the other side of the worker's. Celery starts the timer of
    the hard limit when the soft one has passed (on_timeout_set in celery/concurrency/asynpool.py, 5.7.0): the task would
    run until then. Here it is told and killed at once. Can go when Celery starts the earlier one.
    """

    requires = ("celery.worker.components:Pool",)

    def create(self, worker: Any) -> None:
        """Come between the worker and its pool."""
        apply_async = worker.pool.apply_async

        def apply_within_limits(*args: Any, timeout: float | None = None, soft_timeout: float | None = None, **options: Any) -> Any:
            hard = timeout or worker.time_limit
            soft = soft_timeout or worker.soft_time_limit
            if hard and soft and hard < soft:
                soft_timeout = hard
            return apply_async(*args, timeout=timeout, soft_timeout=soft_timeout, **options)

        worker.pool.apply_async = apply_within_limits
