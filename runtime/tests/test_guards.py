"""Defects of Celery, kombu and py-amqp: each is shown without its guard, and gone with it."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import redis
from amqp.exceptions import AccessRefused, ChannelError, NotFound
from celery import Celery
from celery.exceptions import QueueNotFound
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from kombu import Connection, Exchange, Producer, Queue, transport
from kombu.exceptions import OperationalError

from celery_platform import broker, configuration, guards
from celery_platform.settings import Settings
from helpers.sites import Site, wait_for

RabbitMQ = tuple[str, Callable[..., str]]


@pytest.fixture(autouse=True)
def _without_guards() -> Iterator[None]:
    """Take the guards' transport away from the tests that follow."""
    aliases, cache = dict(transport.TRANSPORT_ALIASES), dict(transport._transport_cache)
    yield
    for kept, now in ((aliases, transport.TRANSPORT_ALIASES), (cache, transport._transport_cache)):
        now.clear()
        now.update(kept)


@pytest.fixture(scope="module")
def vhost(rabbitmq_node: RabbitMQ) -> Iterator[str]:
    """Return the address of a vhost that several tests share, each with a queue of its own."""
    url, control = rabbitmq_node
    control("add_vhost", "guards")
    control("set_permissions", "--vhost", "guards", "guest", ".*", ".*", ".*")
    yield f"{url}/guards"
    control("delete_vhost", "guards")


@pytest.fixture(scope="module")
def process(rabbitmq_node: RabbitMQ) -> int:
    """Return the id of RabbitMQ's process."""
    return int(rabbitmq_node[1]("eval", "os:getpid().").strip().strip('"'))


def settings(**values: Any) -> Settings:
    return Settings(application="shop:app", **{"broker_password": "guest"} | values)


def guarded(**values: Any) -> Celery:
    app = Celery("shop", set_as_current=False)
    configuration.apply(app, settings(**values))
    guards.install(app, settings(**values))
    return app


def bare(url: str, queues: list[str], **conf: Any) -> Celery:
    """As Celery's documentation sets up quorum queues."""
    app = Celery("shop", broker=url.replace("guest@", "guest:guest@"), set_as_current=False)
    arguments = {"x-queue-type": "quorum"}
    app.conf.task_queues = [Queue(name, Exchange(name, type="topic"), name, queue_arguments=arguments) for name in queues]
    app.conf.task_default_queue = queues[0]
    app.conf.broker_transport_options = {"confirm_publish": True}
    app.conf.update(conf)
    return app


def messages(app: Celery, queue: str) -> list[str]:
    """Return the names of the tasks that wait in a queue, and take them from it."""
    with app.connection_for_read() as connection:
        bound = app.amqp.queues[queue](connection.default_channel)
        return [message.headers["task"] for message in iter(lambda: bound.get(no_ack=True), None)]


# --- Countdowns to quorum queues ---

SHOP = """
import time
from celery import Celery
app = Celery("shop")
app.conf.task_routes = {"*": {"routing_key": "default"}}  # As in Celery's documentation of quorum queues.

@app.task(name="runs", bind=True)
def runs(self, name, due):
    with open("ran", "a") as file:
        print(name, time.time() - due, self.request.delivery_info["routing_key"].rpartition(".")[2], file=file)
    if name == "retry" and self.request.retries < 2:
        self.retry(args=(name, time.time() + 1.3), countdown=1.3)
"""
SENDER = """
import sys, time
from datetime import UTC, datetime, timedelta
from celery_platform.worker import app
from shop import runs

def now(seconds):
    return time.time() + seconds

app.send_task("runs", ("zero", now(0)), countdown=0)
app.send_task("runs", ("fraction", now(0.2)), countdown=0.2)
app.send_task("runs", ("one", now(1)), {}, 1)
app.send_task("runs", ("eta", now(0.3)), eta=datetime.now(UTC) + timedelta(seconds=0.3))
for _ in range(20):  # An ETA of a second is in less than one when Celery looks.
    app.send_task("runs", ("second", now(1)), eta=(datetime.now(UTC) + timedelta(seconds=1.0001)).isoformat())
runs.apply_async(("long", now(2.5)), countdown=2.5)
runs.apply_async(("key", now(1)), routing_key="critical", countdown=1)
runs.apply_async(("exchange", now(0.5)), exchange="critical", routing_key="critical", countdown=0.5)
app.send_task("runs", ("retry", now(0)), queue="critical")
"""


