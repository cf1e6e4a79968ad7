"""All is measured, the dashboards have something to show, and what breaks is told of, and that it is over."""

from __future__ import annotations

import base64
import json
import re
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from helpers import REPOSITORY
from helpers.cluster import Cluster
from helpers.nodes import Node, wait_for
from helpers.rabbit import SERVICE, RabbitCluster
from helpers.targets import only_in_drills, only_in_test_all

testinfra_hosts = ["ansible://ops1"]

FILES = "/etc/ssl/celery-platform"

#: What Prometheus takes for a minute is two seconds here, so that alerts that wait for an hour come in two minutes.
PACE = {"site_pace": 30}
HOOK = "http://127.0.0.1:9999/"
#: What Alertmanager posts, one JSON document a line.
POSTED = "/run/alerts.jsonl"
RECEIVER = f"""
import http.server
class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with open({POSTED!r}, "ab") as posted:
            posted.write(body.replace(b"\\n", b" ") + b"\\n")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok")
http.server.HTTPServer(("127.0.0.1", 9999), Receiver).serve_forever()
"""


class Prometheus:
    """The site's, as people reach it: through the proxy."""

    def __init__(self, cluster: Cluster, node: Node) -> None:
        self.address = f"https://{node.address}/prometheus/"
        password = cluster.secrets["vault_monitoring_proxy_password"]
        self.login = "Basic " + base64.b64encode(f"operator:{password}".encode()).decode()
        self.context = ssl.create_default_context(cafile=str(cluster.authority))

    def get(self, path: str, **parameters: str) -> bytes:
        """Return a page."""
        request = urllib.request.Request(
            f"{self.address}{path}?{urllib.parse.urlencode(parameters)}", headers={"Authorization": self.login}
        )
        with urllib.request.urlopen(request, context=self.context, timeout=10) as page:
            return bytes(page.read())

    def ask(self, path: str, **parameters: str) -> Any:
        """Return what its API answers."""
        return json.loads(self.get(f"api/v1/{path}", **parameters))["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the value of an expression: a label set and a value for each series."""
        return list(self.ask("query", query=expression)["result"])


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, node: Node) -> Prometheus:
    """Return the site's Prometheus, once it has looked at all its targets."""
    found = Prometheus(cluster, node)
    wait_for("a look at all targets", lambda: found.query('up{job="certificates"}'), seconds=120, every=2)
    return found


@pytest.fixture(scope="module")
def traffic(cluster: Cluster, prometheus: Prometheus) -> None:
    """Run tasks that succeed and one that fails for good, and wait until Prometheus knows."""
    cluster.application.celery_python("app.send_task('orders.tasks.decline_payment', (1,), queue='critical')")
    cluster.application.host.check_output("celery-exec python -m orders.demo")
    wait_for("the failure", lambda: prometheus.query("celery_dead_letters_total > 0"), seconds=120, every=2)
    wait_for("the successes", lambda: prometheus.query('rate(celery_tasks_total{state="succeeded"}[5m]) > 0'), seconds=120, every=2)


def test_all_targets_are_up(cluster: Cluster, prometheus: Prometheus) -> None:
    def down() -> list[dict[str, Any]]:
        return [series["metric"] for series in prometheus.query("up == 0 or probe_success == 0")]

    wait_for("all targets", lambda: not down(), seconds=60, every=2)
    jobs = {(series["metric"]["job"], series["metric"]["instance"]) for series in prometheus.query("up")}
    data, all_hosts = list(cluster.nodes), [*cluster.nodes, "app1", "app2", "ops1"]
    assert jobs >= {(job, host) for job in ("redis", "sentinel", "rabbitmq", "rabbitmq_detailed") for host in data}
    assert jobs >= {("node", host) for host in all_hosts}
    assert jobs >= {(job, "ops1") for job in ("prometheus", "alertmanager", "celery", "blackbox")}


