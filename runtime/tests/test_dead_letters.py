"""Dead letters: real brokers, real workers, tasks that fail in every way."""

from __future__ import annotations

import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kombu.message
import kombu.transport.redis
import pytest
from celery import Celery

from celery_platform import dead_letters, guards
from celery_platform.dead_letters import RabbitStore, RedisStore
from helpers.brokers import lasting_redis
from helpers.shop import SHOP, letter, shop, store_of
from helpers.sites import Site, free_port, wait_for

__all__ = ["shop"]


def ran(site: Site) -> Counter[str]:
    path = site.folder / "ran"
    return Counter(path.read_text().split() if path.exists() else ())


def waiting(app: Celery) -> int:
    """Return the messages in the default queue, with those that a worker took along when it was killed."""
    with app.connection_for_read() as connection:
        channel, queue = connection.default_channel, app.amqp.queues["default"]
        if isinstance(store_of(app), RedisStore):
            with channel.conn_or_acquire() as client:
                return int(client.llen("default") + client.hlen("unacked"))
        return int(queue(channel).queue_declare(passive=True)[1])


def send_raw(app: Celery, id: str | None, body: bytes, task: str | None = "works", content_type: str = "application/json") -> None:
    """Send what no producer of Celery sends."""
    headers = {name: value for name, value in {"id": id, "task": task}.items() if value}
    with app.producer_pool.acquire(block=True) as producer:
        queue = app.amqp.queues["default"]
        options = {"exchange": queue.exchange, "routing_key": queue.routing_key, "declare": [queue], "correlation_id": id}
        producer.publish(body, content_type=content_type, content_encoding="utf-8", headers=headers, **options)


def test_every_kind_of_failure_is_kept_and_replayed_once(shop: Site) -> None:
    app = shop.producer()
    store = store_of(app)
    good_body = b'[["s3cret"], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
    with shop.worker("--queues=default"):
        for name in ("rejects", "waits", "slow", "early", "retries", "dies", "works"):
            app.send_task(name, task_id=name)
        app.send_task("fails", ("s3cret",), task_id="fails")
        app.send_task("works", task_id="expired", expires=-1)
        app.send_task("unknown", task_id="unknown")
        send_raw(app, "type", good_body, content_type="application/x-python-serialize")
        send_raw(app, "json", b"{broken")
        send_raw(app, "form", b"5")
        send_raw(app, None, good_body, task="works")
        send_raw(app, "nameless", b'{"x": 1}', task=None)
        # The last to fail: it is run three times, each time behind all others.
        wait_for("the dead letters", lambda: len(store.list()) >= 12 and ran(shop)["waits"] == 5, seconds=25, every=0.5)
        letters = {letter.id: letter for letter in store.list()}
        reasons = {id: letter.reason for id, letter in letters.items() if len(id) < 64}
        assert reasons == {
            "rejects": "rejected",
            "slow": "time-limit",
            "early": "failed",
            "retries": "failed",
            "dies": "worker-lost",
            "fails": "failed",
            "unknown": "unknown-task",
            "type": "undecodable",
            "json": "undecodable",
            "form": "invalid",
            "nameless": "invalid",
        }
        assert [letter.reason for id, letter in letters.items() if len(id) == 64] == ["invalid"]
        logged = re.findall(
            r"ERROR MainProcess celery_platform.dead_letters .*Task (\S+)\[(.*)\] of queue default is a dead letter: (.*)", shop.log()
        )
        assert {id: reason for _, id, reason in logged} == {id: letter.reason for id, letter in letters.items()}
        assert ("fails", "fails", "failed") in logged
        assert "s3cret" not in shop.log()
        assert ran(shop) == {"waits": 5, "works": 1, "retries": 2, "dies": 3, "fails": 1}

        fails = letters["fails"]
        assert (fails.task, fails.exception, fails.message, fails.runs) == ("fails", "ValueError", "no stock", 1)
        assert 'raise ValueError("no stock")' in (fails.traceback or "")
        assert json.loads(fails.original.body)[0] == ["s3cret"]
        assert fails.original.queue == "default"
        assert letters["type"].original.body == good_body
        assert (letters["retries"].exception, letters["retries"].retries) == ("KeyError", 1)
        assert (letters["dies"].exception, letters["dies"].runs) == ("WorkerLostError", 3)
        assert app.AsyncResult("dies").state == "FAILURE"

        (shop.folder / "fixed").touch()
        assert store.replay(["fails", "retries", "dies"]) == 3
        for id in ("fails", "retries", "dies"):
            wait_for(f"the replayed {id}", lambda id=id: app.AsyncResult(id).state == "SUCCESS")
        assert ran(shop) == {"waits": 5, "works": 1, "retries": 3, "dies": 4, "fails": 2}
        assert store.remove(letter.id for letter in store.list()) == 9
        assert store.list() == []
    assert waiting(app) == 0


