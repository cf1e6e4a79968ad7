"""The exporter: real brokers and workers, the rights of the roles; brokers that go away; what its memory holds."""

from __future__ import annotations

import math
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from celery import Celery
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from celery_platform import exporter
from celery_platform.settings import Settings
from helpers.managers import Manager
from helpers.sentinels import MASTER, Servers
from helpers.sites import Site, free_port, wait_for

ROLES = Path(__file__).parents[2] / "roles"
USER, PASSWORD = "monitoring", "monitoring's password"

SHOP = """
import time
from pathlib import Path
from celery import Celery

app = Celery("shop")

@app.task(name="works")
def works(seconds=0):
    time.sleep(seconds)

@app.task(name="unannounced")
def unannounced():
    pass

@app.task(name="fails")
def fails():
    raise ValueError("no stock")

@app.task(name="retries", bind=True, max_retries=1)
def retries(self):
    if self.request.retries == 0:
        raise self.retry(countdown=1)

@app.task(name="slow", soft_time_limit=0.5, time_limit=1)
def slow():
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass
"""


class Exporter:
    """A running exporter, and what it tells."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path, context: ssl.SSLContext | None) -> None:
        self.process = process
        self.log = log
        self.context = context
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{port}/metrics"

    def scrape(self) -> dict[tuple[str, ...], float]:
        """Return each sample by its name and the values of its labels, sorted by the labels' names."""
        with urllib.request.urlopen(self.url, context=self.context, timeout=8) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def wait_for(self, value: float, *sample: str, seconds: float = 30) -> None:
        """Wait until a sample has this value."""
        told: dict[tuple[str, ...], float] = {}

        def reached() -> bool:
            nonlocal told
            told = self.scrape()
            return told.get(sample) == value

        try:
            wait_for(f"{sample} is {value}", reached, seconds, every=0.3)
        except AssertionError as error:
            raise AssertionError(f"{error}; last: {told}\n{self.log.read_text()}") from error


@contextmanager
def running(site: Site, *options: str, context: ssl.SSLContext | None = None) -> Iterator[Exporter]:
    """Run an exporter as its unit would."""
    port, manager, log = free_port(), Manager(site.folder), site.folder / "exporter.log"
    command = [sys.executable, "-m", "celery_platform.cli", "exporter", f"--listen=127.0.0.1:{port}", *options]
    environment = os.environ | site.environment | {"NOTIFY_SOCKET": manager.address}
    with log.open("ab") as out, subprocess.Popen(command, env=environment, cwd=site.folder, stdout=out, stderr=out) as process:
        try:
            wait_for("READY", lambda: manager.last("READY=1") or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield Exporter(port, process, log, context)
            process.terminate()
            assert process.wait(10) == 0, log.read_text()
        finally:
            process.kill()


def rules(prefix: str) -> list[str]:
    """Return what the role gives a Redis user of the purpose `monitoring`, and what it gives each to log in with."""
    role = yaml.safe_load((ROLES / "redis/vars/main.yml").read_text())
    text = role["__redis_purposes"]["monitoring"].replace("{prefix}", prefix).replace("{database}", "0")
    return [*text.split(), "+ping", "+hello", "+auth", "+client|setname"]


@pytest.fixture
def monitoring(redis_url: str) -> Iterator[redis.Redis]:
    """Make the user as the role does; return a client of the administrator, after whose use nothing may have been refused."""
    server = redis.Redis.from_url(redis_url)
    server.execute_command("ACL", "SETUSER", USER, "reset", "on", f">{PASSWORD}", *rules("shop:"))
    server.acl_log_reset()
    yield server
    refused = [entry["object"] for entry in server.acl_log() if entry["object"] != "client|setinfo"]
    server.acl_deluser(USER)
    server.acl_log_reset()
    assert refused == []


@pytest.fixture(params=["redis", "rabbitmq"])
def sites(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Site, Site]]:
    """Return a site with two queues, and the one of who looks at it, with no more rights than the roles give."""
    folders = tmp_path / "shop", tmp_path / "monitor"
    for folder in folders:
        folder.mkdir()
    shop, monitor = (Site(folder) for folder in folders)
    if request.param == "redis":
        request.getfixturevalue("monitoring")
        url = request.getfixturevalue("redis_url")
        shop.set(broker_url=f"{url}/0")
        monitor.set(broker_url=f"{url}/0".replace("//", f"//{USER}@"))
        monitor.secret(broker_password=PASSWORD)
    else:
        url, control = request.getfixturevalue("rabbitmq")
        own = "^(celeryev[.].+|(.+[.])?celery[.]pidbox)$"
        request.getfixturevalue("rabbitmq_node")[1]("add_user", USER, PASSWORD)
        # As the role has it (definitions.yml.j2), whose test tries it, too.
        control("set_permissions", USER, own, own, own.replace("(celeryev", "(celeryev|celeryev"))
        shop.set(broker_url=url)
        shop.secret(broker_password="guest")
        monitor.set(broker_url=url.replace("guest@", f"{USER}@"), declare_queues="false")
        monitor.secret(broker_password=PASSWORD)
    shop.write(SHOP)
    for site in (shop, monitor):
        site.set(key_prefix="shop:", queues='["default", "mail"]', time_limit="60", soft_time_limit="50")
    monitor.set(application="celery_platform.monitor:bare")
    yield shop, monitor
    if request.param == "rabbitmq":
        request.getfixturevalue("rabbitmq_node")[1]("delete_user", USER)


