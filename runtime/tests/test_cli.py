"""The command `celery-platform`, run as an operator runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest
from click import BadParameter

from celery_platform.cli import _printable, _since, hider
from celery_platform.settings import Settings
from helpers.shop import SHOP, letter, shop, store_of
from helpers.sites import Site, cli

__all__ = ["shop"]


def test_config_tells_where_each_value_is_from_and_no_secret(site: Site) -> None:
    own = "app.conf.update(timezone='Europe/Berlin', broker_url='redis://:0wn@localhost', task_time_limit=700)"
    site.write(f"from celery import Celery\napp = Celery('shop')\n{own}\n")
    site.set(broker_url="sentinel://shop@a:26379;sentinel://shop@b:26379", result_backend="redis://shop@c/1", time_limit="1000")
    secrets = {
        "broker_password": "br0ker/pw",
        "result_backend_password": "res3lt",
        "sentinel_password": "sentin3l",
        "alert_webhook": "https://x/h00k",
    }
    site.secret(**secrets)
    rows = {row["name"]: row for row in json.loads(cli(site, "config", "--json").stdout)}
    shown = cli(site, "config").stdout
    assert rows["CELERY_PLATFORM_TIME_LIMIT"] == {"name": "CELERY_PLATFORM_TIME_LIMIT", "value": 1000, "source": "environment"}
    assert (rows["CELERY_PLATFORM_MAX_RUNS"]["source"], rows["CELERY_PLATFORM_BROKER_PASSWORD"]["source"]) == ("default", "credential")
    sources = [rows[name]["source"] for name in ("task_time_limit", "timezone", "task_acks_late")]
    assert sources == ["environment", "application", "default"]
    assert rows["broker_url"]["value"] == "sentinel://shop:********@a:26379;sentinel://shop:********@b:26379"
    assert rows["broker_transport_options"]["value"]["sentinel_kwargs"]["password"] == "********"
    assert "Europe/Berlin" in shown
    told = [(rows[name]["value"], rows[name]["overridden"], rows[name]["reason"]) for name in ("task_time_limit",)]
    assert told == [(1000, 700, "CELERY_PLATFORM_TIME_LIMIT is set")]
    assert rows["broker_url"]["overridden"] == "redis://:********@localhost"
    for secret in ("br0ker", "res3lt", "sentin3l", "h00k", "0wn"):
        assert secret not in shown + json.dumps(rows)


def test_config_shows_values_as_they_are_written(site: Site) -> None:
    site.write("from celery import Celery\napp = Celery('shop')\n")
    (site.folder / "ca.crt").touch()
    site.set(
        broker_url="amqps://shop@a//",
        time_limit="1000",
        queues='["default", {"name": "batch", "priority": 1}]',
        routes='{"a.*": {"queue": "batch"}}',
    )
    site.set(tls_ca_file=str(site.folder / "ca.crt"))
    site.environment["TZ"] = "UTC"
    rows = [line.split("\t") for line in cli(site, "config").stdout.splitlines()]
    assert rows[0] == ["Name", "Value", "From", "Overruled"]
    shown = {name: (value, source) for name, value, source, _ in rows}
    assert shown["task_soft_time_limit"] == ("600", "default")
    assert shown["task_time_limit"] == ("1000", "environment")
    assert shown["CELERY_PLATFORM_QUEUES"] == ('["default", {"name": "batch", "priority": 1}]', "environment")
    assert shown["task_queues"] == ('["default", "batch"]', "environment")
    assert shown["task_routes"] == ('[{"a.*": {"queue": "batch"}}]', "environment")
    assert shown["timezone"] == ("UTC", "environment")
    assert shown["broker_url"] == ("amqps://shop@a//", "environment")
    assert shown["broker_heartbeat"] == ("20", "default")
    assert '"cert_reqs": "CERT_REQUIRED"' in shown["broker_use_ssl"][0]
    assert not [value for value, _ in shown.values() if value in ("null", "") or re.search(r"<|object|kombu\.|  ", value)]


def test_a_table_fits_its_terminal(site: Site) -> None:
    site.write("from celery import Celery\napp = Celery('shop')\n")
    site.set(broker_url="redis://a/0")
    command = f"stty cols 100; {sys.executable} -m celery_platform.cli config"
    lines = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        env=os.environ | site.environment,
        cwd=site.folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(lines) > 50
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in lines) <= 100


def test_bad_settings_are_told(site: Site) -> None:
    site.write(SHOP)
    assert "CELERY_PLATFORM_BROKER_URL" in cli(site, "config", status=78).stderr


def test_dead_letters_are_listed_shown_replayed_and_forgotten(shop: Site) -> None:
    store = store_of(shop.producer())
    store.add(letter("1", failed=time.time() - 7000, message="\x1b[2J[red]out of stock"))
    store.add(letter("2", task="mails.send", reason="time-limit"))
    store.add(letter("3"))

    def ids(*filters: str) -> list[str]:
        return [told["id"] for told in json.loads(cli(shop, "dead-letters", "list", "--json", *filters).stdout)]

    assert ids() == ["1", "2", "3"]
    assert ids("--task", "mails.*", "--queue", "default", "--reason", "time-limit", "--since", "2h") == ["2"]
    assert ids("--since", "1h", "--reason", "failed") == ["3"]
    table = cli(shop, "dead-letters", "list").stdout
    assert "ValueError: \N{REPLACEMENT CHARACTER}[2J[red]out of stock" in table
    assert "3 dead letters" in table
    shown = cli(shop, "dead-letters", "show", "1").stdout
    assert "Traceback: here" in shown
    assert "s3cret" not in table + shown
    assert "s3cret" in cli(shop, "dead-letters", "show", "1", "--arguments").stdout

    (shop.folder / "fixed").touch()
    assert "1 replayed" in cli(shop, "dead-letters", "replay", "1").stdout
    with shop.worker("--queues=default", "--without-mingle", "--without-gossip"):
        assert shop.producer().AsyncResult("1").get(timeout=10) is None
    assert (shop.folder / "ran").read_text().split() == ["fails"]

    gone = cli(shop, "dead-letters", "replay", "1", status=1)
    assert ("0 replayed" in gone.stdout, "There is no dead letter 1." in gone.stderr) == (True, True)
    cli(shop, "dead-letters", "purge", "--all", status=1, input="n\n")
    assert ids() == ["2", "3"]
    assert "1 forgotten" in cli(shop, "dead-letters", "purge", "--all", "--task", "mails.*", "--yes").stdout
    assert "1 replayed" in cli(shop, "dead-letters", "replay", "--all", "--yes").stdout
    assert ids() == []


@pytest.mark.parametrize("shop", ["redis"], indirect=True)
def test_wrong_calls_are_refused(shop: Site) -> None:
    cli(shop, "dead-letters", "purge", "--yes", status=2)
    cli(shop, "dead-letters", "replay", "1", "--all", status=2)
    cli(shop, "dead-letters", "show", "1", status=1)
    shop.set(broker_url="redis://127.0.0.1:1/0")
    away = cli(shop, "dead-letters", "list", status=1).stderr
    assert "Error: OperationalError" in away


def test_secrets_are_hidden_wherever_they_stand() -> None:
    hide = hider(Settings(application="shop:app", broker_url="amqp://a", broker_password="br0ker/pw"))
    assert hide(["x br0ker/pw", "x br0ker%2Fpw"]) == ["x ********", "x ********"]
    assert hide({"url": "redis://:other@host/0;redis://user:other@host"}) == {"url": "redis://:********@host/0;redis://user:********@host"}
    assert hide({"password": "other", "port": 1}) == {"password": "********", "port": 1}


def test_small_things() -> None:
    assert _printable("a\x1b]0;b\x07\nc") == "a\N{REPLACEMENT CHARACTER}]0;b\N{REPLACEMENT CHARACTER}\nc"
    found = _since(None, None, "2h")  # type: ignore[arg-type]
    assert found is not None
    assert abs(time.time() - 7200 - found) < 5
    with pytest.raises(BadParameter):
        _since(None, None, "2 weeks")  # type: ignore[arg-type]
