"""Tells systemd when a service serves, what it does, that it is alive, and when it stops (sd_notify(3)).

A worker is alive while the loop of its consumer turns and its pool works, or while it looks for its broker. A pool works
while a child of it is up, and while no task waits for one that is free. With the solo pool, tasks run in the loop: there a
worker is alive while a task runs, too. Beat is alive while its scheduler ticks.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from typing import Any

from celery import Celery, bootsteps, signals
from celery.worker import state

from celery_platform.settings import Settings

logger = logging.getLogger(__name__)

#: Signs of life in each period of the watchdog, so that one late one does not count (sd_watchdog_enabled(3) advises 2).
SIGNS_PER_PERIOD = 3
#: Seconds beyond the time limit that a worker has to stop, as in its unit (roles/celery_worker).
STOP_MARGIN = 30


def notify(message: str) -> None:
    """Send a message ("READY=1") to systemd; does nothing where no service manager listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    # A leading @ is systemd's way to write a socket in the abstract namespace.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.sendto(message.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)


def watchdog_interval() -> float | None:
    """Return the seconds between two signs of life, or None if systemd expects none of this process."""
    period = int(os.environ.get("WATCHDOG_USEC", 0))
    if not period or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return period / 1_000_000 / SIGNS_PER_PERIOD


def stderr_is_journal() -> bool:
    """Tell whether systemd connected this process's standard error to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(sys.__stderr__.fileno() if sys.__stderr__ else -1)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class PoolWatch:
    """Looks whether a worker's pool works."""

    def __init__(self, pool: Any, patience: float) -> None:
        """Begin with a pool that works.

        Args:
            pool: The worker's, as its consumer knows it.
            patience: Seconds for which it may have no child, or leave one without work that waits.
        """
        self.pool = pool
        self.patience = patience
        self.started = 0
        self.had_child = self.moved = time.monotonic()

    def slots(self) -> int:
        """Return how many tasks could run at once now: the children that are up, or the threads."""
        pool = getattr(self.pool, "_pool", None)
        children = getattr(pool, "_pool", None)
        if not isinstance(children, list):
            return int(self.pool.limit or 1)
        # Those that have not yet said that they are up (celery/concurrency/asynpool.py); the first ones never are among them.
        starting = getattr(pool, "_waiting_to_start", ())
        return sum(child not in starting and child._is_alive() for child in children)

    def trouble(self) -> str:
        """Return why the pool does not work, or nothing if it does. To be called again and again."""
        now, slots = time.monotonic(), self.slots()
        running, started = len(state.active_requests), sum(state.total_count.values())
        waiting = len(state.reserved_requests) - running
        if slots or state.should_stop is not None or state.should_terminate is not None:
            self.had_child = now
        if started != self.started or waiting <= 0 or running >= slots:
            self.moved, self.started = now, started
        if now - self.had_child > self.patience:
            return f"no child of it has come up for {now - self.had_child:.0f} s"
        if now - self.moved > self.patience:
            return f"{waiting} tasks wait for {now - self.moved:.0f} s, with {slots - running} of {slots} children or threads free"
        return ""


class SignsOfLife(bootsteps.StartStopStep):  # type: ignore[misc]
    """Part of a worker's consumer: started when it has a broker, stopped when it loses it."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **_: Any) -> None:
        """Begin as a worker that looks for its broker."""
        super().__init__(consumer)
        self.queues = ", ".join(sorted(consumer.app.amqp.queues.consume_from))
        self.solo = consumer.pool is not None and "solo" in type(consumer.pool).__module__
        self.watch: PoolWatch | None = None
        self.stuck = False
        self.consuming = False
        self.timer: Any = None
        self.interval = watchdog_interval()
        if self.interval:
            # What a stuck worker was doing when systemd ends it (SIGABRT) then stands in the journal.
            faulthandler.enable()
            threading.Thread(target=self._stand_in_for_the_loop, args=(self.interval,), daemon=True, name="signs-of-life").start()

    def start(self, consumer: Any) -> None:
        """Give a sign of life from the consumer's loop, again and again."""
        self.consuming = True
        if consumer.pool is not None and not self.solo:
            self.watch = PoolWatch(consumer.pool, consumer.app.conf.worker_proc_alive_timeout)
        self.timer = consumer.timer.call_repeatedly(self.interval or 10.0, self._sign)
        self._sign()

    def stop(self, consumer: Any) -> None:
        """Note that the broker is gone."""
        self.consuming = False
        if self.timer:
            self.timer.cancel()
        # None, or the exit code that a shutdown was asked for with.
        if state.should_stop is None and state.should_terminate is None:
            notify("STATUS=Looking for the broker")

    def _sign(self) -> None:
        trouble = self.watch.trouble() if self.watch else ""
        if trouble:
            if not self.stuck:
                logger.error("This worker is stuck: %s", trouble)
            notify(f"STATUS=Stuck: {trouble}")
        self.stuck = bool(trouble)
        if self.stuck:
            return
        done = sum(state.total_count.values()) - len(state.active_requests)
        notify(f"WATCHDOG=1\nSTATUS=Consuming {self.queues}; {len(state.active_requests)} tasks running, {done} done")

    def _stand_in_for_the_loop(self, interval: float) -> None:
        pause = threading.Event()
        while not pause.wait(interval):
            if not self.consuming or (self.solo and state.active_requests):
                notify("WATCHDOG=1")


def _ready(**_: Any) -> None:
    notify("READY=1")


def _watch_beat(sender: Any, **_: Any) -> None:
    """Let each tick of beat's scheduler be a sign of life, and waiting for another beat's lock (RedBeat), too."""
    tick, ticking, interval = sender.scheduler.tick, threading.Event(), watchdog_interval()

    def stand_by() -> None:
        while not ticking.is_set():
            notify("WATCHDOG=1\nSTATUS=Standing by; another beat holds the lock")
            ticking.wait(interval or 10)

    if getattr(sender.scheduler, "lock_key", None):
        threading.Thread(target=stand_by, daemon=True, name="signs-of-life").start()

    def tick_and_sign(*args: Any, **kwargs: Any) -> Any:
        ticking.set()
        pause = tick(*args, **kwargs)
        notify(f"WATCHDOG=1\nSTATUS=Next task in {pause:.0f} s at the latest")
        return pause

    sender.scheduler.tick = tick_and_sign
    notify("READY=1")


def install(app: Celery, settings: Settings) -> None:
    """Report the services of an application to systemd."""
    app.steps["consumer"].add(SignsOfLife)
    signals.worker_ready.connect(_ready, weak=False)
    # The unit's time may be for a shorter limit than the application's own.
    time = (settings.time_limit + STOP_MARGIN) * 1_000_000
    told = f"STOPPING=1\nEXTEND_TIMEOUT_USEC={time}\nSTATUS=Finishing the running tasks"
    signals.worker_shutting_down.connect(lambda **_: notify(told), weak=False)
    signals.beat_init.connect(_watch_beat, weak=False)
