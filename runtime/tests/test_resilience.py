"""Retries, circuit breakers and rate limits: real brokers, several real workers."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import kombu.exceptions
import pytest
import redis
import yaml
from celery import Celery, Task, chain, chord
from celery.exceptions import Reject
from pybreaker import STATE_CLOSED, STATE_HALF_OPEN

from celery_platform import resilience
from celery_platform.dead_letters import RabbitStore, RedisStore
from celery_platform.resilience import CircuitBreaker, PutOff, RateLimit, SharedCircuit, Store, is_connection_error
from celery_platform.settings import Breaker, Settings
from helpers.shop import use_broker
from helpers.sites import Site, free_port, wait_for

SHOP = """
import json, os
from pathlib import Path
import redis
from celery import Celery, Task

app = Celery("shop")
clock = redis.Redis.from_url(os.environ["CLOCK"])

def ran(task):
    seconds, micros = clock.time()
    request = task.request
    queue = request.delivery_info["routing_key"].split(".")[-1]
    run = {"name": task.name, "id": request.id, "time": seconds + micros / 1e6, "retries": request.retries, "queue": queue}
    with open("runs", "a") as file:
        file.write(json.dumps(run) + "\\n")
    return request.retries

class Called(Task):  # Not derived from the application's own class.
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)

@app.task(name="net.plain")
def plain(tries=1):
    if ran(plain) < tries:
        raise ConnectionResetError("gone")
    return "plain"

@app.task(name="net.bound", bind=True, base=Called)
def bound(self, before=""):
    if ran(self) < 1:
        raise redis.exceptions.TimeoutError("slow")
    return before + "bound"

class Classy(Task):
    name = "net.classy"
    def run(self, tries):
        if ran(self) < tries:
            raise TimeoutError("slow")
        return "classy"

app.register_task(Classy())

@app.task(name="net.auto", bind=True, autoretry_for=(KeyError,))
def auto(self):
    ran(self)
    raise ConnectionError("gone")

@app.task(name="net.once", bind=True, max_retries=1)
def once(self):
    ran(self)
    raise ConnectionError("gone")

@app.task(name="net.bug", bind=True)
def bug(self):
    ran(self)
    raise ValueError("bug")

@app.task(name="other", bind=True)
def other(self, fail=False):
    ran(self)
    if fail:
        raise ConnectionError("gone")

@app.task(name="join", bind=True)
def join(self, results):
    return sorted(results)

@app.task(name="pay", bind=True)
def pay(self):
    ran(self)
    if not Path("fixed").exists():
        raise ConnectionError("gone")

@app.task(name="limited", bind=True, ignore_result=True)
def limited(self):
    ran(self)
"""

QUIET = ("--without-mingle", "--without-gossip")


@pytest.fixture(params=["redis", "rabbitmq"])
def shop(request: pytest.FixtureRequest, site: Site, redis_url: str) -> Site:
    """A site with tasks to be protected, on each broker; what workers share is in Redis either way."""
    use_broker(request, site, redis_url)
    if request.param != "rabbitmq alone":
        site.set(result_backend=f"{redis_url}/1")
    site.set(key_prefix="shop:", queues='["default", "critical"]', publish_timeout="3")
    site.environment["CLOCK"] = redis_url
    site.write(SHOP)
    return site


@pytest.fixture
def store(redis_url: str) -> Store:
    return Store(redis.Redis.from_url(redis_url), "shop:")


def runs(site: Site, name: str = "") -> list[dict[str, Any]]:
    """Return the runs so far, all or of one task, in their order."""
    path = site.folder / "runs"
    every = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [run for run in every if name in ("", run["name"])]


def letters(app: Celery) -> dict[str, int]:
    """Return the retries of the dead letters, by id."""
    store = RabbitStore(app) if app.conf.broker_url.startswith("amqp") else RedisStore(app)
    return {letter.id: letter.retries for letter in store.list()}


@contextmanager
def server(folder: Path, *arguments: str) -> Iterator[None]:
    """Run a redis-server of the test's own."""
    with subprocess.Popen(["redis-server", *arguments], cwd=folder, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def find_keys(redis_url: str, database: int) -> set[str]:
    """Return the keys of a database."""
    return {key.decode() for key in redis.Redis.from_url(f"{redis_url}/{database}").scan_iter()}


@contextmanager
def workers(site: Site, count: int) -> Iterator[None]:
    """Run several workers, started and stopped at the same time."""
    every = [site.worker(f"--hostname={number}@test", *QUIET) for number in range(count)]
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(lambda worker: worker.__enter__(), every))
        try:
            wait_for("all workers", lambda: site.log().count(" ready.") == count)
            yield
        finally:
            list(threads.map(lambda worker: worker.__exit__(None, None, None), every))


