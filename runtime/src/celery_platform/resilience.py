"""Retries, circuit breakers and rate limits of tasks, chosen by the names of the tasks.

They are put around `run` of the tasks that match, in a worker, before its pool starts: nothing changes for other tasks,
nor for a task that is called as a function. Celery's own tasks (celery.*) and ours are never touched.

A task whose turn it is not is put off: published again with its id, its queue and its place in chains and chords, for
some whole seconds later (RabbitMQ can delay by no less), then its message is acknowledged, as in Task.retry. Unlike there
the number of its retries stays as it is. Its worker slot is free meanwhile. On RabbitMQ it waits in the broker; on Redis
in a worker's memory, unacknowledged, which is why no wait may come near the visibility timeout.

What workers share is in Redis: the broker, or else the result backend. While it is away, tasks run as if there were
neither breakers nor limits. Where there is no Redis at all, each process has circuits and each worker limits of its own.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
import random
import socket
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError

import kombu.exceptions
import pybreaker
import redis
from celery import Celery, signals
from celery.app.task import Task
from celery.exceptions import Ignore, Reject, Retry

from celery_platform import broker
from celery_platform.application import BUILT_IN
from celery_platform.queues import DELAY
from celery_platform.settings import Breaker, Settings

logger = logging.getLogger(__name__)

#: Header with the time (of Redis, seconds since the epoch) at which a task's turn is that waits for its rate limit.
TURN_HEADER = "celery_platform_turn"
#: Seconds that Redis has to answer, and that it is left alone after it did not: a task waits once for it, not each time.
TIMEOUT, RECOVERY = 0.5, 5
#: Seconds ahead for which turns are given out. Who comes later asks again, so a line of tasks that were purged ends soon.
HORIZON = 300
#: Seconds by which tasks may run ahead of their rate: they come back up to a second late, in whole seconds.
SLACK = 1
#: Seconds of the units of a rate.
UNITS = {"s": 1, "m": 60, "h": 3600}

#: Errors of a connection, wherever they come from. A subclass of OSError is none for that (FileNotFoundError).
CONNECTION_ERRORS = (
    ConnectionError,
    TimeoutError,
    socket.gaierror,
    kombu.exceptions.OperationalError,
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
)
#: The same as plain OSError, which has no subclass for them.
CONNECTION_ERRNOS = {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH}
#: The same of libraries, by the names in their documentation; looked up only where the application has imported them.
#: Answers of a server (HTTP 503, a violated constraint) are none, nor is what a retry cannot mend (a malformed URL).
LIBRARY_ERRORS = {
    "requests.exceptions": ("ConnectionError", "Timeout", "ChunkedEncodingError"),
    "urllib3.exceptions": ("NewConnectionError", "ProtocolError", "TimeoutError", "MaxRetryError"),
    "httpx": ("NetworkError", "TimeoutException", "RemoteProtocolError"),
    "psycopg": ("OperationalError", "InterfaceError"),
    "psycopg2": ("OperationalError", "InterfaceError"),
    "django.db.utils": ("OperationalError", "InterfaceError"),
}

# What time it is, Redis knows best: the clocks of hosts differ. Numbers are passed as text, or Lua cuts them.

#: Takes a run from a rate limit (the generic cell rate algorithm), or a turn at the end of the line of those that wait.
#: Keys: when the next run is due, the last turn given out. Arguments: seconds between runs, SLACK, HORIZON, whether the
#: task has had its turn. Returns nothing for "run", else the time and the turn, or the time alone if the line is full.
TAKE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local interval, slack, horizon = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local due = math.max(now, tonumber(redis.call('GET', KEYS[1]) or 0))
local last = tonumber(redis.call('GET', KEYS[2]) or 0)
local function keep(key, moment)
  redis.call('SET', key, string.format('%.6f', moment), 'PX', math.ceil((moment - now + slack) * 1000))
end
if due - now <= slack and (ARGV[4] == '1' or last <= now) then
  keep(KEYS[1], due + interval)
  return {}
end
local turn = math.max(due, last + interval)
if turn - now > horizon then return {tostring(now)} end
keep(KEYS[2], turn)
return {string.format('%.6f', now), string.format('%.6f', turn)}
"""

