"""Encryption, what is refused, and that no argument of a task can be read where it need not be."""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import kombu
import pytest
import redis
from celery import Celery, chain, chord
from celery.events.event import get_exchange
from kombu.exceptions import DecodeError
from kombu.utils.encoding import str_to_bytes

from celery_platform import serialization
from celery_platform.serialization import CONTENT_TYPE, HEADER_SIZE, NAME, KeyRing, generate_key
from celery_platform.settings import MASK, BadSettings, SecretStr, Settings, load_settings
from helpers.sites import Site, wait_for

SECRET = "card4012888888881881"
OLD, NEW = generate_key(), generate_key()
SHOP = """
import pathlib, time
from celery import Celery

app = Celery("shop")
app.conf.result_extended = True

@app.task
def hold(card, gate):
    while not pathlib.Path(gate).exists():
        time.sleep(0.05)
    return card

@app.task(serializer="json")
def echo(card):
    return card

@app.task
def join(cards):
    return "+".join(cards)

@app.task(bind=True)
def again(self, card):
    if self.request.retries:
        return echo.delay(card).id
    raise self.retry(countdown=1)

@app.task
def note(word, file):
    with open(file, "a") as notes:
        notes.write(word + "\\n")
"""


@pytest.fixture(autouse=True)
def _forget_serializer() -> Iterator[None]:
    """Leave kombu's registry, which all applications of a process share, as it was."""
    yield
    if NAME in kombu.serialization.registry.name_to_type:
        kombu.serialization.unregister(NAME)


def settings(**values: Any) -> Settings:
    return Settings(application="shop:app", broker_url="memory://", **values)


def keys(*ring: str) -> SecretStr:
    return SecretStr("\n".join(ring))


def key_id(key: str) -> str:
    return KeyRing(key).first.id.hex()


def decode(data: bytes) -> Any:
    return kombu.serialization.loads(data, CONTENT_TYPE, "binary", accept=[CONTENT_TYPE])


def encode(data: Any) -> bytes:
    return bytes(kombu.serialization.dumps(data, serializer=NAME)[2])