def test_connection_errors_are_retried_whatever_the_kind_of_task(shop: Site) -> None:
    shop.set(retry_tasks='["net.*"]', retry_max="2", retry_backoff_max="1")
    app = shop.producer()
    with shop.worker(*QUIET, "--concurrency=2"):
        app.send_task("net.plain", (2,), task_id="plain", queue="critical")
        app.send_task("net.classy", (1,), task_id="classy")
        app.send_task("net.plain", (9,), task_id="always")
        for name in ("auto", "once", "bug"):
            app.send_task(f"net.{name}", task_id=name)
        app.send_task("other", (True,), task_id="other")
        parts = [app.signature("net.plain", kwargs={"tries": 1}), app.signature("net.bound")]
        joined = chord(parts, app=app)(app.signature("join"))
        chained = chain(app.signature("net.plain"), app.signature("net.bound"), app=app).apply_async()
        assert joined.get(timeout=30) == ["bound", "plain"]
        assert chained.get(timeout=30) == "plainbound"
        assert app.AsyncResult("plain").get(timeout=30) == "plain"
        assert app.AsyncResult("classy").get(timeout=30) == "classy"
        failed = {"always": 2, "auto": 0, "once": 1, "bug": 0, "other": 0}
        wait_for("the dead letters", lambda: len(letters(app)) == len(failed))
        assert letters(app) == failed
    for id, retries in {"plain": 2, "classy": 1, **failed}.items():
        assert [run["retries"] for run in runs(shop) if run["id"] == id] == list(range(retries + 1))
    assert {run["queue"] for run in runs(shop) if run["id"] == "plain"} == {"critical"}
    assert "net.plain[plain] retry: Retry in 1s: ConnectionResetError('gone')" in shop.log()


@pytest.mark.parametrize("shop", ["redis", "rabbitmq", "rabbitmq alone"], indirect=True)
def test_a_circuit_opens_for_all_workers_and_trials_close_it(shop: Site) -> None:
    """Without Redis, a circuit is of one process."""
    alone = "CELERY_PLATFORM_RESULT_BACKEND" not in shop.environment
    shop.set(breakers='{"pay": {"failures": 3, "reset": 1}}', rate_limits='{"unused": "1/h"}')
    app = shop.producer()
    with workers(shop, 1 if alone else 2):
        for number in range(8):
            app.send_task("pay", task_id=str(number))
        wait_for("two trials", lambda: len(runs(shop)) >= 5)
        app.send_task("other")
        wait_for("another task", lambda: runs(shop, "other"))
        (shop.folder / "fixed").touch()
        wait_for("all tasks", lambda: len({run["id"] for run in runs(shop, "pay")}) == 8)
    pays = runs(shop, "pay")
    assert [run["retries"] for run in pays] == [0] * 8
    # With two workers a fourth may run while the third failure is counted. From then on, one trial a second.
    trials = [run["time"] for run in pays][2 if alone else 3 : 5]
    assert all(later - earlier >= 1 for earlier, later in pairwise(trials))
    assert "The circuit of pay is open" in shop.log()
    assert "retry: Put off for" in shop.log()
    assert ("Without Redis, breakers are of each process" in shop.log()) is alone


def test_a_rate_limit_holds_across_workers(shop: Site, redis_url: str) -> None:
    count, rate = 20, 6
    shop.set(rate_limits=f'{{"limi*": "{rate}/s"}}')
    app = shop.producer()
    with workers(shop, 2):
        seconds, micros = redis.Redis.from_url(redis_url).time()
        start = seconds + micros / 1e6
        for number in range(count):
            app.send_task("limited", task_id=str(number))
        wait_for("all tasks", lambda: len(runs(shop)) >= count, seconds=60)
    assert {run["id"] for run in runs(shop)} == {str(number) for number in range(count)}
    assert {run["retries"] for run in runs(shop)} == {0}
    # A run notes its time after it was allowed: on a busy machine later, which leaves room for more.
    for number, moment in enumerate(sorted(run["time"] for run in runs(shop)), 1):
        assert number <= 1 + (moment - start + resilience.SLACK) * rate
    assert len(runs(shop)) == count


@pytest.mark.parametrize("shop", ["rabbitmq"], indirect=True)
def test_tasks_run_while_redis_is_away(shop: Site) -> None:
    shop.set(rate_limits='{"*": "1/h"}', breakers='{"*": {}}', result_backend=f"redis://127.0.0.1:{free_port()}/0")
    with shop.worker(*QUIET):
        for _ in range(20):
            shop.producer().send_task("limited", ignore_result=True)
        wait_for("all tasks", lambda: len(runs(shop)) == 20)
    assert shop.log().count("while Redis is away") == 1


