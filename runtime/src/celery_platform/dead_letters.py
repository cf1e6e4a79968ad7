"""Keeps tasks that failed for good as dead letters, to be looked at and run again.

A dead letter is written before its message is acknowledged: a worker that dies in between has the message delivered
again, and the same id is kept once. While the store cannot be written, the message stays unacknowledged and its
worker tries again.

It also bounds how often a task is run that takes its process down. The runs are counted in a header of the message.
A child that dies is seen by its worker, which sends the message again with one run more. A worker that dies leaves a
message that the broker marks as redelivered; before such a message is run, it is replaced by a copy with one run more.

A redelivery is no proof of a lost worker: one whose connection is lost, or whose task takes longer than the visibility
timeout of Redis, still runs it. So before a task is given up for its redeliveries, all workers are asked, and the result
backend: one that has succeeded is acknowledged, and one that still runs is waited for.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple, Protocol

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery import Celery, signals
from celery.exceptions import (
    Ignore,
    InvalidTaskError,
    NotRegistered,
    Reject,
    Retry,
    TaskRevokedError,
    Terminated,
    TimeLimitExceeded,
    WorkerLostError,
)
from celery.states import SUCCESS
from celery.worker.consumer import Consumer
from celery.worker.control import inspect_command
from celery.worker.request import Request
from celery.worker.state import active_requests, successful_requests, task_ready
from kombu import serialization
from kombu.entity import Exchange, Queue
from kombu.exceptions import ContentDisallowed, SerializationError, SerializerNotInstalled
from kombu.utils import json
from kombu.utils.imports import symbol_by_name

from celery_platform.settings import Settings
from celery_platform.versions import MAX_LEVEL, calculate_routing_key, level_name

logger = logging.getLogger(__name__)

#: Header with the runs of a message before this delivery that did not come to an end.
RUNS_HEADER = "celery_platform_runs"
#: Header with the time of the first of these, in seconds since the epoch.
SINCE_HEADER = "celery_platform_since"
#: Hash of documents by id in Redis; exchange and queue in RabbitMQ.
NAME = "dead-letters"
#: Sorted set in Redis: ids by the time of their failure.
INDEX = "dead-letters-by-time"
#: Seconds until a dead letter is tried again that could not be written.
RETRY_INTERVAL = 5
#: Seconds that workers have to answer what became of a task. One that is busy with a task in its only process does not.
ANSWER_TIMEOUT = 1
#: Seconds that RabbitMQ has to confirm a message; py-amqp waits for ever by default.
CONFIRM_TIMEOUT = 10
#: Each look into the queue counts as a delivery, and RabbitMQ 4 drops a message at the 20th by default.
DELIVERY_LIMIT = 1_000_000
#: One try at once beyond the first: for a pooled connection that has been closed since its last use.
RETRY_POLICY = {"max_retries": 1, "interval_start": 0.1}
#: Characters of a name or an id that the log shows of a dead letter, which anybody can send.
LONGEST_NAME = 200
#: Headers that tell of earlier deliveries, which a replayed task begins without.
HISTORY = (
    "redelivered",
    RUNS_HEADER,
    SINCE_HEADER,
    "x-delivery-count",
    "x-death",
    "x-first-death-exchange",
    "x-first-death-queue",
    "x-first-death-reason",
    "x-last-death-exchange",
    "x-last-death-queue",
    "x-last-death-reason",
)

#: What reading a message of an unexpected form raises. (kombu takes a KeyError for a lost connection to Redis.)
OF_FORM = (AttributeError, LookupError, TypeError, ValueError)
#: What Celery and kombu raise as well of messages and results that they cannot read.
UNREADABLE = (*OF_FORM, InvalidTaskError, SerializationError, SerializerNotInstalled)

FAILED, REJECTED, WORKER_LOST, TIME_LIMIT = "failed", "rejected", "worker-lost", "time-limit"
UNKNOWN_TASK, UNDECODABLE, INVALID, EXPIRED = "unknown-task", "undecodable", "invalid", "expired"
REASONS = (FAILED, REJECTED, WORKER_LOST, TIME_LIMIT, UNKNOWN_TASK, UNDECODABLE, INVALID, EXPIRED)
#: What RabbitMQ calls its own (rabbitmq.com/docs/dlx).
BROKER_REASONS = {"delivery_limit": WORKER_LOST, "rejected": REJECTED, "expired": EXPIRED}


class StoreError(Exception):
    """A dead letter that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Original:
    """A message as it was: the body is neither decoded nor decrypted (only a compressed one is unpacked)."""

    queue: str
    exchange: str
    routing_key: str
    body: bytes
    content_type: str | None
    content_encoding: str | None
    headers: dict[str, Any]
    properties: dict[str, Any]

    @classmethod
    def of(cls, message: Any, queue: str) -> Original:
        """Take a message of kombu, and the name of its queue."""
        body = message.body
        if isinstance(body, str):
            # py-amqp has decoded it, which it only does where this is exact.
            body = body.encode(message.content_encoding or "utf-8")
        headers = dict(message.headers)
        if not message.errors:
            # kombu has unpacked the body.
            headers.pop("compression", None)
        not_of_the_sender = ("application_headers", "content_type", "content_encoding", "delivery_info", "delivery_tag", "body_encoding")
        return cls(
            queue=queue,
            exchange=message.delivery_info.get("exchange") or "",
            routing_key=message.delivery_info.get("routing_key") or queue,
            body=bytes(body or b""),
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            headers=headers,
            properties={name: value for name, value in message.properties.items() if name not in not_of_the_sender},
        )

    @property
    def id(self) -> str:
        """The task's id. One without is named by its content, so that it is kept once."""
        return str(self.headers.get("id") or self.properties.get("correlation_id") or hashlib.sha256(self.body).hexdigest())

    @property
    def task(self) -> str:
        """Its name."""
        return str(self.headers.get("task") or "?")

    @property
    def retries(self) -> int:
        """Which retry it is."""
        retries = self.headers.get("retries")
        return retries if isinstance(retries, int) else 0

    def counted(self, runs: int) -> Original:
        """Return it with so many runs behind it."""
        headers = {name: value for name, value in self.headers.items() if name not in HISTORY}
        since = self.headers.get(SINCE_HEADER) or time.time()
        return replace(self, headers=headers | {RUNS_HEADER: runs, SINCE_HEADER: since})

    def fresh(self) -> Original:
        """Return it as if it had never run, to be run now: without retries, runs, ETA and time of expiry."""
        headers = {name: value for name, value in self.headers.items() if name not in HISTORY}
        headers |= {name: value for name, value in {"retries": 0, "eta": None, "expires": None}.items() if name in headers}
        return replace(self, headers=headers)


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """A task that failed for good. Times are seconds since the epoch."""

    id: str
    task: str
    reason: str
    original: Original
    exception: str
    message: str
    traceback: str | None
    #: How often the last message was run, and which retry that was.
    runs: int
    retries: int
    #: When the worker received the last message, and when it gave up.
    received: float
    failed: float
    hostname: str