def producer(site: Site) -> Celery:
    """Return an application like `site.producer()` that encrypts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in site.environment.items():
            patch.setenv(name, value)
        told = load_settings()
    app = site.producer()
    serialization.install(app, told)
    return app


def ask(app: Celery, command: str) -> Any:
    """Return the answer of the only worker to a command of remote control."""
    [[answer]] = [reply.values() for reply in app.control.broadcast(command, reply=True, limit=1, timeout=10)]
    return answer


def settle(app: Celery) -> None:
    """Wait until no task runs: a worker that is stopped just when one ends may take 30 s for it (billiard's pool)."""
    wait_for("an idle worker", lambda: not ask(app, "active"))


def readable(seen: bytes, text: str = SECRET) -> bool:
    """Tell whether a text can be read in what was seen, as it is or in base64, as kombu writes bodies to Redis."""
    coded = [base64.b64encode(b"." * shift + text.encode())[4 if shift else 0 : -4] for shift in range(3)]
    return any(form in seen for form in (text.encode(), *coded))


@contextmanager
def watch_redis(url: str) -> Iterator[Callable[[], bytes]]:
    """Give a function that returns all commands so far, and all that is stored now."""
    address = urlsplit(url)
    seen = bytearray()
    with socket.create_connection((address.hostname, address.port)) as connection:

        def listen() -> None:
            while part := connection.recv(65536):
                seen.extend(part)

        connection.sendall(b"MONITOR\r\n")
        thread = threading.Thread(target=listen)
        thread.start()
        wait_for("MONITOR", lambda: b"+OK" in seen)
        yield lambda: bytes(seen) + b"".join(stored(f"{url}/{number}") for number in (0, 1))
        connection.shutdown(socket.SHUT_RDWR)
        thread.join()


def stored(url: str) -> bytes:
    client = redis.Redis.from_url(url)
    read = {
        b"string": client.get,
        b"list": lambda key: client.lrange(key, 0, -1),
        b"hash": client.hgetall,
        b"set": client.smembers,
        b"zset": lambda key: client.zrange(key, 0, -1),
    }
    # Keys may expire, and queues become empty, while this reads.
    return repr([(key, read[kind](key)) for key in client.scan_iter() if (kind := client.type(key)) != b"none"]).encode()


@contextmanager
def watch_rabbitmq(url: str, app: Celery) -> Iterator[Callable[[], bytes]]:
    """Give a function that returns all task messages, events and replies so far."""
    seen = bytearray()
    with kombu.Connection(url, password="guest") as connection:
        exchanges = [
            (kombu.Exchange("default", type="topic"), "#"),
            (get_exchange(connection), "#"),
            (app.control.mailbox.reply_exchange, app.control.mailbox.oid),
        ]
        spy = kombu.Queue("spy", bindings=[kombu.binding(exchange, routing_key=key) for exchange, key in exchanges])
        channel = connection.channel()
        bound = spy(channel)
        for exchange, _ in exchanges:
            exchange(channel).declare()
        bound.declare()

        def drain() -> bytes:
            while message := bound.get(no_ack=True):
                seen.extend(repr((str_to_bytes(message.body), message.headers, message.properties)).encode())
            return bytes(seen)

        yield drain


@pytest.fixture(params=["redis", "rabbitmq"])
def encrypted_site(request: pytest.FixtureRequest, site: Site, redis_url: str) -> Site:
    """Return a site with encryption on, and its results in Redis."""
    site.write(SHOP)
    site.secret(encryption_keys=OLD)
    site.set(broker_url=redis_url, result_backend=f"{redis_url}/1", encryption="on", log_arguments="true")
    if request.param == "rabbitmq":
        site.set(broker_url=request.getfixturevalue("rabbitmq")[0])
        site.secret(broker_password="guest")
    return site


@pytest.fixture
def redis_site(site: Site, redis_url: str) -> Site:
    site.write(SHOP)
    site.set(broker_url=redis_url, result_backend=f"{redis_url}/1")
    return site


def test_a_key_ring_reads_what_each_of_its_keys_wrote() -> None:
    assert KeyRing(f"{NEW} since May\n{OLD}\n").open(KeyRing(OLD).seal(b"text")) == b"text"
    assert KeyRing(f"{OLD}\n{NEW}").open(KeyRing(NEW.rstrip("=")).seal(b"text")) == b"text"
    assert KeyRing(NEW).seal(b"text") != KeyRing(NEW).seal(b"text")


@pytest.mark.parametrize("changed", [0, 1, HEADER_SIZE, HEADER_SIZE + 12, -1], ids=["version", "key id", "nonce", "text", "tag"])
def test_what_was_tampered_with_cannot_be_decoded(changed: int) -> None:
    serialization.install(Celery("shop"), settings(encryption="on", encryption_keys=keys(OLD)))
    sealed = bytearray(encode(["args"]))
    sealed[changed] ^= 1

    with pytest.raises(DecodeError):
        decode(bytes(sealed))
    with pytest.raises(DecodeError):
        decode(encode(["args"])[:20])


def test_an_unknown_key_is_named() -> None:
    serialization.install(Celery("shop"), settings(encryption="on", encryption_keys=keys(NEW)))

    with pytest.raises(DecodeError, match=key_id(OLD)):
        decode(KeyRing(OLD).seal(b"[]"))


@pytest.mark.parametrize(
    "ring", ["", "\n", f"{OLD}\ntopsecret", f"{OLD}\n{OLD}x", f"{OLD}\n{OLD[:20]}", f"{OLD}\n{OLD[:20]}!{OLD[20:]}"], ids=range(6)
)
def test_what_is_no_key_is_refused_and_not_shown(environment: Callable[..., None], ring: str) -> None:
    environment(encryption="on", secrets={"encryption_keys": ring})
    with pytest.raises(BadSettings, match=r"^CELERY_PLATFORM_ENCRYPTION_KEYS is \*+; allowed: .*generate-key") as refusal:
        load_settings()

    assert "topsecret" not in str(refusal.value)
    assert OLD[:20] not in str(refusal.value)


@pytest.mark.parametrize(("mode", "writes", "reads_plain"), [("off", b"[", True), ("migrate", b"\x01", True), ("on", b"\x01", False)])
def test_each_mode_reads_what_the_next_one_writes(redis_url: str, mode: Any, writes: bytes, reads_plain: bool) -> None:
    app = Celery("shop", backend=redis_url)
    serialization.install(app, settings(encryption=mode, encryption_keys=keys(OLD)))
    app.backend.set(app.backend.get_key_for_task("plain"), json.dumps({"status": "SUCCESS", "result": 7}))
    app.backend.set(app.backend.get_key_for_task("sealed"), KeyRing(OLD).seal(b'{"status": "SUCCESS", "result": 7}'))

    assert app.backend.encode([]).startswith(writes)
    assert app.AsyncResult("sealed").result == 7
    assert NAME in app.conf.accept_content
    assert ("json" in app.conf.accept_content) is reads_plain
    if reads_plain:
        assert app.AsyncResult("plain").result == 7
    else:
        with pytest.raises(DecodeError, match="not encrypted"):
            app.AsyncResult("plain").get(timeout=1)


def test_a_serializer_of_the_application_is_overridden(caplog: pytest.LogCaptureFixture) -> None:
    app = Celery("shop", broker="memory://")
    serialization.install(app, settings(encryption="migrate", encryption_keys=keys(OLD)))

    for _ in range(2):
        app.send_task("shop.echo", [SECRET], serializer="json", argsrepr=SECRET)

    with app.connection_for_read() as connection:
        message = connection.SimpleQueue("celery").get(block=False)
    assert message.content_type == CONTENT_TYPE
    assert SECRET not in repr((message.body, message.headers, message.properties))
    assert len([record for record in caplog.records if "shop.echo asks for the serializer json" in record.message]) == 1


def test_arguments_and_results_cannot_be_read_in_brokers_results_events_and_logs(encrypted_site: Site, redis_url: str) -> None:
    site = encrypted_site
    site.set(result_compression="gzip")
    app = producer(site)
    gate = site.folder / "gate"

    with (
        watch_redis(redis_url) as in_redis,
        watch_rabbitmq(app.conf.broker_url, app) if "amqp" in app.conf.broker_url else watch_redis(redis_url) as in_broker,
    ):
        held = app.send_task("shop.hold", [SECRET, str(gate)])
        echoed = app.send_task("shop.echo", kwargs={"card": SECRET}, serializer="json", argsrepr=SECRET)
        pending = in_broker()
        with site.worker():
            wait_for("a running task", lambda: held.state == "STARTED")
            unacked = in_broker()
            active = ask(app, "active")
            assert ask(site.producer(), "ping") == {"ok": "pong"}
            gate.touch()
            echo = app.signature("shop.echo", [SECRET])
            results = [
                held,
                echoed,
                app.send_task("shop.again", [SECRET]),
                chain(echo, app.signature("shop.echo"))(),
                chord([echo, echo], app.signature("shop.join"), app=app)(),
            ]
            values = [result.get(timeout=20) for result in results]
            values.append(app.AsyncResult(values.pop(2)).get(timeout=20))
            settle(app)
        seen = in_broker() + in_redis()

    assert values == [SECRET, SECRET, SECRET, f"{SECRET}+{SECRET}", SECRET]
    assert held._get_task_meta()["args"] == [SECRET, str(gate)]
    assert [(task["args"], task["kwargs"]) for task in active] == [(MASK, MASK)]
    assert b"shop.hold" in pending
    assert readable(seen, "task-succeeded")
    assert not readable(pending + unacked + seen)
    log = site.log()
    assert "succeeded in" in log
    assert SECRET not in log
    assert "shop.echo asks for the serializer json" in log
    assert "shop.again asks" not in log


def test_what_is_not_encrypted_by_a_key_of_the_ring_is_not_executed(encrypted_site: Site) -> None:
    site, notes, trap = encrypted_site, encrypted_site.folder / "notes", encrypted_site.folder / "trap"
    foreign, ancient = site.producer(), site.producer()
    ancient.conf.task_protocol = 1

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(trap),)

    def note(app: Celery, word: Any, **options: Any) -> Any:
        return app.send_task("shop.note", [word, str(notes)], **options)

    note(foreign, f"plain {SECRET}")
    note(ancient, f"protocol 1 {SECRET}")
    note(foreign, Trap(), serializer="pickle", argsrepr="")
    note(foreign, "yaml", serializer="yaml")
    site.secret(encryption_keys=NEW)
    note(producer(site), "unknown key")
    site.secret(encryption_keys=OLD)
    app = producer(site)
    kombu.serialization.register(NAME, lambda _: KeyRing(OLD).seal(b"[]")[:-1] + b"!", None, CONTENT_TYPE, "binary")
    note(app, "tampered")
    app = producer(site)
    last = note(app, "good")
    reasons = [
        f"encrypted under key {key_id(NEW)}, which is not in the credential encryption_keys",
        f"names key {key_id(OLD)}, but is not what was encrypted under it",
        *(f"untrusted content of type {name}" for name in ("json", "pickle", "yaml")),
    ]
    # What is refused may be told after what came behind it has run.
    with site.worker("--without-mingle"):
        last.get(timeout=20)
        wait_for("the reasons", lambda: all(reason in site.log() for reason in reasons), why=site.log)

    assert notes.read_text() == "good\n"
    assert not trap.exists()
    assert SECRET not in site.log()


