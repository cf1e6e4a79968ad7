"""Tests of crontabs and intervals over a year in which clocks are put forward and back, by a clock that the tests turn."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from celery import Celery, current_app
from celery.beat import PersistentScheduler, Scheduler
from celery.schedules import crontab, schedule
from redbeat import RedBeatScheduler, RedBeatSchedulerEntry
from redbeat.decoder import RedBeatJSONEncoder

from celery_platform import daylight_saving
from celery_platform.settings import load_settings
from helpers import REPOSITORY
from helpers.clock import Clock
from helpers.sites import Site

START, END = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
STEP = timedelta(minutes=5)


class Zone(NamedTuple):
    """A time zone, and the days of 2026 on which its clocks are put back and forward."""

    name: str
    back: date
    forward: date


ZONES = [
    Zone("Europe/Berlin", date(2026, 10, 25), date(2026, 3, 29)),
    Zone("America/New_York", date(2026, 11, 1), date(2026, 3, 8)),
    # By half an hour.
    Zone("Australia/Lord_Howe", date(2026, 4, 5), date(2026, 10, 4)),
]


def days(zone: Zone) -> tuple[set[int], set[int]]:
    """Return the days and months on which the frequent crontabs run: those of the changes."""
    return {zone.back.day, zone.forward.day}, {zone.back.month, zone.forward.month}


def schedules(zone: Zone) -> dict[str, Any]:
    """Return what beat is to run."""
    frequent = {"day_of_month": f"{zone.back.day},{zone.forward.day}", "month_of_year": f"{zone.back.month},{zone.forward.month}"}
    return {
        "daily": crontab(minute=45, hour="1,2"),
        "named hours": crontab(minute="*/15", hour="1-3", **frequent),
        "all hours": crontab(minute="*/20", **frequent),
        "interval": timedelta(hours=36),
    }


@functools.cache
def expected(zone: Zone) -> dict[str, list[datetime]]:
    """Return when that is to be, from what the zone's clock shows every five minutes of the year."""
    due: dict[str, list[datetime]] = {name: [] for name in schedules(zone)}
    in_days, in_months = days(zone)
    moment, clock = START, ZoneInfo(zone.name)
    latest = moment.astimezone(clock).replace(tzinfo=None)
    while (moment := moment + STEP) < END:
        shown = moment.astimezone(clock).replace(tzinfo=None)
        # What it shows for the first time, or skips: nothing in a repeated hour.
        new = [latest + STEP * number for number in range(1, (shown - latest) // STEP + 1)]
        latest = max(latest, shown)
        if any(time.hour in (1, 2) and time.minute == 45 for time in new):
            due["daily"].append(moment)
        if shown.day in in_days and shown.month in in_months:
            if any(0 < time.hour < 4 and time.minute % 15 == 0 for time in new):
                due["named hours"].append(moment)
            if shown.minute % 20 == 0:
                due["all hours"].append(moment)
        if (moment - START) % timedelta(hours=36) == timedelta(0):
            due["interval"].append(moment)
    return due


@pytest.fixture(autouse=True)
def guarded(environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard this process for a test."""
    for owner, name in [
        (crontab, "remaining_estimate"),
        (schedule, "remaining_estimate"),
        (RedBeatSchedulerEntry, "due_at"),
        (RedBeatJSONEncoder, "default"),
    ]:
        monkeypatch.setattr(owner, name, vars(owner)[name])
    environment()
    daylight_saving.install(Celery(set_as_current=False), load_settings())


@pytest.fixture(params=["file", "redbeat"])
def scheduler(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str) -> Iterator[Callable[..., Scheduler]]:
    """Return a function that starts a scheduler by a clock; started again, it knows what it has sent."""

    def start(clock: Clock, zone: str, schedule: dict[str, Any]) -> Scheduler:
        app = Celery("shop", broker="memory://")
        entries = {name: {"task": name, "schedule": value} for name, value in schedule.items()}
        app.conf.update(timezone=zone, beat_schedule=entries)
        clock.drive(app)
        if request.param == "file":
            return PersistentScheduler(app, schedule_filename=str(tmp_path / "schedule"), max_interval=1e6)
        app.conf.update(redbeat_redis_url=redis_url, redbeat_redis_options={}, redbeat_lock_key=None)
        return RedBeatScheduler(app, max_interval=100_000)

    # Entries that the file was written with look for it.
    before = current_app._get_current_object()
    yield start
    before.set_current()


def minutes(moments: list[datetime]) -> list[datetime]:
    """Return moments without their seconds."""
    return [moment.replace(second=0, microsecond=0) for moment in moments]


@pytest.mark.parametrize("zone", ZONES, ids=[zone.name for zone in ZONES])
def test_in_a_year_each_local_time_of_a_crontab_runs_once_and_intervals_are_steady(zone: Zone, scheduler: Callable[..., Scheduler]) -> None:
    clock = Clock(START)
    sent = clock.run(scheduler(clock, zone.name, schedules(zone)), END)
    for name, moments in expected(zone).items():
        assert minutes(sent[name]) == moments, name


def test_beat_that_is_restarted_in_the_repeated_hour_goes_on(scheduler: Callable[..., Scheduler]) -> None:
    start = datetime(2026, 10, 24, 23, 40, tzinfo=UTC)
    clock = Clock(start)
    sent: dict[str, list[datetime]] = {"interval": [], "named hour": [], "all hours": []}
    for number in range(1, 10):
        running = scheduler(
            clock,
            "Europe/Berlin",
            {
                "interval": timedelta(minutes=10),
                "named hour": crontab(minute="0,50", hour=2),
                "all hours": crontab(minute="*/10"),
            },
        )
        for name, moments in clock.run(running, start + number * timedelta(minutes=24)).items():
            sent[name] += minutes(moments)
        running.close()
    every_ten = [start + number * timedelta(minutes=10) for number in range(1, 22)]
    # 2:00 and 2:50, once each.
    assert sent == {"interval": every_ten, "all hours": every_ten, "named hour": [every_ten[1], every_ten[6]]}


DJANGO = """
import datetime, json, sys, types

from celery import Celery
import django
from django.conf import settings
from django.core.management import call_command
from django.utils import timezone

from celery_platform import daylight_saving
from celery_platform.settings import load_settings
from helpers.clock import Clock
from test_daylight_saving import START, ZONES, around, schedules

settings.configure(
    INSTALLED_APPS=["django_celery_beat"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    MIGRATION_MODULES={"django_celery_beat": None},
    USE_TZ=True,
)
django.setup()
call_command("migrate", run_syncdb=True, verbosity=0)
from django_celery_beat import models, schedulers, tzcrontab

clock = Clock(START)

class Datetime(datetime.datetime):
    now = staticmethod(clock.now)

timezone.now = clock.now
tzcrontab.datetime = Datetime
schedulers.datetime = types.SimpleNamespace(datetime=Datetime, timedelta=datetime.timedelta)

app = Celery("shop", broker="memory://")
daylight_saving.install(app, load_settings())
sent = {}
for zone in ZONES:
    app = Celery("shop", broker="memory://")
    entries = {name: {"task": name, "schedule": schedule} for name, schedule in schedules(zone).items()}
    app.conf.update(timezone=zone.name, beat_schedule=entries, result_expires=None)
    clock.drive(app)
    for begin, end in around(zone):
        models.PeriodicTask.objects.all().delete()
        clock.time = begin.timestamp()
        for name, moments in clock.run(schedulers.DatabaseScheduler(app, max_interval=1800), end).items():
            sent.setdefault(zone.name, {}).setdefault(name, []).extend(str(moment) for moment in moments)
json.dump(sent, sys.stdout)
"""


def around(zone: Zone) -> list[tuple[datetime, datetime]]:
    """Return the first five hours of the days on which a zone's clock is changed."""
    midnights = [datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone.name)) for day in sorted([zone.forward, zone.back])]
    return [(midnight.astimezone(UTC), (midnight + timedelta(hours=5)).astimezone(UTC)) for midnight in midnights]


def test_so_it_is_with_django_celery_beat(site: Site) -> None:
    pytest.importorskip("django_celery_beat")
    site.set(broker_url="redis://127.0.0.1:1/0")
    site.environment["PYTHONPATH"] += f":{Path(__file__).parent}:{REPOSITORY / 'molecule'}"
    sent = json.loads(site.run("python", "-c", DJANGO).stdout)
    for zone in ZONES:
        crontabs = {name: moments for name, moments in expected(zone).items() if name != "interval"}
        for name, moments in crontabs.items():
            wanted = [moment for begin, end in around(zone) for moment in moments if begin < moment < end]
            assert minutes([datetime.fromisoformat(moment) for moment in sent[zone.name][name]]) == wanted, (zone, name)