def test_countdowns_of_any_length_reach_their_queues(site: Site, rabbitmq: RabbitMQ) -> None:
    url, _ = rabbitmq
    app = bare(url, ["default", "critical"], task_routes={"*": {"routing_key": "default"}})
    with pytest.raises(KeyError, match="exchange_type"):
        app.send_task("runs", countdown=2)
    app.conf.task_routes = None
    app.amqp.flush_routes()
    del app.amqp.router
    for delay in ({"countdown": 0.2}, {"eta": datetime.now(UTC) + timedelta(seconds=0.8)}):
        with pytest.raises(ValueError, match="countdown must be a positive number"):
            app.send_task("runs", **delay)
    with pytest.raises(NotFound, match="celery_delayed_27"):
        app.send_task("runs", countdown=2)

    site.write(SHOP)
    site.set(broker_url=url, queues='["default", "critical"]', publish_timeout="3")
    site.secret(broker_password="guest")
    site.run("python", "-c", SENDER)  # No worker has ever run.
    path = site.folder / "ran"
    with site.worker("--queues=default,critical"):
        wait_for("the tasks", lambda: path.exists() and len(path.read_text().splitlines()) == 30)
    ran = [line.split() for line in path.read_text().splitlines()]
    assert min(float(late) for _, late, _ in ran) >= 0
    assert sorted((name, queue) for name, _, queue in ran if queue != "default") == [
        ("exchange", "critical"),
        ("key", "critical"),
        ("retry", "critical"),
        ("retry", "critical"),
        ("retry", "critical"),
    ]


def test_a_countdown_to_an_unknown_exchange_is_an_error_for_the_sender(rabbitmq: RabbitMQ) -> None:
    app = guarded(broker_url=rabbitmq[0], queues=["default"])
    with pytest.raises(QueueNotFound, match="'other'"):
        app.send_task("runs", exchange="other", routing_key="default", countdown=2)


def test_who_may_not_declare_may_still_delay(rabbitmq: RabbitMQ) -> None:
    url, control = rabbitmq
    guards.declare_delays(guarded(broker_url=url, queues=["default"]))
    # What a producer is permitted at least.
    control("set_permissions", "guest", "^$", "^celery_delayed_27$", "^$")
    app = guarded(broker_url=url, queues=["default"], publish_timeout=1)
    app.conf.task_send_sent_event = False
    with app.connection_for_write() as connection, pytest.raises(AccessRefused):
        app.amqp.queues["default"](connection.default_channel).declare()
    app.send_task("runs", countdown=1)
    control("set_permissions", "guest", ".*", ".*", ".*")
    assert wait_for("the message", lambda: messages(app, "default")) == ["runs"]


def test_what_is_there_is_not_declared(rabbitmq: RabbitMQ) -> None:
    url, control = rabbitmq
    guards.declare_delays(guarded(broker_url=url, queues=["default"]))
    kinds = (["list_queues", "name"], ["list_exchanges"], ["list_bindings"])
    had = [sorted(control(*kind).split()) for kind in kinds]
    control("set_permissions", "guest", "^own", "^(own|default|celery_delayed_27)", "^(own|default)")
    app = guarded(broker_url=url, queues=["default"], declare_queues=False)
    app.conf.task_send_sent_event = False
    app.send_task("now")
    app.send_task("later", countdown=1)
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        # As the application and Celery would.
        app.amqp.queues["default"](channel).declare()
        Queue("default", Exchange("other"), "other")(channel).declare()
        Exchange("default")(channel).bind_to("other")
        own = Queue("own", Exchange("own", durable=False, auto_delete=True), "own", durable=False, exclusive=True)(channel)
        own.declare()
        own.bind_to("default", "default")
        app.send_task("now", connection=connection)
        assert [message.headers["task"] for message in iter(lambda: own.get(no_ack=True), None)] == ["now"]
        with pytest.raises(NotFound, match="no queue 'missing'"):
            Queue("missing", durable=True)(channel).declare()
    arrived: list[str] = []
    wait_for("the messages", lambda: arrived.extend(messages(app, "default")) or len(arrived) == 3)
    assert sorted(arrived) == ["later", "now", "now"]
    control("set_permissions", "guest", ".*", ".*", ".*")
    assert [sorted(control(*kind).split()) for kind in kinds] == had


# --- Messages that no queue takes ---