def test_it_tells_what_happens(sites: tuple[Site, Site]) -> None:
    shop, monitor = sites
    on_redis = shop.environment["CELERY_PLATFORM_BROKER_URL"].startswith("redis")
    with shop.worker("--queues=default", "--hostname=default@here"):
        # The queues are there.
        pass
    with running(monitor, "--worker=default@here", "--worker=gone@here") as metrics:
        told = metrics.scrape()
        assert (told["celery_broker_up",], told["celery_worker_up", "default@here"], told["celery_worker_up", "gone@here"]) == (1, 0, 0)
        begun = told["celery_queue_last_success_timestamp_seconds", "default"]
        producer = shop.producer()
        with producer.events.default_dispatcher() as dispatcher:
            # Events before its subscription reach nobody.
            wait_for("an event", lambda: dispatcher.send("greeting") or metrics.scrape()["celery_exporter_events_total",])
        for priority in (0, 0, 5):
            producer.send_task("works", queue="mail", priority=priority)
        producer.send_task("works", (3,), countdown=1)
        metrics.wait_for(2 if on_redis else 3, "celery_queue_length", "0" if on_redis else "", "mail")
        if on_redis:
            metrics.wait_for(1, "celery_queue_length", "3", "mail")
            metrics.wait_for(0, "celery_queue_length", "9", "mail")
        else:
            metrics.wait_for(0, "celery_queue_consumers", "default")

        with shop.worker("--queues=default", "--hostname=default@here"):
            metrics.wait_for(1, "celery_worker_up", "default@here")
            metrics.wait_for(1, "celery_worker_tasks_active", "default@here")
            metrics.wait_for(1, "celery_unacknowledged", "" if on_redis else "default")
            assert 0 < metrics.scrape()["celery_oldest_unacknowledged_seconds",] < 20
            if not on_redis:
                metrics.wait_for(1, "celery_queue_consumers", "default")
            for name in ("works", "fails", "retries", "slow"):
                producer.send_task(name)
            for state, counts in {
                "sent": {"works": 2, "fails": 1, "retries": 2, "slow": 1},
                "started": {"works": 2, "fails": 1, "retries": 2, "slow": 1},
                "succeeded": {"works": 2, "retries": 1},
                "failed": {"fails": 1, "slow": 1},
                "retried": {"retries": 1},
            }.items():
                for task, count in counts.items():
                    metrics.wait_for(count, "celery_tasks_total", "default", state, task)
            # Also what its sender did not tell of, as one that knows nothing of us: then there is no time that it waited.
            silent = shop.producer()
            silent.conf.task_send_sent_event = False
            silent.send_task("unannounced")
            for state in ("started", "succeeded"):
                metrics.wait_for(1, "celery_tasks_total", "default", state, "unannounced")
            metrics.wait_for(2, "celery_dead_letters", "")
            metrics.wait_for(1, "celery_dead_letters_total", "default", "failed")
            metrics.wait_for(1, "celery_dead_letters_total", "default", "time-limit")
            metrics.wait_for(0, "celery_unacknowledged", "" if on_redis else "default")
            told = metrics.scrape()
        metrics.wait_for(0, "celery_worker_up", "default@here", seconds=5)

    assert told["celery_worker_up", "gone@here"] == 0
    assert (
        sum(value for (name, *labels), value in told.items() if name == "celery_tasks_total" and labels[1:] == ["received", "works"]) == 2
    )
    assert told["celery_task_runtime_seconds_count", "works"] == 2
    assert 3 <= told["celery_task_runtime_seconds_sum", "works"] < 3.5
    assert told["celery_task_wait_seconds_count", "works"] == 2
    assert ("celery_task_wait_seconds_count", "unannounced") not in told
    # One had to wait for its worker and the slow one only from when it was due.
    assert told["celery_task_wait_seconds_count", "retries"] == 2
    assert told["celery_task_wait_seconds_sum", "retries"] < 15
    assert told["celery_queue_last_success_timestamp_seconds", "default"] > begun
    assert told["celery_queue_last_success_timestamp_seconds", "mail"] == pytest.approx(begun, abs=0.1)
    assert begun < told["celery_queue_last_start_timestamp_seconds", "default"] <= told["celery_exporter_last_event_timestamp_seconds",]
    assert told["celery_exporter_events_total",] > 15
    assert told["celery_exporter_collect_seconds",] < 1
    assert not any(name.endswith("_created") for name, *_ in told)
    assert PASSWORD not in metrics.log.read_text()