#: Looks at a circuit. Keys of all three: failures in a row, until when the circuit is open. Arguments: failures that
#: open it, seconds that it stays open, whether this run is the trial. Returns the seconds left, and whether to try:
#: the trial keeps the circuit open for the others, so that another one follows if it never comes to an end.
LOOK = """
if tonumber(redis.call('GET', KEYS[1]) or 0) < tonumber(ARGV[1]) then return {0, 0} end
local now = tonumber(redis.call('TIME')[1])
local till = redis.call('GET', KEYS[2])
if till then return {math.max(1, till - now), 0} end
redis.call('SET', KEYS[2], now + ARGV[2], 'EX', ARGV[2])
return {0, 1}
"""

#: Counts a failure, returns how many there are; the last that is allowed opens the circuit, and so does a failed trial.
FAILED = """
local failures = redis.call('INCR', KEYS[1])
if failures == tonumber(ARGV[1]) or ARGV[3] == '1' then
  redis.call('SET', KEYS[2], redis.call('TIME')[1] + ARGV[2], 'EX', ARGV[2])
end
return failures
"""

#: Forgets the failures, unless the circuit has been opened since this run began; that is up to the trial.
SUCCEEDED = """
if ARGV[3] == '1' or tonumber(redis.call('GET', KEYS[1]) or 0) < tonumber(ARGV[1]) then
  redis.call('DEL', KEYS[1], KEYS[2])
end
"""


class Store:
    """What workers share in Redis."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self._prefix = prefix
        self._scripts = {text: client.register_script(text) for text in (TAKE, LOOK, FAILED, SUCCEEDED)}
        self._away_until = 0.0

    def run(self, script: str, keys: list[str], *arguments: object) -> Any:
        """Return what a script returns, or None while Redis is away; never raises an error of Redis."""
        if time.monotonic() < self._away_until:
            return None
        try:
            result = self._scripts[script](keys=[self._prefix + key for key in keys], args=[str(argument) for argument in arguments])
        except (redis.exceptions.RedisError, OSError) as error:
            if not self._away_until:
                logger.warning("No breakers and rate limits while Redis is away: %s: %s", type(error).__name__, error)
            self._away_until = time.monotonic() + RECOVERY
            return None
        if self._away_until:
            self._away_until = 0.0
            logger.info("Breakers and rate limits are back")
        return result


def store_of(settings: Settings) -> Store | None:
    """Return the store that workers share, or None if neither the broker nor the result backend is Redis."""
    if settings.redis_store is None:
        return None
    return Store(broker.redis_client(settings, *settings.redis_store, TIMEOUT), settings.key_prefix)


class SharedCircuit(pybreaker.CircuitBreakerStorage):
    """A circuit in Redis as one run sees it. Only the one trial sees it half open.

    pybreaker's own storage in Redis lets all runs through a half-open circuit, and needs SETNX, which the ACL forbids.
    """

    state = pybreaker.STATE_CLOSED
    counter = 0
    success_counter = 0
    opened_at: datetime | None = None

    def __init__(self, store: Store, glob: str, breaker: Breaker) -> None:
        super().__init__("redis")
        self._store, self._breaker = store, breaker
        self._keys = [f"breaker:{glob}:failures", f"breaker:{glob}:open"]
        self._trial = 0
        #: Seconds for which the circuit stays open; 0 if this run may go ahead.
        self.remaining: float = 0
        self.remaining, self._trial = self._run(LOOK) or (0, 0)
        if self._trial:
            self.state = pybreaker.STATE_HALF_OPEN

    def _run(self, script: str) -> Any:
        return self._store.run(script, self._keys, self._breaker.failures, self._breaker.reset, self._trial)

    def increment_counter(self) -> None:
        """Count a failure."""
        self.counter = self._run(FAILED) or 0

    def reset_counter(self) -> None:
        """Note a success."""
        self._run(SUCCEEDED)

    def increment_success_counter(self) -> None:
        """Count the trial's success, which is enough."""
        self.success_counter += 1


class LocalCircuit(pybreaker.CircuitMemoryStorage):
    """A circuit of this process alone."""

    def __init__(self, breaker: Breaker) -> None:
        super().__init__(pybreaker.STATE_CLOSED)
        self._breaker = breaker

    @property
    def remaining(self) -> float:
        """Seconds for which the circuit stays open."""
        if self.state != pybreaker.STATE_OPEN or self.opened_at is None:
            return 0
        return max(0.0, self._breaker.reset - (datetime.now(UTC) - self.opened_at).total_seconds())