def full(control: Callable[..., str], app: Celery) -> None:
    """Let the queue `full` take no more. It is told so only after some messages too many."""
    control("set_policy", "full", "^full$", '{"max-length": 1, "overflow": "reject-publish"}')
    options: dict[str, Any] = {"retry": False, "queue": "full"}

    def refused() -> bool:
        with suppress(OperationalError):
            app.send_task("runs", **options)
            return False
        return True

    wait_for("a full queue", refused)


def test_a_task_that_no_queue_takes_is_an_error_for_its_sender(rabbitmq: RabbitMQ) -> None:
    url, control = rabbitmq
    app = guarded(broker_url=url, queues=["default", "full"], publish_timeout=2)
    full(control, app)
    with app.producer_pool.acquire(block=True) as producer:
        # Declares it, which is done once for a connection.
        app.send_task("runs", producer=producer)
        with app.connection_for_write() as connection:
            app.amqp.queues["default"](connection.default_channel).delete()
        with pytest.raises(ChannelError, match="NO_ROUTE"):
            app.send_task("runs", producer=producer)
        # What RabbitMQ confirms for that one is not taken for the next one's.
        start = time.monotonic()
        with pytest.raises(OperationalError, match="its queue is full"):
            app.send_task("runs", producer=producer, queue="full")
        assert 2 <= time.monotonic() - start < 8


def test_a_queue_that_is_full_for_a_while_only_delays(rabbitmq: RabbitMQ) -> None:
    url, control = rabbitmq
    app = guarded(broker_url=url, queues=["full"], default_queue="full")
    full(control, app)
    taken: list[str] = []
    timer = threading.Timer(3, lambda: taken.extend(messages(app, "full")))
    timer.start()
    start = time.monotonic()
    app.send_task("last")
    assert time.monotonic() - start > 2
    timer.join()
    assert messages(app, "full") == ["last"]
    assert set(taken) == {"runs"}


@contextmanager
def without_majority(control: Callable[..., str], queue: str, url: str) -> Iterator[None]:
    """Stop the only member of a quorum queue: it has no majority, while RabbitMQ itself is as before."""
    member = f"{{'{url.rpartition('/')[2]}_{queue}', node()}}"
    control("eval", f"ra:stop_server(quorum_queues, {member}).")
    try:
        yield
    finally:
        control("eval", f"ra:restart_server(quorum_queues, {member}).")


def test_a_queue_without_a_majority_is_an_error_for_the_sender_in_time(rabbitmq: RabbitMQ, rabbitmq_node: RabbitMQ) -> None:
    url, _ = rabbitmq
    app = guarded(broker_url=url, queues=["default"], publish_timeout=5)
    app.conf.broker_transport_options["confirm_timeout"] = 2
    app.send_task("before")
    for options in ({}, {"retry_policy": {"max_retries": 1000}}, {"countdown": 0}):
        with without_majority(rabbitmq_node[1], "default", url):
            start = time.monotonic()
            with pytest.raises(OperationalError, match="did not take the task"):
                app.send_task("during", **options)
            assert 5 <= time.monotonic() - start < 9
    app.send_task("after")
    sent = wait_for("the messages", lambda: messages(app, "default"))
    assert (sent[0], sent[-1]) == ("before", "after")