def test_the_certificates_of_all_services_are_watched(prometheus: Prometheus) -> None:
    watched = prometheus.query("(probe_ssl_earliest_cert_expiry - time()) / 86400")
    assert {series["metric"]["service"] for series in watched} >= {"redis", "sentinel", "rabbitmq"}
    assert all(float(series["value"][1]) > 300 for series in watched)


def test_the_exporter_tells_what_runs(cluster: Cluster, prometheus: Prometheus, traffic: None) -> None:
    workers = {f"celery@{worker}.app{number}" for worker in ("critical", "default", "batch") for number in (1, 2)}
    assert {series["metric"]["worker"] for series in prometheus.query("celery_worker_up == 1")} == workers
    assert [series["value"][1] for series in prometheus.query("celery_broker_up")] == ["1"]
    assert prometheus.query("time() - celery_beat_last_tick_timestamp_seconds < 60")
    assert prometheus.query('celery_task_runtime_seconds_count{task="orders.tasks.batch_import"}')


def test_old_results_go_by_themselves(cluster: Cluster, traffic: None) -> None:
    client = cluster.client(cluster.master())
    client.connection_pool.connection_kwargs["db"] = 1
    left = {key: client.ttl(key) for key in client.scan_iter("orders:celery-task-meta-*")}
    assert len(left) >= 60
    assert all(0 < seconds <= 24 * 60 * 60 for seconds in left.values()), left


@pytest.mark.parametrize("dashboard", ["overview", "workers", "brokers"])
def test_no_panel_is_empty(prometheus: Prometheus, traffic: None, dashboard: str) -> None:
    """The page gives what the repository has, and each of its queries has a result."""
    text = prometheus.get(f"user/dashboards/{dashboard}.json")
    assert text == (REPOSITORY / f"roles/dashboards/files/dashboards/{dashboard}.json").read_bytes()
    panels = [panel for panel in json.loads(text)["panels"] if panel["type"] != "row"]
    assert len(panels) > 10

    def empty() -> list[str]:
        return [
            f"{panel['title']}: {target['expr']}"
            for panel in panels
            for target in panel["targets"]
            if not prometheus.query(target["expr"].replace("$__rate_interval", "1m").replace("$task", ".*"))
        ]

    wait_for("no empty panel", lambda: not empty(), seconds=90, every=5)


@pytest.mark.parametrize("page", ["dashboards/", "dashboards/viewer.js", "dashboards/chart.js", "runbooks/RedisDown.html"])
def test_pages_are_there(prometheus: Prometheus, page: str) -> None:
    assert len(prometheus.get(f"user/{page}")) > 200


