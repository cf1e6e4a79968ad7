"""Processes that send tasks, as a web server, a cron job or a shell does: applications whose code knows nothing of the deployment."""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from celery import Celery

from helpers.preflight import site as inventory
from helpers.sentinels import Servers
from helpers.sites import Site, cli, wait_for

#: What a worker runs, and what producers import. Its own broker is one of a developer's machine.
TASKS = """
from celery import Celery
app = Celery("shop", broker="redis://127.0.0.1:1/0")
@app.task(name="sell")
def sell(number):
    return number + 1
@app.task(name="total")
def total(numbers):
    return sum(numbers)
"""
#: Ways in which web applications make and configure theirs; each ends with a task `sell`.
APPLICATIONS = {
    "plain": "from shop import sell",
    "django": """
        import sys, types
        module = types.ModuleType("project_settings")
        module.CELERY_BROKER_URL, module.CELERY_TASK_ACKS_LATE = "amqp://guest@127.0.0.1:1//", False
        module.CELERY_RESULT_BACKEND = "redis://127.0.0.1:1/1"
        sys.modules["project_settings"] = module
        from celery import Celery, shared_task
        app = Celery("project")
        app.config_from_object("project_settings", namespace="CELERY")
        @shared_task(name="sell")
        def sell(number): pass
    """,
    "factory": """
        from celery import Celery, shared_task
        @shared_task(name="sell")
        def sell(number): pass
        def create_app():
            app = Celery("flask")
            app.config_from_object({"broker_url": "redis://127.0.0.1:1/9", "result_backend": "redis://127.0.0.1:1/9"})
            app.set_default()
            return app
        create_app()
        create_app()
    """,
    "read before it is configured": """
        from celery import Celery
        app = Celery("late")
        assert app.conf.task_default_queue
        app.config_from_object({"broker_url": "redis://127.0.0.1:1/9"})
        sell = app.signature("sell")
    """,
    "several": """
        from celery import Celery
        from shop import app as other
        assert other.conf.broker_url
        app = Celery("second", broker="redis://127.0.0.1:1/9")
        sell = app.signature("sell")
    """,
}


@pytest.fixture(params=["redis", "rabbitmq"])
def shop(request: pytest.FixtureRequest, site: Site, redis_url: str) -> Iterator[Site]:
    """Return a site with encryption whose worker runs."""
    site.write(TASKS)
    site.set(broker_url=f"{redis_url}/0", result_backend=f"{redis_url}/1", key_prefix="shop:", queues='["batch", "default"]')
    site.set(encryption="on", routes='{"sell": {"queue": "batch"}}')
    site.secret(encryption_keys=cli(site, "generate-key").stdout)
    if request.param == "rabbitmq":
        site.set(broker_url=request.getfixturevalue("rabbitmq")[0])
        site.secret(broker_password="guest")
    with site.worker("--queues=batch"):
        yield site


@contextmanager
def producer(site: Site) -> Iterator[Site]:
    """Let processes of a site be producers."""
    site.environment["CELERY_LOADER"] = "celery_platform.producer:Loader"
    yield site
    del site.environment["CELERY_LOADER"]


def run(site: Site, *sources: str, check: bool = True) -> str:
    """Return what a process prints that runs these lines as a producer."""
    with producer(site):
        done = site.run("python", "-c", "\n".join(map(textwrap.dedent, sources)), check=check)
    return done.stdout if check else done.stdout + done.stderr


def test_every_kind_of_application_sends_and_reads_its_results(shop: Site) -> None:
    for name, source in APPLICATIONS.items():
        assert run(shop, source, "print(sell.delay(6).get(timeout=20))") == "7\n", name


