"""Shows that each queue has a worker that takes tasks and answers: `celery-platform round-trip`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from celery import Celery
from celery.app.task import Task
from celery.result import AsyncResult

from celery_platform.settings import Settings

#: Task that every worker has. It takes whatever a message brings, and does nothing with it.
PING = "celery_platform.ping"
#: Seconds between two looks for answers.
LOOK_INTERVAL = 0.005


class Answer(NamedTuple):
    """What became of the ping of a queue: seconds until its answer, or why there is none."""

    queue: str
    seconds: float | None
    error: str = ""


def install(app: Celery, _: Settings) -> None:
    """Give an application the task that answers."""

    # Not on the application's own base class, which may do anything.
    @app.task(base=Task, name=PING, shared=False, ignore_result=False, typing=False, track_started=False)  # type: ignore[untyped-decorator]
    def ping(*_: Any, **__: Any) -> str:
        return "pong"


def ping_queues(app: Celery, names: list[str], timeout: float) -> Iterator[Answer]:
    """Send a ping to each queue, and yield each answer when it comes; those without one in so many seconds at the end.

    A ping that is late is not run: it expires. Without a result backend, a ping that was sent counts as answered: its
    Answer has neither seconds nor an error.

    Raises:
        kombu.exceptions.OperationalError: if the broker or the result backend cannot be reached.
    """
    with app.connection_for_write() as connection:
        connection.ensure_connection(timeout=timeout, max_retries=None)
    waiting: dict[str, tuple[AsyncResult, float]] = {}
    end = time.monotonic() + timeout
    for name in names:
        sent = time.monotonic()
        try:
            waiting[name] = app.send_task(PING, queue=name, expires=timeout, retry=False, ignore_result=False), sent
        except Exception as error:
            yield Answer(name, None, f"not sent: {type(error).__name__}: {error}")
    if not app.conf.result_backend:
        yield from (Answer(name, None) for name in waiting)
        return
    while waiting and time.monotonic() < end:
        for name, (result, sent) in list(waiting.items()):
            if result.ready():
                took = time.monotonic() - sent
                del waiting[name]
                yield Answer(name, took) if result.successful() else Answer(name, None, f"failed: {result.result!r}")
        time.sleep(LOOK_INTERVAL)
    yield from (Answer(name, None, f"no answer in {timeout:g} s") for name in waiting)
