"""The Redis transport: real servers, real workers, kill -9; beside kombu's own transport where both share a broker."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import celery.backends.redis
import kombu
import kombu.transport.redis
import pytest
import redbeat.schedulers
import redis
import redis.lock
import yaml
from kombu.exceptions import OperationalError
from kombu.transport import TRANSPORT_ALIASES
from redis.auth.token import SimpleToken

import celery_platform
from celery_platform import dead_letters, redis_transport, resilience
from celery_platform.dead_letters import RedisStore
from celery_platform.redis_transport import Unconfirmed
from celery_platform.settings import BadSettings, load_settings
from helpers.sentinels import MASTER, PASSWORD, Servers
from helpers.sites import Site, free_port, wait_for
from helpers.targets import only_in_test_all

OURS = "celery_platform.redis_transport:Transport"
KOMBUS = "kombu.transport.redis:Transport"
QUEUE = kombu.Queue("work", kombu.Exchange("work"), routing_key="work")

SHOP = """
import time
from celery import Celery

app = Celery("shop")

@app.task(name="note")
def note(id):
    time.sleep(0.002)
    with open("ran", "a") as file:
        file.write(f"{id}\\n")

@app.task(name="slow")
def slow(id):
    time.sleep(2)
    note(id)
"""


def connect(url: str, transport: str = OURS, **options: Any) -> kombu.Connection:
    return kombu.Connection(f"{url}/0", transport=transport, transport_options=options)


def send(connection: kombu.Connection, *bodies: Any, queue: kombu.Queue = QUEUE, **options: Any) -> None:
    for body in bodies:
        connection.Producer().publish(body, exchange=queue.exchange, routing_key=queue.routing_key, declare=[queue], **options)


class Taker:
    """A consumer without an event loop; it acknowledges what it takes, unless told otherwise."""

    def __init__(
        self, connection: kombu.Connection, *queues: kombu.Queue, prefetch: int = 0, ack: bool = True, no_ack: bool = False
    ) -> None:
        self.connection, self.ack, self.bodies, self.messages = connection, ack, [], []
        self.channel = connection.channel()
        self.channel.basic_qos(0, prefetch, False)
        self.consumer = kombu.Consumer(self.channel, queues or [QUEUE], callbacks=[self._take], no_ack=no_ack)
        self.consumer.consume()

    def _take(self, body: Any, message: Any) -> None:
        self.bodies.append(body)
        self.messages.append(message)
        if self.ack and not self.consumer.no_ack:
            message.ack()

    def take(self, count: int, seconds: float = 20) -> list[Any]:
        """Return the bodies taken so far once there are so many."""
        wait_for(f"{count} messages", lambda: self.look(0.2) or len(self.bodies) >= count, seconds, every=0)
        return self.bodies

    def look(self, seconds: float) -> None:
        with suppress(TimeoutError):
            self.connection.drain_events(timeout=seconds)


@pytest.fixture
def server(redis_url: str) -> redis.Redis:
    """A client of the empty Redis."""
    return redis.Redis.from_url(redis_url)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    with Servers(tmp_path) as servers:
        yield servers


@pytest.fixture
def shop(site: Site, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose tasks write down that they ran, and that knows no result backend."""
    for scheme in redis_transport.ALIASES:
        monkeypatch.setitem(TRANSPORT_ALIASES, scheme, TRANSPORT_ALIASES[scheme])
    monkeypatch.setattr(kombu.transport, "_transport_cache", {})
    site.write(SHOP)
    site.set(broker_url=f"{redis_url}/0", queues='["default"]', key_prefix="shop:", soft_time_limit="1", time_limit="3")
    site.set(visibility_timeout="4", max_runs="1000", prefetch_multiplier="4")
    return site


def ran(site: Site) -> Counter[str]:
    path = site.folder / "ran"
    return Counter(path.read_text().split() if path.exists() else ())


# --- The claim ---

DIES_ON_DELIVERY = """
import os, signal, sys, kombu
from kombu.transport import virtual

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

virtual.Transport._deliver = die
url, transport = sys.argv[1:]
with kombu.Connection(url, transport=transport) as connection:
    connection.Consumer([kombu.Queue("work")], callbacks=[print]).consume()
    connection.drain_events()
"""


