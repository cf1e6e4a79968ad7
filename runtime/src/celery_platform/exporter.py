"""Metrics of a site for Prometheus, taken from its broker and from the events that its services send.

Nothing of the application is needed: events tell names only. Lengths are looked up when Prometheus asks, in a bounded
time. Events that are sent while the exporter has no connection are lost to it: its counters tell of what it saw.
"""

from __future__ import annotations

import logging
import signal
import socket
import socketserver
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from celery import Celery
from kombu.messaging import Consumer
from kombu.transport.redis import Channel as RedisChannel
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from celery_platform import broker, dead_letters
from celery_platform.dead_letters import OF_FORM
from celery_platform.queues import DELAY
from celery_platform.settings import Settings
from celery_platform.systemd import notify

logger = logging.getLogger(__name__)

#: Seconds that one answer of the broker may take, and all that a scrape waits for.
ANSWER_TIMEOUT, LOOK_TIMEOUT = 3, 4
#: Seconds without any event after which the connection counts as dead: workers send heartbeats every 2 seconds.
SILENCE = 15
#: Seconds until the next try to receive events.
RETRY_INTERVAL = 1
#: Seconds for which a worker without heartbeat counts as up, and for which one that nobody expects is remembered.
WORKER_TIMEOUT, WORKER_FORGOTTEN = 30, 3600
#: Seconds beyond its time limit after which a task that seems to run has ended without an event.
GRACE = 60
#: Names of tasks and workers at most, and their length.
MOST_NAMES, LONGEST_NAME = 300, 200
#: What stands for names beyond these, and for queues that are not of the site.
OTHER = "other"
#: Seconds that a client has for its request.
CLIENT_TIMEOUT = 10

STATES = {f"task-{state}": state for state in ("sent", "received", "started", "succeeded", "failed", "rejected", "revoked", "retried")}
BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)


