"""Connections to brokers that come and go."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis
from celery import Celery
from redbeat.schedulers import get_redis

from celery_platform import beat, broker
from celery_platform.settings import SecretStr, Settings
from helpers.brokers import rabbitmq, rabbitmq_node
from helpers.sentinels import PASSWORD as SERVERS_PASSWORD
from helpers.sentinels import Servers
from helpers.sites import Site, wait_for

__all__ = ["rabbitmq", "rabbitmq_node"]

SHOP = """
from celery import Celery
app = Celery("shop")
"""


def test_a_broker_that_is_there_again_is_found_soon(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.write(SHOP)
    with Servers(tmp_path) as servers:
        port = servers.redis()
        site.set(broker_url=f"redis://127.0.0.1:{port}/0")
        with site.worker("--without-mingle"):
            servers.kill(port)
            # kombu's own intervals would make it look again after 2, 6 and 12 seconds.
            time.sleep(6.5)
            assert "Cannot connect" in site.log()
            back = time.monotonic()
            servers.redis(port=port)
            wait_for("a connected worker", lambda: site.log().count("Connected to redis") == 2)
            assert time.monotonic() - back < 3


#: Every printable character of ASCII, and some beyond.
PASSWORD = "".join(map(chr, range(0x20, 0x7F))) + "ß€😀"


def application(**values: Any) -> tuple[Celery, Settings]:
    """Return an application that logs in with PASSWORD, and its settings."""
    passwords = dict.fromkeys(("broker_password", "result_backend_password", "sentinel_password"), SecretStr(PASSWORD))
    settings = Settings(application="shop:app", key_prefix="shop:", **passwords | values)
    app = Celery("shop", set_as_current=False)
    app.conf.update(broker.celery_config(settings) | beat.celery_config(settings))
    return app, settings


def test_redis_takes_a_password_of_all_characters_wherever_celery_logs_in(tmp_path: Path) -> None:
    with Servers(tmp_path) as servers:
        port = servers.redis()
        administrator = redis.Redis(port=port)
        administrator.acl_setuser("shop", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], channels=["*"], commands=["+@all"])
        administrator.acl_setuser("default", enabled=False)
        url = f"redis://shop@127.0.0.1:{port}/0"
        app, settings = application(broker_url=url, result_backend=url)

        with app.connection_for_write() as connection:
            assert connection.default_channel.client.ping()
        assert app.backend.client.ping()
        assert broker.redis_client(settings, url, settings.broker_password, 5).ping()
        assert get_redis(app).ping()


def test_sentinel_is_given_the_password_as_it_is() -> None:
    url = "sentinel://shop@a:26379/0;sentinel://shop@b:26379/0"
    app, settings = application(broker_url=url, result_backend=url)

    assert app.backend.connparams["hosts"][1]["password"] == PASSWORD
    assert app.connection_for_write().password == PASSWORD
    assert broker.sentinel_options(settings)["password"] == PASSWORD


def test_rabbitmq_takes_a_password_of_all_characters(
    rabbitmq_node: tuple[str, Callable[..., str]], rabbitmq: tuple[str, Callable[..., str]]
) -> None:
    (_, control), (url, control_vhost) = rabbitmq_node, rabbitmq
    vhost = urlsplit(url).path[1:]
    control("add_user", "shop", PASSWORD)
    control_vhost("set_permissions", "shop", ".*", ".*", ".*")
    app, _ = application(broker_url=url.replace("guest", "shop"), result_backend=None)

    with app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1)
        assert connection.connected
        assert connection.virtual_host == vhost


def test_a_broker_of_others_is_verified_by_the_cas_of_the_system(tmp_path: Path) -> None:
    """As with managed Redis: no file of CAs is named. OpenSSL takes those of the system from SSL_CERT_FILE, if that is set."""
    site = Site(tmp_path)
    site.write(SHOP + "@app.task(name='sell')\ndef sell(number):\n    return number + 1\n")
    with Servers(tmp_path, tls=True) as servers:
        port = servers.redis()
        site.set(broker_url=f"rediss://default@127.0.0.1:{port}/0", result_backend=f"rediss://default@127.0.0.1:{port}/1")
        site.set(publish_timeout="1")
        site.secret(broker_password=SERVERS_PASSWORD, result_backend_password=SERVERS_PASSWORD)
        site.environment["CELERY_LOADER"] = "celery_platform.producer:Loader"
        send = ("python", "-c", "from shop import sell; print(sell.delay(1).get(timeout=20))")
        assert "certificate verify failed" in site.run(*send, check=False).stderr
        site.environment["SSL_CERT_FILE"] = str(servers.ca)
        with site.worker("--without-mingle"):
            assert site.run(*send).stdout == "2\n"
