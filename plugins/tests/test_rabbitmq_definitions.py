"""The role's definitions, and the module `rabbitmq_definitions`, with a real RabbitMQ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from amqp import Message
from amqp.exceptions import AccessRefused, NotAllowed
from celery import Celery
from celery.events.event import event_exchange
from kombu import Connection, Exchange, Queue

from celery_platform import configuration, guards
from celery_platform.dead_letters import RabbitStore
from celery_platform.settings import Settings
from helpers import REPOSITORY
from helpers.brokers import rabbitmq_node
from helpers.sites import Site
from helpers.targets import only_in_test_all
from helpers.waiting import wait_for

__all__ = ["rabbitmq_node"]

PLAY = """
- hosts: localhost
  gather_facts: false
  tasks:
    - block:
        - import_role: {name: rabbitmq, tasks_from: definitions.yml}
        - copy: {content: "{{ __rabbitmq_defined | to_json }}", dest: result.json}
          check_mode: false
      rescue:
        - copy: {content: "{{ ansible_failed_result | to_json }}", dest: result.json}
          check_mode: false
"""

Define = Callable[..., dict[str, Any]]
Control = Callable[..., str]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="RabbitMQ's commands are for root")


@pytest.fixture
def control(rabbitmq_node: tuple[str, Control]) -> Control:
    return rabbitmq_node[1]


@pytest.fixture
def define(control: Control, tmp_path: Path) -> Define:
    """Return a function that runs the role's tasks with these users and applications, and returns the module's result."""
    (tmp_path / "play.yml").write_text(PLAY)
    home, node = (control("eval", code).strip().strip('"') for code in ('os:getenv("HOME").', "atom_to_list(node())."))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    environment |= {"ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "HOME": home}
    # As root, where Debian's command would become another user.
    environment["PATH"] = f"/usr/lib/rabbitmq/bin:{environment['PATH']}"

    def run(users: list[dict[str, str]], applications: dict[str, list[str]], *options: str, node: str = node) -> dict[str, Any]:
        variables = {
            "rabbitmq_users": [{"password": password(user["name"])} | user for user in users],
            "rabbitmq_applications": [{"name": name, "queues": queues} for name, queues in applications.items()],
            "__rabbitmq_node": node,
            "ansible_python_interpreter": sys.executable,
        }
        (tmp_path / "variables.json").write_text(json.dumps(variables))
        command = [Path(sys.executable).parent / "ansible-playbook", "-i", "localhost,", "-c", "local", "-e", "@variables.json"]
        done = subprocess.run(
            [*command, "-vvv", "--diff", *options, "play.yml"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        for user in variables["rabbitmq_users"]:
            assert user["password"] not in done.stdout + done.stderr
        return json.loads((tmp_path / "result.json").read_text())

    return run


@pytest.fixture
def channel(rabbitmq_node: tuple[str, Control]) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a channel of a user to a vhost."""
    opened = []

    def channel_of(user: str, vhost: str = "orders") -> Any:
        address = rabbitmq_node[0].rpartition("@")[2]
        connection = Connection(f"amqp://{address}/{vhost}", userid=user, password=password(user))
        opened.append(connection)
        return connection.channel()

    yield channel_of
    for connection in opened:
        connection.close()


def password(user: str) -> str:
    return f"Aa1/{user}-'\"ü{user}"


def definitions(control: Control, vhost: str = "") -> dict[str, list[dict[str, Any]]]:
    """Return what the node has, or what is in a vhost of it."""
    every = json.loads(control("export_definitions", "-"))
    return {
        kind: [
            {name: value for name, value in item.items() if name != "vhost"} for item in items if not vhost or item.get("vhost") == vhost
        ]
        for kind, items in every.items()
        if isinstance(items, list)
    }


def names(control: Control, kind: str) -> set[str]:
    return {item.get("name") or item["user"] for item in definitions(control)[kind]}


USERS = [
    {"name": "root", "purpose": "administrator"},
    {"name": "orders"},
    {"name": "web", "purpose": "producer"},
    {"name": "flower", "purpose": "monitoring"},
]