@pytest.mark.parametrize(("transport", "kept"), [(OURS, True), (KOMBUS, False)])
def test_a_worker_killed_as_it_takes_a_message_does_not_lose_it(redis_url: str, server: redis.Redis, transport: str, kept: bool) -> None:
    with connect(redis_url) as connection:
        send(connection, "task", priority=3)
        environment = os.environ | {"PYTHONPATH": str(Path(celery_platform.__file__).parents[1])}
        worker = subprocess.run([sys.executable, "-c", DIES_ON_DELIVERY, f"{redis_url}/0", transport], env=environment)
        assert worker.returncode == -signal.SIGKILL
        assert server.llen("work\x06\x163") == 0
        # If kombu's does not lose it any more, this module is no longer needed.
        assert server.hlen("unacked") == server.zcard("unacked_index") == kept


def test_a_record_is_as_kombu_writes_it(redis_url: str, server: redis.Redis) -> None:
    records = []
    for transport in OURS, KOMBUS:
        with connect(redis_url, transport) as connection:
            send(connection, {"to": "Zoë/\x06\u2028"}, headers={"empty": [], "none": None, "big": 2**53 - 1, "float": 0.1}, priority=5)
            taker = Taker(connection, ack=False)
            taker.take(1)
            [(tag, record)] = server.hgetall("unacked").items()
            assert server.zrange("unacked_index", 0, -1) == [tag]
            assert abs(server.zscore("unacked_index", tag) - time.time()) < 60
            records.append(json.loads(record))
            taker.messages[0].ack()
            assert server.hlen("unacked") == server.zcard("unacked_index") == 0
    (ours, *where), (kombus, *_) = records
    for message in ours, kombus:
        del message["properties"]["delivery_tag"]
    assert ours == kombus
    # It returns to its queue, also where the exchange has other queues, or none any more.
    assert where == ["", "work"]


@only_in_test_all
def test_workers_killed_under_load_lose_nothing(shop: Site, server: redis.Redis) -> None:
    app, sent = shop.producer(), []
    for kill in range(4):
        for number in range(300):
            sent.append(f"{kill}-{number}")
            app.send_task("note", (sent[-1],))
        with shop.worker("--concurrency=2") as worker:
            until = len(ran(shop)) + random.randint(50, 250)
            wait_for("some tasks", lambda until=until: len(ran(shop)) >= until, every=0.01)
            worker.kill()
            worker.wait()
    assert server.hlen("shop:unacked") > 0
    with shop.worker("--concurrency=2"):
        wait_for("all tasks", lambda: set(ran(shop)) == set(sent), seconds=40)
        wait_for("all acknowledged", lambda: not server.hlen("shop:unacked"))


@pytest.mark.parametrize("prefix", ["", "shop:"])
def test_transports_share_a_broker(redis_url: str, server: redis.Redis, prefix: str) -> None:
    """Whoever sends, whoever takes: in the order of priorities; what one leaves behind, the other restores and acknowledges."""
    options = {"global_keyprefix": prefix, "visibility_timeout": 0}
    for sender, taker, other in [(OURS, KOMBUS, OURS), (KOMBUS, OURS, KOMBUS), (OURS, OURS, KOMBUS), (KOMBUS, KOMBUS, OURS)]:
        with connect(redis_url, sender, **options) as producer, connect(redis_url, other, **options) as second:
            for priority in (9, 0, 6, 3):
                send(producer, f"{priority}a", f"{priority}b", priority=priority)
            with connect(redis_url, taker, **options) as first:
                lost = Taker(first, ack=False, prefetch=8)
                order = ["0a", "0b", "3a", "3b", "6a", "6b", "9a", "9b"]
                assert lost.take(8) == order
                assert server.hlen(f"{prefix}unacked") == 8
                # As after kill -9: nothing is given back.
                lost.channel.qos._delivered.clear()
            finder = Taker(second)
            second.default_channel.qos.restore_visible()
            assert sorted(finder.take(8)) == order
            assert [message.headers.get("redelivered") for message in finder.messages] == [True] * 8
            assert server.hlen(f"{prefix}unacked") == server.zcard(f"{prefix}unacked_index") == 0