class Names:
    """Lets a name be a label while there are not too many."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    def __call__(self, name: str) -> str:
        """Return it, or what stands for it."""
        if name in self.known:
            return name
        if len(self.known) >= MOST_NAMES:
            return OTHER
        name = name[:LONGEST_NAME]
        self.known.add(name)
        return name


@dataclass(slots=True)
class Task:
    """What is remembered of a task; times are those of the hosts that told them, in seconds since the epoch."""

    name: str = ""
    queue: str = ""
    #: When it was sent, or may run at the earliest.
    sent: float | None = None
    started: float | None = None


@dataclass(slots=True)
class Worker:
    """A worker: when it was last heard of (time.monotonic), whether it stopped since, and how many tasks it ran then."""

    heard: float
    stopped: bool
    active: int = 0

    @property
    def up(self) -> bool:
        """Whether it lives."""
        return not self.stopped and time.monotonic() - self.heard < WORKER_TIMEOUT


class Events:
    """What the events told. One thread adds to it, others read it."""

    def __init__(self, settings: Settings, registry: CollectorRegistry, expected: Iterable[str] = (), most_tasks: int = 100_000) -> None:
        self.expected = frozenset(expected)
        self.most_tasks = most_tasks
        self.longest = settings.time_limit + GRACE
        self.queues = {queue.name for queue in settings.queues}
        self.names = Names()
        self.tasks: dict[str, Task] = {}
        #: Queue, start and worker of the tasks that run, by id; the oldest first.
        self.running: dict[str, tuple[str, float, str]] = {}
        self.workers = {name: Worker(time.monotonic(), stopped=True) for name in self.expected}
        self.ticks: dict[str, float] = {}
        self.last = 0.0
        # Without these, the age of what never happened would be that of the epoch.
        self.last_start = dict.fromkeys(self.queues, time.time())
        self.last_success = dict(self.last_start)

        self.received = Counter("celery_exporter_events", "Events that were received.", registry=registry)
        self.states = Counter("celery_tasks", "Events of tasks, by what they tell.", ["task", "queue", "state"], registry=registry)
        self.dead = Counter("celery_dead_letters", "Tasks that workers gave up for good.", ["queue", "reason"], registry=registry)
        # The first of a counter that is not there yet is no increase to Prometheus.
        for queue in self.queues:
            for reason in dead_letters.REASONS:
                self.dead.labels(queue, reason)
        options: dict[str, Any] = {"labelnames": ["task"], "buckets": BUCKETS, "registry": registry}
        self.runtime = Histogram("celery_task_runtime_seconds", "Time that successful tasks ran.", **options)
        self.wait = Histogram("celery_task_wait_seconds", "Time from when tasks were sent, or due, until they started.", **options)

    def take(self, event: Any) -> None:
        """Note an event; one of an unexpected form may come from anybody who can send events, and is left out."""
        self.last = time.time()
        self.received.inc()
        try:
            kind = event["type"]
            if kind in STATES:
                self._task(STATES[kind], event)
            elif kind == "task-dead-lettered":
                reason = event["reason"] if event["reason"] in dead_letters.REASONS else OTHER
                self.dead.labels(self._queue(event["queue"]), reason).inc()
            elif kind in ("worker-online", "worker-heartbeat", "worker-offline"):
                self._worker(event["hostname"], kind != "worker-offline", int(event.get("active") or 0))
            elif kind == "beat-tick" and (event["hostname"] in self.ticks or len(self.ticks) < MOST_NAMES):
                self.ticks[event["hostname"][:LONGEST_NAME]] = self.last
        except OF_FORM as error:
            logger.debug("An event of an unexpected form: %s", error)

    def _queue(self, name: str) -> str:
        return name if name in self.queues or not name else OTHER

    def _task(self, state: str, event: dict[str, Any]) -> None:
        id, when = event["uuid"], float(event["timestamp"])
        task = self.tasks.get(id)
        if task is None:
            task = self.tasks[id] = Task()
            if len(self.tasks) > self.most_tasks:
                del self.tasks[next(iter(self.tasks))]
        if name := event.get("name"):
            task.name = self.names(name)
        # One that is sent with a countdown to RabbitMQ goes by way of no queue.
        if queue := event.get("queue") or DELAY.sub("", event.get("routing_key") or ""):
            task.queue = self._queue(queue)
        self.states.labels(task.name, task.queue, state).inc()
        if state == "sent":
            eta = event.get("eta")
            task.sent = max(when, datetime.fromisoformat(eta).timestamp()) if eta else when
            if event.get("retries"):
                task.started = None
            elif task.started:
                # A worker can be faster than its sender, who waits for the broker to confirm.
                self.wait.labels(task.name).observe(max(0, task.started - task.sent))
        elif state == "started":
            task.started = when
            self.last_start[task.queue] = self.last
            self.running[id] = (task.queue, when, event["hostname"])
            if len(self.running) > self.most_tasks:
                del self.running[next(iter(self.running))]
            if task.sent:
                self.wait.labels(task.name).observe(max(0, when - task.sent))
        elif state != "received":
            self.running.pop(id, None)
            if state == "succeeded":
                self.runtime.labels(task.name).observe(float(event["runtime"]))
                self.last_success[task.queue] = self.last
            if state != "retried" and task.sent and task.started:
                del self.tasks[id]

    def _worker(self, name: str, up: bool, active: int) -> None:
        if name in self.workers or len(self.workers) < MOST_NAMES:
            self.workers[name[:LONGEST_NAME]] = Worker(time.monotonic(), not up, active if up else 0)

    def known_workers(self) -> dict[str, Worker]:
        """Return the workers, and forget those that nobody expects and that have been away for long."""
        for name, worker in list(self.workers.items()):
            if name not in self.expected and time.monotonic() - worker.heard > WORKER_FORGOTTEN:
                del self.workers[name]
        return self.workers.copy()

    def still_running(self) -> list[tuple[str, float]]:
        """Return queue and start of the tasks that run, and forget those whose end was not told."""
        found = []
        for id, (queue, start, name) in list(self.running.items()):
            worker = self.workers.get(name)
            if (worker is None or worker.up) and time.time() - start < self.longest:
                found.append((queue, start))
            else:
                self.running.pop(id, None)
        return found


def receive(app: Celery, take: Callable[[Any], None], stop: threading.Event) -> None:
    """Receive events until told to stop, whatever becomes of the broker."""
    lost = False
    while not stop.is_set():
        try:
            with app.connection_for_read(heartbeat=app.conf.broker_heartbeat) as connection:
                connection.ensure_connection(timeout=SILENCE)
                receiver = app.events.Receiver(connection)
                with Consumer(receiver.channel, [receiver.queue], callbacks=[_each(take)], no_ack=True, accept=["json"]):
                    logger.info("Receiving events from %s", connection.as_uri())
                    receiver.wakeup_workers(receiver.channel)
                    lost = False
                    _drain(connection, stop)
        except Exception as error:
            if not lost:
                logger.warning("No events are received, next try every %s s: %s: %s", RETRY_INTERVAL, type(error).__name__, error)
            lost = True
            stop.wait(RETRY_INTERVAL)


def _each(take: Callable[[Any], None]) -> Callable[[Any, Any], None]:
    # Not by the receiver itself: it moves times by the difference of the hosts' time zones, which they do not have.
    def received(body: Any, _: Any) -> None:
        for event in body if isinstance(body, list) else [body]:
            take(event)

    return received


def _drain(connection: Any, stop: threading.Event) -> None:
    """Take what comes until nothing came for some time."""
    beaten = heard = time.monotonic()
    while not stop.is_set() and time.monotonic() - heard < SILENCE:
        try:
            connection.drain_events(timeout=1)
            heard = time.monotonic()
        except TimeoutError:
            pass
        # Also under a stream of events, or RabbitMQ would take this end for dead.
        if time.monotonic() - beaten >= 1:
            connection.heartbeat_check()
            beaten = time.monotonic()


# --- The broker ---


@dataclass
class Look:
    """What the broker tells."""

    #: Messages by queue and priority.
    lengths: dict[tuple[str, str], int] = field(default_factory=dict)
    #: By queue; only RabbitMQ tells.
    consumers: dict[str, int] = field(default_factory=dict)
    #: Messages that are unacknowledged, by queue, and the time since the epoch from which on the oldest of them is.
    unacknowledged: dict[str, int] = field(default_factory=dict)
    oldest: float | None = None
    dead_letters: int = 0


class Redis:
    """Looks into Redis, where kombu keeps its lists."""

    def __init__(self, settings: Settings) -> None:
        self.client: Any = broker.redis_client(settings, settings.broker_url, settings.broker_password, ANSWER_TIMEOUT)
        self.prefix = settings.key_prefix
        steps = RedisChannel.priority_steps
        lists = [(queue.name, step) for queue in settings.queues for step in steps]
        self.lists = {(name, step): f"{name}{RedisChannel.sep}{step}" if step else name for name, step in lists}

    def look(self) -> Look:
        """Ask all at once."""
        with self.client.pipeline(transaction=False) as pipe:
            for key in self.lists.values():
                pipe.llen(self.prefix + key)
            pipe.hlen(self.prefix + RedisChannel.unacked_key)
            pipe.zrange(self.prefix + RedisChannel.unacked_index_key, 0, 0, withscores=True)
            pipe.hlen(self.prefix + dead_letters.NAME)
            *lengths, unacknowledged, oldest, dead = pipe.execute()
        return Look(
            lengths={(queue, str(step)): length for (queue, step), length in zip(self.lists, lengths, strict=True)},
            unacknowledged={"": unacknowledged},
            oldest=oldest[0][1] if oldest else None,
            dead_letters=dead,
        )


class RabbitMQ:
    """Looks into RabbitMQ by passive declarations, and for tasks that run into the events: AMQP does not tell these."""

    def __init__(self, app: Celery, settings: Settings, events: Events) -> None:
        self.app = app
        self.names = [queue.name for queue in settings.queues]
        self.events = events
        self.connection: Any = None

    def look(self) -> Look:
        """Ask for one queue after the other; once more if the connection that there was is gone."""
        if self.connection:
            try:
                return self._look()
            except Exception as error:
                logger.debug("Connecting again: %s", error)
                self._close()
        options = {"read_timeout": ANSWER_TIMEOUT, "write_timeout": ANSWER_TIMEOUT}
        # Nobody would send heartbeats between two looks.
        self.connection = self.app.connection_for_read(heartbeat=0, connect_timeout=ANSWER_TIMEOUT, transport_options=options)
        try:
            self.connection.ensure_connection(timeout=LOOK_TIMEOUT, interval_start=0, interval_step=0.1)
            return self._look()
        except Exception:
            self._close()
            raise

    def _look(self) -> Look:
        look = Look()
        with self.connection.channel() as channel:
            for name in [*self.names, dead_letters.NAME]:
                try:
                    _, messages, consumers = channel.queue_declare(name, passive=True)
                except self.connection.channel_errors as error:
                    # py-amqp has opened the channel again.
                    logger.debug("No queue %s: %s", name, error)
                    continue
                if name == dead_letters.NAME:
                    look.dead_letters = messages
                else:
                    look.lengths[name, ""], look.consumers[name] = messages, consumers
        running = self.events.still_running()
        look.unacknowledged = dict.fromkeys(self.names, 0)
        for queue, _ in running:
            look.unacknowledged[queue] = look.unacknowledged.get(queue, 0) + 1
        look.oldest = min((start for _, start in running), default=None)
        return look

    def _close(self) -> None:
        connection, self.connection = self.connection, None
        connection.collect()


class Collector:
    """Looks at the broker when Prometheus asks, and tells what it and the events know."""

    def __init__(self, look: Callable[[], Look], events: Events) -> None:
        self.ask = look
        self.events = events
        self._lock = threading.Lock()
        self._asked: Future[Look] | None = None
        self._up = True

    def look(self) -> Look | None:
        """Return what the broker tells, or None if it does not in time; a look that hangs is waited for again by the next."""
        with self._lock:
            asked = self._asked
            if asked is None or asked.done():
                asked = self._asked = Future()
                threading.Thread(target=self._look, args=(asked,), daemon=True, name="look").start()
        try:
            look, error = asked.result(LOOK_TIMEOUT), ""
        except Exception as problem:
            look, error = None, f"{type(problem).__name__}: {problem}"
        if self._up != (look is not None):
            self._up = look is not None
            logger.warning("The broker answers again" if self._up else "The broker does not answer: %s", *([error] if error else []))
        return look

    def _look(self, asked: Future[Look]) -> None:
        try:
            asked.set_result(self.ask())
        except Exception as error:
            asked.set_exception(error)

    def collect(self) -> Iterator[Metric]:
        """Yield all that is not counted event by event."""
        begun = time.monotonic()
        look = self.look()
        yield _gauge("celery_broker_up", "Whether the broker answers.", [], [((), look is not None)])
        if look:
            age = time.time() - look.oldest if look.oldest else 0
            yield _gauge("celery_queue_length", "Messages that wait.", ["queue", "priority"], look.lengths.items())
            yield _gauge("celery_queue_consumers", "Workers that consume it.", ["queue"], _by_name(look.consumers))
            text = "Messages that workers hold, queue empty: of all (Redis); tasks that run (RabbitMQ)."
            yield _gauge("celery_unacknowledged", text, ["queue"], _by_name(look.unacknowledged))
            yield _gauge("celery_oldest_unacknowledged_seconds", "For how long the first of them is held.", [], [((), max(0, age))])
            yield _gauge("celery_dead_letters", "Dead letters that are kept.", ["queue"], [(("",), look.dead_letters)])
        events, workers = self.events, self.events.known_workers()
        up = {name: worker.up for name, worker in workers.items()}
        active = {name: worker.active if worker.up else 0 for name, worker in workers.items()}
        yield _gauge("celery_worker_up", "Whether its heartbeats come.", ["worker"], _by_name(up))
        yield _gauge("celery_worker_tasks_active", "Tasks that it runs.", ["worker"], _by_name(active))
        for name, text, times in (
            ("celery_queue_last_start", "When a task of the queue last started", events.last_start),
            ("celery_queue_last_success", "When a task of the queue last succeeded", events.last_success),
        ):
            yield _gauge(f"{name}_timestamp_seconds", f"{text}; before, when the exporter began.", ["queue"], _by_name(times))
        text = "When the active beat last looked at its schedule."
        yield _gauge("celery_beat_last_tick_timestamp_seconds", text, ["beat"], _by_name(events.ticks))
        yield _gauge("celery_exporter_last_event_timestamp_seconds", "When an event last came, 0: none yet.", [], [((), events.last)])
        yield _gauge("celery_exporter_collect_seconds", "Time that this took.", [], [((), time.monotonic() - begun)])


def _by_name(values: dict[str, Any]) -> list[tuple[tuple[str], float]]:
    return [((name,), value) for name, value in values.copy().items()]


def _gauge(name: str, text: str, labels: list[str], samples: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    metric = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        metric.add_metric(values, value)
    return metric


# --- Serving ---


@dataclass(frozen=True)
class Tls:
    """The exporter's certificate and key, and the CA of whoever may ask (None: anybody)."""

    cert: Path
    key: Path
    client_ca: Path | None = None