def test_text_that_is_no_utf_8_is_run_as_python_wrote_it(shop: Site) -> None:
    """A file name by os.fsdecode, half an emoji, and what else Python's json writes and reads back."""
    texts: list[Any] = [b"caf\xe9.txt".decode(errors="surrogateescape"), "\ud83d", "\ude00\ud83d", "\0", float("inf"), 10**400]
    app = shop.producer()
    with shop.worker("--queues=default"):
        results = [app.send_task("echo", (text,), {"key": text}, headers={"file": f"{text}"}, shadow=f"{text}") for text in texts]
        assert [result.get(timeout=20) for result in results] == [[text, text] for text in texts]
    assert store_of(app).list() == []
    assert waiting(app) == 0


@pytest.mark.parametrize(("shop", "pool"), [("redis", "prefork"), ("rabbitmq", "solo")], indirect=["shop"])
def test_an_error_of_the_worker_is_not_told_as_one_of_the_message(shop: Site, pool: str) -> None:
    shop.write(
        SHOP
        + """
from celery.worker.request import Request

class Broken(Request):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.id == "early":
            raise AttributeError("before there is a request")

    def revoked(self):
        if self.id == "late":
            raise KeyError("before the pool has it")
        return super().revoked()

class Task(Base):
    Request = Broken

@app.task(name="broken", base=Task)
def broken():
    ran("broken")

@app.task(name="answer", base=Task)
def answer(request, exc, traceback):
    ran(f"answer-to-{request.id}")
"""
    )
    app = shop.producer()
    with shop.worker("--queues=default", f"--pool={pool}"):
        for id in ("early", "late", "good"):
            app.send_task("broken", task_id=id, link_error=app.signature("answer"))
        send_raw(app, "malformed", b"5", task="broken")
        wait_for("all", lambda: len(store_of(app).list()) == 3 and len(ran(shop)) == 3)
        letters = {letter.id: (letter.reason, letter.exception) for letter in store_of(app).list()}
        assert letters == {
            "early": ("failed", "AttributeError"),
            "late": ("failed", "KeyError"),
            "malformed": ("invalid", "TypeError"),
        }
        assert [app.AsyncResult(id).state for id in ("early", "late", "good")] == ["FAILURE", "FAILURE", "SUCCESS"]
    assert ran(shop) == {"broken": 1, "answer-to-early": 1, "answer-to-late": 1}
    assert waiting(app) == 0


def test_only_what_celery_refuses_is_a_malformed_message(shop: Site) -> None:
    class Lost(dead_letters.CountingConsumer):
        hostname, connection_errors = "host", ()

        def __init__(self) -> None:
            self.app = shop.producer()

        @property
        def event_dispatcher(self) -> None:
            raise ConnectionError("on the way to the broker")

    with pytest.raises(ConnectionError):
        Lost()._request_of(kombu.message.Message(b"[[], {}, {}]"))


EXITS = """
import argparse, asyncio, sys

class Exits(Task):
    def before_start(self, id, args, kwargs):
        if "before" in args:
            sys.exit("before it started")

@app.task(name="exits", base=Exits)
def exits(how):
    ran("exits")
    if how == "sys":
        sys.exit()
    if how == "argparse":
        argparse.ArgumentParser().parse_args(["--unknown"])
    if how == "asyncio":
        raise asyncio.CancelledError
    if how == "hang":
        time.sleep(30)

@app.task(name="answer")
def answer(request, exc, traceback):
    ran(f"answer-to-{request.id}-{type(exc).__name__}")
"""