#: A name of its own, since the stores have a method `list`.
Letters = list[DeadLetter]
Held = list[tuple[Any, DeadLetter]]


class Store(Protocol):
    """Where dead letters are. Every method raises the errors of kombu and its drivers if the broker is away."""

    def add(self, letter: DeadLetter) -> None:
        """Keep a dead letter; return once the broker has it."""

    def list(self) -> Letters:
        """Return all, each id once, the oldest first."""

    def get(self, id: str) -> DeadLetter | None:
        """Return one, or None."""

    def remove(self, ids: Iterable[str]) -> int:
        """Forget some; return how many there were."""

    def replay(self, ids: Iterable[str]) -> int:
        """Put the messages of some back on their queues, then forget these; return how many there were.

        It can be interrupted at any point: that may run a task twice, it does not lose one.
        """

    def send(self, original: Original, delay: int = 0) -> None:
        """Put a message on its queue, behind the others, or let it come there after so many seconds; return once the broker has it."""


class _Documents:
    """Dead letters as text. What an exception says is encoded, and so encrypted, as results are."""

    def __init__(self, app: Celery) -> None:
        self.app = app

    def write(self, letter: DeadLetter) -> str:
        fields = asdict(letter)
        said = {name: fields.pop(name) for name in ("message", "traceback")}
        return str(json.dumps(fields | {"said": serialization.dumps(said, serializer=self.app.conf.result_serializer)}))

    def read(self, text: bytes | str) -> DeadLetter:
        try:
            fields = json.loads(text)
            content_type, encoding, said = fields.pop("said")
            original = Original(**fields.pop("original"))
            try:
                accept = serialization.prepare_accept_content(self.app.conf.result_accept_content or self.app.conf.accept_content)
                fields |= serialization.loads(said, content_type, encoding, accept=accept)
            except Exception as error:
                # Without its key, say. The message itself can still be replayed.
                fields |= {"message": f"not readable here: {type(error).__name__}", "traceback": None}
            return DeadLetter(original=original, **fields)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"a document that is no dead letter: {error}") from error