@pytest.mark.parametrize("sites", ["redis"], indirect=True)
def test_the_active_beat_tells_its_ticks_and_one_that_stands_by_does_not(sites: tuple[Site, Site], tmp_path: Path) -> None:
    shop, monitor = sites
    seen: list[dict[str, Any]] = []
    command = [Path(sys.executable).with_name("celery"), "-A", "celery_platform.worker:app", "beat", "--max-interval=1", "--pidfile="]
    beats = []
    with running(monitor) as metrics, shop.producer().connection_for_read() as connection:
        try:
            for name in ("first", "second"):
                folder = tmp_path / name
                folder.mkdir()
                manager = Manager(folder)
                environment = os.environ | shop.environment | {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "3000000"}
                started = subprocess.Popen([*command, "--scheduler=redbeat.RedBeatScheduler"], env=environment, cwd=shop.folder)
                beats.append(started)
                wait_for(name, lambda: manager.last("STATUS=Next task" if len(beats) == 1 else "STATUS=Standing by"))  # noqa: B023
            receiver = shop.producer().events.Receiver(connection, handlers={"beat-tick": seen.append})
            threading.Thread(target=receiver.capture, daemon=True).start()
            time.sleep(11)
            receiver.should_stop = True
            name = ("celery_beat_last_tick_timestamp_seconds", socket.gethostname())
            assert time.time() - metrics.scrape()[name] < 7
        finally:
            for process in beats:
                process.kill()
                process.wait()
        last = metrics.scrape()[name]
        time.sleep(6)
        assert metrics.scrape()[name] == last
    assert {event["pid"] for event in seen} == {beats[0].pid}
    assert 2 <= len(seen) <= 3


# --- Brokers that go away ---


def own_redis(port: int, folder: Path) -> subprocess.Popen[bytes]:
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder)


def in_time(metrics: Exporter) -> dict[tuple[str, ...], float]:
    begun = time.monotonic()
    told = metrics.scrape()
    assert time.monotonic() - begun < 5
    return told


def test_redis_may_stand_still_or_restart(site: Site, tmp_path: Path) -> None:
    site.write(SHOP)
    port = free_port()
    site.set(broker_url=f"redis://127.0.0.1:{port}/0", queues='["default"]')
    server = own_redis(port, tmp_path)
    try:
        with running(site, "--worker=one@here") as metrics, site.worker("--hostname=one@here"):
            metrics.wait_for(1, "celery_worker_up", "one@here")
            server.send_signal(signal.SIGSTOP)
            for _ in range(2):
                told = in_time(metrics)
                assert told["celery_broker_up",] == 0
                assert ("celery_queue_length", "0", "default") not in told
            server.send_signal(signal.SIGCONT)
            metrics.wait_for(1, "celery_broker_up", seconds=5)
            server.kill()
            server.wait()
            assert in_time(metrics)["celery_broker_up",] == 0
            time.sleep(3)
            server = own_redis(port, tmp_path)
            metrics.wait_for(1, "celery_broker_up", seconds=5)
            site.producer().send_task("works", task_id="after")
            metrics.wait_for(1, "celery_tasks_total", "default", "succeeded", "works")
        log = metrics.log.read_text()
        assert log.count("No events are received") == 1
        assert log.count("The broker does not answer") == log.count("The broker answers again") == 2
    finally:
        server.kill()
        server.wait()