@pytest.mark.parametrize(
    ("shop", "pool"), [("redis", "prefork"), ("redis", "threads"), ("rabbitmq", "threads"), ("redis", "solo")], indirect=["shop"]
)
def test_a_task_that_exits_has_failed_and_takes_no_slot(shop: Site, pool: str) -> None:
    shop.write(SHOP + EXITS)
    shop.set(max_runs="2")
    app = shop.producer()
    ways = {"sys": "SystemExit()", "argparse": "SystemExit(2)", "asyncio": "CancelledError()"}
    with shop.worker("--queues=default", f"--pool={pool}") as worker:
        for how in (*ways, "before"):
            app.send_task("exits", (how,), task_id=how, link_error=app.signature("answer"))
        works = app.send_task("works")
        wait_for("the dead letters", lambda: len(store_of(app).list()) == 4)
        works.get(timeout=10)
        letters = {letter.id: letter for letter in store_of(app).list()}
        assert {id: (letter.exception, letter.message, letter.runs) for id, letter in letters.items() if id != "before"} == {
            how: ("TaskExited", f"The task ended by {shown}", 1) for how, shown in ways.items()
        }
        assert "parse_args" in (letters["argparse"].traceback or "")
        # Not in the task itself.
        assert (letters["before"].reason, letters["before"].runs) == ("worker-lost", 2)
        wait_for("the answers", lambda: len(ran(shop)) == 6)
        assert {app.AsyncResult(id).state for id in letters} == {"FAILURE"}
        if pool == "prefork":
            hang = app.send_task("exits", ("hang",), task_id="hang")
            wait_for("its start", lambda: ran(shop)["exits"] == 4)
            app.control.revoke("hang", terminate=True)
            wait_for("its end", lambda: hang.state == "REVOKED")
        assert worker.poll() is None
    assert {f"answer-to-{how}-TaskExited" for how in ways} | {"answer-to-before-WorkerLostError"} == set(ran(shop)) - {"exits", "works"}
    assert len(store_of(app).list()) == 4
    assert waiting(app) == 0


def test_a_task_that_kills_the_worker_itself_is_run_a_few_times_only(shop: Site) -> None:
    shop.set(max_runs="2", soft_time_limit="1", time_limit="2", visibility_timeout="3")
    app = shop.producer()
    app.send_task("dies", task_id="dies")
    for _ in range(2):
        with shop.worker("--queues=default", "--pool=solo", "--without-mingle", "--without-gossip") as worker:
            assert wait_for("the end of the worker", lambda worker=worker: worker.poll()) == -signal.SIGKILL
    with shop.worker("--queues=default", "--pool=solo", "--without-mingle", "--without-gossip"):
        (kept,) = wait_for("the dead letter", lambda: store_of(app).list())
    assert (kept.id, kept.reason, kept.runs) == ("dies", "worker-lost", 2)
    assert ran(shop)["dies"] == 2


LONG = """
from celery_platform import dead_letters
dead_letters.RETRY_INTERVAL = 1

@app.task(name="long", time_limit=60, soft_time_limit=50, ignore_result=True)
def long(seconds):
    ran("starts")
    time.sleep(seconds)
    ran("ends")
"""


@pytest.mark.parametrize(("shop", "pool"), [("redis", "prefork"), ("redis", "threads"), ("redis", "solo")], indirect=["shop"])
def test_a_task_that_still_runs_or_has_succeeded_is_not_given_up(shop: Site, pool: str) -> None:
    """Its own limit is beyond the visibility timeout, and no result tells that it has succeeded."""
    shop.write(SHOP + LONG)
    shop.set(max_runs="1", soft_time_limit="1", time_limit="2", visibility_timeout="3")
    app = shop.producer()
    options = ("--queues=default", f"--pool={pool}", "--without-mingle", "--without-gossip")
    with shop.worker(*options, "--hostname=first@%h"), shop.worker(*options, "--hostname=second@%h"):
        app.send_task("long", (9,), task_id="long")
        wait_for("the second delivery", lambda: "was delivered 1 times and may still run" in shop.log())
        # Who waits for it runs others meanwhile.
        app.send_task("works", task_id="works").get(timeout=4)
        assert ran(shop)["ends"] == 0
        wait_for("the end", lambda: "was delivered 1 times and has succeeded" in shop.log() and waiting(app) == 0)
        # Also who has waited for it before it was delivered once more.
        time.sleep(1.5)
        assert ran(shop) == {"starts": 1, "ends": 1, "works": 1}
    assert store_of(app).list() == []


