"""Posts what an operator should know to a webhook: tasks that failed for good, lost processes and connections, the end.

All of it is seen in the main process, where Celery hears of each failure whatever pool ran the task; the signal
task_failure fires in the pool's child for most failures and in the main process for some, once or twice. What is seen
is only put in a queue, from which a thread posts.
"""

from __future__ import annotations

import atexit
import functools
import http.client
import json
import logging
import socket
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError

from billiard.common import human_status
from billiard.einfo import ExceptionWithTraceback
from billiard.pool import EX_OK, EX_RECYCLE
from celery import Celery, bootsteps, signals
from celery.app.task import Context
from celery.exceptions import TimeLimitExceeded, WorkerLostError
from celery.worker.request import Request

from celery_platform.logs import Mask, masker, task_fields
from celery_platform.settings import SecretStr, Settings

logger = logging.getLogger(__name__)

#: Alerts that wait for the thread at most; beyond it the oldest go.
MOST_WAITING = 1000
#: Different alerts and their ids in one message, and characters of one text: Slack cuts a message at 4000 characters.
MOST_LINES, MOST_IDS, LONGEST_TEXT = 20, 3, 200
#: Seconds of the window in which `alert_rate` messages are allowed.
HOUR = 3600


@dataclass(frozen=True)
class Alert:
    """Something that happened: alerts of one title are counted together, each may have a detail and a task's id."""

    title: str
    detail: str = ""
    task_id: str = ""