def test_migrating_reads_plain_text_and_shows_no_argument_of_other_producers(redis_site: Site, redis_url: str) -> None:
    site = redis_site
    foreign = site.producer()
    foreign.conf.task_send_sent_event = False
    site.secret(encryption_keys=OLD)
    site.set(encryption="migrate", log_arguments="true", log_level="DEBUG")
    app = producer(site)

    sent = foreign.send_task("shop.again", [SECRET])
    with watch_redis(redis_url) as seen, site.worker("--without-mingle", "--loglevel=DEBUG"):
        assert app.AsyncResult(app.AsyncResult(sent.id).get(timeout=20)).get(timeout=20) == SECRET
        with foreign.producer_or_acquire() as raw:
            body, headers = ([SECRET], {}, {}), {"task": "shop.echo", "id": "short", "argsrepr": SECRET}
            raw.publish(body, headers=headers, exchange="", routing_key="default", serializer="json")
        assert app.AsyncResult("short").get(timeout=20) == SECRET
        foreign.send_task("shop.no_such_task", [SECRET])
        wait_for("the refusal", lambda: "no_such_task" in site.log())
        written = [
            line
            for line in seen().splitlines()
            if b'"PUBLISH"' in line or (b'"LPUSH"' in line and not (b"no_such_task" in line or b"short" in line))
        ]

    assert len([line for line in written if b'"LPUSH"' in line]) == 2
    assert not readable(b"".join(written) + stored(f"{redis_url}/1"))
    assert SECRET not in site.log()


