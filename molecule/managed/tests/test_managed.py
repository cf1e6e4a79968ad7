"""Brokers that others run, over TLS with a CA that the system knows: all services use them by address and password alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
import testinfra.host

from helpers.authority import Authority
from helpers.brokers import running_rabbitmq
from helpers.nodes import Node, wait_for
from helpers.proxy import ask, page

testinfra_hosts = ["ansible://celery_worker"]

REDIS, RABBITMQ, CLUSTER = 6390, 5690, 6391
UNITS = [f"celery-orders-worker@{name}" for name in ("critical", "default", "batch")] + ["celery-orders-beat", "flower"]
UNITS += ["prometheus-celery-exporter"]
#: What a provider keeps for itself (the commands that Amazon ElastiCache restricts).
PROVIDERS_OWN = "-acl -bgrewriteaof -bgsave -config -debug -migrate -monitor -replicaof -save -shutdown -slaveof -sync -psync +acl|whoami"


def redis_settings(host: str, port: int, password: str, *more: str) -> str:
    lines = ["port 0", f"tls-port {port}", f"bind {host}", "tls-cert-file server.crt", "tls-key-file server.key", "tls-ca-cert-file ca.crt"]
    lines += ["tls-auth-clients no", "save ''", *more]
    lines += [f"user {name} on >{password} ~* &* +@all {PROVIDERS_OWN}" for name in ("default", "shop")]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module", autouse=True)
def brokers(host: testinfra.host.Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Run a Redis, a Redis Cluster and a RabbitMQ outside of the inventory; return its host, which knows their CA."""
    node = Node(host, Path(__file__).parents[1] / "inventory")
    address = node.address.rpartition(".")[0] + ".1"
    password = node.secrets["vault_celery_app_broker_password"]
    authority = Authority("A public authority")
    folder = tmp_path_factory.mktemp("managed")
    (folder / "ca.crt").write_bytes(authority.certificate)
    certificate = authority.issue([address])
    (folder / "server.crt").write_bytes(certificate.certificate)
    (folder / "server.key").write_bytes(certificate.key)
    node.write("/usr/local/share/ca-certificates/public.crt", authority.certificate.decode())
    node.host.check_output("update-ca-certificates")
    ssl = "".join(f"ssl_options.{name} = {folder}/{file}\n" for name, file in {"cacertfile": "ca.crt", "certfile": "server.crt"}.items())
    ssl += f"listeners.tcp = none\nlisteners.ssl.1 = {address}:{RABBITMQ}\nssl_options.keyfile = {folder}/server.key\n"
    with ExitStack() as stack:
        for port, more in ((REDIS, ()), (CLUSTER, ("cluster-enabled yes",))):
            (folder / f"{port}.conf").write_text(redis_settings(address, port, password, *more))
            server = stack.enter_context(subprocess.Popen(["redis-server", f"{port}.conf"], cwd=folder, stdout=subprocess.DEVNULL))
            stack.callback(server.terminate)
        control = stack.enter_context(running_rabbitmq(folder, ssl))
        control("add_user", "shop", password)
        control("add_vhost", "orders")
        control("set_permissions", "--vhost", "orders", "shop", ".*", ".*", ".*")
        options: dict[str, Any] = {"ssl": True, "ssl_ca_certs": str(folder / "ca.crt"), "password": password}
        for port in (REDIS, CLUSTER):
            wait_for("Redis", lambda port=port: answers(redis.Redis(address, port, **options)), seconds=30)
        yield node


def answers(client: redis.Redis) -> bool:
    """Tell whether a server is there."""
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


#: As the inventory has it, then each in its place.
BROKERS: dict[str, dict[str, str]] = {
    "Redis without a user name": {},
    "Redis with a user name": {
        "celery_app_broker_url": f"rediss://shop@{{{{ managed_host }}}}:{REDIS}/0",
        "celery_app_result_backend": f"rediss://shop@{{{{ managed_host }}}}:{REDIS}/1",
    },
    "RabbitMQ": {"celery_app_broker_url": f"amqps://shop@{{{{ managed_host }}}}:{RABBITMQ}/orders"},
}


@pytest.mark.parametrize("settings", BROKERS.values(), ids=BROKERS)
def test_all_services_use_it(brokers: Node, settings: dict[str, str]) -> None:
    node, given = brokers, ["-e", json.dumps(settings)]
    node.converge(*given)
    assert node.host.run_expect([0], "celery-exec celery-platform round-trip").rc == 0
    sent = node.celery_python("result = app.send_task('orders.tasks.send_email', (4711,)); result.get(timeout=20); print(result.id)")
    assert {unit: node.show(unit, "ActiveState")["ActiveState"] for unit in UNITS} == dict.fromkeys(UNITS, "active")

    def workers() -> set[str]:
        return {name.partition("@")[2].partition(".")[0] for name in json.loads(page(node, "/flower/api/workers?refresh=true"))}

    wait_for("Flower's workers", lambda: workers() == {"critical", "default", "batch"}, seconds=60, every=2, why=workers)
    assert sent not in page(node, "/flower/broker")

    def seen() -> bool:
        task = node.celery_python("print(app.send_task('orders.tasks.send_email', (4711,)).id)")
        status, text = ask(node, f"/flower/api/task/info/{task}", password=node.secrets["vault_monitoring_proxy_password"]).popitem()[1]
        return status == 200 and json.loads(text)["state"] == "SUCCESS"

    wait_for("a task in Flower", seen, seconds=60, every=1)

    def up() -> dict[str, str]:
        found = json.loads(page(node, "/prometheus/api/v1/query?query=celery_worker_up"))["data"]["result"]
        return {one["metric"]["worker"].partition("@")[2].partition(".")[0]: one["value"][1] for one in found}

    wait_for("the workers in Prometheus", lambda: up() == {"critical": "1", "default": "1", "batch": "1"}, seconds=60, every=1, why=up)
    assert node.converge(*given)["changed"] == []


def test_nothing_of_a_broker_or_an_authority_of_our_own_is_there(brokers: Node) -> None:
    assert brokers.host.run("dpkg-query --show redis-server rabbitmq-server").stdout == ""
    assert not brokers.host.file("/etc/ssl/celery-platform").exists
    assert "TLS_" not in brokers.host.file("/etc/celery/orders/celery.env").content_string


def test_redis_cluster_is_refused_before_anything_is_switched(brokers: Node) -> None:
    revision = brokers.host.file("/etc/celery/orders/current").linked_to
    before = {unit: brokers.show(unit, "MainPID") for unit in UNITS}
    settings = {"celery_app_broker_url": f"rediss://{{{{ managed_host }}}}:{CLUSTER}/0"}

    run = brokers.run_playbook("-e", json.dumps(settings))
    assert run.returncode == 2
    assert "Redis Cluster" in run.stdout
    assert brokers.host.file("/etc/celery/orders/current").linked_to == revision
    workers = [unit for unit in UNITS if unit.startswith("celery-")]
    assert {unit: brokers.show(unit, "MainPID") for unit in workers} == {unit: before[unit] for unit in workers}