@pytest.mark.parametrize(
    ("strategy", "order"),
    [("round_robin", ["a1", "b1", "a2", "b2"]), ("sorted", ["a1", "a2", "b1", "b2"]), ("priority", ["b1", "b2", "a1", "a2"])],
)
def test_queues_are_looked_at_in_kombus_order(redis_url: str, strategy: str, order: list[str]) -> None:
    a, b = kombu.Queue("a", routing_key="a"), kombu.Queue("b", routing_key="b")
    with connect(redis_url, queue_order_strategy=strategy) as connection:
        for queue in a, b:
            send(connection, f"{queue.name}1", f"{queue.name}2", queue=queue)
        queues = (b, a) if strategy == "priority" else (a, b)
        assert Taker(connection, *queues).take(4) == order


def test_no_more_is_taken_than_the_prefetch_count_allows(redis_url: str, server: redis.Redis) -> None:
    with connect(redis_url) as connection:
        send(connection, *range(5))
        taker = Taker(connection, prefetch=2, ack=False)
        taker.take(2)
        taker.look(1)
        assert (taker.bodies, server.hlen("unacked"), server.llen("work")) == ([0, 1], 2, 3)
        taker.messages[0].ack()
        assert taker.take(3) == [0, 1, 2]


def test_a_consumer_that_closes_gives_back_what_it_did_not_acknowledge(redis_url: str, server: redis.Redis) -> None:
    with connect(redis_url) as connection:
        send(connection, *range(3))
        Taker(connection, prefetch=2, ack=False).take(2)
    assert server.llen("work") == 3
    assert server.hlen("unacked") == server.zcard("unacked_index") == 0


def test_messages_of_a_lost_consumer_return_without_an_event_loop(redis_url: str, server: redis.Redis) -> None:
    options = {"visibility_timeout": 1, "unacked_restore_interval": 0.5, "unacked_restore_throttle": 1}
    with connect(redis_url, **options) as connection:
        send(connection, "task")
        with connect(redis_url, **options) as first:
            lost = Taker(first, ack=False)
            lost.take(1)
            lost.channel.qos._delivered.clear()
        # As Celery does with gevent: a wait that is longer than the server takes to answer.
        finder = Taker(connection)
        end = time.monotonic() + 20
        while not finder.bodies and time.monotonic() < end:
            finder.look(2)
        assert finder.bodies == ["task"]


def test_messages_that_need_no_acknowledgement_leave_no_record(redis_url: str, server: redis.Redis) -> None:
    with connect(redis_url) as connection:
        send(connection, "reply")
        assert Taker(connection, no_ack=True).take(1) == ["reply"]
        assert server.hlen("unacked") == server.zcard("unacked_index") == 0


def test_a_simple_queue_works(redis_url: str) -> None:
    with connect(redis_url) as connection, connection.SimpleQueue("simple") as queue:
        queue.put({"a": 1})
        message = queue.get(timeout=10)
        assert message.payload == {"a": 1}
        message.ack()
        with pytest.raises(queue.Empty):
            queue.get(timeout=0.3)


def test_a_server_without_the_script_is_given_it(redis_url: str, server: redis.Redis) -> None:
    with connect(redis_url) as connection:
        taker = Taker(connection)
        for number in range(3):
            server.script_flush()
            send(connection, number)
            taker.take(number + 1)
        assert taker.bodies == [0, 1, 2]


def test_what_cannot_be_recorded_stays_in_its_queue(redis_url: str, server: redis.Redis) -> None:
    with connect(redis_url) as connection:
        server.set("unacked", "of somebody else")
        send(connection, "first", "second")
        before = server.lrange("work", 0, -1)
        with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
            Taker(connection).take(1)
        assert server.lrange("work", 0, -1) == before
        server.delete("unacked")


def test_a_full_redis_is_emptied_and_takes_tasks_again(redis_url: str, server: redis.Redis) -> None:
    retry = {"max_retries": 40, "interval_start": 0.1}
    with connect(redis_url) as connection, connect(redis_url) as other:
        send(connection, "first", "second")
        taker = Taker(connection, prefetch=1)
        # So that this connection has declared the queue.
        send(other, "third")
        try:
            server.config_set("maxmemory", 1)
            with pytest.raises(Unconfirmed, match="maxmemory"):
                send(other, "refused", retry=True, retry_policy={"max_retries": 1})
            # kombu's cannot record what it takes then, and loses it.
            assert taker.take(3) == ["first", "second", "third"]
            publisher = threading.Thread(target=send, args=(other, "fourth"), kwargs={"retry": True, "retry_policy": retry})
            publisher.start()
            taker.look(1)
        finally:
            server.config_set("maxmemory", 0)
        assert taker.take(4)[3:] == ["fourth"]
        publisher.join()