class RedisStore(_Documents):
    """Dead letters in a hash beside the queues."""

    @contextmanager
    def _channel(self) -> Iterator[tuple[Any, Any]]:
        with self.app.pool.acquire(block=True) as connection:
            connection.ensure_connection(**RETRY_POLICY)
            channel = connection.default_channel
            with channel.conn_or_acquire() as client:
                yield channel, client

    def add(self, letter: DeadLetter) -> None:
        """See Store."""
        with self._channel() as (_, client), client.pipeline() as pipe:
            pipe.hset(NAME, letter.id, self.write(letter)).zadd(INDEX, {letter.id: letter.failed}).execute()

    def list(self) -> Letters:
        """See Store."""
        with self._channel() as (_, client), client.pipeline(transaction=False) as pipe:
            for id in client.zrange(INDEX, 0, -1):
                pipe.hget(NAME, id.decode())
            return [self.read(document) for document in pipe.execute() if document]

    def get(self, id: str) -> DeadLetter | None:
        """See Store."""
        with self._channel() as (_, client):
            document = client.hget(NAME, id)
        return self.read(document) if document else None

    def remove(self, ids: Iterable[str]) -> int:
        """See Store."""
        removed = 0
        with self._channel() as (_, client):
            for id in ids:
                with client.pipeline() as pipe:
                    removed += pipe.hdel(NAME, id).zrem(INDEX, id).execute()[0]
        return removed

    def replay(self, ids: Iterable[str]) -> int:
        """See Store. Here it is one transaction for each."""
        replayed = 0
        with self._channel() as (channel, client):
            for id in ids:
                replayed += bool(client.transaction(partial(self._replay, channel, id), NAME)[0])
        return replayed

    def _replay(self, channel: Any, id: str, pipe: Any) -> None:
        document = pipe.hget(NAME, id)
        pipe.multi()
        pipe.hdel(NAME, id).zrem(INDEX, id)
        if document:
            original = self.read(document).original.fresh()
            pipe.lpush(self._key(channel, original), json.dumps(self._message(channel, original)))

    def send(self, original: Original, delay: int = 0) -> None:
        """See Store. Here its worker waits for its time."""
        with self._channel() as (channel, client):
            client.lpush(self._key(channel, original), json.dumps(self._message(channel, original)))

    def _key(self, channel: Any, original: Original) -> str:
        return str(channel._q_for_pri(original.queue, original.properties.get("priority") or 0))

    def _message(self, channel: Any, original: Original) -> dict[str, Any]:
        """Return a message in kombu's form for brokers without AMQP."""
        properties = original.properties | {"delivery_info": {}}
        priority = properties.get("priority") or 0
        arguments = original.content_type, original.content_encoding, original.headers, properties
        message: dict[str, Any] = channel.prepare_message(original.body, priority, *arguments)
        channel._inplace_augment_message(message, original.exchange, original.routing_key)
        return message


