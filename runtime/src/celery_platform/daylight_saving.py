"""Crontabs and intervals where clocks are put forward and back: of Celery's own scheduler, RedBeat and django-celery-beat.

A crontab whose hours are `*` runs whenever the clock shows one of its minutes: in a repeated hour again, in a skipped one
not. One that names hours runs once for each time that it names: at the first of two, and for skipped ones when the gap
ends. So does Debian's cron (cron(8)). Intervals are real time.

Owns five patches, for defects of Celery up to 5.7.0 and RedBeat 2.4.2:
- `schedule.remaining_estimate` (celery/schedules.py, before 5.7) adds real seconds to what the clock shows: an hour off.
- `crontab.remaining_estimate` (celery/schedules.py) goes on from what the clock shows, so nothing runs in a repeated hour,
  and may pass over a time just behind a gap.
- `RedBeatSchedulerEntry.due_at` (redbeat/schedulers.py) adds real seconds to what the clock shows: an hour off.
- `RedBeatJSONEncoder.default` (redbeat/decoder.py) forgets which of two times with the same name is meant.
- `acquire_distributed_beat_lock` (redbeat/schedulers.py), connected wherever that is imported, fails for any other scheduler.
Each can go when the year in the tests, or a beat alone, passes without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from celery import Celery
from celery.beat import Scheduler
from celery.schedules import crontab, schedule
from celery.utils.time import timezone

from celery_platform.settings import Settings

MINUTE = timedelta(minutes=1)
#: How far ahead a change of the clock is looked for: beyond a whole day, so that no day of a crontab lies behind it unseen.
AHEAD = timedelta(hours=25)


def install(app: Celery, settings: Settings) -> None:
    """Guard the schedules of this process, with RedBeat's if there is a Redis for them."""
    crontab.remaining_estimate = remaining_estimate
    schedule.remaining_estimate = _steady(schedule.remaining_estimate)
    if settings.redis_store:
        guard_redbeat()


def remaining_estimate(entry: crontab, last_run_at: datetime, **_: Any) -> timedelta:
    """Return the real time from now to the next run, negative if it is overdue; takes the place of Celery's."""
    return next_run(entry, last_run_at) - _utc(entry, entry.now())


def _steady(remaining: Callable[..., timedelta]) -> Callable[..., timedelta]:
    """Return how an interval tells the real time to its next run; one that is rounded to the clock is left as it is."""

    @functools.wraps(remaining)
    def steady(interval: schedule, last_run_at: datetime) -> timedelta:
        if interval.relative:
            return remaining(interval, last_run_at)
        due: datetime = _utc(interval, last_run_at) + interval.run_every
        return due - _utc(interval, interval.now())

    return steady


def next_run(entry: crontab, last_run_at: datetime) -> datetime:
    """Return when a crontab runs after it last ran, in UTC.

    Raises:
        RuntimeError: if it never does.
    """
    last, zone = _utc(entry, last_run_at), timezone.get_timezone(entry.tz)
    start, delta, _ = entry.remaining_delta(last.astimezone(zone))
    changes = start.fold or start.utcoffset() != (last + AHEAD).astimezone(zone).utcoffset()
    if changes and len(entry.hour) == 24:
        shown = last.replace(second=0, microsecond=0)
        for _ in range(AHEAD // MINUTE):
            shown += MINUTE
            if _matches(entry, shown.astimezone(zone)):
                return shown
    while (due := _first_moment((start + delta).replace(fold=0))) <= last:
        # In the second of two equal hours: the first one had it.
        start, delta, _ = entry.remaining_delta((start + delta).replace(fold=0))
    return due


def _utc(entry: Any, moment: datetime) -> datetime:
    aware: datetime = entry.maybe_make_aware(moment)
    return aware.astimezone(UTC)


def _matches(entry: crontab, shown: datetime) -> bool:
    return (
        shown.minute in entry.minute
        and shown.hour in entry.hour
        and shown.isoweekday() % 7 in entry.day_of_week
        and shown.day in entry.day_of_month
        and shown.month in entry.month_of_year
    )


def _first_moment(wanted: datetime) -> datetime:
    """Return the first moment at which the clock shows a local time or, if that is skipped, a later one; in UTC."""
    moment = wanted.astimezone(UTC)
    shown = moment.astimezone(wanted.tzinfo)
    if shown.replace(tzinfo=None) != wanted.replace(tzinfo=None):
        while (moment - MINUTE).astimezone(wanted.tzinfo).utcoffset() == shown.utcoffset():
            moment -= MINUTE
    return moment


def guard_redbeat() -> None:
    """Let RedBeat's entries be due when their schedules say so."""
    from redbeat import RedBeatSchedulerEntry
    from redbeat.decoder import RedBeatJSONEncoder

    def due_at(entry: Any) -> Any:
        if entry.last_run_at is None:
            return entry.default_now()
        left = entry.schedule.remaining_estimate(entry.last_run_at)
        # None: never again.
        return None if left is None else entry.default_now().astimezone(UTC) + max(left, timedelta())

    encode = RedBeatJSONEncoder.default

    def default(self: Any, value: Any) -> Any:
        encoded = encode(self, value)
        if isinstance(value, datetime):
            # What is read is passed to `datetime` as it is.
            encoded["fold"] = value.fold
        return encoded

    # Once imported, RedBeat asks the scheduler of any beat for its lock.
    Scheduler.lock_key = None
    RedBeatSchedulerEntry.due_at = property(due_at)
    RedBeatJSONEncoder.default = default