def test_a_connection_that_went_silent_is_made_anew(site: Site, tmp_path: Path) -> None:
    """As behind a firewall that forgot it: nothing comes, and nothing says so."""
    site.write(SHOP)
    port = free_port()
    site.set(broker_url=f"redis://127.0.0.1:{port}/0", queues='["default"]')
    client = redis.Redis(port=port)
    server = own_redis(port, tmp_path)
    try:
        with running(site):
            subscribed = wait_for("a subscriber", lambda: client.client_list(_type="pubsub"))
            wait_for("another", lambda: (now := client.client_list(_type="pubsub")) and now[0]["id"] != subscribed[0]["id"], seconds=25)
            assert len(client.client_list(_type="pubsub")) == 1
    finally:
        server.kill()
        server.wait()


def test_sentinel_may_name_another_master(site: Site, tmp_path: Path) -> None:
    site.write(SHOP)
    folder = tmp_path / "servers"
    folder.mkdir()
    with Servers(folder) as servers:
        master = servers.redis()
        servers.redis(replica_of=master)
        sentinels = [servers.sentinel(master) for _ in range(3)]
        url = ";".join(f"sentinel://127.0.0.1:{port}/0" for port in sentinels)
        site.set(broker_url=url, sentinel_master=MASTER, queues='["default"]')
        with running(site) as metrics, site.worker("--hostname=one@here"):
            metrics.wait_for(1, "celery_worker_up", "one@here")
            servers.kill(master)
            assert in_time(metrics)["celery_broker_up",] == 0
            metrics.wait_for(1, "celery_broker_up", seconds=30)
            site.producer().send_task("works")
            metrics.wait_for(1, "celery_tasks_total", "default", "succeeded", "works")


@pytest.mark.parametrize("sites", ["rabbitmq"], indirect=True)
def test_rabbitmq_may_restart_or_close_connections(
    sites: tuple[Site, Site], rabbitmq: tuple[str, Callable[..., str]], rabbitmq_node: tuple[str, Callable[..., str]]
) -> None:
    shop, monitor = sites
    control = rabbitmq_node[1]
    with shop.worker("--hostname=one@here"), running(monitor) as metrics:
        metrics.wait_for(1, "celery_worker_up", "one@here")
        rabbitmq[1]("close_all_connections", "a test")
        # At once, though the connection that it has is gone.
        assert in_time(metrics)["celery_broker_up",] == 1
        shop.producer().send_task("works")
        metrics.wait_for(1, "celery_tasks_total", "default", "succeeded", "works")
        control("stop_app")
        try:
            assert in_time(metrics)["celery_broker_up",] == 0
        finally:
            control("start_app")
        metrics.wait_for(1, "celery_broker_up", seconds=10)
        shop.producer().send_task("works")
        metrics.wait_for(2, "celery_tasks_total", "default", "succeeded", "works")


def test_a_stream_of_events_does_not_keep_heartbeats_from_rabbitmq(
    rabbitmq: tuple[str, Callable[..., str]], caplog: pytest.LogCaptureFixture
) -> None:
    app = Celery("monitor", broker=rabbitmq[0].replace("guest@", "guest:guest@"), set_as_current=False)
    # RabbitMQ closes a connection that is silent for twice as long.
    app.conf.broker_heartbeat = 1
    stop, seen = threading.Event(), set()
    receiver = threading.Thread(target=exporter.receive, args=(app, lambda event: seen.add(event["type"]), stop))
    caplog.set_level("INFO", logger=exporter.__name__)
    receiver.start()
    try:
        wait_for("the receiver", lambda: "Receiving events" in caplog.text)
        with app.connection_for_write() as connection, app.events.Dispatcher(connection) as events:
            end = time.monotonic() + 8
            while time.monotonic() < end:
                events.send("own-event")
                time.sleep(0.05)
            events.send("own-last")
            wait_for("the last event", lambda: "own-last" in seen)
    finally:
        stop.set()
        receiver.join()
    assert caplog.text.count("Receiving events") == 1