@only_in_test_all
def test_what_it_defines_is_what_the_runtime_declares(define: Define, control: Control, rabbitmq_node: tuple[str, Control]) -> None:
    queues = ["critical", "default", "mail.eu"]
    control("add_vhost", "declared")
    control("set_permissions", "--vhost", "declared", "guest", ".*", ".*", ".*")
    app = Celery("shop", set_as_current=False)
    settings = Settings(application="shop:app", broker_url=f"{rabbitmq_node[0]}/declared", broker_password="guest", queues=queues)
    configuration.apply(app, settings)
    guards.install(app, settings)
    guards.declare_delays(app)
    with app.connection_for_write() as connection:
        RabbitStore.queue(connection.default_channel).declare()
        event_exchange(connection.default_channel).declare()

    checked = define(USERS, {"shop": queues}, "--check")
    assert checked["changed"]
    assert "add queue shop/mail.eu" in checked["changes"]
    assert names(control, "users") == {"guest"}

    assert define(USERS, {"shop": queues})["changes"] == checked["changes"]
    ours, declared = definitions(control, "shop"), definitions(control, "declared")
    for kind in ("exchanges", "queues", "bindings"):
        assert sorted(map(str, ours[kind])) == sorted(map(str, declared[kind]))
    assert names(control, "users") == {"root", "orders", "web", "flower"}
    for user in USERS:
        assert "Success" in control("authenticate_user", user["name"], password(user["name"]))
    for options in ([], ["--check"]):
        again = define(USERS, {"shop": queues}, *options)
        assert (again["changed"], again["changes"], again["conflicts"]) == (False, [], [])
    control("delete_vhost", "declared")


@only_in_test_all
def test_a_password_is_changed_when_it_is_another(define: Define, control: Control, channel: Callable[..., Any]) -> None:
    define(USERS, {"shop": ["default"]})
    opened = channel("orders", "shop")
    changed = [USERS[0], {"name": "orders", "password": "An0ther/password"}, *USERS[2:]]
    assert define(changed, {"shop": ["default"]})["changes"] == ["change user orders: password"]
    assert "Success" in control("authenticate_user", "orders", "An0ther/password")
    with pytest.raises(subprocess.CalledProcessError):
        control("authenticate_user", "orders", password("orders"))
    # Who is connected stays so.
    opened.queue_declare("default", passive=True)


@only_in_test_all
def test_what_is_ours_and_unwanted_goes_and_all_else_stays(define: Define, control: Control) -> None:
    define([*USERS, {"name": "left"}], {"shop": ["default"], "other": ["default"]})
    control("add_user", "guest", "guest")
    control("add_user", "own", "own")
    control("add_vhost", "own")
    for user, vhost in (("own", "own"), ("own", "shop"), ("orders", "own"), ("left", "own")):
        control("set_permissions", "--vhost", vhost, user, "^a$", "^b$", "^c$")
    for name, vhost in (("own", "shop"), ("celery-platform-old", "shop"), ("celery-platform-old", "own")):
        control("set_policy", "--vhost", vhost, name, "^x$", '{"max-length": 5}')

    # A queue that is no longer wanted may hold tasks.
    control("eval", 'rabbit_amqqueue:declare(rabbit_misc:r(<<"shop">>, queue, <<"old">>), true, false, [], none, <<"test">>).')

    moved = [user | ({"application": "other"} if user["name"] == "web" else {}) for user in USERS]
    arguments = moved, {"shop": ["default"], "other": ["default"]}
    for options in (["--check"], []):
        assert define(*arguments, *options)["changes"] == [
            "add permission other/web",
            "remove user guest",
            "remove user left",
            "remove permission own/orders",
            "remove permission shop/web",
            "remove policy shop/celery-platform-old",
        ]
    assert names(control, "users") == {"root", "orders", "web", "flower", "own"}
    assert "old" in {item["name"] for item in definitions(control, "shop")["queues"]}
    assert {"own", "shop", "other"} <= names(control, "vhosts")
    assert [item["user"] for item in definitions(control, "own")["permissions"]] == ["own"]
    assert [item["name"] for item in definitions(control, "own")["policies"]] == ["celery-platform-old"]
    assert sorted(item["name"] for item in definitions(control, "shop")["policies"]) == ["celery-platform", "own"]