def test_a_worker_outlives_a_redis_that_takes_no_writes(shop: Site, server: redis.Redis) -> None:
    shop.set(soft_time_limit="10", time_limit="20", visibility_timeout="600")
    app = shop.producer()
    with shop.worker("--concurrency=2") as worker:
        app.send_task("slow", ("before",))
        wait_for("a claim", lambda: server.hlen("shop:unacked"))
        server.config_set("min-replicas-to-write", 1)
        try:
            wait_for("the task", lambda: ran(shop)["before"] == 1)
            wait_for("a success that cannot be acknowledged", lambda: "Task slow" in shop.log() and "succeeded" in shop.log())
        finally:
            server.config_set("min-replicas-to-write", 0)
        app.send_task("note", ("after",))
        wait_for("the task", lambda: ran(shop)["after"] == 1)
        wait_for("all acknowledged", lambda: not server.hlen("shop:unacked"))
        assert worker.poll() is None
    assert ran(shop) == {"before": 1, "after": 1}


def test_a_message_of_any_form_becomes_a_dead_letter_and_stops_nothing(shop: Site, server: redis.Redis) -> None:
    app = shop.producer()
    delivery = b'"delivery_tag": "%d", "delivery_info": {"exchange": "", "routing_key": "default"}'
    odd = [
        b"no JSON \xff\x00",
        b"[" * 2000,
        b'"text"',
        b'{"properties": {"delivery_tag": "x", "delivery_info": {"exchange": null, "routing_key": "default"}}}',
        b'{"properties": {"delivery_tag": 5}}',
        b'{"properties": {"delivery_tag": "x"}}',
    ]
    # These three can be claimed as they are, but not be read.
    odd_later = [
        b'{"headers": [1], "body": "x", "properties": {%s}}' % (delivery % 1),
        b'{"headers": {}, "body": "x", "properties": {"body_encoding": "rot13", %s}}' % (delivery % 2),
        b'{"headers": {"x": {"__type__": "uuid", "__value__": 5}}, "body": "x", "properties": {%s}}' % (delivery % 3),
    ]
    for message in odd + odd_later:
        server.lpush("shop:default", message)
    app.send_task("note", ("last",))
    with shop.worker() as worker:
        wait_for("the task behind them", lambda: ran(shop)["last"] == 1)
        store = RedisStore(app)
        wait_for("the dead letters", lambda: len(store.list()) == 9 and not server.hlen("shop:unacked"))
        assert worker.poll() is None
    letters = store.list()
    assert {letter.reason for letter in letters} == {"undecodable"}
    bodies = [letter.original.body for letter in letters]
    assert bodies[:6] == odd
    for body, message in zip(map(json.loads, bodies[6:]), map(json.loads, odd_later), strict=True):
        # Some under the tag of their claim.
        assert body["properties"].pop("delivery_tag")
        del message["properties"]["delivery_tag"]
        assert body == message


def test_what_was_claimed_by_a_lost_worker_returns_whatever_its_form(redis_url: str, server: redis.Redis) -> None:
    """A record of each version: by this one's claim of a message and of no message, by the earlier one's and kombu's."""
    message = {
        "body": "x",
        "headers": {"file": "\udcff"},
        "properties": {"delivery_tag": "1", "delivery_info": {"exchange": "work", "routing_key": "work"}},
    }
    with connect(redis_url, visibility_timeout=0) as connection:
        send(connection, "so that the queue is bound")
        server.delete("work")
        server.lpush("work", json.dumps(message), b"no JSON \xff", json.dumps(message))
        lost = Taker(connection, ack=False)
        lost.consumer.on_message = lost.messages.append
        wait_for("all claims", lambda: lost.look(0.2) or server.hlen("unacked") == 3)
        assert len(set(server.hkeys("unacked"))) == 3
        server.hset("unacked", "1", json.dumps([message, "work", "work"]))
        server.zadd("unacked_index", {"1": 1})
        lost.channel.qos._delivered.clear()
        with connect(redis_url, visibility_timeout=0) as second:
            second.default_channel.qos.restore_visible()
            assert server.hlen("unacked") == server.zcard("unacked_index") == 0
            finder = Taker(second)
            finder.consumer.on_message = finder.messages.append
            wait_for("all", lambda: finder.look(0.2) or len(finder.messages) == 4)
    unreadable = {"application/octet-stream": b"no JSON \xff"}
    assert {found.content_type: found.body for found in finder.messages if found.content_type} == unreadable
    assert [found.headers.get("file") for found in finder.messages].count("\udcff") == 3


