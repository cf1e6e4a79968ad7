"""Web servers of the site's own send tasks, though none of their lines knows of the deployment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import testinfra.host

from helpers import web as servers
from helpers.nodes import Node, wait_for
from helpers.web import SERVERS

testinfra_hosts = ["ansible://celery_producer"]


@pytest.fixture(scope="module", autouse=True)
def web(host: testinfra.host.Host) -> Node:
    """Install the sites, as their owner does, and start them; then run the playbook, as their owner does next."""
    inventory = Path(__file__).parents[1] / "inventory"
    node = Node(host, inventory)
    servers.install(node)
    before = servers.processes(node)
    changed = node.converge()["changed"]
    assert changed == ["celery_producer : Restart those services that run with something else"]
    assert all(pid != before[name] for name, pid in servers.processes(node).items())
    return node


@pytest.fixture
def stopped_broker(web: Node) -> Iterator[None]:
    """Take the broker away."""
    web.host.check_output("systemctl stop redis-server")
    yield
    web.host.check_output("systemctl start redis-server")


def ask(node: Node, name: str, path: str) -> dict[str, Any]:
    """Return what a site answers, once it listens."""
    script = f"""
import time, urllib.error, urllib.request
for _ in range(40):
    try:
        print(urllib.request.urlopen("http://127.0.0.1:{SERVERS[name][1]}{path}", timeout=60).read().decode())
        break
    except urllib.error.HTTPError as error:
        print("status", error.code)
        break
    except OSError:
        time.sleep(0.5)
"""
    answer = node.python(script)
    return dict(json.loads(answer)) if answer.startswith("{") else {"error": answer.strip()}


@pytest.mark.parametrize("name", SERVERS)
def test_a_site_sends_and_reads_the_result(web: Node, name: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda number: ask(web, name, f"/order/lamp{number}"), range(12)))
    assert [answer.get("answer") for answer in answers] == [f"lamp{number}: -1" for number in range(12)]


def test_a_coroutine_sends(web: Node) -> None:
    assert len(ask(web, "fastapi", "/later/lamp")["id"]) == 36


@pytest.mark.usefixtures("stopped_broker")
def test_a_request_fails_in_time_and_the_site_lives(web: Node) -> None:
    before = web.show("web-flask", "MainPID")
    assert ask(web, "flask", "/order/lamp")["error"] == "status 500"
    journal = web.host.check_output("journalctl --unit=web-flask --output=cat --since=-2min")
    assert "The broker did not take the task" in journal
    assert web.show("web-flask", "MainPID") == before


def test_secrets_are_where_the_service_alone_reads_them(web: Node) -> None:
    password = web.secrets["vault_celery_producer_redis_password"]
    web.host.run_expect([1], "grep -r --include=* -l %s /etc/systemd/system /etc/celery-producer/orders/producer.env", password)
    pid = web.show("web-django", "MainPID")["MainPID"]
    assert password not in web.host.check_output("tr '\\0' '\\n' < /proc/%s/environ", pid)
    assert web.host.file("/etc/celery-producer/orders/credentials").mode == 0o700
    web.host.run_expect([1], "runuser -u nobody -- cat /etc/celery-producer/orders/credentials/broker_password")


def test_a_command_sends_as_the_services_do(web: Node) -> None:
    code = "from fastapi_shop import celery; print(celery.send_task('orders.tasks.update_stock', ('cup', 2)).get(timeout=20))"
    run = web.host.check_output("cd /srv/web && celery-producer-exec --user www-data venv/bin/python -c %s", code)
    assert run.strip() == "cup: +2"
    assert web.host.run("celery-producer-exec true").rc == 2


def test_redis_has_refused_nothing(web: Node) -> None:
    refused = {(entry["username"], entry["reason"], entry["object"]) for entry in web.redis_admin().acl_log()}
    assert {entry for entry in refused if entry[0] == "orders-producer" and entry[1] != "auth"} == set()


def test_a_service_that_is_stopped_stays_so_and_a_second_run_changes_nothing(web: Node) -> None:
    web.host.check_output("systemctl stop web-django")
    assert web.converge()["changed"] == []
    assert not web.host.service("web-django").is_running
    web.host.check_output("systemctl start web-django")
    wait_for("the site", lambda: "answer" in ask(web, "django", "/order/lamp"))


def test_a_host_that_is_no_producer_any_more_loses_what_it_had(web: Node) -> None:
    web.converge("-e", json.dumps({"celery_producer_units": ["web-django.service", "web-fastapi.service"]}))
    assert not web.host.file("/etc/systemd/system/web-flask.service.d/celery-producer.conf").exists
    assert web.host.file("/etc/systemd/system/web-django.service.d/celery-producer.conf").exists
    web.converge()
    assert web.host.file("/etc/systemd/system/web-flask.service.d/celery-producer.conf").exists