def test_what_cannot_be_changed_stops_all_else(define: Define, control: Control) -> None:
    control("add_vhost", "fixed")
    # With another default type of queues, which RabbitMQ 3.10 does not change, nor need be.
    assert "add queue fixed/default" in define(USERS, {"fixed": ["default"]})["changes"]
    control("eval", 'rabbit_amqqueue:declare(rabbit_misc:r(<<"fixed">>, queue, <<"mail">>), true, false, [], none, <<"test">>).')
    arguments = [*USERS, {"name": "new"}], {"fixed": ["default", "mail"]}
    told = 'queue fixed/mail has {"arguments": {}}, not {"arguments": {"x-queue-type": "quorum"}}'
    assert define(*arguments, "--check")["conflicts"] == [told]

    failed = define(*arguments)
    assert failed["msg"] == f"RabbitMQ cannot change what exists, and nothing was changed: {told}"
    assert "new" not in names(control, "users")


@only_in_test_all
def test_a_check_of_a_node_that_does_not_run_says_all(define: Define) -> None:
    checked = define(USERS, {"shop": ["default"]}, "--check", node="none@localhost")
    assert checked["changed"]
    assert checked["conflicts"] == []
    assert "none@localhost" in define(USERS, {"shop": ["default"]}, node="none@localhost")["msg"]


# --- What users may do ---

SHOP = """
import os
from celery import Celery
app = Celery("shop")

def ran(line):
    with open("ran", "a") as file:
        print(line, file=file)

@app.task(name="works")
def works(name):
    ran(name)

@app.task(name="sends")
def sends():
    app.send_task("works", ("sent",), countdown=1, queue="critical")
    app.send_task("works", ("sent at once",))

@app.task(name="retries", bind=True)
def retries(self):
    if self.request.retries < 1:
        self.retry(countdown=1)
    ran("retried")

@app.task(name="fails")
def fails():
    if not os.path.exists("fixed"):
        raise ValueError("no stock")
    ran("fixed")
"""
SEND = """
from celery_platform.worker import app
app.send_task("works", ("later",), countdown=1)
app.send_task("works", ("critical",), queue="critical", expires=60)
for name in ("sends", "retries", "fails"):
    app.send_task(name)
"""
WATCH = """
import threading, time
from prometheus_client import CollectorRegistry
from celery_platform import exporter
from celery_platform.settings import load_settings
from celery_platform.worker import app
settings = load_settings()
look = exporter.RabbitMQ(app, settings, exporter.Events(settings, CollectorRegistry())).look()
print(*sorted(look.consumers.items()), look.dead_letters)
seen = set()
with app.connection_for_read() as connection:
    receiver = app.events.Receiver(connection, handlers={"*": lambda event: seen.add(event["type"])})
    threading.Thread(target=lambda: receiver.capture(limit=None), daemon=True).start()
    print(*sorted(queue["name"] for queues in app.control.inspect(timeout=3).active_queues().values() for queue in queues))
    print(app.control.ping(timeout=2)[0].popitem()[1]["ok"])
    open("watching", "w").close()
    while not {"task-sent", "task-received", "task-succeeded"} <= seen:
        time.sleep(0.1)
"""
REVOKE = """
from celery_platform.worker import app
task = app.send_task("works", ("revoked",), countdown=2)
app.control.revoke(task.id)
"""


@pytest.fixture
def sites(define: Define, rabbitmq_node: tuple[str, Control], tmp_path: Path) -> Callable[[str], Site]:
    """Return a function that gives a site whose services are a user."""
    define(USERS, {"orders": ["default", "critical"], "other": ["default"]})
    address = rabbitmq_node[0].rpartition("@")[2]

    def site_of(user: str) -> Site:
        site = Site(tmp_path, f"credentials-{user}")
        site.write(SHOP)
        site.set(broker_url=f"amqp://{user}@{address}/orders", queues='["default", "critical"]', declare_queues="false")
        site.secret(broker_password=password(user))
        return site

    return site_of