def test_each_alert_names_a_runbook_that_is_there(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"] if rule["type"] == "alerting"]
    assert len(rules) > 20
    for rule in rules:
        address = rule["annotations"]["runbook_url"]
        assert address.startswith(prometheus.address), address
        assert rule["name"].encode() in prometheus.get(address.removeprefix(prometheus.address)), address


def runbook_commands() -> dict[str, set[str]]:
    """Return the commands of all runbooks that only look, by the host that has what they look at."""
    hosts = {"rabbitmq": "data1", "rcli": "data1", "celery-exec": "app1", "amtool": "ops1", "promtool": "ops1"}
    found: dict[str, set[str]] = {}
    for runbook in (REPOSITORY / "docs/runbooks").glob("*.md"):
        look = runbook.read_text().partition("\n## Look\n")[2].partition("\n## ")[0]
        for command in re.findall(r"`([^`]+)`", look):
            host = next((host for word, host in hosts.items() if command.startswith(word)), None)
            if host and " " in command and "ID" not in command:
                # What a filter lets through depends on what goes on.
                found.setdefault(host, set()).add(command.replace("shop", "orders").partition(" | ")[0])
    return found


@only_in_test_all
def test_what_runbooks_look_at_is_there(cluster: Cluster, node: Node) -> None:
    define = (REPOSITORY / "docs/runbooks/README.md").read_text().split("```")[1]
    password = cluster.secrets["vault_redis_operator_password"]
    commands = runbook_commands()
    assert sum(map(len, commands.values())) > 40
    failed = {}
    for name, host in {"data1": cluster.nodes["data1"], "app1": cluster.application, "ops1": node}.items():
        for command in commands[name]:
            done = host.host.run("echo %s | bash -c %s", password, f"{define}\n{command}")
            if done.rc or "NOPERM" in done.stdout or "(error)" in done.stdout:
                failed[command] = f"{done.stdout[-300:]} {done.stderr[-300:]}"
    assert not failed, json.dumps(failed, indent=2)


def answer(host: Node, address: str, certificate: bool = False) -> str:
    """Return the status that a host gets for a page, or what went wrong on the way to it."""
    return host.python(
        f"""
import ssl, urllib.request
context = ssl.create_default_context(cafile="{FILES}/ca.crt")
if {certificate}:
    context.load_cert_chain("{FILES}/host.crt", "{FILES}/host.key")
try:
    print(urllib.request.urlopen("{address}", context=context, timeout=5).status)
except Exception as error:
    print(getattr(error, "code", error))
"""
    ).strip()


def test_nobody_is_let_in_without_password_or_certificate(cluster: Cluster, node: Node) -> None:
    """Pages are asked for from another host; metrics from the one host that a firewall lets through."""
    pages = [
        "",
        "prometheus/",
        "prometheus/api/v1/query?query=up",
        "prometheus/user/dashboards/",
        "alertmanager/",
        "flower/",
        "flower/metrics",
    ]
    assert {page: answer(cluster.application, f"https://{node.address}/{page}") for page in pages} == dict.fromkeys(pages, "401")
    listening = {line.split()[3] for line in node.host.check_output("ss -tlnH").splitlines()}
    outside = {int(address.rpartition(":")[2]) for address in listening if not address.startswith(("127.", "[::1]"))}
    assert outside <= {22, 443, 9100}
    data, app = cluster.nodes["data1"], cluster.application
    for host, port in ((node, 9100), (app, 9100), (data, 9100), (data, 9121), (data, 9122), (data, 15691)):
        metrics = f"{host.address}:{port}/metrics"
        assert answer(node, f"https://{metrics}", certificate=True) == "200"
        assert "alert" in answer(node, f"https://{metrics}"), metrics
        assert answer(node, f"http://{metrics}") != "200", metrics


def test_services_are_sandboxed(cluster: Cluster, node: Node) -> None:
    units = {
        node: ["prometheus", "prometheus-alertmanager", "prometheus-blackbox-exporter", "prometheus-celery-exporter", "flower", "nginx"],
        cluster.nodes["data1"]: ["prometheus-node-exporter", "prometheus-redis-exporter", "prometheus-sentinel-exporter"],
    }
    for host, names in units.items():
        for name in names:
            told = host.host.check_output(f"systemd-analyze security {name} --no-pager | tail -1")
            assert float(told.rpartition("service: ")[2].split()[0]) <= 1.5, told


# --- Alerts ---


class Webhook:
    """What Alertmanager posted."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def messages(self) -> list[tuple[str, str, str]]:
        """Return for each message whether it fires or is resolved, its alert, and its text."""
        found = []
        for body in map(json.loads, self.node.host.run(f"cat {POSTED}").stdout.splitlines()):
            (attachment,) = body["attachments"]
            status, alert = re.match(r"(\w+) \w*: (\w+) in ", attachment["title"]).groups()  # type: ignore[union-attr]
            found.append((status, alert, attachment["text"]))
        return found

    def told(self, status: str) -> set[str]:
        """Return the alerts that it told of as FIRING or RESOLVED."""
        return {alert for found, alert, _ in self.messages() if found == status}

    def tells(self, status: str, alerts: set[str]) -> None:
        """Wait until it told of all these alerts."""
        with suppress(AssertionError):
            wait_for("alerts", lambda: alerts <= self.told(status), seconds=180, every=2)
        assert alerts - self.told(status) == set(), status

    def forget(self) -> None:
        """Empty it."""
        self.node.host.check_output(f"rm -f {POSTED}")


@pytest.fixture(scope="module")
def webhook(cluster: Cluster, node: Node) -> Iterator[Webhook]:
    """Let alerts go to a receiver on the host itself, soon."""
    node.host.check_output("systemd-run --quiet --collect --unit=test-webhook python3 -c %s", RECEIVER)
    tags = "--tags=prometheus,alertmanager"
    cluster.application.converge(tags, "-e", json.dumps(PACE | {"alertmanager_webhook": HOOK}))
    found = Webhook(node)
    yield found
    cluster.application.converge(tags)
    node.host.check_output("systemctl stop test-webhook")
    found.forget()


@only_in_drills
def test_what_breaks_is_told_of_and_that_it_is_over(cluster: RabbitCluster, webhook: Webhook, traffic: None) -> None:
    """The dead letter of `traffic` is the first of them. Each repair is what its runbook says."""
    data, app = cluster.nodes, cluster.workers
    replica = next(name for name in data if name != cluster.master())
    limit = cluster.client(replica).config_get("maxmemory")["maxmemory"]
    expected = {"CeleryDeadLetters", "CeleryWorkerDown", "CeleryQueueStalled", "CeleryBeatStale", "RabbitmqNodeDown"}
    expected |= {"RedisMemoryFull", "TargetMissing", "HostDiskFull", "CertificateAboutToExpire"}
    certificate = ["--tags=pki,redis,redis_sentinel,rabbitmq,exporters", "--limit=data2"]
    try:
        cluster.application.converge(*certificate, "-e", json.dumps({"pki_certificate_days": 2, "pki_renew_days": 1, "pki_replace": True}))
        data["data3"].host.check_output(f"systemctl stop {SERVICE}")
        data["data1"].host.check_output("systemctl stop prometheus-redis-exporter")
        app[1].host.check_output("systemctl stop celery-orders-worker@default")
        app[1].host.check_output("mkdir -p /srv/full && mount -t tmpfs -o size=20m tmpfs /srv/full && fallocate -l 20M /srv/full/x")
        for worker in app:
            worker.host.check_output("systemctl stop celery-orders-beat && systemctl kill --signal=STOP celery-orders-worker@batch")
        cluster.client(replica).config_set("maxmemory", 1024 * 1024)
        cluster.application.celery_python("[app.send_task('orders.tasks.batch_import', (0,)) for _ in range(5)]")
        webhook.tells("FIRING", expected)
    finally:
        data["data3"].host.check_output(f"systemctl start {SERVICE}")
        data["data1"].host.check_output("systemctl start prometheus-redis-exporter")
        app[1].host.check_output("systemctl start celery-orders-worker@default; umount /srv/full; rm -d /srv/full")
        for worker in app:
            worker.host.check_output("systemctl kill --signal=CONT celery-orders-worker@batch; systemctl start celery-orders-beat")
        cluster.client(replica).config_set("maxmemory", limit)
        cluster.application.host.check_output("celery-exec celery-platform dead-letters purge --all --yes")
        cluster.application.converge(*certificate)
    webhook.tells("RESOLVED", expected)
    (REPOSITORY / ".lab/alerts.txt").write_text("\n\n".join(" ".join(message) for message in webhook.messages()))
    assert all("Runbook: https://" in text for _, _, text in webhook.messages())


@only_in_drills
def test_a_broker_that_is_down_is_one_alert(cluster: RabbitCluster, webhook: Webhook) -> None:
    """Not one per queue, worker and node."""
    cluster.whole()
    webhook.forget()
    nodes = [cluster.nodes[name].host for name in ("data2", "data3")]
    try:
        for host in nodes:
            host.check_output(f"systemctl kill --signal=KILL {SERVICE}; systemctl stop {SERVICE}")
        webhook.tells("FIRING", {"RabbitmqMajorityDown"})
        time.sleep(30)
        assert {alert for alert in webhook.told("FIRING") if alert.startswith(("Celery", "RabbitmqNode", "RabbitmqQuorum"))} == set()
    finally:
        for host in nodes:
            host.check_output(f"systemctl start {SERVICE}")
    cluster.whole()