def test_processes_that_are_forked_and_threads_send(shop: Site) -> None:
    """As gunicorn with `--preload` and uwsgi do: the parent has sent, and has its connections."""
    source = """
        import os, sys, traceback
        from concurrent.futures import ThreadPoolExecutor
        from shop import app, sell
        assert sell.delay(0).get(timeout=20) == 1
        parents = app.pool, app.amqp.producer_pool, app.backend
        children = []
        for number in range(3):
            if not (child := os.fork()):
                try:
                    assert not {id(app.pool), id(app.amqp.producer_pool), id(app.backend)} & set(map(id, parents))
                    with ThreadPoolExecutor(4) as pool:
                        assert list(pool.map(lambda n: sell.delay(n).get(timeout=20), range(8))) == list(range(1, 9))
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(ends, sell.delay(1).get(timeout=20))
    """
    shown = run(shop, source, check=False)
    assert shown == "[0, 0, 0] 2\n"


def test_a_coroutine_sends_by_a_thread(shop: Site) -> None:
    source = """
        import asyncio
        from shop import sell
        async def main():
            sent = await asyncio.gather(*(asyncio.to_thread(sell.delay, n) for n in range(5)))
            return [await asyncio.to_thread(result.get, timeout=20) for result in sent]
        print(asyncio.run(main()))
    """
    assert run(shop, source) == "[1, 2, 3, 4, 5]\n"


@pytest.mark.parametrize("shop", ["redis"], indirect=True)
def test_groups_chords_and_countdowns_arrive(shop: Site) -> None:
    source = """
        from celery import group, signature
        from shop import sell
        print(group(sell.s(n) for n in range(3)).delay().get(timeout=20), sell.apply_async((1,), countdown=1).get(timeout=20))
        print((sell.s(1) | sell.s()).delay().get(timeout=20))
    """
    assert run(shop, source) == "[1, 2, 3] 2\n3\n"


@pytest.mark.parametrize("shop", ["redis"], indirect=True)
def test_a_queue_that_is_not_declared_is_an_error_of_the_sender(shop: Site) -> None:
    source = "from shop import sell\nfrom celery.exceptions import QueueNotFound\n"
    source += "try: sell.apply_async((1,), queue='celery')\nexcept QueueNotFound as error: print(error)\n"
    assert "celery" in run(shop, source)


def test_bad_settings_are_an_exception_that_names_the_variable_each_time(site: Site) -> None:
    site.write(TASKS)
    site.set(broker_url="redis://127.0.0.1:1/0", publish_timeout="soon")
    source = """
        from shop import app, sell
        for _ in range(2):
            try:
                sell.delay(1)
            except Exception as error:
                print(type(error).__name__, error)
        print("lives")
    """
    told = "BadSettings CELERY_PLATFORM_PUBLISH_TIMEOUT is 'soon'"
    assert re.fullmatch(rf"{told}.*\n{told}.*\nlives\n", run(site, source))
    # Nor does the application see to it before it needs its broker.
    assert run(site, "import shop; print('imported')") == "imported\n"


def test_the_logs_and_the_signals_of_the_process_are_left_alone(site: Site) -> None:
    site.write(TASKS)
    site.set(broker_url="redis://127.0.0.1:1/0", log_format="json")
    source = """
        import logging, signal, sys
        logging.basicConfig(format="mine %(message)s", stream=sys.stdout, level=logging.INFO)
        before = [signal.getsignal(number) for number in signal.valid_signals()], logging.root.handlers[:], logging.getLogRecordFactory()
        from shop import app
        assert app.conf.broker_url.endswith(":1/0") and app.conf.task_create_missing_queues is False
        after = [signal.getsignal(number) for number in signal.valid_signals()], logging.root.handlers[:], logging.getLogRecordFactory()
        print(before == after)
    """
    assert run(site, source) == "True\n"


@pytest.mark.parametrize("broker", ["redis://127.0.0.1:1/0", "amqp://127.0.0.1:1//", "redis://192.0.2.1:6379/0"])
def test_a_broker_that_is_away_is_an_error_in_time(site: Site, broker: str) -> None:
    site.write(TASKS)
    site.set(broker_url=broker, publish_timeout="3")
    source = """
        import time
        from kombu.exceptions import OperationalError
        from shop import sell
        begin = time.monotonic()
        try: sell.delay(1)
        except OperationalError as error: print(round(time.monotonic() - begin, 1), error)
    """
    shown = run(site, source)
    seconds, _, told = shown.partition(" ")
    assert told.startswith("The broker did not take the task: ")
    assert 3 <= float(seconds) < 10


