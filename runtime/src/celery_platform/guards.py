"""Guards for defects of Celery 5.7.0, and of kombu 5.7.0 and py-amqp 5.4.2 with RabbitMQ.

Each says which defect it is for, where that is, and when it can go. What settings alone prevent is in `broker`, `queues`
and `configuration`; time limits are in `limits`. The tests show each defect without its guard.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from asyncio import CancelledError
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from amqp.exceptions import MessageNacked
from billiard.common import _should_have_exited
from celery import Celery, signals
from celery.exceptions import QueueNotFound, WorkerShutdown, WorkerTerminate
from celery.utils.time import maybe_make_aware
from kombu import transport
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp

from celery_platform import queues
from celery_platform.settings import Settings
from celery_platform.versions import bind_queue_to_native_delayed_delivery_exchange, declare_native_delayed_delivery_exchanges_and_queues

logger = logging.getLogger(__name__)

#: What the transport's classes below override. If one is no longer there, nothing would call ours.
OVERRIDDEN = (
    (pyamqp.Channel, "basic_publish_confirm"),
    (pyamqp.Channel, "exchange_bind"),
    (pyamqp.Channel, "exchange_declare"),
    (pyamqp.Channel, "queue_bind"),
    (pyamqp.Channel, "queue_declare"),
    (pyamqp.Connection, "drain_events"),
    (pyamqp.Connection, "blocking_read"),
    (pyamqp.Transport, "establish_connection"),
)
#: What ends a process, a thread or a coroutine; not what gevent and eventlet raise at a time limit.
EXITS = (SystemExit, KeyboardInterrupt, GeneratorExit, CancelledError)
#: Seconds until a message that RabbitMQ refused is sent again.
NACK_INTERVAL = 1
#: What says how long to wait for a broker.
WAITING = frozenset({"max_retries", "interval_start", "interval_step", "interval_max"})


def install(app: Celery, settings: Settings) -> None:
    """Guard an application. Comes before whatever else wraps `app.send_task` or its tasks.

    Raises:
        RuntimeError: if kombu is not as these guards know it.
    """
    # All tasks are there by then, and the pool is not yet.
    signals.worker_init.connect(lambda **_: fail_on_exit(app), weak=False)
    if settings.uses_rabbitmq:
        use_transport()
        delay_safely(app, settings.declare_queues)
    if not settings.broker_url.startswith("memory"):
        give_up(app, settings.publish_timeout)


# --- Tasks ---


class TaskExited(Exception):
    """A task that ended by what is to end a process: sys.exit(), as argparse, click and Django's commands call it, or the like."""


def fail_on_exit(app: Celery) -> None:
    """Let a task that ends by SystemExit, or another exception that is no Exception, be one that failed.

    Celery lets these pass (celery/app/trace.py, trace_task). With prefork the child ends, and the task is run again as one
    whose process was lost. In a thread nothing tells the worker, which waits for ever with one slot less. Solo takes it for
    an error of its own (celery/concurrency/base.py, apply_target, and Request.on_success). Whoever reads such a result would
    exit as well, so it is stored as a TaskExited. Can go when Celery makes a failure of it in each pool.
    """
    for task in app.tasks.values():
        task.run = _failing_on_exit(task.run)