# --- Waking up ---


def test_a_message_wakes_a_waiting_worker(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_transport, "IDLE_WAIT", 60)
    with connect(redis_url) as connection, connect(redis_url) as producer:
        taker = Taker(connection, QUEUE, kombu.Queue("other", routing_key="other"))
        taker.look(0.5)
        assert taker.channel._wait
        send(producer, "task")
        assert taker.take(1) == ["task"]


def test_messages_without_a_wake_up_are_found(redis_url: str) -> None:
    with connect(redis_url) as connection, connect(redis_url, KOMBUS) as producer:
        taker = Taker(connection)
        taker.look(0.5)
        send(producer, "task")
        assert taker.take(1) == ["task"]


def test_wake_ups_do_not_pile_up(redis_url: str, server: redis.Redis) -> None:
    with connect(redis_url) as connection:
        send(connection, *range(20))
        assert (server.zcard("wake-up:work"), server.ttl("wake-up:work")) == (1, -1)


def test_messages_sent_at_once_wake_a_worker(redis_url: str, server: redis.Redis) -> None:
    with connect(redis_url) as connection:
        producer = connection.Producer()
        with producer.batch():
            producer.publish("batch", exchange=QUEUE.exchange, routing_key="work", declare=[QUEUE])
        assert server.llen("work") == server.zcard("wake-up:work") == 1


def test_remote_control_answers_and_leaves_nothing(shop: Site, server: redis.Redis) -> None:
    app = shop.producer()
    with shop.worker():
        assert app.control.inspect(timeout=10, limit=1).ping()
        shop.run("celery", "-A", "celery_platform.worker:app", "inspect", "active", f"--destination=celery@{socket.gethostname()}")
        assert not server.hlen("shop:unacked")
    for key in server.scan_iter("*.reply.celery.pidbox"):
        assert key.startswith(b"shop:wake-up:")
        assert 0 < server.ttl(key) <= 60


# --- Connections ---