def test_who_waits_for_a_result_waits_through_a_failover(site: Site, tmp_path: Path) -> None:
    site.write(TASKS)
    with Servers(tmp_path) as servers, ThreadPoolExecutor() as pool:
        port = servers.redis()
        site.set(broker_url=f"redis://127.0.0.1:{port}/0", result_backend=f"redis://127.0.0.1:{port}/1", key_prefix="shop:")
        source = "from shop import sell\nprint(sell.apply_async((6,), task_id='one').get(timeout=30))"
        waiting = pool.submit(run, site, source, check=False)
        with redis.Redis(port=port) as client:
            wait_for("who waits", lambda: client.pubsub_channels("*one"))
        servers.kill(port)
        time.sleep(6)
        servers.redis(port=port)
        stored = Celery(backend=f"redis://127.0.0.1:{port}/1", set_as_current=False)
        stored.conf.result_backend_transport_options = {"global_keyprefix": "shop:"}
        stored.backend.store_result("one", 7, "SUCCESS")
        assert waiting.result(30) == "7\n"


def test_a_producer_needs_no_package_but_celery(site: Site, redis_url: str) -> None:
    site.write(TASKS)
    site.set(broker_url=f"{redis_url}/0")
    absent = "import sys; sys.modules |= dict.fromkeys(['cryptography', 'pybreaker', 'redbeat', 'prometheus_client'])\n"
    assert run(site, absent, "from shop import sell; print(len(sell.delay(1).id))") == "36\n"


def test_a_request_waits_ten_seconds_for_the_broker_unless_told_otherwise(site: Site) -> None:
    site.write(TASKS)
    site.set(broker_url="redis://127.0.0.1:1/0")
    source = "from shop import app; print(app.conf.task_publish_retry_policy['max_retries'])"
    assert run(site, source) == "10\n"
    site.set(publish_timeout="7")
    assert run(site, source) == "7\n"


def test_an_application_that_names_its_loader_keeps_its_broker(site: Site) -> None:
    site.write(TASKS)
    site.set(broker_url="redis://127.0.0.1:1/0")
    source = "from celery import Celery; print(Celery('own', broker='redis://127.0.0.1:2/0', loader='app').conf.broker_url)"
    assert run(site, source) == "redis://127.0.0.1:2/0\n"


def test_a_url_in_the_environment_of_the_process_is_no_other_broker(site: Site, redis_url: str) -> None:
    site.write(TASKS)
    site.set(broker_url=f"{redis_url}/0", result_backend=f"{redis_url}/1")
    site.environment |= {"CELERY_BROKER_URL": "redis://127.0.0.1:1/0", "CELERY_RESULT_BACKEND": "redis://127.0.0.1:1/1"}
    with site.worker("--queues=default"):
        assert run(site, "from shop import sell; print(sell.delay(1).get(timeout=20))") == "2\n"


def test_a_worker_is_configured_as_a_worker_whatever_the_environment_says(site: Site, redis_url: str) -> None:
    site.write(TASKS)
    site.set(broker_url=f"{redis_url}/0", result_backend=f"{redis_url}/1")
    with producer(site), site.worker("--queues=default"):
        assert site.producer().send_task("sell", (1,)).get(timeout=20) == 2


# --- What the user of producers may do in Redis ---

PASSWORD = "nX7cY2pK9mQ4wL8vD3fG6hJ1"