def test_nodes_that_refuse_connections_are_tried_again_for_that_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    app = guarded(
        broker_url=";".join(f"amqp://guest@{host}:{port}/" for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3")), queues=["default"]
    )
    for seconds in (0, 4):
        guards.give_up(app, seconds)
        start = time.monotonic()
        with pytest.raises(OperationalError, match=r"did not take the task: .*refused"):
            app.send_task("runs")
        assert seconds <= time.monotonic() - start < seconds + 2


def test_a_task_that_expires_is_left_to_its_worker(rabbitmq: RabbitMQ) -> None:
    plain = bare(rabbitmq[0], ["default"])
    plain.send_task("runs", expires=0.1)
    time.sleep(0.5)
    assert messages(plain, "default") == []
    app = guarded(broker_url=rabbitmq[0], queues=["default"])
    app.send_task("runs", expires=0.1)
    time.sleep(0.5)
    assert messages(app, "default") == ["runs"]


def test_queues_whose_delayed_messages_would_mix_are_refused(rabbitmq: RabbitMQ) -> None:
    url, _ = rabbitmq
    app = bare(url, ["eu.orders", "orders"])
    guards.declare_delays(app)  # As a worker does.
    app.send_task("runs", countdown=1)
    assert wait_for("the message", lambda: messages(app, "eu.orders")) == ["runs"]
    assert wait_for("the other", lambda: messages(app, "orders")) == ["runs"]

    def conflicts(*queues: str) -> list[str]:
        return [conflict.text for conflict in settings(broker_url=url, queues=list(queues), default_queue="orders").conflicts()]

    (told,) = conflicts("orders", "eu.orders")
    assert "QUEUES has orders and eu.orders" in told
    assert conflicts("orders", "orders.eu", "old-orders") == []


# --- TLS ---


class Authority:
    """A certificate authority, and certificates of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
        self.file = folder / "ca.pem"
        self.file.write_bytes(self._signed(self.name, self.key, x509.BasicConstraints(ca=True, path_length=0)))

    def _signed(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType) -> bytes:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(
            self.name, name, key.public_key(), x509.random_serial_number(), now - timedelta(1), now + timedelta(1)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def context(self, *names: x509.GeneralName) -> ssl.SSLContext:
        """Return the server's side of TLS with a certificate for these names."""
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        file = self.folder / f"{time.monotonic_ns()}.pem"
        file.write_bytes(private + self._signed(x509.Name([]), key, x509.SubjectAlternativeName(names)))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context


class Relay:
    """Offers a broker at an address of its own, with TLS if wanted, until its block ends."""

    def __init__(self, url: str, host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> None:
        inner, _, vhost = url.rpartition("@")[2].partition("/")
        self.broker = inner.split(":")
        self.context = context
        self.listener = socket.create_server((host, 0))
        self.url = f"{'amqps' if context else 'amqp'}://guest@{host}:{self.listener.getsockname()[1]}/{vhost}"
        self.clients: list[socket.socket] = []
        #: Bytes from clients; clearing an event holds back what comes then.
        self.requested = 0
        self.requests, self.answers = threading.Event(), threading.Event()
        self.requests.set()
        self.answers.set()

    def __enter__(self) -> Relay:
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.requests.set()
        self.answers.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for client in self.clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self.serve, args=(self.listener.accept()[0],), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with suppress(OSError):
            client = self.context.wrap_socket(client, server_side=True) if self.context else client
            self.clients.append(client)
            broker = socket.create_connection(self.broker)
            threading.Thread(target=self.answer, args=(broker, client), daemon=True).start()
            with client, broker:
                while data := client.recv(65536):
                    self.requested += len(data)
                    self.requests.wait()
                    broker.sendall(data)

    def answer(self, broker: socket.socket, client: socket.socket) -> None:
        with suppress(OSError), broker, client:
            while data := broker.recv(65536):
                self.answers.wait()
                client.sendall(data)


def of(*names: str) -> list[x509.GeneralName]:
    return [x509.IPAddress(ip_address(name)) if name[0].isdigit() else x509.DNSName(name) for name in names]


def test_each_host_is_verified_against_its_own_name(vhost: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with ExitStack() as second, ExitStack() as first:
        one = first.enter_context(Relay(vhost, "127.0.0.1", authority.context(*of("127.0.0.1")))).url
        two = second.enter_context(Relay(vhost, "127.0.0.2", authority.context(*of("127.0.0.2")))).url
        app = guarded(broker_url=f"{one};{two}", queues=["own"], default_queue="own", tls_ca_file=authority.file, publish_timeout=3)
        app.send_task("first")
        # Without the guards, and set up as kombu documents it.
        plain = {"transport": "kombu.transport.pyamqp:SSLTransport"}
        tls = {"cert_reqs": ssl.CERT_REQUIRED, "ca_certs": str(authority.file), "server_hostname": None}
        Connection(app.conf.broker_url.split(";")[0], ssl=tls, **plain).transport.establish_connection()
        first.close()
        with pytest.raises(ssl.SSLCertVerificationError, match=r"'127\.0\.0\.1'"):
            Connection(app.conf.broker_url.split(";")[1], ssl=tls, **plain).transport.establish_connection()

        app.send_task("second")
        assert messages(app, "own") == ["first", "second"]


@pytest.mark.parametrize(("name", "server_name"), [("127.0.0.9", None), ("127.0.0.1", "rabbitmq.test")])
def test_a_host_of_another_name_is_refused(vhost: str, tmp_path: Path, name: str, server_name: str | None) -> None:
    authority = Authority(tmp_path)
    with Relay(vhost, context=authority.context(*of(name))) as relay:
        config = broker.celery_config(settings(broker_url=relay.url, tls_ca_file=authority.file))
        tls = config["broker_use_ssl"]
        del tls["server_hostname"]
        with Connection(config["broker_url"], ssl=tls) as connection:
            connection.transport.establish_connection()

        app = guarded(broker_url=relay.url, queues=["default"], tls_ca_file=authority.file, tls_server_name=server_name)
        with app.connection_for_write() as connection, pytest.raises(ssl.SSLCertVerificationError, match=server_name or "127.0.0.1"):
            connection.transport.establish_connection()


def test_all_hosts_are_verified_against_the_name_they_share(vhost: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    options = {"queues": ["shared"], "default_queue": "shared", "tls_ca_file": authority.file}
    with ExitStack() as stack:
        context = authority.context(*of("rabbitmq.test"))
        hosts = [stack.enter_context(Relay(vhost, host, context)).url for host in ("127.0.0.1", "127.0.0.2")]
        for host in hosts:
            app = guarded(broker_url=host, tls_server_name="rabbitmq.test", **options)
            app.send_task(host)
            with guarded(broker_url=host, **options).connection_for_write() as connection, pytest.raises(ssl.SSLCertVerificationError):
                connection.transport.establish_connection()
        assert messages(app, "shared") == hosts


# --- Confirmations ---


@contextmanager
def frozen(process: int) -> Iterator[None]:
    """Stop a process until the block ends."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@contextmanager
def out_of_memory(control: Callable[..., str]) -> Iterator[None]:
    """Let RabbitMQ take no messages until the block ends. It goes on sending heartbeats."""
    control("eval", "vm_memory_monitor:set_vm_memory_high_watermark(0.00001).")
    try:
        yield
    finally:
        control("eval", "vm_memory_monitor:set_vm_memory_high_watermark(0.4).")


def test_a_publisher_does_not_wait_for_ever(vhost: str, process: int) -> None:
    """Without the guards it still waits when, with them, it has tried twice and given up."""
    plain = bare(vhost, ["frozen"], broker_connection_timeout=1)
    apps = [plain]
    # Unequal, or they would share a pool of connections.
    for retries, timeout in ((1, 2), (60, 2.5)):
        apps.append(guarded(broker_url=vhost, queues=["frozen"], default_queue="frozen", publish_timeout=retries))
        apps[-1].conf.broker_connection_timeout = 1
        apps[-1].conf.broker_transport_options["confirm_timeout"] = timeout
    for app in apps:
        app.send_task("warm")
    failures: list[str] = []

    def send_in_vain() -> None:
        try:
            apps[1].send_task("fails")
        except OperationalError as error:
            failures.append(type(error).__name__)

    waiting = threading.Thread(target=plain.send_task, args=("waits",), daemon=True)
    failing = threading.Thread(target=send_in_vain, daemon=True)
    trying = threading.Thread(target=apps[2].send_task, args=("outlasts",), daemon=True)
    with frozen(process):
        for thread in (waiting, failing, trying):
            thread.start()
        # Less than the 30 seconds after which a connection that is silent is taken for lost anyway.
        failing.join(25)
        assert [thread.is_alive() for thread in (waiting, failing, trying)] == [True, False, True]
        assert failures == ["OperationalError"]
    trying.join(60)
    assert not trying.is_alive()
    apps[1].send_task("works")
    assert {"outlasts", "works"} <= set(messages(apps[1], "frozen"))
    waiting.join(60)
    assert not waiting.is_alive()


def test_heartbeats_do_not_keep_a_publisher_waiting(vhost: str, rabbitmq_node: RabbitMQ) -> None:
    """Each way it has two seconds, and RabbitMQ, which is out of memory, sends a heartbeat each second."""
    published: dict[str, str] = {}
    with ExitStack() as stack:
        threads = {}
        for module in ("kombu.transport.pyamqp", "celery_platform.guards"):
            options = {"transport": f"{module}:Transport", "transport_options": {"confirm_publish": True}, "heartbeat": 2}
            connection = stack.enter_context(Connection(vhost.replace("guest@", "guest:guest@"), **options))
            producer = Producer(connection.channel())
            producer.publish({}, routing_key="nowhere")

            def publish(module: str = module, producer: Producer = producer) -> None:
                try:
                    producer.publish({}, routing_key="nowhere", confirm_timeout=2)
                    published[module] = "published"
                except Exception as error:
                    published[module] = type(error).__name__

            threads[module] = threading.Thread(target=publish, daemon=True)
        with out_of_memory(rabbitmq_node[1]):
            for thread in threads.values():
                thread.start()
            threads["celery_platform.guards"].join(60)
            assert published == {"celery_platform.guards": "TimeoutError"}
        threads["kombu.transport.pyamqp"].join(60)
        assert published["kombu.transport.pyamqp"] == "published"


def test_a_late_confirmation_is_not_the_next_messages(vhost: str) -> None:
    """The next message never reaches RabbitMQ."""
    for module, outcome in (("kombu.transport.pyamqp", "published"), ("celery_platform.guards", "RecoverableConnectionError")):
        outcomes: list[str] = []
        options = {"transport": f"{module}:Transport", "transport_options": {"confirm_publish": True}}
        with Relay(vhost) as relay, Connection(relay.url.replace("@", ":guest@"), **options) as connection:
            producer = Producer(connection.channel())
            producer.publish({}, routing_key="nowhere")

            def publish_next(producer: Producer = producer, outcomes: list[str] = outcomes) -> None:
                try:
                    producer.publish({}, routing_key="nowhere", confirm_timeout=30)
                    outcomes.append("published")
                except Exception as error:
                    outcomes.append(type(error).__name__)

            relay.answers.clear()
            with pytest.raises(TimeoutError):
                producer.publish({}, routing_key="nowhere", confirm_timeout=1)
            relay.requests.clear()
            requested = relay.requested
            next_one = threading.Thread(target=publish_next)
            next_one.start()
            wait_for("the next message", lambda relay=relay, start=requested, told=outcomes: told or relay.requested > start + 20)
            relay.answers.set()
            next_one.join(60)
            relay.requests.set()
            assert outcomes == [outcome]


# --- Redis ---

KILLED_IN_SWEEP = """
import json, os, signal, sys
from kombu import Connection, Queue
from kombu.transport.redis import Mutex

channel = Connection(sys.argv[1], transport_options=json.loads(sys.argv[2])).default_channel
queue = Queue("default")(channel)
queue.declare()
assert queue.get()
with channel.conn_or_acquire() as client, Mutex(client, channel.unacked_mutex_key, channel.unacked_mutex_expire):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_lock_that_a_killed_worker_holds_does_not_keep_its_messages(redis_url: str) -> None:
    ours = broker.celery_config(settings(broker_url=redis_url, soft_time_limit=1, time_limit=2, visibility_timeout=3))
    ours = ours["broker_transport_options"]
    # The test has less time than a site.
    ours |= {"unacked_mutex_expire": ours["unacked_mutex_expire"] / 5}
    kombus = {"visibility_timeout": 3, "unacked_restore_throttle": 1}
    received = {}
    with ExitStack() as stack:
        connections = {}
        for name, options in (("0", kombus), ("1", ours)):
            connection = stack.enter_context(Connection(f"{redis_url}/{name}", transport_options=options))
            Producer(connection.default_channel).publish({}, routing_key="default", declare=[Queue("default")])
            ended = subprocess.run([sys.executable, "-c", KILLED_IN_SWEEP, f"{redis_url}/{name}", json.dumps(options)])
            assert ended.returncode == -signal.SIGKILL
            consumer = connection.Consumer([Queue("default")], on_message=lambda message, name=name: received.update({name: message}))
            stack.enter_context(consumer)
            connections[name] = connection

        def redelivered() -> bool:
            for connection in connections.values():
                with suppress(TimeoutError):
                    connection.drain_events(timeout=0.2)
            return "1" in received

        wait_for("the message", redelivered)
        # Three more rounds for kombu's, which is waiting for this lock.
        for _ in range(3):
            redelivered()
        assert list(received) == ["1"]
        assert redis.Redis.from_url(f"{redis_url}/0").pttl("unacked_mutex") > 200_000
        received["1"].ack()


def test_what_cannot_be_put_back_at_shutdown_stays_in_redis(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So kombu's emergency dump, which would be a pickle in /tmp, is never written with Redis."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    client = redis.Redis.from_url(redis_url)
    options = {"visibility_timeout": 1, "unacked_restore_throttle": 1}
    connection = Connection(redis_url, transport_options=options)
    queue = Queue("default")(connection.default_channel)
    Producer(connection.default_channel).publish({}, routing_key="default", declare=[queue])
    assert queue.get()
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            connection.default_channel.close()
    finally:
        client.config_set("maxmemory", 0)
    assert list(tmp_path.iterdir()) == []
    assert client.hlen("unacked") == 1

    received: list[Any] = []
    with Connection(redis_url, transport_options=options) as other, other.Consumer([Queue("default")], on_message=received.append):

        def redelivered() -> list[Any]:
            with suppress(TimeoutError):
                other.drain_events(timeout=0.2)
            return received

        wait_for("the message", redelivered)
        received[0].ack()
