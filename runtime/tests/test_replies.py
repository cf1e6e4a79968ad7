"""What workers answer to remote control: every command of real workers on real brokers, and a real Flower."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from celery.worker.control import Panel

from celery_platform.replies import without_secrets
from helpers.sentinels import MASTER, Servers
from helpers.sites import Site, wait_for

#: Each needs quoting in a URL, and none is part of a word.
SECRETS = {"broker_password": "br0ker/p@ss", "sentinel_password": "s3ntinel/p@ss", "result_backend_password": "res/ult p@ss"}
#: What the application was given besides: in variables of the environment, and as a credential of its own.
VARIABLES = {"MAIL_WORD": "m@il/w0rd", "DATABASE_URL": "postgres://shop:d8%2Fbase@host/shop"}
OWN = {"signature": "s1gn/ature"}

SHOP = """
import os, time
from celery import Celery
from celery.worker.control import Panel, inspect_command
from kombu import Connection

app = Celery("shop")
app.conf.update(shop_token="t0ken", database_url="postgres://shop:d4tabase@host/shop")

@app.task(name="slow")
def slow(seconds):
    time.sleep(seconds)

@inspect_command()
def leak(state):
    def read(name):
        path = os.path.join(os.environ["CREDENTIALS_DIRECTORY"], name)
        return open(path).read() if os.path.exists(path) else ""
    words = [read(name) for name in ("broker_password", "sentinel_password", "result_backend_password", "signature")]
    words += [os.environ["MAIL_WORD"], os.environ["DATABASE_URL"], "d8/base"]
    return {
        "url": app.conf.broker_url, "text": "".join(f"-{word}-" for word in words), "tuple": tuple(words),
        "bytes": words[0].encode(), words[0] or "none": 1, "connection": state.consumer.connection.info(),
        "key": "0ther", "tokens": ["0ther", {"a": "0ther"}], "routing_key": "shop", "error": repr(ValueError(words[0])),
    }

@inspect_command()
def fail(state):
    raise ValueError(app.conf.broker_url)