@pytest.mark.parametrize("shop", ["rabbitmq"], indirect=True)
def test_a_task_whose_connection_is_lost_is_not_given_up(shop: Site, rabbitmq: tuple[str, Callable[..., str]]) -> None:
    shop.write(SHOP + LONG)
    shop.set(max_runs="1", soft_time_limit="20", time_limit="30")
    app = shop.producer()
    with shop.worker("--queues=default", "--pool=threads", "--without-mingle", "--without-gossip"):
        app.send_task("long", (6,), task_id="long")
        wait_for("its start", lambda: ran(shop)["starts"])
        rabbitmq[1]("close_all_connections", "as in a failover")
        wait_for("the second delivery", lambda: "was delivered 1 times and may still run" in shop.log())
        wait_for("the end", lambda: "was delivered 1 times and has succeeded" in shop.log() and waiting(app) == 0)
    assert ran(shop) == {"starts": 1, "ends": 1}
    assert "is a dead letter" not in shop.log()


@pytest.mark.parametrize("shop", ["redis"], indirect=True)
def test_a_task_is_not_given_up_while_its_result_cannot_be_read(shop: Site, tmp_path: Path) -> None:
    """Its worker is lost after its success was stored, and the result backend is away when it is delivered again."""
    shop.write(
        SHOP
        + """
from celery_platform import dead_letters
dead_letters.RETRY_INTERVAL = 1

class Ends(Task):
    def after_return(self, *args):
        os.kill(os.getpid(), signal.SIGKILL)

@app.task(name="ends", base=Ends)
def ends():
    ran("ends")
"""
    )
    port = free_port()
    shop.set(result_backend=f"redis://127.0.0.1:{port}/1", max_runs="1", soft_time_limit="1", time_limit="2", visibility_timeout="3")
    app = shop.producer()
    options = ("--queues=default", "--pool=solo", "--without-mingle", "--without-gossip")
    with lasting_redis(port, tmp_path), shop.worker(*options) as worker:
        app.send_task("ends", task_id="ends")
        assert wait_for("the end of the worker", worker.poll) == -signal.SIGKILL
    with shop.worker(*options):
        wait_for("the second delivery", lambda: "was delivered 1 times and may still run" in shop.log() or store_of(app).list())
        assert store_of(app).list() == []
        with lasting_redis(port, tmp_path):
            wait_for("the end", lambda: "was delivered 1 times and has succeeded" in shop.log() and waiting(app) == 0)
    assert store_of(app).list() == []
    assert ran(shop) == {"ends": 1}


def test_a_message_is_not_acknowledged_before_it_is_kept(shop: Site) -> None:
    """The store fails at first; then the worker is killed between the two steps."""
    name = type(store_of(shop.producer())).__name__
    shop.write(
        SHOP
        + f"""
from celery_platform import dead_letters, guards
dead_letters.RETRY_INTERVAL = 1
add = dead_letters.{name}.add
def failing_add(self, letter):
    if not fixed():
        ran("tried")
        raise OSError("away")
    add(self, letter)
    os.kill(os.getpid(), signal.SIGKILL)
dead_letters.{name}.add = failing_add
"""
    )
    app = shop.producer()
    with shop.worker("--queues=default", "--pool=threads", "--without-mingle", "--without-gossip") as worker:
        app.send_task("fails", ("s3cret",), task_id="fails")
        wait_for("two tries", lambda: ran(shop)["tried"] >= 2)
        assert store_of(app).list() == []
        (shop.folder / "fixed").touch()
        wait_for("the end of the worker", lambda: worker.poll())
    assert [letter.id for letter in store_of(app).list()] == ["fails"]
    wait_for("the message", lambda: waiting(app) == 1)
    assert ran(shop)["fails"] == 1


