"""Flower shows what runs, to those who have a password, and can change nothing; nothing else reaches it."""

from __future__ import annotations

import json
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers.flower_client import Flower
from helpers.nodes import Node, wait_for
from helpers.rabbit import SERVICE, RabbitCluster
from helpers.targets import only_in_drills, only_in_test_all

testinfra_hosts = ["ansible://ops1"]

PATHS = ["/", "/index.html", "/nothing", "/prometheus/", "/prometheus/-/healthy", "/alertmanager/", "/alertmanager/api/v2/status"]
PATHS += [f"/flower{path}" for path in ("", "/", "/metrics", "/healthcheck", "/tasks", "/broker", "/api/workers", "/api/tasks")]
PATHS += ["/flower/static/css/flower.css", "/%66lower/metrics", "//flower/metrics", "/x/../flower/healthcheck", "/flower/login"]
#: Seconds without broker: long enough for Flower to wait much longer by itself, which doubles the time between its tries.
OUTAGE = 110
WORKERS = ("critical", "default", "batch")
OTHER_PASSWORD = "nX7cY2pK9mQ4wL8vD3fG6hJ1"


@pytest.fixture(scope="module")
def flower(cluster: RabbitCluster, node: Node) -> Flower:
    return Flower(node, cluster.authority)


def statuses(client: Node, address: str, method: str, login: str) -> dict[str, str]:
    """Return the status that a host gets for each path, without password or with one."""
    script = f"""
import http.client, ssl
for path in {PATHS!r}:
    connection = http.client.HTTPSConnection({address!r}, context=ssl.create_default_context(cafile="/etc/ssl/celery-platform/ca.crt"))
    connection.request({method!r}, path, headers=dict(Authorization={login!r}) if {login!r} else dict())
    answer = connection.getresponse()
    print(path, answer.status, dict(answer.getheaders()).get("WWW-Authenticate"))
    connection.close()
"""
    return dict(line.split(maxsplit=1) for line in client.python(script).splitlines())


def pid(node: Node, unit: str) -> str:
    return node.show(unit, "MainPID")["MainPID"]


# --- What it shows ---


def test_it_shows_workers_and_tasks_and_no_secret(cluster: RabbitCluster, flower: Flower) -> None:
    task = flower.sees(cluster.application)
    expected = {f"celery@{worker}.{node.variables['inventory_hostname']}" for node in cluster.workers for worker in WORKERS}
    workers = flower.workers()
    assert set(workers) == expected
    assert {queue["name"] for worker in workers.values() for queue in worker["active_queues"]} == set(WORKERS)

    pages = {path: flower.page(path) for path in ("/", "/flower/", "/flower/tasks", f"/flower/task/{task}", "/flower/broker")}
    pages |= {name: flower.page(f"/flower/worker/{name}") for name in workers}
    assert all(name in pages["/flower/"] for name in workers)
    assert "orders.tasks.send_email" in pages[f"/flower/task/{task}"]
    assert 'href="/flower/"' in pages["/"]
    text = json.dumps(workers) + "".join(pages.values()) + flower.node.host.check_output("journalctl -u flower -u nginx --output=cat")
    assert [name for name, secret in flower.node.secrets.items() if secret in text] == []


@only_in_drills
def test_it_sees_events_soon_after_a_long_outage_of_the_broker(cluster: RabbitCluster, flower: Flower) -> None:
    before = pid(flower.node, "flower")

    def all_brokers(verb: str) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: node.host.check_output(f"systemctl {verb} {SERVICE}"), cluster.nodes.values()))

    all_brokers("stop")
    try:
        time.sleep(OUTAGE)
    finally:
        all_brokers("start")
        cluster.whole()
    flower.sees(cluster.application, seconds=20)
    assert pid(flower.node, "flower") == before


# --- Who is let in ---


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "DELETE"])
@pytest.mark.parametrize("login", ["", "Basic b3BlcmF0b3I6d3Jvbmc=", "Basic b3BlcmF0b3I6", "Bearer x"])
def test_every_path_asks_for_the_password(cluster: RabbitCluster, flower: Flower, method: str, login: str) -> None:
    assert statuses(cluster.application, flower.node.address, method, login) == dict.fromkeys(PATHS, '401 Basic realm="orders"')


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_plain_text_and_old_protocols_are_refused(flower: Flower) -> None:
    address = flower.node.address
    with socket.create_connection((address, 443), timeout=5) as plain:
        plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert plain.recv(100).startswith(b"HTTP/1.1 400 ")
    for port in (80, 5555, 8080):
        with pytest.raises(OSError, match=r"timed out|refused"):
            socket.create_connection((address, port), timeout=2)
    context = ssl.create_default_context(cafile=str(flower.authority))
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    with socket.create_connection((address, 443), timeout=5) as plain, pytest.raises(ssl.SSLError, match="alert protocol version"):
        context.wrap_socket(plain, server_hostname=address)