@pytest.mark.parametrize("sites", ["rabbitmq"], indirect=True)
def test_a_queue_that_is_not_there_is_left_out(sites: tuple[Site, Site]) -> None:
    shop, monitor = sites
    with shop.worker("--queues=default,mail"):
        pass
    monitor.set(queues='["default", "nowhere", "mail"]')
    with running(monitor) as metrics:
        told = metrics.scrape()
    assert sorted(sample[2] for sample in told if sample[0] == "celery_queue_length") == ["default", "mail"]
    assert told["celery_broker_up",] == 1


# --- Rights ---


def test_what_monitoring_is_refused(monitoring: redis.Redis, redis_url: str) -> None:
    client = redis.Redis.from_url(redis_url.replace("//", f"//{USER}@"), password=PASSWORD)
    for command in (
        "GET shop:x",
        "LRANGE shop:default 0 -1",
        "RPOP shop:default",
        "LPUSH shop:default x",
        "HGET shop:unacked x",
        "HDEL shop:unacked x",
        "ZREM shop:unacked_index x",
        "HGETALL shop:dead-letters",
        "DEL shop:default",
        "SADD shop:_kombu.binding.default x",
        "LLEN other:default",
        "PUBLISH shop:/0.celeryev/task.sent x",
        "PUBLISH other:/0.celery.pidbox x",
        "PSUBSCRIBE other:/0.celeryev/*",
        "KEYS *",
        "CONFIG GET *",
        "FLUSHALL",
        "EVAL return 0",
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*command.split())
    # A script may name all keys, but what it does is judged, too.
    with pytest.raises(redis.exceptions.ResponseError, match=r"(?i)user executing the script|ACL failure in script"):
        client.evalsha(client.script_load("return redis.call('RPOP', KEYS[1])"), 1, "shop:default")
    monitoring.acl_log_reset()


SWEEP = """
from celery_platform.monitor import app
with app.connection_for_read() as connection:
    print(connection.default_channel.sweep_bindings())
"""


@pytest.mark.parametrize("sites", ["redis"], indirect=True)
def test_kombu_may_clean_up_after_monitors_that_were_killed(sites: tuple[Site, Site], monitoring: redis.Redis) -> None:
    exchanges = ("celeryev", "celery.pidbox", "reply.celery.pidbox")
    for name in exchanges:
        monitoring.sadd(f"shop:_kombu.binding.{name}", "of one that was killed")
        monitoring.zadd("shop:_kombu.binding_deadlines", {name: 1})
    assert sites[1].run("python", "-c", SWEEP).stdout.split() == ["3"]
    assert monitoring.keys("shop:_kombu*") == []


@pytest.mark.parametrize("sites", ["redis"], indirect=True)
def test_flower_works_with_the_rights_of_monitoring(sites: tuple[Site, Site]) -> None:
    shop, monitor = sites
    with shop.worker("--hostname=one@here", "--queues=default"), monitor.flower("--read-only") as get:
        # It listens before it reads events, and a task's events are not repeated: a worker's heartbeat says when it does.
        wait_for("the worker", lambda: "one@here" in get("workers?json=1"))
        shop.producer().send_task("works", task_id="seen")
        wait_for("the task", lambda: "works" in get("task/seen"))
        assert "default" in get("worker/one@here")
        assert "default" in get("broker")
        # It says every five seconds that workers are to send events.
        time.sleep(6)
    log = (monitor.folder / "flower.log").read_text()
    assert "Error" not in log, log


# --- Who asks ---


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """Return a folder with a CA, certificates of a server (and a newer one) and of a client."""
    folder = tmp_path / "certificates"
    folder.mkdir()

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=test CA")
    for serial, name in enumerate(("server", "renewed", "client"), 1):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "extensions").write_text("subjectAltName = IP:127.0.0.1\n")
        signing = ["-CA", "ca.crt", "-CAkey", "ca.key", "-set_serial", str(serial), "-days", "2", "-extfile", "extensions"]
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.crt", *signing)
    return folder