def test_a_half_open_connection_is_dropped(servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    port = servers.redis()
    with connect(f"redis://127.0.0.1:{port}", health_check_interval=1, socket_timeout=5) as connection:
        taker = Taker(connection)
        taker.look(0.5)
        servers.running[port].send_signal(signal.SIGSTOP)
        taker.look(4)
        servers.running[port].send_signal(signal.SIGCONT)
        assert "got no reply" in caplog.text
        send(connection, "task")
        assert taker.take(1) == ["task"]


def test_a_lost_connection_does_not_keep_its_channel_from_closing(servers: Servers) -> None:
    port = servers.redis()
    with connect(f"redis://127.0.0.1:{port}") as connection:
        taker = Taker(connection)
        taker.look(0.5)
        servers.running[port].send_signal(signal.SIGSTOP)
        # Sends a command, to which no reply comes.
        connection.transport.cycle.on_poll_start()
        servers.kill(port)
        taker.channel.close()
        assert taker.channel.closed


def test_a_task_may_outlast_its_connection(redis_url: str, server: redis.Redis) -> None:
    with connect(redis_url) as connection:
        send(connection, "task")
        taker = Taker(connection, ack=False)
        taker.take(1)
        taker.channel.close()
        taker.messages[0].ack()
        assert server.llen("work") == 1


def test_new_credentials_reach_the_waiting_connection(redis_url: str, server: redis.Redis) -> None:
    with connect(redis_url, client_name="taker") as connection:
        taker = Taker(connection)
        taker.look(0.5)
        server.acl_setuser("rotated", enabled=True, passwords="+new", commands=["+@all"], keys=["*"], channels=["*"])
        waiting = taker.channel.client.connection
        waiting.set_re_auth_token(SimpleToken("new", -1, 0, {"oid": "rotated"}))
        taker.look(1)
        send(connection, "task")
        assert taker.take(1) == ["task"]
        assert waiting is taker.channel.client.connection
        [client] = [client for client in server.client_list() if client["cmd"] in ("bzpopmin", "evalsha")]
        assert client["user"] == "rotated"
        server.acl_deluser("rotated")


#: Names of what the sources below call commands of: clients, pipelines, and what returns one.
CLIENTS = {"client", "pipe", "pipeline", "pubsub", "_pubsub", "redis", "redis_client", "get_redis", "_create_client", "subclient", "c"}
#: Where redis-py calls a command otherwise. A lock is made of a SET and scripts.
NAMED = {"delete": "del", "script_load": "script|load", "transaction": "watch", "register_script": "evalsha", "lock": "set"}


def commands_in(source: Path) -> set[str]:
    """Return the Redis commands that a module calls, itself or by its scripts."""
    text, found = source.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            receiver: ast.expr = node.func.value
            while isinstance(receiver, ast.Call):
                receiver = receiver.func.value if isinstance(receiver.func, ast.Attribute) and receiver.args else receiver.func
            if (receiver.id if isinstance(receiver, ast.Name) else getattr(receiver, "attr", "")) in CLIENTS:
                found.add(NAMED.get(node.func.attr, node.func.attr))
    return found | {name.lower() for name in re.findall(r"redis\.p?call\(\s*'(\w+)'", text)}


def test_the_role_allows_every_command_that_an_option_can_call(server: redis.Redis) -> None:
    role = yaml.safe_load((Path(__file__).parents[2] / "roles/redis/vars/main.yml").read_text())
    allowed = {rule.removeprefix("+") for line in role["__redis_celery_commands"] for rule in line.split()} | {"ping"}
    known = {name.decode() for name in server.command_list()}
    modules = (celery.backends.redis, kombu.transport.redis, redis.lock, redbeat.schedulers, redis_transport, resilience, dead_letters)
    # Methods of redis-py's that are named as a command is.
    methods = {"pubsub", "reset"}
    called = {module.__name__: commands_in(Path(module.__file__ or "")) & known - methods for module in modules}
    # Each by another form of a call: of an option, of RedBeat's own interface, of a script, of a chain.
    assert {"lrange", "zrange", "mget", "sismember"} <= called["celery.backends.redis"]
    assert {"zrank", "hsetnx"} <= called["redbeat.schedulers"]
    assert {"zadd", "hset", "sadd", "psubscribe"} <= called["kombu.transport.redis"]
    assert {name: commands - allowed for name, commands in called.items() if commands - allowed} == {}


def test_all_of_it_works_with_the_commands_that_the_role_allows(shop: Site, server: redis.Redis) -> None:
    role = yaml.safe_load((Path(__file__).parents[2] / "roles/redis/vars/main.yml").read_text())
    # What any client sends to log in stands apart there.
    login = ["+ping", "+hello", "+auth", "+client|setname"]
    rules = [rule for line in role["__redis_celery_commands"] for rule in line.split()] + login
    channels = [f"&shop:/0.{name}" for name in ("celeryev/*", "celeryev/worker.*", "celery.pidbox")]
    server.execute_command("ACL", "SETUSER", "shop", "reset", "on", f">{PASSWORD}", "~shop:*", "&shop:*", *channels, *rules)
    server.acl_log_reset()
    try:
        shop.set(
            broker_url=shop.environment["CELERY_PLATFORM_BROKER_URL"].replace("//", "//shop@"), confirm_replicas="1", confirm_timeout="1"
        )
        shop.secret(broker_password=PASSWORD)
        server.lpush("shop:default", "no message")
        with shop.worker():
            producer = "from celery_platform.worker import app; app.send_task('note', ('x',), retry=False)"
            told = shop.run("python", "-c", producer, check=False).stderr
            assert "replicas confirmed" in told or ran(shop)["x"] == 1
            wait_for("the dead letter", lambda: server.hlen("shop:dead-letters") == 1)
        assert [entry["object"] for entry in server.acl_log() if entry["object"] != "client|setinfo"] == []
    finally:
        server.acl_deluser("shop")


# --- Publishing ---


def test_a_publish_waits_for_its_replica(servers: Servers) -> None:
    master = servers.redis()
    replica = servers.redis(replica_of=master)
    client, url = servers.client(master), f"redis://127.0.0.1:{master}"
    with connect(url, confirm_replicas=1, confirm_timeout=0.5) as connection:
        send(connection, "confirmed", priority=3)
        assert client.llen("work\x06\x163") == 1
        servers.running[replica].send_signal(signal.SIGSTOP)
        with pytest.raises(Unconfirmed, match=r"0 of 1 replicas confirmed it within 0\.5 s"):
            send(connection, "withdrawn")
        assert client.llen("work") == 0
        send(connection, "transient", delivery_mode=1)
        assert client.llen("work") == 1

        # The policy of the producer is obeyed, and the error is the one that Celery's callers know.
        told: list[Exception] = []
        with pytest.raises(OperationalError):
            send(connection, "given up", retry=True, retry_policy={"max_retries": 2, "errback": lambda error, _: told.append(error)})
        assert len(told) == 2
        assert client.llen("work") == 1

        threading.Timer(1.2, servers.running[replica].send_signal, [signal.SIGCONT]).start()
        send(connection, "delayed", retry=True, retry_policy={"max_retries": 40})
        assert client.llen("work") == 2
        assert wait_for("the replica", lambda: servers.client(replica).llen("work") == 2)


def test_a_publish_is_tried_again_when_its_master_is_demoted(servers: Servers) -> None:
    master = servers.redis()
    replica = servers.redis(replica_of=master)
    with connect(f"redis://127.0.0.1:{master}", confirm_replicas=1, confirm_timeout=8) as connection:
        send(connection, "confirmed")
        servers.running[replica].send_signal(signal.SIGSTOP)
        demote = threading.Timer(0.5, servers.client(master).replicaof, ["127.0.0.1", str(free_port())])
        demote.start()
        # Of the errors that are tried again; Sentinel names another master by then.
        with pytest.raises(Unconfirmed, match="UNBLOCKED"):
            send(connection, "on a master no more")
        demote.join()
        servers.running[replica].send_signal(signal.SIGCONT)


def test_a_publish_is_tried_as_often_as_its_policy_says(redis_url: str, server: redis.Redis) -> None:
    """kombu gives up at the second error in a row, however short the time and whatever the policy."""
    done = threading.Event()

    def cut_connections() -> None:
        while not done.wait(0.001):
            # It may cut its own as well.
            with suppress(redis.exceptions.ConnectionError):
                server.client_kill_filter(_type="normal", skipme=True)

    with connect(redis_url) as connection:
        cutter = threading.Thread(target=cut_connections)
        cutter.start()
        threading.Timer(1, done.set).start()
        while not done.is_set():
            send(connection, "task", retry=True, retry_policy={"max_retries": 10_000, "interval_start": 0, "interval_max": 0})
        cutter.join()
    assert server.llen("work") > 0


def test_an_unconfirmed_message_that_a_worker_took_counts_as_published(servers: Servers) -> None:
    master = servers.redis()
    url = f"redis://127.0.0.1:{master}"
    with connect(url) as connection, connect(url, confirm_replicas=1, confirm_timeout=2) as producer:
        taker = Taker(connection)
        publisher = threading.Thread(target=send, args=(producer, "taken"))
        publisher.start()
        assert taker.take(1) == ["taken"]
        publisher.join()
        taker.look(0.5)
        assert taker.bodies == ["taken"]


def test_many_messages_at_once_are_not_for_confirmed_publishes(redis_url: str) -> None:
    with connect(redis_url) as connection, connect(redis_url, confirm_replicas=1) as confirmed:
        assert connection.Producer().supports_batch_publish
        assert not confirmed.Producer().supports_batch_publish
        assert not confirmed.default_channel.supports_batch_publish


# --- Choosing it ---


def test_a_cluster_is_refused(servers: Servers) -> None:
    port = servers.redis(cluster_enabled="yes", cluster_config_file="nodes.conf", cluster_port=str(free_port()))
    with pytest.raises(RuntimeError, match="Redis Cluster"), connect(f"redis://127.0.0.1:{port}") as connection:
        connection.ensure_connection(max_retries=1)


SHOW_TRANSPORT = """
from celery_platform.worker import app
with app.connection_for_write() as connection:
    connection.maybe_switch_next()
    transport = connection.transport
    print(type(transport).__module__, type(transport).__name__, transport.driver_type, connection.as_uri())
"""


@pytest.mark.parametrize(
    ("setting", "url", "shown"),
    [
        ("atomic", "redis://{}/0", "celery_platform.redis_transport Transport redis redis://:**@{}/0"),
        ("atomic", "rediss://{}/0;rediss://{}/0", "celery_platform.redis_transport Transport redis rediss://:**@{}/0"),
        ("atomic", "sentinel://{}/0;sentinel://{}/0", "celery_platform.redis_transport SentinelTransport redis sentinel://:**@{}/0"),
        ("kombu", "redis://{}/0", "kombu.transport.redis Transport redis redis://:**@{}/0"),
    ],
)
def test_urls_of_redis_mean_the_transport_that_the_settings_name(shop: Site, setting: str, url: str, shown: str) -> None:
    where = "127.0.0.1:6399"
    shop.set(broker_url=url.replace("{}", where), redis_transport=setting)
    assert shop.run("python", "-c", SHOW_TRANSPORT).stdout.strip() == shown.replace("{}", where)


def test_an_unknown_kombu_is_refused_with_the_way_back(shop: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in shop.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CELERY_PLATFORM_REDIS_TRANSPORT", "atomic")
    monkeypatch.setattr(redis_transport, "version", lambda _: "5.99.0")
    with pytest.raises(BadSettings, match=r"CELERY_PLATFORM_REDIS_TRANSPORT is atomic; allowed: kombu, since .* this is 5\.99\.0"):
        redis_transport.install(shop.producer(), load_settings())
    monkeypatch.setenv("CELERY_PLATFORM_REDIS_TRANSPORT", "kombu")
    redis_transport.install(shop.producer(), load_settings())
    assert TRANSPORT_ALIASES["redis"] == KOMBUS


# --- Sentinel ---


def test_a_master_that_lost_its_replicas_is_left_for_another(servers: Servers) -> None:
    """As after a partition, when Sentinel has another master and has not yet told the old one."""
    old, new = servers.redis(), servers.redis()
    sentinel = servers.sentinel(old)
    with connect(f"sentinel://127.0.0.1:{sentinel}", f"{redis_transport.__name__}:SentinelTransport", master_name=MASTER) as connection:
        send(connection, "to the old one")
        servers.client(old).config_set("min-replicas-to-write", 1)
        servers.client(sentinel).sentinel_remove(MASTER)
        servers.client(sentinel).sentinel_monitor(MASTER, "127.0.0.1", new, 2)
        send(connection, "to the new one", retry=True, retry_policy={"max_retries": 5, "interval_start": 0.1})
    assert servers.client(new).llen("work") == 1


def test_a_killed_master_loses_no_confirmed_task(shop: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "servers"
    folder.mkdir()
    with Servers(folder, tls=True) as servers:
        master = servers.redis()
        replica = servers.redis(replica_of=master)
        sentinels = [servers.sentinel(master) for _ in range(3)]
        for port in sentinels:
            known = servers.client(port)
            wait_for(
                "all known",
                lambda known=known: [known.sentinel_master(MASTER)[f"num-{of}"] for of in ("other-sentinels", "slaves")] == [2, 1],
            )
        shop.set(
            broker_url=";".join(f"sentinel://default@127.0.0.1:{port}/0" for port in sentinels),
            sentinel_master=MASTER,
            tls_ca_file=str(servers.ca),
            confirm_replicas="1",
            confirm_timeout="2",
        )
        shop.secret(broker_password=PASSWORD)
        for name, value in shop.environment.items():
            monkeypatch.setenv(name, value)
        redis_transport.install(app := shop.producer(), load_settings())
        sent: list[str] = []
        with shop.worker("--concurrency=2") as worker:

            def publish(count: int) -> None:
                for _ in range(count):
                    app.send_task("note", (f"{len(sent)}",))
                    sent.append(f"{len(sent)}")

            publish(200)
            publisher = threading.Thread(target=publish, args=(400,))
            publisher.start()
            wait_for("more tasks", lambda: len(sent) > 250, every=0.01)
            servers.kill(master)
            # Back at once it would be an empty master again: these servers write nothing to disk.
            for port in sentinels:
                wait_for("a failover", lambda port=port: servers.client(port).sentinel_master(MASTER)["port"] == replica)
            servers.redis(port=master)
            publisher.join(60)
            assert len(sent) == 600
            wait_for("all tasks", lambda: set(ran(shop)) >= set(sent), seconds=40)
            assert worker.poll() is None, shop.log()