@pytest.fixture
def limited(site: Site, redis_url: str, tmp_path: Path) -> Iterator[tuple[Site, redis.Redis]]:
    """Return a site whose producers log in as the role redis lets them, and the Redis."""
    passwords = dict.fromkeys(["celery_app_redis_password", "celery_producer_redis_password"], PASSWORD)
    rules = inventory(tmp_path / "inventory", celery_app_name="shop", celery_app_queues=["batch", "default", "idle"], **passwords).render(
        "redis/templates/users.acl.j2"
    )
    server = redis.Redis.from_url(redis_url, decode_responses=True)
    for name in ("shop", "shop-producer"):
        (line,) = re.findall(rf"^user {name} (.*)$", rules, re.MULTILINE)
        # The rules are Debian 13's; this Redis may be Debian 12's, which does not know that command.
        server.execute_command("ACL", "SETUSER", name, "reset", *re.findall(r"\([^)]*\)|\S+", line.replace("+client|setinfo", "")))
    server.acl_log_reset()
    site.write(TASKS)
    site.set(broker_url=f"{redis_url}/0".replace("//", "//shop@"), result_backend=f"{redis_url}/1".replace("//", "//shop@"))
    site.set(key_prefix="shop:", queues='["batch", "default", "idle"]', routes='{"sell": {"queue": "batch", "priority": 3}}')
    site.secret(broker_password=PASSWORD, result_backend_password=PASSWORD)
    with site.worker("--queues=batch,default"):
        for name in ("BROKER_URL", "RESULT_BACKEND"):
            site.environment[f"CELERY_PLATFORM_{name}"] = site.environment[f"CELERY_PLATFORM_{name}"].replace("shop@", "shop-producer@")
        yield site, server
    for name in ("shop", "shop-producer"):
        server.acl_deluser(name)


def refused(server: redis.Redis) -> set[tuple[str, str]]:
    """Return what Redis has refused, and why; not what it has no need to know of a client's library."""
    return {(entry["reason"], entry["object"]) for entry in server.acl_log() if entry["object"] != "client|setinfo"}


def test_the_user_of_producers_can_do_all_that_sending_and_reading_results_takes(limited: tuple[Site, redis.Redis]) -> None:
    site, server = limited
    source = """
        from celery import chord, group
        from shop import app, sell
        print(group(sell.s(n) for n in range(3)).delay().get(timeout=20), sell.apply_async((1,), countdown=1).get(timeout=20))
        print((sell.s(1) | sell.s()).delay().get(timeout=20))
        print(chord([sell.s(1), sell.s(2)])(app.signature("total")).get(timeout=20))
        result = sell.delay(1); result.get(timeout=20); result.forget()
        from celery.result import GroupResult
        kept = group(sell.s(n) for n in range(2)).delay(); kept.save()
        print(GroupResult.restore(kept.id, app=app).get(timeout=20)); kept.delete()
    """
    assert run(site, source).splitlines() == ["[1, 2, 3] 2", "3", "5", "[1, 2]"]
    assert refused(server) == set()
    # One that is not confirmed is taken back.
    site.set(confirm_replicas="1", confirm_timeout="1", publish_timeout="1")
    told = run(site, "from shop import sell; sell.apply_async((1,), queue='idle')", check=False)
    assert re.search(r"The broker did not take the task: .* withdrawn: 0 of 1 replicas confirmed it", told)
    assert refused(server) == set()
    assert server.llen("shop:idle\x06\x163") == 0


def test_the_user_of_producers_can_do_nothing_else(limited: tuple[Site, redis.Redis]) -> None:
    _, server = limited
    address = server.connection_pool.connection_kwargs
    client = redis.Redis(address["host"], address["port"], username="shop-producer", password=PASSWORD, decode_responses=True)
    server.mset({"other": "x", "shop:mine": "x"})
    server.lpush("shop:default", "a task")
    attempts: list[tuple[str | int, ...]] = [
        ("GET", "other"),
        ("GET", "shop:mine"),
        ("LRANGE", "shop:default", 0, -1),
        ("RPOP", "shop:default"),
        ("BRPOP", "shop:default", 1),
        ("DEL", "shop:default"),
        ("HGETALL", "shop:unacked"),
        ("HGETALL", "shop:dead-letters"),
        ("PUBLISH", "/0.celery.pidbox", "shutdown"),
        ("PUBLISH", "shop:/0.celery.pidbox", "shutdown"),
        ("KEYS", "*"),
        ("SCAN", 0),
        ("FLUSHALL",),
        ("CONFIG", "GET", "*"),
        ("ACL", "LIST"),
        ("EVAL", "return redis.call('GET', 'other')", 0),
    ]
    for attempt in attempts:
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*attempt)