def test_a_redis_that_does_not_answer_is_waited_for_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = resilience.store_of(Settings(application="x", broker_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0"))
        assert client is not None
        start = time.monotonic()
        assert CircuitBreaker(client, "x", Breaker()).call(lambda: "ran") == "ran"
        first = time.monotonic() - start
        for _ in range(1000):
            RateLimit(client, "x", "1/h", 300).take(had_turn=False)
        assert time.monotonic() - start < 3 * first


def test_a_store_is_used_again_once_redis_is_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resilience, "RECOVERY", 0.1)
    port = free_port()
    limit = RateLimit(Store(redis.Redis(port=port), "shop:"), "x", "1/h", 300)
    for _ in range(3):
        limit.take(had_turn=False)

    def limited() -> bool:
        try:
            limit.take(had_turn=False)
        except PutOff:
            return True
        return False

    with server(tmp_path, "--port", str(port), "--bind", "127.0.0.1", "--save", ""):
        wait_for("the limit", limited)


def test_the_store_is_found_by_sentinel(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resilience, "RECOVERY", 0.1)
    port, master = free_port(), urlsplit(redis_url).port
    (tmp_path / "conf").write_text(f"port {port}\nbind 127.0.0.1\nsentinel monitor orders 127.0.0.1 {master} 1\n")
    url = f"sentinel://127.0.0.1:{port}/3;sentinel://127.0.0.1:{free_port()}/3"
    with server(tmp_path, "conf", "--sentinel"):
        store = resilience.store_of(Settings(application="x", broker_url=url, sentinel_master="orders", key_prefix="shop:"))
        assert store is not None
        wait_for("the store", lambda: RateLimit(store, "x", "1/h", 300).take(had_turn=False) or find_keys(redis_url, 3), every=1)
    assert find_keys(redis_url, 3) == {"shop:rate-limit:x:due"}


def test_turns_are_given_out_in_order_and_not_too_far_ahead(store: Store) -> None:
    limit = RateLimit(store, "x", "1/m", horizon=150)

    def later(had_turn: bool = False) -> PutOff:
        with pytest.raises(PutOff) as put_off:
            limit.take(had_turn)
        return put_off.value

    limit.take(had_turn=False)
    turns = [later().turn, later().turn]
    assert turns[0] is not None
    assert turns[1] == pytest.approx(turns[0] + 60)
    full = later()
    assert full.turn is None
    assert 75 <= full.countdown <= 150


def test_newcomers_stand_behind_those_that_wait(store: Store) -> None:
    limit = RateLimit(store, "x", "20/s", horizon=300)
    # More than a busy machine can refill.
    taken = []
    with suppress(PutOff):
        while len(taken) < 1000:
            taken.append(limit.take(had_turn=False))
    assert 21 <= len(taken) < 1000
    with pytest.raises(PutOff) as second:
        limit.take(had_turn=False)
    time.sleep(0.1)
    # There is a run free again, for who has had its turn.
    with pytest.raises(PutOff) as third:
        limit.take(had_turn=False)
    assert third.value.turn == pytest.approx((second.value.turn or 0) + 0.05)
    # RabbitMQ delays by whole seconds only.
    assert third.value.countdown in (1, 2)
    limit.take(had_turn=True)


def test_one_run_at_a_time_tries_an_open_circuit(store: Store, redis_url: str) -> None:
    breaker = Breaker(failures=2, reset=1)

    def circuit() -> SharedCircuit:
        return SharedCircuit(store, "x", breaker)

    early = circuit()
    for _ in range(2):
        circuit().increment_counter()
    assert circuit().remaining >= 1
    # One that began before says nothing about now.
    early.reset_counter()
    assert circuit().remaining >= 1
    trial = wait_for("the trial", lambda: (seen := circuit()).remaining == 0 and seen)
    assert trial.state == STATE_HALF_OPEN
    assert circuit().remaining >= 1
    # The trial's process is lost: there is another trial.
    trial = wait_for("another trial", lambda: (seen := circuit()).remaining == 0 and seen)
    # It takes longer than the circuit stays open.
    redis.Redis.from_url(redis_url).delete("shop:breaker:x:open")
    trial.increment_counter()
    assert circuit().remaining >= 1
    trial = wait_for("a third trial", lambda: (seen := circuit()).remaining == 0 and seen)
    trial.reset_counter()
    closed = circuit()
    assert (closed.remaining, closed.state) == (0, STATE_CLOSED)
    closed.increment_counter()
    assert circuit().remaining == 0


def test_the_acl_of_our_redis_allows_all_of_it(redis_url: str) -> None:
    roles = Path(__file__).parents[2] / "roles"
    commands = yaml.safe_load((roles / "redis/vars/main.yml").read_text())["__redis_celery_commands"]
    admin = redis.Redis.from_url(redis_url)
    admin.execute_command("ACL SETUSER", "shop", "reset", "on", ">s3cret", "~shop:*", "&shop:*", *" ".join(commands).split())
    admin.execute_command("SCRIPT", "FLUSH")
    admin.acl_log_reset()
    secrets = {"broker_password": "s3cret"}
    url = redis_url.replace("//", "//shop@")
    store = resilience.store_of(Settings(application="x", broker_url=f"{url}/1", key_prefix="shop:", **secrets))
    assert store is not None
    limit, circuit = RateLimit(store, "x", "1/h", horizon=7200), CircuitBreaker(store, "x", Breaker(failures=1, reset=1))
    circuit.call(lambda: None)
    limit.take(had_turn=False)
    with pytest.raises(PutOff) as waiting:
        limit.take(had_turn=False)
    assert waiting.value.turn
    with pytest.raises(ZeroDivisionError):
        circuit.call(lambda: 1 / 0)
    with pytest.raises(PutOff):
        circuit.call(lambda: None)

    def tried() -> bool:
        with suppress(PutOff):
            circuit.call(lambda: None)
            return True
        return False

    wait_for("the trial", tried)
    circuit.call(lambda: None)
    assert [entry["object"] for entry in admin.acl_log() if "client" not in str(entry["object"])] == []
    assert all(key.startswith("shop:") for key in find_keys(redis_url, 1))
    admin.execute_command("ACL DELUSER", "shop")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError(), True),
        (TimeoutError(), True),
        (socket.gaierror(-3, "Temporary failure in name resolution"), True),
        (OSError(errno.EHOSTUNREACH, "No route to host"), True),
        (kombu.exceptions.OperationalError(), True),
        (redis.exceptions.ConnectionError(), True),
        (redis.exceptions.TimeoutError(), True),
        (URLError(ConnectionRefusedError()), True),
        (URLError("unknown url type"), False),
        (HTTPError("http://x", 503, "away", None, None), False),  # type: ignore[arg-type]
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (redis.exceptions.ResponseError(), False),
        (ValueError(), False),
    ],
)
def test_what_is_a_connection_error(error: Exception, expected: bool) -> None:
    assert is_connection_error(error) is expected