def test_messages_of_the_old_key_are_read_after_a_rotation_under_load(redis_site: Site) -> None:
    site, results = redis_site, []
    site.set(encryption="on")

    def send(app: Celery, count: int) -> None:
        results.extend(app.send_task("shop.echo", [f"{len(results)}"]) for _ in range(count))

    site.secret(encryption_keys=f"{OLD}\n{NEW}")
    app = producer(site)
    send(app, 50)
    with site.worker("--without-mingle"):
        results[-1].get(timeout=20)
        settle(app)
    send(app, 50)
    site.secret(encryption_keys=f"{NEW}\n{OLD}")
    with site.worker("--without-mingle"):
        send(app, 50)
        app = producer(site)
        send(app, 50)
        values = [app.AsyncResult(result.id).get(timeout=20) for result in results]
        settle(app)
    first, last = (app.backend.get(app.backend.get_key_for_task(results[number].id))[1:HEADER_SIZE].hex() for number in (0, -1))

    assert values == [f"{number}" for number in range(200)]
    assert (first, last) == (key_id(OLD), key_id(NEW))


@pytest.mark.parametrize("log_arguments", ["false", "true"])
def test_without_encryption_logs_show_arguments_only_if_wanted_and_pickle_is_refused(redis_site: Site, log_arguments: str) -> None:
    site, notes = redis_site, redis_site.folder / "notes"
    site.set(log_arguments=log_arguments, log_level="DEBUG")
    app = site.producer()

    app.send_task("shop.note", ["pickled", str(notes)], serializer="pickle")
    with site.worker("--without-mingle", "--loglevel=DEBUG"):
        assert app.send_task("shop.echo", [SECRET]).get(timeout=20) == SECRET
        wait_for("the refusal", lambda: "untrusted content of type pickle" in site.log(), why=site.log)

    assert not notes.exists()
    assert (SECRET in site.log()) is (log_arguments == "true")
