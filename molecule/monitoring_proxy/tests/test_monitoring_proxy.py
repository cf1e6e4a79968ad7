"""One host that shows what runs on it, to those who have a password, and to nobody from outside."""

from __future__ import annotations

import json
from typing import Any

from helpers.nodes import Node, wait_for
from helpers.proxy import ask, page

testinfra_hosts = ["ansible://monitoring"]

PATHS = ["/", "/flower/", "/flower/api/workers", "/prometheus/-/ready", "/prometheus/api/v1/targets", "/alertmanager/api/v2/status"]
JOBS = {"alertmanager", "blackbox", "celery", "node", "prometheus", "redis"}


def test_without_the_password_nothing_is_shown(node: Node) -> None:
    for password in (None, "", "wrong", node.secrets["vault_redis_exporter_password"]):
        assert {path: status for path, (status, _) in ask(node, *PATHS, password=password).items()} == dict.fromkeys(PATHS, 401)


def test_with_the_password_all_is_shown(node: Node) -> None:
    answers = ask(node, *PATHS, password=node.secrets["vault_monitoring_proxy_password"])
    assert {path: status for path, (status, _) in answers.items()} == dict.fromkeys(PATHS, 200)
    assert "<h1>orders</h1>" in answers["/"][1]


def test_it_and_what_is_behind_it_are_reached_from_the_host_only(node: Node) -> None:
    listening = node.host.check_output("ss -Hltn 'sport = :8080 or sport = :9090 or sport = :9093 or sport = :9100 or sport = :9121'")
    assert {line.split()[3].rpartition(":")[0] for line in listening.splitlines()} == {"127.0.0.1"}


def test_all_targets_are_up(node: Node) -> None:
    def states() -> dict[str, Any]:
        targets = json.loads(page(node, "/prometheus/api/v1/targets"))["data"]["activeTargets"]
        return {target["labels"]["job"]: (target["health"], target["lastError"]) for target in targets}

    wait_for("the targets", lambda: {health for health, _ in states().values()} == {"up"}, seconds=60, every=1, why=states)
    assert set(states()) == JOBS


def test_flower_and_prometheus_see_a_task(node: Node) -> None:
    seen = node.celery_python("print(app.send_task('orders.tasks.send_email', (4711,)).id)")
    workers = json.loads(page(node, "/flower/api/workers?refresh=true"))
    assert {name.partition("@")[2].partition(".")[0] for name in workers} == {"critical", "default", "batch"}

    def known() -> bool:
        status, text = ask(node, f"/flower/api/task/info/{seen}", password=node.secrets["vault_monitoring_proxy_password"]).popitem()[1]
        return status == 200 and json.loads(text)["state"] == "SUCCESS"

    wait_for("the task", known, seconds=30, every=1)

    def up() -> dict[str, str]:
        found = json.loads(page(node, "/prometheus/api/v1/query?query=celery_worker_up"))["data"]["result"]
        return {one["metric"]["worker"].partition("@")[2].partition(".")[0]: one["value"][1] for one in found}

    # It looks every 15 s.
    wait_for("the workers", lambda: up() == {"critical": "1", "default": "1", "batch": "1"}, seconds=40, every=1, why=up)