def refusals(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "refused for user" in line]


def test_each_user_can_do_what_it_is_for(sites: Callable[[str], Site], control: Control) -> None:
    log = Path(control("eval", 'os:getenv("HOME").').strip().strip('"')) / "out"
    worker, producer, monitoring = (sites(name) for name in ("orders", "web", "flower"))

    def ran() -> list[str]:
        path = worker.folder / "ran"
        return sorted(path.read_text().splitlines()) if path.exists() else []

    # Before a worker ever ran.
    producer.run("python", "-c", SEND)
    with worker.worker("--queues=default,critical"):
        wait_for("the tasks", lambda: ran() == ["critical", "later", "retried", "sent", "sent at once"])
        with ThreadPoolExecutor() as threads:
            watch = threads.submit(monitoring.run, "python", "-c", WATCH, timeout=60)
            wait_for("the monitor", lambda: (worker.folder / "watching").exists() or watch.done())
            for site, code in ((producer, SEND), (worker, SEND), (worker, REVOKE)):
                site.run("python", "-c", code)
            assert watch.result().stdout.splitlines() == ["('critical', 1) ('default', 1) 1", "critical default", "pong"]
        wait_for("all tasks", lambda: len(ran()) == 15)
        (worker.folder / "fixed").touch()
        wait_for(
            "the dead letter", lambda: "3 dead letters" in worker.run("python", "-m", "celery_platform.cli", "dead-letters", "list").stdout
        )
        worker.run("python", "-m", "celery_platform.cli", "dead-letters", "replay", "--all", "--yes")
        wait_for("the replayed tasks", lambda: ran().count("fixed") == 3)
    assert "revoked" not in ran()
    assert "Warm shutdown" in worker.log()
    assert refusals(log) == []


def sent(channel: Any, exchange: str, key: str) -> None:
    channel.basic_publish_confirm(Message(b"x"), exchange, key)


ALL = {
    "declare a queue": lambda channel: Queue("new", durable=True)(channel).declare(),
    "declare an exchange": lambda channel: Exchange("new")(channel).declare(),
    "delete a queue": lambda channel: Queue("default")(channel).delete(),
    "delete an exchange": lambda channel: Exchange("celeryev")(channel).delete(),
    "send past the exchanges": lambda channel: sent(channel, "", "default"),
    "delay less": lambda channel: sent(channel, "celery_delayed_3", "x"),
    "take what is delayed": lambda channel: Queue("celery_delayed_27")(channel).get(),
}
READ = {
    "take a task": lambda channel: Queue("default")(channel).get(),
    "take a dead letter": lambda channel: Queue("dead-letters")(channel).get(),
    "purge": lambda channel: Queue("default")(channel).purge(),
    "see what is sent": lambda channel: channel.queue_bind("celeryev.x", "default", "#"),
    "write a dead letter": lambda channel: sent(channel, "dead-letters", "dead-letters"),
}
REFUSED = {
    "orders": ALL,
    "web": ALL
    | READ
    | {
        "follow events": lambda channel: Queue("celeryev.x", exclusive=True, durable=False)(channel).declare(),
        "command workers": lambda channel: sent(channel, "celery.pidbox", "x"),
    },
    "flower": ALL
    | READ
    | {
        "send a task": lambda channel: sent(channel, "default", "default"),
        "delay a task": lambda channel: sent(channel, "celery_delayed_27", "x"),
        "make up events": lambda channel: sent(channel, "celeryev", "x"),
    },
}


@pytest.mark.usefixtures("sites")
def test_each_user_is_refused_all_else(channel: Callable[..., Any]) -> None:
    tried = []
    for user, deeds in REFUSED.items():
        for name, deed in deeds.items():
            one = channel(user)
            with closing(one), pytest.raises(AccessRefused):
                deed(one)
            tried.append((user, name))
        with pytest.raises(NotAllowed):
            channel(user, "other")
    assert len(tried) == 7 + 14 + 15