class Changes(pybreaker.CircuitBreakerListener):
    """Logs what a run does to its circuit."""

    def state_change(self, cb: pybreaker.CircuitBreaker, old_state: Any, new_state: Any) -> None:
        """Log that the circuit opens or closes."""
        level = logging.WARNING if new_state.name == pybreaker.STATE_OPEN else logging.INFO
        logger.log(level, "The circuit of %s is %s", cb.name, new_state.name)


def is_no_failure(error: BaseException) -> bool:
    """Tell whether a task left with an exception that says nothing against the service behind it: it is just not done."""
    return isinstance(error, Ignore | Reject) or (isinstance(error, Retry) and error.exc is None)


class PutOff(Exception):
    """A task is not to run now but in so many seconds, perhaps because it has its turn then."""

    def __init__(self, countdown: int, reason: str, turn: float | None = None) -> None:
        super().__init__(reason)
        self.countdown, self.reason, self.turn = countdown, reason, turn


class CircuitBreaker:
    """The circuit breaker of a glob."""

    def __init__(self, store: Store | None, glob: str, breaker: Breaker) -> None:
        self._store, self._glob, self._breaker = store, glob, breaker
        self._local = LocalCircuit(breaker)

    def call(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a task and note how it ends.

        Raises:
            PutOff: if the circuit is open.
        """
        circuit = SharedCircuit(self._store, self._glob, self._breaker) if self._store else self._local
        if circuit.remaining:
            # Not all at the same moment.
            wait = circuit.remaining + random.uniform(0, self._breaker.reset / 4)  # noqa: S311
            raise PutOff(max(1, math.ceil(wait)), f"the circuit of {self._glob} is open")
        # One for each run: pybreaker holds a lock while it calls, and threads would wait for each other's tasks.
        breaker = pybreaker.CircuitBreaker(
            fail_max=self._breaker.failures,
            reset_timeout=self._breaker.reset,
            exclude=[is_no_failure],
            listeners=[Changes()],
            state_storage=circuit,
            name=self._glob,
            throw_new_error_on_trip=False,
        )
        return breaker.call(run, *args, **kwargs)


class RateLimit:
    """The rate limit of a glob: so many runs in each unit of time, evenly spread, by all workers together.

    In any span of t seconds no more than 1 + (t + SLACK) * rate runs begin. Who comes when there is none left gets the
    next free turn, and newcomers stand behind: so all run, about in the order in which they came.
    """

    def __init__(self, store: Store, glob: str, rate: str, horizon: int) -> None:
        count, unit = rate.split("/")
        self._store, self._glob, self._rate, self._horizon = store, glob, rate, horizon
        self._interval = UNITS[unit] / int(count)

    def take(self, had_turn: bool) -> None:
        """Take one run.

        Raises:
            PutOff: if there is none left now.
        """
        keys = [f"rate-limit:{self._glob}:due", f"rate-limit:{self._glob}:last"]
        answer = self._store.run(TAKE, keys, self._interval, SLACK, self._horizon, int(had_turn))
        if not answer:
            return
        now, *turn = (float(text) for text in answer)
        reason = f"the rate limit of {self._glob} is {self._rate}"
        if turn:
            raise PutOff(max(1, math.ceil(turn[0] - now)), reason, turn=turn[0])
        # The line is full.
        raise PutOff(max(1, math.ceil(self._horizon * random.uniform(0.5, 1))), reason)  # noqa: S311


def is_connection_error(error: BaseException) -> bool:
    """Tell whether an exception means that a connection failed, so that trying again may help."""
    if isinstance(error, URLError):
        # It wraps what happened; its subclass HTTPError is an answer.
        return not isinstance(error, HTTPError) and isinstance(error.reason, BaseException) and is_connection_error(error.reason)
    if isinstance(error, CONNECTION_ERRORS) or (isinstance(error, OSError) and error.errno in CONNECTION_ERRNOS):
        return True
    imported = ((sys.modules[module], names) for module, names in LIBRARY_ERRORS.items() if module in sys.modules)
    kinds = tuple(getattr(module, name) for module, names in imported for name in names if hasattr(module, name))
    return isinstance(error, kinds)


class Retries(NamedTuple):
    """How connection errors are retried: how often (None: for ever), and the first and the longest wait in seconds."""

    most: int | None
    backoff: int
    backoff_max: int

    def countdown(self, retries: int) -> int:
        """Return whole seconds until the next try: twice as long each time, of which the later half is up to chance."""
        longest = min(self.backoff_max, self.backoff * 2 ** min(retries, 30))
        return max(1, math.ceil(random.uniform(longest / 2, longest)))  # noqa: S311


def retries_of(task: Task, settings: Settings) -> Retries | None:
    """Return how a task's connection errors are retried; None if they are not, or if the task sees to it (autoretry_for).

    A number of retries that the task sets itself (max_retries) holds.
    """
    if not any(fnmatchcase(task.name, glob) for glob in settings.retry_tasks):
        return None
    if hasattr(task, "_orig_run"):
        # That is what celery.app.autoretry leaves.
        return None
    classes = type(task).__mro__
    own = "max_retries" in vars(task) or any("max_retries" in vars(kind) for kind in classes[: classes.index(Task)])
    return Retries(task.max_retries if own else settings.retry_max, settings.retry_backoff, settings.retry_backoff_max)


def send_again(task: Task, countdown: int, retries: int, *, turn: float | None = None) -> None:
    """Publish the task that runs once more, for later.

    Raises:
        Reject: if it cannot be published; its message goes back to the queue, or to the dead letters if it is no more.
    """
    request = task.request
    # Task.retry would send it by its route, which need not be where it was.
    queue = DELAY.sub("", (request.delivery_info or {}).get("routing_key") or "")
    where = {"queue": queue} if queue in task.app.amqp.queues else {}
    try:
        signature = task.signature_from_request(request, countdown=countdown, retries=retries, **where)
        if turn is not None:
            signature.options["headers"] = (signature.options.get("headers") or {}) | {TURN_HEADER: turn}
        signature.apply_async()
    except Exception as error:
        raise Reject(error, requeue=bool(task.acks_late)) from error


def protect(task: Task, retries: Retries | None, breaker: CircuitBreaker | None, limit: RateLimit | None) -> None:
    """Put what a task needs around its `run`."""
    run = task.run

    @functools.wraps(run)
    def protected(*args: Any, **kwargs: Any) -> Any:
        request = task.request
        if request.called_directly or request.is_eager or "celery_platform_protected" in vars(request):
            return run(*args, **kwargs)
        # The task may call its own `run`.
        request.celery_platform_protected = True
        had_turn = bool(request.headers and request.headers.pop(TURN_HEADER, None))
        try:
            # Before the breaker, which may choose this run for its trial.
            if limit:
                limit.take(had_turn)
            return breaker.call(run, *args, **kwargs) if breaker else run(*args, **kwargs)
        except PutOff as later:
            send_again(task, later.countdown, request.retries, turn=later.turn)
            raise Retry(f"Put off for {later.countdown} s: {later.reason}", when=later.countdown) from None
        except Exception as error:
            if retries is None or not is_connection_error(error) or (retries.most is not None and request.retries >= retries.most):
                raise
            countdown = retries.countdown(request.retries)
            send_again(task, countdown, request.retries + 1)
            raise Retry(exc=error, when=countdown) from error

    task.run = protected


def first_match(name: str, globs: Iterable[str]) -> str | None:
    """Return the first glob that a name matches."""
    return next((glob for glob in globs if fnmatchcase(name, glob)), None)


def protect_tasks(app: Celery, settings: Settings) -> None:
    """Put around the tasks of an application what the settings name for them."""
    store = store_of(settings)
    if store is None and (settings.breakers or settings.rate_limits):
        logger.warning("Without Redis, breakers are of each process and rate limits of each worker alone")
    breakers = {glob: CircuitBreaker(store, glob, breaker) for glob, breaker in settings.breakers.items()}
    horizon = min(HORIZON, settings.longest_wait // 2) if settings.uses_redis_broker else HORIZON
    limits = {glob: RateLimit(store, glob, rate, horizon) for glob, rate in settings.rate_limits.items() if store}
    for task in app.tasks.values():
        if task.name.startswith(BUILT_IN):
            continue
        retries = retries_of(task, settings)
        breaker = breakers.get(first_match(task.name, breakers) or "")
        limit = limits.get(first_match(task.name, limits) or "")
        if retries or breaker or limit:
            protect(task, retries, breaker, limit)
        if store is None and (glob := first_match(task.name, settings.rate_limits)):
            task.rate_limit = settings.rate_limits[glob]


def install(app: Celery, settings: Settings) -> None:
    """Let the workers of an application retry, break and limit the tasks that the settings name."""
    if settings.retry_tasks or settings.breakers or settings.rate_limits:
        # All tasks are there by then, and the pool is not yet, whose processes take `run` as it is when they start.
        signals.worker_init.connect(lambda **_: protect_tasks(app, settings), weak=False)