def test_an_interrupted_replay_loses_nothing(shop: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    app = shop.producer()
    store = store_of(app)
    app.send_task("works", task_id="first")
    store.add(letter())

    def then_interrupted(step: Any) -> Any:
        def interrupted(*arguments: Any, **options: Any) -> None:
            step(*arguments, **options)
            raise KeyboardInterrupt

        return interrupted

    with monkeypatch.context() as patch:
        # After the first of RabbitMQ's two steps, whichever that is, and before the one of Redis.
        patch.setattr(kombu.message.Message, "ack", then_interrupted(kombu.message.Message.ack))
        patch.setattr(RabbitStore, "send", then_interrupted(RabbitStore.send))
        patch.setattr(kombu.transport.redis.PrefixedRedisPipeline, "execute", then_interrupted(lambda *_: None))
        with pytest.raises(KeyboardInterrupt):
            store.replay(["1"])
    assert [letter.id for letter in store.list()] == ["1"]
    assert store.replay(["1"]) == 1
    assert store.list() == []
    with app.connection_for_read() as connection:
        queue = app.amqp.queues["default"](connection.default_channel)
        messages = list(iter(lambda: queue.get(no_ack=True), None))
    # RabbitMQ has it twice.
    assert list(dict.fromkeys(message.headers["id"] for message in messages)) == ["first", "1"]
    assert messages[1].body in (letter().original.body, letter().original.body.decode())
    assert (messages[1].headers["retries"], messages[1].headers["expires"]) == (0, None)
    assert "celery_platform_runs" not in messages[1].headers


def test_an_id_is_kept_once(shop: Site) -> None:
    store = store_of(shop.producer())
    store.add(letter(message="before"))
    store.add(letter(id="2", failed=time.time() + 1))
    store.add(letter(message="after", failed=time.time() + 2))
    assert [(letter.id, letter.message) for letter in store.list()] == [("2", "no stock"), ("1", "after")]
    kept = store.get("1")
    assert kept is not None
    assert kept.original == letter().original
    assert store.get("3") is None
    assert store.remove(["1", "3"]) == 1
    assert [letter.id for letter in store.list()] == ["2"]


@pytest.mark.parametrize("shop", ["rabbitmq"], indirect=True)
def test_what_rabbitmq_gives_up_is_a_dead_letter_too(shop: Site, rabbitmq: tuple[str, Callable[..., str]]) -> None:
    # As roles/rabbitmq has it.
    limit = {"delivery-limit": 1, "dead-letter-strategy": "at-least-once", "overflow": "reject-publish"}
    policy = limit | {"dead-letter-exchange": "dead-letters", "dead-letter-routing-key": "dead-letters"}
    rabbitmq[1]("set_policy", "all", "^default$", json.dumps(policy))
    app = shop.producer()
    guards.use_transport()
    guards.declare_delays(app)
    store = store_of(app)
    assert store.list() == []
    app.send_task("works", task_id="rejected", retries=2)
    with app.connection_for_read() as connection:
        app.amqp.queues["default"](connection.default_channel).get().reject()
    app.send_task("works", ("s3cret",), task_id="limit", countdown=1)

    def taken_and_left() -> bool:
        with app.connection_for_read() as connection:
            message = app.amqp.queues["default"](connection.default_channel).get()
        return bool(message)

    for _ in range(2):
        wait_for("the message", taken_and_left)
    letters = wait_for("both", lambda: len(store.list()) == 2 and store.list())
    assert [(letter.id, letter.task, letter.reason, letter.message, letter.retries) for letter in letters] == [
        ("rejected", "works", "rejected", "rejected", 2),
        ("limit", "works", "worker-lost", "delivery_limit", 0),
    ]
    assert time.time() - letters[1].failed < 10
    assert (letters[1].original.queue, json.loads(letters[1].original.body)[0]) == ("default", ["s3cret"])
    assert store.replay(["rejected", "limit"]) == 2
    assert store.list() == []
    with app.connection_for_read() as connection:
        queue = app.amqp.queues["default"](connection.default_channel)
        messages = list(iter(lambda: queue.get(no_ack=True), None))
    assert {message.headers["id"] for message in messages} == {"rejected", "limit"}
    assert not any("x-death" in message.headers for message in messages)


@pytest.mark.parametrize("shop", ["redis"], indirect=True)
def test_nothing_is_installed_if_it_is_switched_off(shop: Site) -> None:
    from celery_platform.settings import Settings

    app = Celery()
    url = shop.environment["CELERY_PLATFORM_BROKER_URL"]
    dead_letters.install(app, Settings(application="shop:app", broker_url=url, dead_letters=False))
    assert app.conf.worker_consumer == "celery.worker.consumer:Consumer"
    dead_letters.install(app, Settings(application="shop:app", broker_url=url))
    assert issubclass(app.conf.worker_consumer, dead_letters.CountingConsumer)