def test_only_the_proxy_reaches_flower_and_even_then_it_wants_the_password(flower: Flower) -> None:
    host = flower.node.host
    assert f"pid={pid(flower.node, 'flower')}," not in host.check_output("ss --listening --tcp --udp --processes --numeric")
    script = """
import os, pwd, socket, sys
account = pwd.getpwnam(sys.argv[1])
os.setgroups(os.getgrouplist(account.pw_name, account.pw_gid))
os.setgid(account.pw_gid)
os.setuid(account.pw_uid)
try:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("/run/flower/flower.sock")
        client.sendall(b"GET /flower/api/workers HTTP/1.0\\r\\n\\r\\n")
        print(client.recv(100).decode().split()[1])
except OSError as error:
    print(type(error).__name__)
"""
    assert flower.node.python(script, "nobody").strip() == "PermissionError"
    assert flower.node.python(script, "www-data").strip() == "PermissionError"
    assert flower.node.python(script, "root").strip() == "401"


@only_in_test_all
def test_a_new_password_holds_at_once_and_the_old_one_no_longer(flower: Flower) -> None:
    tags = "--tags=celery_flower,monitoring_proxy"
    users = {"monitoring_proxy_users": [{"name": "operator", "password": OTHER_PASSWORD}]}
    proxy = pid(flower.node, "nginx")
    try:
        flower.node.converge(tags, "--limit=ops1", "-e", json.dumps(users))
        assert flower.ask("/flower/api/workers", password=OTHER_PASSWORD)[0] == 200
        assert flower.ask("/flower/api/workers")[0] == 401
    finally:
        flower.node.converge(tags, "--limit=ops1")
    assert flower.ask("/flower/api/workers")[0] == 200
    assert pid(flower.node, "nginx") == proxy


# --- What it may do ---


@pytest.mark.parametrize(
    "action",
    [
        "worker/shutdown/{worker}",
        "worker/pool/restart/{worker}",
        "worker/pool/shrink/{worker}?n=1",
        "worker/queue/cancel-consumer/{worker}?queue=default",
        "task/revoke/0d5b4c2e-0000-4000-8000-000000000000?terminate=true",
        "task/timeout/orders.tasks.send_email?hard=1",
        "task/send-task/orders.tasks.send_email",
    ],
)
def test_it_changes_nothing(cluster: RabbitCluster, flower: Flower, action: str) -> None:
    worker = f"celery@default.{cluster.application.variables['inventory_hostname']}"
    wait_for("the worker", lambda: worker in flower.workers(), seconds=30)
    before = pid(cluster.application, "celery-orders-worker@default")
    assert flower.ask(f"/flower/api/{action.format(worker=worker)}", "POST") == (403, "Read only mode is enabled")
    assert pid(cluster.application, "celery-orders-worker@default") == before


def test_secrets_are_where_only_root_and_its_service_read_them(flower: Flower) -> None:
    host = flower.node.host
    for unit in ("flower", "nginx"):
        told = host.check_output(
            f"tr '\\0' '\\n' < /proc/{pid(flower.node, unit)}/environ; tr '\\0' ' ' < /proc/{pid(flower.node, unit)}/cmdline"
        )
        told += host.check_output(f"systemctl cat {unit}; systemctl show {unit}")
        assert [name for name, secret in flower.node.secrets.items() if secret in told] == []
    open_files = host.check_output("find /etc/flower /etc/celery-monitor /etc/nginx -type f -perm /o=r")
    assert "/etc/flower/flowerconfig.py" in open_files
    script = f"""
import pathlib
texts = {{name: pathlib.Path(name).read_text(errors="replace") for name in {open_files.split()!r}}}
print([name for name, text in texts.items() if any(secret in text for secret in {list(flower.node.secrets.values())!r})])
"""
    assert flower.node.python(script).strip() == "[]"


# --- Runs ---


def test_a_renewed_certificate_is_shown_without_a_restart(cluster: RabbitCluster, flower: Flower) -> None:
    before, processes = flower.certificate(), [pid(flower.node, unit) for unit in ("nginx", "flower")]
    flower.node.converge("--tags=pki,monitoring_proxy", "--limit=ops1", "-e", "pki_replace=true")
    wait_for("the new certificate", lambda: flower.certificate() != before)
    assert flower.certificate().split() == flower.node.host.file("/etc/ssl/celery-platform/host.crt").content_string.split()
    assert [pid(flower.node, unit) for unit in ("nginx", "flower")] == processes
    flower.sees(cluster.application)


@only_in_test_all
def test_a_second_run_changes_nothing(flower: Flower) -> None:
    """Nor does a check; and the new key of the test before is Flower's with its next connection."""
    for arguments in ([], ["--check"]):
        assert flower.node.converge("--tags=celery_monitor,celery_flower,monitoring_proxy", "--limit=ops1", *arguments)["changed"] == []