def test_errors_of_a_library_count_once_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("requests.exceptions")
    library.Timeout = type("Timeout", (OSError,), {})  # type: ignore[attr-defined]
    assert not is_connection_error(library.Timeout())
    monkeypatch.setitem(sys.modules, "requests.exceptions", library)
    assert is_connection_error(library.Timeout())
    assert not is_connection_error(OSError())


def test_other_tasks_and_tasks_called_as_functions_are_untouched(redis_url: str) -> None:
    app = Celery(set_as_current=False)

    @app.task(name="net.away", shared=False)
    def away() -> None:
        raise ConnectionError("gone")

    @app.task(name="other", shared=False)
    def other() -> None: ...

    settings = {"retry_tasks": ["net.*", "celery.*"], "breakers": {"net.*": Breaker()}, "rate_limits": {"net.*": "1/h"}}
    resilience.protect_tasks(app, Settings(application="x", broker_url=redis_url, **settings))
    assert [name for name, task in app.tasks.items() if "run" in vars(task)] == ["net.away"]
    for _ in range(2):
        with pytest.raises(ConnectionError, match="gone"):
            away()
        assert isinstance(away.apply().result, ConnectionError)
    assert isinstance(away, Task)
    assert find_keys(redis_url, 0) == set()


@pytest.mark.parametrize("late", [True, False])
def test_a_task_that_cannot_be_sent_again_is_not_lost(late: bool) -> None:
    """Its message goes back to the queue, or where it is acknowledged already, to the dead letters."""
    app = Celery(broker="memory://", set_as_current=False)

    @app.task(name="net.away", acks_late=late, shared=False)
    def away(_: object) -> None:
        raise ConnectionError("gone")

    resilience.protect_tasks(app, Settings(application="x", broker_url="memory://", retry_tasks=["net.*"]))
    not_for_json = object()
    away.push_request(id="1", args=[not_for_json], kwargs={}, called_directly=False)
    with pytest.raises(Reject) as rejected:
        away.run(not_for_json)
    assert rejected.value.requeue is late
