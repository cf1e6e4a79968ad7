"""Brokers and result backends at IPv6 addresses, which stand in brackets in the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.sentinels import MASTER, PASSWORD, Servers
from helpers.sites import Site, wait_for

SHOP = """
from celery import Celery
app = Celery("shop")

@app.task
def add(a, b):
    return a + b

@app.task
def fail():
    raise LookupError("out of stock")
"""


@pytest.fixture(params=["redis", "rediss", "sentinel", "amqp"])
def shop(request: pytest.FixtureRequest, site: Site, tmp_path: Path) -> Iterator[Site]:
    """Return a site whose broker and result backend listen on ::1 only, or for RabbitMQ are reached there."""
    scheme: str = request.param
    site.write(SHOP)
    with Servers(tmp_path, tls=scheme in ("rediss", "sentinel"), address="::1") as servers:
        port = servers.redis()
        if servers.tls:
            site.set(tls_ca_file=str(servers.ca))
            site.secret(broker_password=PASSWORD, result_backend_password=PASSWORD)
        redis = f"{'rediss' if servers.tls else 'redis'}://[::1]:{port}"
        if scheme == "sentinel":
            redis = ";".join([f"sentinel://[::1]:{servers.sentinel(port)}"] * 2)
            site.set(sentinel_master=MASTER)
        site.set(broker_url=";".join(f"{url}/0" for url in redis.split(";")), result_backend=f"{redis}/1")
        if scheme == "amqp":
            url, _ = request.getfixturevalue("rabbitmq")
            site.set(broker_url=url.replace("127.0.0.1", "[::1]"))
            site.secret(broker_password="guest")
        yield site


def test_a_worker_reaches_everything_by_ipv6(shop: Site) -> None:
    with shop.worker("--without-mingle"):
        producer = shop.producer()
        assert producer.send_task("shop.add", (1, 2)).get(timeout=20) == 3
        producer.send_task("shop.fail").get(timeout=20, propagate=False)

    def letters() -> str:
        return shop.run("python", "-m", "celery_platform.cli", "dead-letters", "list").stdout

    wait_for("the dead letter", lambda: "shop.fail" in letters())
    assert "[::1]" in shop.run("python", "-m", "celery_platform.cli", "config").stdout


def test_redbeat_reaches_its_schedule_by_ipv6(environment: Callable[..., None], tmp_path: Path) -> None:
    import redbeat
    from celery import Celery

    from celery_platform import beat, configuration
    from celery_platform.settings import load_settings

    with Servers(tmp_path, address="::1") as servers:
        port = servers.redis()
        for url in (f"redis://[::1]:{port}/0", f"sentinel://[::1]:{servers.sentinel(port)}/0"):
            environment(broker_url=url, sentinel_master=MASTER)
            app = Celery("shop", set_as_current=False)
            settings = load_settings()
            configuration.apply(app, settings)
            beat.install(app, settings)
            assert redbeat.schedulers.get_redis(app).ping()
