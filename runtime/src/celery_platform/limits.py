"""Time limits of a worker, for all that it runs and whoever sent it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from celery import Celery, bootsteps, signals
from celery.concurrency.asynpool import AsynPool
from kombu.asynchronous import get_event_loop

from celery_platform.settings import Settings

#: Seconds between two looks for the end of a process, and looks: until Celery itself looks, every 5 s (AsynPool.timers).
LOOK_INTERVAL, LOOKS = 0.1, 50


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
    signals.celeryd_init.connect(lambda **_: see_ends_first(), weak=False)
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


def see_ends_first() -> None:
    """Let a task whose process is gone, or that is done, not be taken for one that ran into its time limit.

    Both are defects of celery/concurrency/asynpool.py (5.7.0):
    - A process that ends closes its pipes before it can be waited for. The worker looks once, when they are closed
      (_event_process_exit), and if that is too early not until 5 s later. Can go when it looks again.
    - The loop calls the timers that are due before it reads what processes sent. After a worker was kept busy, or stood
      still, for so long, tasks that were done by then are killed. Can go when it reads first.
    """
    AsynPool._event_process_exit = _look_again(AsynPool._event_process_exit)
    AsynPool._on_soft_timeout = _after_reading(AsynPool._on_soft_timeout)
    AsynPool._on_hard_timeout = _after_reading(AsynPool._on_hard_timeout)


def _look_again(process_exit: Callable[..., None]) -> Callable[..., None]:
    def look(pool: Any, hub: Any, process: Any, looks: int) -> None:
        if process in pool._pool:
            pool.maintain_pool()
            if looks:
                hub.call_later(LOOK_INTERVAL, look, pool, hub, process, looks - 1)

    @functools.wraps(process_exit)
    def process_exit_surely(pool: Any, hub: Any, process: Any) -> None:
        process_exit(pool, hub, process)
        look(pool, hub, process, LOOKS)

    return process_exit_surely


def _after_reading(on_timeout: Callable[..., None]) -> Callable[..., None]:
    def decide(pool: Any, job: int, *arguments: Any) -> None:
        pool.maintain_pool()
        on_timeout(pool, job, *arguments)

    @functools.wraps(on_timeout)
    def after_reading(pool: Any, job: int, *arguments: Any) -> None:
        # The loop calls it after it has read once.
        loop: Any = get_event_loop()
        loop.call_soon(decide, pool, job, *arguments)

    return after_reading