def test_only_who_has_a_certificate_is_answered(site: Site, redis_url: str, certificates: Path) -> None:
    site.set(broker_url=f"{redis_url}/0")
    served = {"cert": certificates / "server.crt", "key": certificates / "server.key", "client-ca": certificates / "ca.crt"}
    stranger = ssl.create_default_context(cafile=certificates / "ca.crt")
    known = ssl.create_default_context(cafile=certificates / "ca.crt")
    known.load_cert_chain(certificates / "client.crt", certificates / "client.key")

    def serial(address: tuple[str, int]) -> Any:
        with socket.create_connection(address) as plain, known.wrap_socket(plain, server_hostname=address[0]) as connection:
            certificate = connection.getpeercert()
        assert certificate
        return int(str(certificate["serialNumber"]), 16)

    with running(site, *(f"--tls-{name}={path}" for name, path in served.items()), context=known) as metrics:
        address = ("127.0.0.1", int(metrics.url.split(":")[2].partition("/")[0]))
        # One that says nothing.
        with closing(socket.create_connection(address)):
            assert in_time(metrics)["celery_broker_up",] == 1
        with pytest.raises((ssl.SSLError, urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(metrics.url, context=stranger, timeout=5).read()
        assert serial(address) == 1
        served["key"].write_bytes((certificates / "renewed.key").read_bytes())
        served["cert"].write_bytes((certificates / "renewed.crt").read_bytes())
        assert serial(address) == 2
        assert metrics.scrape()["celery_broker_up",] == 1
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(metrics.url.replace("metrics", "x"), context=known, timeout=5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--listen=9808"], "an address and a port"),
        ([], "an address and a port"),
        (["--tls-cert=/dev/null"], "both or neither"),
        (["--listen=127.0.0.1:1"], "Permission denied|cannot|in use"),
        (["--tls-cert=/etc/hostname", "--tls-key=/etc/hostname"], "SSL|PEM"),
    ],
)
def test_what_cannot_be_is_told(site: Site, redis_url: str, options: list[str], told: str) -> None:
    if told.startswith("Permission"):
        taken = socket.create_server(("127.0.0.1", 0))
        options = [f"--listen=127.0.0.1:{taken.getsockname()[1]}"]
    site.set(broker_url=f"{redis_url}/0", application="celery_platform.monitor:bare")
    site.environment |= {"CELERY_EXPORTER_LISTEN": "anywhere"} if not options else {}
    run = site.run("python", "-m", "celery_platform.cli", "exporter", *options, check=False, timeout=30)
    assert run.returncode in (1, 2)
    assert "Traceback" not in run.stderr
    assert [word for word in told.split("|") if word in run.stderr] != [], run.stderr


# --- What it remembers ---


@pytest.fixture
def events() -> exporter.Events:
    settings = Settings(
        application="a", broker_url="memory://", queues=["default"], default_queue="default", time_limit=100, soft_time_limit=50
    )
    return exporter.Events(settings, CollectorRegistry(), ["expected@here"], most_tasks=10)


def event(type: str, **fields: Any) -> dict[str, Any]:
    return {"type": type, "timestamp": 1000.0, "hostname": "one@here", "uuid": "1"} | fields


def waits(events: exporter.Events, task: str = "works") -> tuple[float, float]:
    child: Any = events.wait.labels(task)
    samples = {sample.name: sample.value for sample in child._child_samples() if sample.name in ("_count", "_sum")}
    return samples["_count"], samples["_sum"]


def test_the_time_a_task_waits(events: exporter.Events) -> None:
    events.take(event("task-sent", name="works", queue="default"))
    events.take(event("task-started", timestamp=1003.0))
    assert waits(events) == (1, 3)
    events.take(event("task-succeeded", runtime=1))
    assert events.tasks == {}
    # The worker was faster.
    events.take(event("task-started", uuid="2", name="works", timestamp=1000.0))
    events.take(event("task-succeeded", uuid="2", runtime=1))
    events.take(event("task-sent", uuid="2", name="works", timestamp=1000.1))
    assert waits(events) == (2, 3)
    # Due later; then sent again by the task itself, which is told before the retry.
    events.take(event("task-sent", uuid="3", name="works", eta="1970-01-01T00:16:50+00:00"))
    events.take(event("task-started", uuid="3", timestamp=1012.0))
    assert waits(events) == (3, 5)
    events.take(event("task-sent", uuid="3", name="works", retries=1, timestamp=1013.0, eta="1970-01-01T00:17:00+00:00"))
    events.take(event("task-retried", uuid="3"))
    assert waits(events) == (3, 5)
    events.take(event("task-started", uuid="3", timestamp=1021.0))
    assert waits(events) == (4, 6)


def test_its_memory_is_bounded(events: exporter.Events) -> None:
    for number in range(1000):
        events.take(event("task-started", uuid=str(number), name=f"{number}" * 300, queue=f"q{number}"))
        events.take(event("worker-heartbeat", hostname=f"w{number}"))
        events.take(event("beat-tick", hostname=f"b{number}"))
        events.take(event("task-dead-lettered", name="x", queue=f"q{number}", reason=f"r{number}"))
    assert (len(events.tasks), len(events.running)) == (10, 10)
    assert max(len(events.workers), len(events.ticks)) <= exporter.MOST_NAMES
    samples = [sample for family in events.states.collect() for sample in family.samples]
    assert len({sample.labels["task"] for sample in samples}) == exporter.MOST_NAMES + 1
    assert {sample.labels["queue"] for sample in samples} == {"other"}
    assert max(len(sample.labels["task"]) for sample in samples) == exporter.LONGEST_NAME
    assert [sample.labels for family in events.dead.collect() for sample in family.samples if sample.value == 1000] == [
        {"queue": "other", "reason": "other"}
    ]


@pytest.mark.parametrize(
    "bad",
    [
        "text",
        None,
        {},
        {"type": ["x"]},
        event("task-sent", uuid=["x"]),
        event("task-started", timestamp="x"),
        event("task-sent", name=5),
        event("task-sent", name="works", queue=["x"]),
        event("task-sent", name="works", eta="tomorrow"),
        event("task-succeeded", name="works", runtime=None),
        event("worker-heartbeat", active="many"),
        event("worker-heartbeat", hostname=None),
        event("task-dead-lettered"),
        {"type": "beat-tick", "hostname": 5},
        event("own-event"),
    ],
    ids=str,
)
def test_an_event_that_is_none_does_no_harm(events: exporter.Events, bad: Any) -> None:
    events.take(bad)
    events.take(event("task-succeeded", uuid="2", name="works", queue="default", runtime=1))
    assert events.last_success["default"] == events.last
    list(exporter.Collector(exporter.Look, events).collect())


def test_workers_are_forgotten_unless_they_are_expected(events: exporter.Events, monkeypatch: pytest.MonkeyPatch) -> None:
    events.take(event("worker-heartbeat", active=3))
    assert events.known_workers()["one@here"].up
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 31)
    assert not events.known_workers()["one@here"].up
    monkeypatch.setattr(time, "monotonic", lambda: now + 3700)
    assert set(events.known_workers()) == {"expected@here"}


def test_a_task_whose_end_was_not_told_does_not_run_for_ever(events: exporter.Events) -> None:
    now = time.time()
    events.take(event("worker-heartbeat", hostname="gone@here"))
    events.take(event("worker-offline", hostname="gone@here"))
    for id, age, host in (("1", 30, "one@here"), ("2", 170, "one@here"), ("3", 30, "gone@here"), ("4", 20, "one@here")):
        events.take(event("task-started", uuid=id, name="works", queue="default", timestamp=now - age, hostname=host))
    assert [(queue, math.ceil(now - start)) for queue, start in events.still_running()] == [("default", 30), ("default", 20)]
    assert set(events.running) == {"1", "4"}


def test_a_look_that_hangs_is_waited_for_again(events: exporter.Events, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "LOOK_TIMEOUT", 0.2)
    looks = []

    def look() -> exporter.Look:
        looks.append(1)
        time.sleep(0.5)
        return exporter.Look()

    collector = exporter.Collector(look, events)
    assert collector.look() is None
    assert collector.look() is None
    assert collector.look() is not None
    assert len(looks) == 1