@dataclass
class Group:
    """The alerts of one title: the detail of the first, how many, and the ids of some."""

    detail: str
    count: int = 0
    ids: list[str] = field(default_factory=list)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirection an error: urllib would follow it with a GET, and the alert would be lost."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Alerts:
    """Gathers alerts and posts them from a thread of its own."""

    def __init__(self, settings: Settings, url: SecretStr, mask: Mask) -> None:
        self.source = socket.gethostname()
        self._url = url
        self.mask = mask
        self._interval, self._timeout, self._rate = settings.alert_interval, settings.alert_timeout, settings.alert_rate
        # A deque needs no lock, so alerts may come from anywhere, and none may ever wait.
        self._waiting: deque[Alert] = deque(maxlen=MOST_WAITING)
        self._dropped = 0
        self._groups: dict[str, Group] = {}
        self._suppressed = 0
        self._posted: deque[float] = deque()
        self._reachable = True
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)

    def tell(self, title: str, detail: str = "", task_id: str = "") -> None:
        """Put an alert in the queue; never waits."""
        if len(self._waiting) == MOST_WAITING:
            self._dropped += 1
        # Masked before it is cut, or half a secret could stay.
        self._waiting.append(Alert(self.mask(title), self.mask(detail), task_id))

    def start(self) -> bool:
        """Start the thread, in the main process after the children are forked; return False if it was started before."""
        if self._thread.ident is not None:
            return False
        self._thread.start()
        return True

    def close(self) -> None:
        """Post what waits, for as long as one post may take."""
        self._closing.set()
        self._thread.join(self._timeout)

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            self._post()
        self._post()

    def _gather(self) -> None:
        while self._waiting:
            alert = self._waiting.popleft()
            title = alert.title if alert.title in self._groups or len(self._groups) < MOST_LINES else "Other alerts"
            group = self._groups.setdefault(title, Group(alert.detail))
            group.count += 1
            if alert.task_id and len(group.ids) < MOST_IDS:
                group.ids.append(alert.task_id)

    def _post(self) -> None:
        self._gather()
        while self._posted and self._posted[0] <= time.monotonic() - HOUR:
            self._posted.popleft()
        if len(self._posted) >= self._rate:
            self._suppressed += sum(group.count for group in self._groups.values())
            self._groups.clear()
            return
        if not self._groups and not self._suppressed:
            return
        dropped = self._dropped
        body = json.dumps({"text": self._text(dropped)}).encode()
        # The scheme is checked in install().
        request = urllib.request.Request(self._url.get_secret_value(), body, {"Content-Type": "application/json"})  # noqa: S310
        try:
            with self._opener.open(request, timeout=self._timeout):
                pass
        except (OSError, http.client.HTTPException, ValueError) as error:
            # The groups stay for the next try, and what comes until then joins them.
            if self._reachable:
                told = f"HTTP {error.code}" if isinstance(error, HTTPError) else type(error).__name__
                logger.warning("Alerts cannot be posted (%s); they are kept and tried again every %s s", told, self._interval)
            self._reachable = False
            return
        if not self._reachable:
            logger.warning("Alerts are posted again")
        self._reachable = True
        self._posted.append(time.monotonic())
        self._groups.clear()
        self._suppressed = 0
        self._dropped -= dropped

    def _text(self, dropped: int) -> str:
        lines = [f"*{self.source}*"]
        for title, group in self._groups.items():
            ids = f" [{', '.join(group.ids)}{', …' if group.count > len(group.ids) else ''}]" if group.ids else ""
            lines.append(f"• {f'{group.count} times ' if group.count > 1 else ''}{title}{f': {group.detail}' if group.detail else ''}{ids}")
        if self._suppressed:
            lines.append(f"• {self._suppressed} suppressed: more than {self._rate} messages an hour")
        if dropped:
            lines.append(f"• {dropped} dropped: more than {MOST_WAITING} at once")
        # Slack's three control characters; with them a text could name a channel, or show a false link.
        return "\n".join(lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class Watch:
    """Sees what happens in a worker or beat, and tells."""

    def __init__(self, alerts: Alerts) -> None:
        self.alerts = alerts
        self.stopping = ""
        self.killed: set[int] = set()
        #: The task that a lost process ran, by its process id: Celery gives up the task first, and then the process.
        self.lost: dict[int, Request] = {}

    def failures(self) -> None:
        """See all tasks that fail for good.

        That is where Celery would send the event task-failed: not for retries, nor for a lost process whose task is
        put back in its queue.
        """
        on_failure, send_event = Request.on_failure, Request.send_event

        @functools.wraps(on_failure)
        def noted(request: Request, exc_info: Any, *arguments: Any, **named: Any) -> Any:
            request._celery_platform_failure = exc_info.exception
            if request.worker_pid and isinstance(_unwrapped(exc_info.exception), WorkerLostError):
                self.lost[request.worker_pid] = request
            return on_failure(request, exc_info, *arguments, **named)

        @functools.wraps(send_event)
        def seen(request: Request, type: str, **fields: Any) -> Any:
            # At its hard time limit, Celery sends that event of a task twice.
            failure = request.__dict__.pop("_celery_platform_failure", None)
            if type == "task-failed" and failure is not None:
                self._safely(self._failed, request, failure)
            return send_event(request, type, **fields)

        Request.on_failure, Request.send_event = noted, seen

    def _safely(self, told: Callable[..., None], *arguments: Any) -> None:
        try:
            told(*arguments)
        except Exception:
            # Raised, it would keep Celery from acknowledging the task.
            logger.exception("An alert is lost")

    def _failed(self, request: Request, failure: BaseException) -> None:
        exception = _unwrapped(failure)
        if isinstance(exception, TimeLimitExceeded) and request.worker_pid:
            self.killed.add(request.worker_pid)
        task = task_fields(request.name, Context(request.request_dict))
        first_line = self.alerts.mask(str(exception).partition("\n")[0])[:LONGEST_TEXT]
        where = f"(queue {task['queue']}, host {socket.gethostname()}, attempt {task['attempt']})"
        self.alerts.tell(f"{request.name} failed with {type(exception).__name__}", f"{first_line} {where}", request.id)

    def unknown_task(self, name: str, id: str, **_: object) -> None:
        """Tell of a task that this worker does not know, and that Celery throws away."""
        self.alerts.tell(f"{name} is unknown here; its message is thrown away", task_id=id)

    def bad_message(self, **_: object) -> None:
        """Tell of a message that is no task, and that Celery throws away."""
        self.alerts.tell("A message is no task; it is thrown away")

    def ready(self, sender: Any, **_: object) -> None:
        """Start to post, and watch the pool; Celery sends this again after each loss of the connection."""
        self.alerts.source = sender.hostname
        self._begin()
        pool: Any = getattr(sender.pool, "_pool", None)
        # Prefork's alone; Celery sets it anew with each connection.
        down = getattr(pool, "on_process_down", None)
        if down is None or hasattr(down, "__wrapped__"):
            return

        @functools.wraps(down)
        def watched(process: Any) -> None:
            self._safely(self._process_down, process)
            down(process)

        pool.on_process_down = watched

    def beat_ready(self, **_: object) -> None:
        """Start to post for beat."""
        self.alerts.source = f"beat@{socket.gethostname()}"
        self._begin()

    def _begin(self) -> None:
        if self.alerts.start():
            # Not the signal worker_shutdown: a cold shutdown does not send it, nor does beat.
            atexit.register(self._end)

    def _end(self) -> None:
        self.alerts.tell(f"Stopped {self.stopping or 'by itself'}")
        self.alerts.close()

    def shutting_down(self, sig: str, how: str, **_: object) -> None:
        """Note why a worker stops; this runs in a signal handler."""
        self.stopping = f"in order ({how.lower()} shutdown on {sig})"

    def _process_down(self, process: Any) -> None:
        code, pid = process.exitcode, process.pid
        lost = self.lost.pop(pid, None)
        meant = getattr(process, "_controlled_termination", False) or getattr(process, "_job_terminated", False)
        if code in (EX_OK, EX_RECYCLE) or meant or self.stopping:
            return
        if pid in self.killed:
            self.killed.discard(pid)
            return
        running = lost.name if lost else "no task"
        self.alerts.tell("A process of the pool died", f"{human_status(code)} (it ran {running})", lost.id if lost else "")

    def connection_step(self) -> type[bootsteps.StartStopStep]:
        """Return a step of the worker's consumer that sees it lose its broker, and find it again."""
        alerts = self.alerts

        class Connection(bootsteps.StartStopStep):  # type: ignore[misc]
            requires = ("celery.worker.consumer.connection:Connection",)
            lost = False

            def start(self, parent: Any) -> None:
                if self.lost:
                    alerts.tell("Connected to the broker again")
                self.lost = False

            def stop(self, parent: Any) -> None:
                # A consumer that is closed for good is no longer running by now.
                if parent.blueprint.state == bootsteps.RUN:
                    self.lost = True
                    alerts.tell("The connection to the broker is lost", _handled_error())

        return Connection


def _unwrapped(failure: BaseException) -> BaseException:
    return failure.exc if isinstance(failure, ExceptionWithTraceback) else failure


def _handled_error() -> str:
    # Celery restarts a consumer while it handles the exception that the connection ended with.
    error = sys.exception()
    return type(error).__name__ if error else ""


def install(app: Celery, settings: Settings) -> None:
    """Watch the worker or beat, if there is a webhook."""
    if settings.alert_webhook is None:
        return
    watch = Watch(Alerts(settings, settings.alert_webhook, masker(settings)))
    watch.failures()
    app.steps["consumer"].add(watch.connection_step())
    signals.task_unknown.connect(watch.unknown_task, weak=False)
    signals.task_rejected.connect(watch.bad_message, weak=False)
    signals.worker_ready.connect(watch.ready, weak=False)
    signals.beat_init.connect(watch.beat_ready, weak=False)
    signals.worker_shutting_down.connect(watch.shutting_down, weak=False)