"""

#: What commands are called with, those that need something.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "query_task": {"ids": ["1"]},
    "revoke": {"task_id": "2"},
    "revoke_by_stamped_headers": {"headers": {"a": ["b"]}},
    "terminate": {"signal": "KILL", "task_id": "2"},
    "rate_limit": {"task_name": "slow", "rate_limit": "10/s"},
    "time_limit": {"task_name": "slow", "hard": 100},
    "election": {"id": "1", "topic": "t", "action": None},
    "hello": {"from_node": "other@here"},
    "conf": {"with_defaults": True},
    "registered": {"taskinfoitems": ["rate_limit"], "builtins": True},
    "add_consumer": {"queue": "batch"},
    "cancel_consumer": {"queue": "batch"},
    "pool_grow": {"n": 1},
    "pool_shrink": {"n": 1},
}


@pytest.fixture
def rabbitmq_user(rabbitmq_node: tuple[str, Callable[..., str]]) -> Iterator[None]:
    """A user `shop` of RabbitMQ."""
    _, control = rabbitmq_node
    control("add_user", "shop", SECRETS["broker_password"])
    yield
    control("delete_user", "shop")


@pytest.fixture(params=["redis", "sentinel", "rabbitmq"])
def shop(request: pytest.FixtureRequest, site: Site, tmp_path: Path) -> Iterator[Site]:
    """A site with passwords for all that it reaches."""
    site.write(SHOP)
    site.set(queues='["default", "batch"]')
    with Servers(tmp_path) as servers:
        master = servers.redis(requirepass=SECRETS["broker_password"])
        servers.client(master).execute_command(
            "ACL", "SETUSER", "results", "on", "~*", "&*", "+@all", f">{SECRETS['result_backend_password']}"
        )
        site.set(broker_url=f"redis://127.0.0.1:{master}/0", result_backend=f"redis://results@127.0.0.1:{master}/1")
        if request.param == "sentinel":
            sentinel = servers.sentinel(master, password=SECRETS["sentinel_password"], master_password=SECRETS["broker_password"])
            site.set(broker_url=f"sentinel://127.0.0.1:{sentinel}/0", sentinel_master=MASTER)
        if request.param == "rabbitmq":
            url, control = request.getfixturevalue("rabbitmq")
            request.getfixturevalue("rabbitmq_user")
            control("set_permissions", "shop", ".*", ".*", ".*")
            site.set(broker_url=url.replace("guest@", "shop@"))
        site.secret(**SECRETS, **OWN)
        site.set(secret_variables=json.dumps([*VARIABLES]))
        site.environment |= VARIABLES
        yield site


def leaks(text: str) -> list[str]:
    """Return the secrets in a text, in whatever form."""
    words = [*SECRETS.values(), *VARIABLES.values(), *OWN.values(), "d8/base", "t0ken", "d4tabase", "0ther"]
    return [word for word in words for form in {word, quote(word), quote(word, safe=""), json.dumps(word)[1:-1]} if form in text]


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_no_command_answers_with_a_secret(shop: Site, pool: str) -> None:
    node = "one@here"
    with shop.worker(f"--hostname={node}", "--queues=default", f"--pool={pool}", "--without-gossip", "--without-mingle"):
        app = shop.producer()
        if pool != "solo":
            # There, a task keeps its worker from answering.
            app.send_task("slow", (5,), task_id="1")
        answers = {}
        commands = sorted((set(Panel.data) | {"leak", "fail"}) - {"shutdown", "pool_restart"})
        assert len(commands) > 25
        for command in commands:
            reply = app.control.broadcast(command, arguments=ARGUMENTS.get(command, {}), reply=True, limit=1, timeout=4)
            assert reply, (command, shop.log()[-3000:])
            answers[command] = reply[0][node]
    assert {command: found for command, answer in answers.items() if (found := leaks(json.dumps(answer, default=str)))} == {}
    # They still say what they are asked for.
    assert answers["ping"] == {"ok": "pong"}
    assert answers["stats"]["broker"]["transport"] in ("redis", "sentinel", "amqp")
    assert "slow" in json.dumps(answers["registered"])
    assert answers["active_queues"][0]["routing_key"] == "default"
    assert answers["leak"]["routing_key"] == "shop"
    assert answers["leak"]["url"].count("********") == 1
    assert "ValueError" in answers["fail"]["error"]


@pytest.mark.parametrize("shop", ["sentinel"], indirect=True)
def test_flower_shows_no_secret(shop: Site) -> None:
    shop.environment["FLOWER_UNAUTHENTICATED_API"] = "true"
    with shop.worker("--hostname=one@here", "--queues=default"), shop.flower() as get:
        api = wait_for("the worker's answers", lambda: (text := get("api/workers?refresh=1")) and "sentinel_kwargs" in text and text)
        pages = {path: wait_for(path, lambda path=path: get(path)) for path in ("worker/one@here", "broker", "workers", "tasks", "")}
    assert "sentinel_kwargs" in pages["worker/one@here"]
    shown = pages | {"api": api, "log": (shop.folder / "flower.log").read_text()}
    assert {name: found for name, text in shown.items() if (found := leaks(text))} == {}


@pytest.mark.parametrize("shop", ["redis", "sentinel"], indirect=True)
def test_who_asks_waits_no_longer_than_for_the_last_answer(shop: Site) -> None:
    options = ("--queues=default", "--without-gossip", "--without-mingle")
    shop.write(SHOP + "\n@inspect_command()\ndef slowly(state):\n    time.sleep('two' in state.hostname)\n    return state.hostname\n")
    ask = """
import time
from celery_platform.worker import app
app.control.ping(timeout=5)
for command in ("ping", "slowly"):
    start = time.monotonic()
    answers = app.control.broadcast(command, reply=True, timeout=5)
    assert len(answers) == 2, answers
    assert time.monotonic() - start < 4
start = time.monotonic()
assert [*app.control.inspect(destination=["one@here"], timeout=5).ping()] == ["one@here"]
assert time.monotonic() - start < 4
assert app.control.inspect(destination=["none@here"], timeout=1).ping() is None
assert [*app.control.inspect(pattern="t*", matcher="glob", timeout=1).ping()] == ["two@here"]
"""
    with shop.worker("--hostname=one@here", *options), shop.worker("--hostname=two@here", *options):
        shop.run("python", "-c", ask)


def test_only_what_is_a_secret_is_hidden() -> None:
    answer = {
        "sentinel_kwargs": {"password": "a", "ssl_keyfile": "/k"},
        "total": {"shop.reset_password": 3},
        "exchange": {"routing_key": "default"},
        "global_keyprefix": "shop:",
        "api_key": None,
        "Secrets": [{"a"}, ["a", {"b": "c"}], True],
    }
    hidden = without_secrets(answer, lambda text: text)
    assert hidden["sentinel_kwargs"] == {"password": "********", "ssl_keyfile": "/k"}
    assert hidden["Secrets"] == [["********"], ["********", {"b": "********"}], True]
    assert {name: hidden[name] for name in ("total", "exchange", "global_keyprefix", "api_key")} == {
        name: answer[name] for name in ("total", "exchange", "global_keyprefix", "api_key")
    }