class RabbitStore(_Documents):
    """Dead letters in a quorum queue: our documents, and messages that a policy of RabbitMQ (roles/rabbitmq) put there."""

    queue = Queue(
        NAME,
        Exchange(NAME, type="direct"),
        routing_key=NAME,
        queue_arguments={"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT},
    )

    def _publish(self, body: str | bytes, **options: Any) -> None:
        options |= {"mandatory": True, "retry": True, "retry_policy": RETRY_POLICY, "confirm_timeout": CONFIRM_TIMEOUT}
        with self.app.producer_pool.acquire(block=True) as producer:
            producer.publish(body, delivery_mode=2, **options)

    def add(self, letter: DeadLetter) -> None:
        """See Store."""
        where = {"exchange": self.queue.exchange, "routing_key": NAME, "declare": [self.queue]}
        self._publish(self.write(letter), content_type="application/json", content_encoding="utf-8", **where)

    @contextmanager
    def _held(self) -> Iterator[Held]:
        """Take all out of the queue; what is not acknowledged returns to its place at the end, also of this process."""
        with self.app.pool.acquire(block=True) as connection:
            connection.ensure_connection(**RETRY_POLICY)
            with connection.channel() as channel:
                queue = self.queue(channel)
                queue.declare()
                messages = []
                while message := queue.get(no_ack=False):
                    messages.append(message)
                yield [(message, self._letter(message)) for message in messages]

    def _letter(self, message: Any) -> DeadLetter:
        """Return the dead letter that a message holds, or is."""
        deaths = message.headers.get("x-death")
        if not deaths:
            return self.read(message.body)
        # The latest one is the first; those before tell of delays, each of which RabbitMQ counts as a death.
        death = deaths[0]
        original = replace(Original.of(message, death["queue"]), exchange=death["exchange"], routing_key=death["routing-keys"][0])
        when = death["time"].timestamp()
        return DeadLetter(
            id=original.id,
            task=original.task,
            reason=BROKER_REASONS.get(death["reason"], death["reason"]),
            original=original,
            exception="RabbitMQ",
            message=death["reason"],
            traceback=None,
            runs=original.headers.get(RUNS_HEADER, 0),
            retries=original.retries,
            received=when,
            failed=when,
            hostname="",
        )

    def list(self) -> Letters:
        """See Store. Meanwhile the queue is empty for others."""
        with self._held() as held:
            latest = {letter.id: letter for _, letter in sorted(held, key=lambda item: item[1].failed)}
        return sorted(latest.values(), key=lambda letter: letter.failed)

    def get(self, id: str) -> DeadLetter | None:
        """See Store."""
        return next((letter for letter in self.list() if letter.id == id), None)

    def remove(self, ids: Iterable[str]) -> int:
        """See Store."""
        wanted, removed = set(ids), set()
        with self._held() as held:
            for message, letter in held:
                if letter.id in wanted:
                    message.ack()
                    removed.add(letter.id)
        return len(removed)

    def replay(self, ids: Iterable[str]) -> int:
        """See Store. Between its two steps a message is in both queues."""
        wanted, replayed = set(ids), set()
        with self._held() as held:
            for message, letter in reversed(held):
                if letter.id in wanted:
                    if letter.id not in replayed:
                        self.send(letter.original.fresh())
                    message.ack()
                    replayed.add(letter.id)
        return len(replayed)

    def send(self, original: Original, delay: int = 0) -> None:
        """See Store.

        Raises:
            amqp.exceptions.ChannelError: if the queue is no more.
        """
        queue = self.app.amqp.queues.get(original.queue)
        where = (queue.exchange, queue.routing_key) if queue else (original.exchange, original.routing_key)
        if delay:
            where = (level_name(MAX_LEVEL), calculate_routing_key(delay, where[1]))
        # RabbitMQ would take the time to live anew, and kombu the mode twice.
        properties = {name: value for name, value in original.properties.items() if name not in ("expiration", "delivery_mode")}
        properties |= {"content_type": original.content_type, "content_encoding": original.content_encoding, "headers": original.headers}
        self._publish(original.body, exchange=where[0], routing_key=where[1], declare=[queue] if queue else [], **properties)


def store_of(app: Celery, settings: Settings) -> Store | None:
    """Return the store that belongs to the broker, or None if it keeps nothing (memory://)."""
    if settings.uses_redis_broker:
        return RedisStore(app)
    return RabbitStore(app) if settings.uses_rabbitmq else None


class Death(NamedTuple):
    """Why a task failed for good."""

    reason: str
    exception: BaseException
    traceback: str | None = None


def _one_line(text: str) -> str:
    """Return what a message says of itself as part of a line of the log: short, and without control characters."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text[:LONGEST_NAME])


def _storable(text: str) -> str:
    """Return a name or an id as a key that any store takes, also where it is no valid UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _seconds(when: datetime | str) -> float:
    """Return a time of a result in seconds since the epoch."""
    moment = datetime.fromisoformat(when) if isinstance(when, str) else when
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _death_by(exception: BaseException, traceback: str | None) -> Death | None:
    """Return what an exception of a task means, as celery.worker.request judges it; None if the task lives on."""
    if isinstance(exception, ExceptionWithTraceback):
        exception = exception.exc
    if isinstance(exception, (Ignore, Retry, Terminated)) or (isinstance(exception, Reject) and exception.requeue):
        return None
    if isinstance(exception, Reject):
        return Death(REJECTED, exception, traceback)
    if isinstance(exception, (SystemExit, KeyboardInterrupt)):
        # Whoever read such a result would end, too.
        exception = WorkerLostError(f"The process ended by {exception!r}")
    if isinstance(exception, WorkerLostError):
        return Death(WORKER_LOST, exception)
    return Death(TIME_LIMIT if isinstance(exception, TimeLimitExceeded) else FAILED, exception, traceback)


class Fate(StrEnum):
    """What became of a task that was delivered again."""

    RUNS = "runs"
    SUCCEEDED = "succeeded"
    LOST = "lost"


def fate_here(id: str, age: float) -> Fate:
    """Return what this worker knows of a task: whether it runs, or has succeeded in so many seconds past."""
    if successful_requests._data.get(id, (-math.inf,))[0] >= time.monotonic() - age:
        return Fate.SUCCEEDED
    return Fate.RUNS if any(request.id == id for request in tuple(active_requests)) else Fate.LOST


@inspect_command(args=[("id", str), ("age", float)], visible=False)  # type: ignore[untyped-decorator]
def fate_of_task(state: Any, id: str, age: float) -> str:
    """Answer another worker what became of a task."""
    return fate_here(id, float(age))


def _counted(execute: Callable[..., Any]) -> Callable[..., Any]:
    def execute_using_pool(self: Any, pool: Any, **options: Any) -> Any:
        if not self.may_run():
            # The worker takes its slot back, and does no more.
            raise TaskRevokedError(self.id)
        try:
            return execute(self, pool, **options)
        except OF_FORM as error:
            self.fail(error)
            raise TaskRevokedError(self.id) from error

    return execute_using_pool


def _ended(on_success: Callable[..., Any]) -> Callable[..., Any]:
    def on_success_or_exit(self: Any, result: Any, **options: Any) -> Any:
        # What the pools without processes tell of a task that ended by an exception that is no Exception.
        return self.on_failure(result, return_ok=True) if isinstance(result, ExceptionInfo) else on_success(self, result, **options)

    return on_success_or_exit


class CountedRequest(Request):  # type: ignore[misc]
    """A request that keeps its message as a dead letter before it is acknowledged, and that is run a few times at most."""

    consumer: CountingConsumer
    death: Death | None = None
    buried = False

    def __init_subclass__(cls, **options: Any) -> None:
        # Celery derives a class for each task (create_request_cls), whose methods do not call this one's.
        super().__init_subclass__(**options)
        if "execute_using_pool" in vars(cls):
            cls.execute_using_pool = _counted(cls.execute_using_pool)
            cls.on_success = _ended(cls.on_success)

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        self.received = time.time()
        if RUNS_HEADER in self._request_dict:
            # Sent again by a worker, if only since the task asked for it. It may look at this, as
            # worker_deduplicate_successful_tasks does.
            self._delivery_info["redelivered"] = True
        # The first one is not noted in itself: by then, it has been away for as long as its broker let it be.
        self.since = float(self._request_dict.pop(SINCE_HEADER, self.received - 2 * self.consumer.visibility_timeout))
        # Not for the task: a retry begins to count anew.
        self.earlier_runs = int(self._request_dict.pop(RUNS_HEADER, 0))
        self.runs = self.earlier_runs
        self.consumer.request = self

    def may_run(self) -> bool:
        """Tell whether to run this delivery; if not, see to its message."""
        if not self.message.delivery_info.get("redelivered"):
            self.runs += 1
            return True
        task_ready(self)
        self.runs += 1
        if self.runs >= self.consumer.max_runs:
            self._give_up_if_lost()
        else:
            self._send_again()
        return False

    def _give_up_if_lost(self, held: bool = False) -> None:
        holds = getattr(getattr(self.message.channel, "qos", None), "holds", None)
        if held and holds and not holds(self.message.delivery_tag):
            # Delivered once more, to somebody who decides now.
            self.consumer.qos.decrement_eventually()
            self.acknowledge()
            return
        fate = self.consumer.fate(self.id, self.since)
        if fate is Fate.RUNS:
            if not held:
                logger.warning("Task %s[%s] was delivered %d times and may still run; it is waited for", self._type, self.id, self.runs)
                # As for a task with an ETA: it must not keep this worker from others.
                self.consumer.qos.increment_eventually()
            self.consumer.timer.call_after(RETRY_INTERVAL, self._give_up_if_lost, (True,))
            return
        if held:
            self.consumer.qos.decrement_eventually()
        if fate is Fate.SUCCEEDED:
            logger.info("Task %s[%s] was delivered %d times and has succeeded", self._type, self.id, self.runs)
            self.acknowledge()
        else:
            self._give_up(WorkerLostError(f"The worker was lost in each of {self.runs} runs."))

    def fail(self, error: Exception) -> None:
        """End a task after an error on its way through the worker, which is neither the task's nor its message's."""
        logger.exception("An error of the worker's with %s[%s]: %s", self._type, self.id, type(error).__name__)
        task_ready(self)
        if self.id in successful_requests:
            self.acknowledge()
        else:
            self.death = self.death or Death(FAILED, error, "".join(traceback.format_exception(error)))
            self._give_up(error)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """Note why the task failed, for when its message is acknowledged or rejected."""
        self.death = _death_by(exc_info.exception, str(exc_info.traceback))
        result = super().on_failure(exc_info, send_failed_event, return_ok)
        if self.death and self.acknowledged and not self.buried:
            # It was acknowledged before it ran (acks_late=False).
            self._bury(lambda: None)
        return result

    def on_timeout(self, soft: bool, timeout: float) -> Any:
        """Note that the task took too long."""
        if not soft:
            self.death = self.death or Death(TIME_LIMIT, TimeLimitExceeded(timeout))
        return super().on_timeout(soft, timeout)

    def _success_was_stored(self) -> Any:
        success = super()._success_was_stored()
        if success:
            self.death = None
        return success

    def _retry_worker_lost(self, exc: BaseException, exc_info: Any) -> bool:
        death, self.death = self.death, None
        retried = bool(super()._retry_worker_lost(exc, exc_info))
        if not retried:
            self.death = death
        return retried

    def _announce_revoked(self, *arguments: Any) -> None:
        self.death = None
        super()._announce_revoked(*arguments)

    def acknowledge(self) -> None:
        """Acknowledge the message, once it is kept if the task failed."""
        if self.death and not self.acknowledged:
            self._bury(super().acknowledge)
        else:
            super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        """Send the message again, or drop it once it is kept."""
        if self.acknowledged or self.buried:
            return
        if not requeue:
            self.death = self.death or Death(REJECTED, Reject(requeue=False))
            self._bury(partial(super().reject, requeue=False))
        elif self.death is None:
            # The task asked for it, which is no failure of its process.
            self.runs = self.earlier_runs
            self._send_again()
        elif self.runs >= self.consumer.max_runs:
            self._give_up(self.death.exception)
        else:
            self._send_again()

    def _send_again(self) -> None:
        self.buried = True
        again = self.consumer.original(self.message).counted(self.runs)
        self.consumer.insist(lambda: self.consumer.store.send(again), super().acknowledge)

    def _give_up(self, exception: BaseException) -> None:
        """Do what Celery does after a failure that the task's own process could not report."""
        self.death = self.death or Death(WORKER_LOST, exception)
        self._bury(super().acknowledge)
        told = {"exception": exception, "args": self.args, "kwargs": self.kwargs, "traceback": None, "einfo": None}
        for tell in (
            partial(self.task.backend.mark_as_failure, self.id, exception, request=self._context, store_result=self.store_errors),
            partial(signals.task_failure.send, sender=self.task, task_id=self.id, **told),
            partial(self.send_event, "task-failed", exception=repr(exception), traceback=""),
        ):
            try:
                tell()
            except Exception:
                # The dead letter tells it, too; an exception from here would end the worker.
                logger.exception("The failure of %s cannot be told", self.id)

    def _bury(self, settle: Callable[[], Any]) -> None:
        if self.buried or self.death is None:
            return
        self.buried = True
        letter = self.consumer.letter(self.message, self.death, task=self._type, id=self.id, runs=self.runs, received=self.received)
        self.consumer.keep(letter, settle)


class CountingConsumer(Consumer):  # type: ignore[misc]
    """A consumer that keeps the messages of which no task can be made."""

    store: Store
    max_runs: int
    visibility_timeout: int
    #: The latest that was made of a message.
    request: CountedRequest | None = None

    def update_strategies(self) -> None:
        """Let all tasks, also those that are not derived from the application's class, use our requests."""
        for task in self.app.tasks.values():
            base = symbol_by_name(task.Request)
            if not issubclass(base, CountedRequest):
                base = type("Request", (CountedRequest,) if base is Request else (CountedRequest, base), {})
            base.consumer = self
            task.Request = base
        super().update_strategies()

    def create_task_handler(self, *arguments: Any, **options: Any) -> Callable[[Any], Any]:
        """Return what takes a message; with Celery's own, one of an unexpected form ends the worker or its connection, again and again."""
        handle = super().create_task_handler(*arguments, **options)

        def handle_any(message: Any) -> None:
            self.request = None
            try:
                handle(message)
            except OF_FORM as error:
                request = self.request or self._request_of(message)
                if request:
                    request.fail(error)
                    return
                logger.exception("A message that is no task: %s", type(error).__name__)
                if not message.acknowledged:
                    self._bury(message, INVALID, error, partial(message.reject_log_error, logger, self.connection_errors))

        return handle_any

    def _request_of(self, message: Any) -> CountedRequest | None:
        """Return what Celery itself makes of a message, or None if it refuses that: the message is malformed then."""
        kind = type("Request", (CountedRequest,), {"consumer": self})
        settle = {"on_ack": message.ack_log_error, "on_reject": message.reject_log_error, "connection_errors": self.connection_errors}
        try:
            request: CountedRequest = kind(message, app=self.app, hostname=self.hostname, eventer=self.event_dispatcher, **settle)
        except UNREADABLE:
            return None
        return request

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Keep a message that cannot be read."""
        self._bury(message, UNDECODABLE, exc, partial(super().on_decode_error, message, exc))

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """Keep a message that names no task."""
        self._bury(message, INVALID, ValueError("The message names no task."), partial(super().on_unknown_message, body, message))

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Keep a message for a task that this worker does not have."""
        unknown = NotRegistered(message.headers.get("task", "?"))
        self._bury(message, UNKNOWN_TASK, unknown, partial(super().on_unknown_task, body, message, exc))

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Keep a message of which no task can be made."""
        reason = UNDECODABLE if isinstance(exc, ContentDisallowed) else INVALID
        self._bury(message, reason, exc, partial(super().on_invalid_task, body, message, exc))

    def _bury(self, message: Any, reason: str, error: Exception, settle: Callable[[], Any]) -> None:
        def settle_surely() -> None:
            try:
                settle()
            except OF_FORM:
                # Celery looks for an id and a name also where there are none.
                logger.exception("A message that is no task could not be reported")
                if not message.acknowledged:
                    message.reject_log_error(logger, self.connection_errors)

        self.keep(self.letter(message, Death(reason, error, "".join(traceback.format_exception(error)))), settle_surely)

    def fate(self, id: str, since: float) -> Fate:
        """Return what became of a task that was first delivered again then; where that is unknown, it may still run."""
        age = time.time() - since
        fates = {fate_here(id, age)}
        try:
            result = self.app.backend._get_task_meta_for(id)
            if result["status"] == SUCCESS and _seconds(result["date_done"]) >= since:
                return Fate.SUCCEEDED
        except (NotImplementedError, *UNREADABLE) as error:
            # Results are disabled, or this one says nothing here.
            logger.debug("There is no result of %s: %s", id, type(error).__name__)
        except Exception as error:
            logger.error("The result of %s cannot be looked up: %s: %s", id, type(error).__name__, error)
            return Fate.RUNS
        if fates == {Fate.LOST}:
            mailbox = self.app.control.mailbox
            try:
                answers = self.app.control.broadcast("fate_of_task", arguments={"id": id, "age": age}, reply=True, timeout=ANSWER_TIMEOUT)
            except Exception as error:
                logger.error("Workers cannot be asked for %s: %s: %s", id, type(error).__name__, error)
                return Fate.RUNS
            fates |= {fate for answer in answers or () for fate in answer.values() if fate in tuple(Fate)}
            # This one does not answer either.
            if (getattr(mailbox, "asked", None) or 0) - self.app.conf.worker_enable_remote_control > len(answers or ()):
                fates.add(Fate.RUNS)
        return next(fate for fate in (Fate.SUCCEEDED, Fate.RUNS, Fate.LOST) if fate in fates)

    def letter(self, message: Any, death: Death, task: str = "", id: str = "", runs: int = 0, received: float | None = None) -> DeadLetter:
        """Return the dead letter of a message."""
        original, now = self.original(message), time.time()
        return DeadLetter(
            id=_storable(str(id or original.id)),
            task=_storable(str(task or original.task)),
            reason=death.reason,
            original=original,
            # One that cannot be pickled comes from its process as a wrapper.
            exception=getattr(death.exception, "exc_cls_name", type(death.exception).__name__),
            message=str(death.exception),
            traceback=death.traceback,
            runs=runs,
            retries=original.retries,
            received=received or now,
            failed=now,
            hostname=self.hostname,
        )

    def original(self, message: Any) -> Original:
        """Return a message as it was, with its queue."""
        delivery = message.delivery_info
        tag, route = delivery.get("consumer_tag"), (delivery.get("exchange"), delivery.get("routing_key"))
        by_tag = (name for name, its in self.task_consumer._active_tags.items() if its == tag)
        by_route = (name for name, queue in self.app.amqp.queues.items() if (queue.exchange.name, queue.routing_key) == route)
        return Original.of(message, next(by_tag, None) or next(by_route, None) or str(route[1]))

    def keep(self, letter: DeadLetter, settle: Callable[[], Any]) -> None:
        """Keep a dead letter, settle its message, and tell who follows events."""

        def settle_and_tell() -> None:
            settle()
            task, id, queue = (_one_line(text) for text in (letter.task, letter.id, letter.original.queue))
            fields = {"task_name": task, "task_id": id, "queue": queue, "reason": letter.reason}
            logger.error("Task %s[%s] of queue %s is a dead letter: %s", task, id, queue, letter.reason, extra=fields)
            if self.event_dispatcher:
                where = {"name": letter.task, "queue": letter.original.queue}
                self.event_dispatcher.send("task-dead-lettered", uuid=letter.id, reason=letter.reason, **where)

        self.insist(lambda: self.store.add(letter), settle_and_tell)

    def insist(self, store: Callable[[], Any], settle: Callable[[], Any]) -> None:
        """Store something, then settle its message; if it cannot be stored, try again later.

        A worker that stops before has its message delivered again, for it is still unacknowledged.
        """
        try:
            store()
        except Exception as error:
            logger.error("Dead letters cannot be written, next try in %d s: %s: %s", RETRY_INTERVAL, type(error).__name__, error)
            self.timer.call_after(RETRY_INTERVAL, self.insist, (store, settle))
        else:
            settle()


def install(app: Celery, settings: Settings) -> None:
    """Keep the tasks of an application that fail for good, and bound the runs of those that take their process down."""
    store = store_of(app, settings)
    if not settings.dead_letters or store is None:
        return
    base = symbol_by_name(app.conf.worker_consumer)
    bases = (CountingConsumer,) if base is Consumer else (CountingConsumer, base)
    app.conf.worker_consumer = type(
        "Consumer", bases, {"store": store, "max_runs": settings.max_runs, "visibility_timeout": settings.visibility_timeout}
    )
