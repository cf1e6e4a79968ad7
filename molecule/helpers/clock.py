"""A clock that tests turn, and schedulers of beat that run by it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from celery import Celery
from celery.beat import Scheduler


class Clock:
    """The time of an application; stands still until it is turned."""

    def __init__(self, start: datetime) -> None:
        self.time = start.timestamp()

    def now(self, zone: Any = UTC) -> datetime:
        """Return the time, as `datetime.now` does."""
        return datetime.fromtimestamp(self.time, zone)

    def drive(self, app: Celery) -> None:
        """Be the time of an application."""
        app.now = lambda: self.now(app.timezone)

    def run(self, scheduler: Scheduler, end: datetime) -> dict[str, list[datetime]]:
        """Let a scheduler tick until a time, as beat does; return when it sent each task, by the task's name, in UTC."""
        sent: dict[str, list[datetime]] = {}
        vars(scheduler)["producer"] = None
        scheduler.send_task = lambda name, *_, **__: sent.setdefault(name, []).append(self.now())
        while self.time < end.timestamp():
            # It ticks 10 ms before a task is due, too (celery/beat.py, adjust).
            self.time += max(scheduler.tick(), 0.011)
        return sent