def _failing_on_exit(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def run_and_fail_on_exit(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except (WorkerShutdown, WorkerTerminate):
            raise
        except EXITS as error:
            # Raised by the signal that ends this process, as for a task that is revoked.
            if _should_have_exited[0]:
                raise
            raise TaskExited(f"The task ended by {error!r}") from error

    return run_and_fail_on_exit


# --- Connections ---


class Channel(pyamqp.Channel):
    """A channel that waits for a confirmation only so long."""

    def basic_publish_confirm(self, message: Any, *args: Any, confirm_timeout: float | None = None, **options: Any) -> Any:
        """Publish a message and wait for its confirmation, at most `confirm_timeout` seconds (default: the connection's).

        py-amqp waits for ever (amqp/channel.py, basic_publish_confirm) unless each caller says how long, and then does
        not close the channel: a late confirmation is taken for the next message's. So is that of a message that RabbitMQ
        gives back since no queue takes it. Can go when it has a default, and waits for that confirmation, too.

        A task that expires is left to its worker, which tells so: RabbitMQ would make a dead letter of it. Can go when
        Celery (celery/app/base.py, send_task) does not tell both, or a policy can keep it from dead letters.

        Raises:
            TimeoutError: if none came in time; kombu takes that for a lost connection, and tries again.
            amqp.exceptions.MessageNacked: if the queue does not take it, say for lack of a majority; kombu tries again.
            amqp.exceptions.ChannelError: if it is mandatory (queues.py), and there is no queue for it.
        """
        if "task" in (message.properties.get("application_headers") or {}):
            message.properties.pop("expiration", None)
        timeout = confirm_timeout or options.get("timeout") or self.connection.confirm_timeout
        returned: list[Exception] = []

        def note(error: Exception, *_: Any) -> None:
            returned.append(error)

        self.events["basic_return"].add(note)
        try:
            result = super().basic_publish_confirm(message, *args, confirm_timeout=timeout, **options)
        except TimeoutError:
            if self.connection is not None:
                self.connection.collect()
            raise
        except MessageNacked:
            # kombu tries again at once, and each time with a new connection.
            time.sleep(NACK_INTERVAL)
            raise MessageNacked("RabbitMQ refused the message: its queue is full, or has lost too many of its nodes") from None
        finally:
            self.events["basic_return"].discard(note)
        if returned:
            raise returned[0]
        return result

    def exchange_declare(self, exchange: str, type: str, passive: bool = False, durable: bool = False, **options: Any) -> Any:
        """Declare an exchange that is not durable; others are there."""
        if self.connection.declare or passive or not durable:
            return super().exchange_declare(exchange, type, passive, durable, **options)
        return None

    def exchange_bind(self, *arguments: Any, **options: Any) -> Any:
        """Bind nothing if all bindings of exchanges are there."""
        return super().exchange_bind(*arguments, **options) if self.connection.declare else None

    def queue_declare(self, queue: str = "", passive: bool = False, durable: bool = False, **options: Any) -> Any:
        """Declare a queue that is not durable; see that others are there.

        Raises:
            amqp.exceptions.NotFound: if one is not.
        """
        passive = passive or (durable and not self.connection.declare)
        declared = super().queue_declare(queue, passive, durable, **options)
        if not passive:
            self.connection.own.add(queue or declared.queue)
        return declared

    def queue_bind(self, queue: str, *arguments: Any, **options: Any) -> Any:
        """Bind a queue that is this connection's own; others are bound."""
        return super().queue_bind(queue, *arguments, **options) if self.connection.declare or queue in self.connection.own else None


class Connection(pyamqp.Connection):
    """A connection whose timeouts are those of what is waited for."""

    Channel = Channel

    def __init__(self, *args: Any, confirm_timeout: float | None = None, declare: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self.confirm_timeout = confirm_timeout
        #: False: RabbitMQ has all durable queues, exchanges and bindings already, and this user may not declare any.
        self.declare = declare
        #: Queues that are this connection's own.
        self.own: set[str] = set()

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait for a method of the broker, at most `timeout` seconds.

        In py-amqp (amqp/connection.py, drain_events) each of the broker's heartbeats starts the timeout anew, so a
        broker that lives but does not answer is waited for for ever. Can go when it keeps a deadline.

        Raises:
            TimeoutError: if none came in time.
        """
        if not timeout:
            super().drain_events(timeout)
            return
        end = time.monotonic() + timeout
        while not self.blocking_read(timeout):
            timeout = end - time.monotonic()
            if timeout <= 0:
                raise TimeoutError("RabbitMQ does not answer")


class Transport(pyamqp.Transport):
    """kombu's transport for RabbitMQ, with the guards."""

    Connection = Connection

    def establish_connection(self) -> Any:
        """Connect, and leave `server_hostname: None` as it is: each host is verified against its own name.

        kombu (kombu/transport/pyamqp.py, establish_connection) writes the first host's name over it, into the dictionary
        that all connections share. Can go when kombu copies that.
        """
        client: Any = self.client
        shared = client.ssl
        if isinstance(shared, dict):
            client.ssl = dict(shared)
        try:
            return super().establish_connection()  # type: ignore[no-untyped-call]
        finally:
            client.ssl = shared


class SSLTransport(Transport, pyamqp.SSLTransport):
    """The same, with TLS."""


def use_transport() -> None:
    """Let this process reach RabbitMQ by the transport with the guards.

    Raises:
        RuntimeError: if kombu or py-amqp lacks what it overrides.
    """
    for owner, name in OVERRIDDEN:
        if not hasattr(owner, name):
            raise RuntimeError(f"{owner.__module__}.{owner.__name__} has no {name}: this kombu or py-amqp is not one that {__name__} knows")
    for scheme, guarded in {"amqp": Transport, "amqps": SSLTransport}.items():
        transport.TRANSPORT_ALIASES[scheme] = f"{__name__}:{guarded.__name__}"
        # An application that connected while it was imported.
        transport._transport_cache.pop(scheme, None)


# --- Giving up ---


def give_up(app: Celery, seconds: float) -> None:
    """Let a task that the broker does not take in so many seconds be an error for its sender, and not earlier.

    kombu counts tries only (kombu/connection.py, ensure). With RabbitMQ each may wait for its confirmation, which takes half an
    hour where most nodes of a cluster are gone, or be refused at once by all nodes, which takes moments while they restart; with
    Redis each may wait for a host that does not answer, or be refused at once while there is no master. And the first connection is
    not tried again at all after four seconds (default_channel). The last try may end later, by the time for a connection and an
    answer, or a confirmation. Can go when kombu takes a time as well.
    """
    send = app.send_task

    def send_task(*args: Any, retry_policy: dict[str, Any] | None = None, producer: Any = None, **options: Any) -> Any:
        end = time.monotonic() + seconds

        def check(error: Exception, interval: float) -> None:
            if time.monotonic() > end:
                raise OperationalError(f"The broker did not take the task: {error}") from error

        policy = app.conf.task_publish_retry_policy | {"errback": check, "max_retries": None} | (retry_policy or {})
        if options.get("connection") or not options.get("retry", app.conf.task_publish_retry):
            return send(*args, retry_policy=policy, producer=producer, **options)
        with app.producer_or_acquire(producer) as connected:
            connected.connection.ensure_connection(**{name: policy[name] for name in (WAITING | {"errback"}) & policy.keys()})
            return send(*args, retry_policy=policy, producer=connected, **options)

    app.send_task = send_task


# --- Countdowns ---


def delay_safely(app: Celery, declares: bool = True) -> None:
    """Let a countdown or ETA of any length arrive, no earlier than asked for.

    With quorum queues (celery/app/base.py, send_task):
    - one of less than a second is a ValueError, as a delay is cut to whole seconds. Here it is a second.
      Can go when calculate_routing_key takes 0.
    - an exchange is ignored: the message goes to the queue of the route. Here the queue that it stands for is found
      (queues.py), and one of others is an error. Can go when Celery 5.7.0's KeyError for routes without a queue is fixed.
    - what delays it is declared by workers only: before the first one ran, it is a 404, or lost. Here whoever sends the
      first one declares it. Can go when Celery declares it for senders.
    """
    send = app.send_task
    declare = Once(lambda: declare_delays(app))

    def send_task(
        name: str, args: Any = None, kwargs: Any = None, countdown: Any = None, eta: Any = None, *more: Any, **options: Any
    ) -> Any:
        delay = countdown
        if eta:
            eta = datetime.fromisoformat(eta) if isinstance(eta, str) else eta
            delay = (maybe_make_aware(eta).astimezone(UTC) - app.now().astimezone(UTC)).total_seconds()
        if delay and delay > 0:
            # Celery looks at the clock again: an ETA in 1.0001 seconds is one of less than a second by then.
            if delay < (2 if eta else 1):
                countdown, eta = math.ceil(delay), None
            if not options.get("retries"):
                _check_exchange(app, options)
            # In a task, its worker has.
            if declares and app.current_worker_task is None:
                declare()
        return send(name, args, kwargs, countdown, eta, *more, **options)

    app.send_task = send_task


def _check_exchange(app: Celery, options: dict[str, Any]) -> None:
    if options.get("exchange") and not options.get("queue") and not queues.addressed(options, app.amqp.queues):
        exchange = getattr(options["exchange"], "name", options["exchange"])
        raise QueueNotFound(f"Exchange {exchange!r}, routing key {options.get('routing_key')!r}: no queue here, so no countdown or ETA")


class Once:
    """Does a thing once in a process, unless it fails."""

    def __init__(self, do: Callable[[], None]) -> None:
        self.do = do
        self.done = False
        self.lock = threading.Lock()

    def __call__(self) -> None:
        """Do it, if it is not done."""
        if not self.done:
            with self.lock:
                if not self.done:
                    self.do()
                    self.done = True


def declare_delays(app: Celery) -> None:
    """Declare what delays messages, and all queues that they may be for.

    Who may not declare is left to what is there: without it, publishing is an error.

    Raises:
        OperationalError: if the broker cannot be reached; it is waited for as for publishing.
    """
    policy = app.conf.task_publish_retry_policy
    with app.connection_for_write() as connection:
        connection.ensure_connection(**{name: policy[name] for name in WAITING & policy.keys()})
        try:
            # Celery 5.4 has no such setting.
            queue_type = app.conf.get("broker_native_delayed_delivery_queue_type", "quorum")
            declare_native_delayed_delivery_exchanges_and_queues(connection, queue_type)
            for queue in app.amqp.queues.values():
                queue(connection.default_channel).declare()
                bind_queue_to_native_delayed_delivery_exchange(connection, queue)
        except connection.channel_errors as error:
            logger.info("What delays messages is not declared from here: %s", error)
        except connection.connection_errors as error:
            raise OperationalError(str(error)) from error