class Server(ThreadingHTTPServer):
    """Answers Prometheus; a client that does not speak holds up nobody else."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry, tls: Tls | None) -> None:
        self.registry = registry
        self.tls = tls
        self.loaded = 0
        if tls:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._load(tls)
            if tls.client_ca:
                self.context.load_verify_locations(tls.client_ca)
                self.context.verify_mode = ssl.CERT_REQUIRED
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind, without the look for the host's name in DNS that HTTPServer's does."""
        socketserver.TCPServer.server_bind(self)

    def _load(self, tls: Tls) -> None:
        changed = tls.cert.stat().st_mtime_ns
        if changed != self.loaded:
            self.context.load_cert_chain(tls.cert, tls.key)
            self.loaded = changed

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection. Its handshake is done by its own thread, with its first read."""
        connection, address = super().get_request()
        connection.settimeout(CLIENT_TIMEOUT)
        if self.tls:
            try:
                self._load(self.tls)
            except (OSError, ssl.SSLError) as error:
                logger.warning("The renewed certificate cannot be loaded: %s", error)
            connection = self.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note a client that was refused, or that went away."""
        logger.info("%s was not answered: %s", client_address[0], sys.exception())


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server

    def do_GET(self) -> None:
        """Send all metrics."""
        found = self.path.partition("?")[0] == "/metrics"
        # OpenMetrics has no place for a gauge celery_dead_letters beside a counter celery_dead_letters_total.
        body = generate_latest(self.server.registry) if found else b""
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log no requests."""


def serve(
    app: Celery, settings: Settings, address: tuple[str, int], tls: Tls | None, workers: Iterable[str] = (), most_tasks: int = 100_000
) -> None:
    """Receive events and answer Prometheus until told to stop (SIGTERM, SIGINT).

    Raises:
        OSError: if it cannot listen, or read its certificate.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry, stop = CollectorRegistry(), threading.Event()
    ProcessCollector(registry=registry)
    events = Events(settings, registry, workers, most_tasks)
    looker = Redis(settings) if settings.uses_redis_broker else RabbitMQ(app, settings, events)
    registry.register(Collector(looker.look, events))
    with Server(address, registry, tls) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        receiver = threading.Thread(target=receive, args=(app, events.take, stop), daemon=True, name="events")
        receiver.start()
        threading.Thread(target=server.serve_forever, daemon=True, name="server").start()
        notify("READY=1")
        stop.wait()
        notify("STOPPING=1")
        server.shutdown()
        receiver.join(ANSWER_TIMEOUT)
