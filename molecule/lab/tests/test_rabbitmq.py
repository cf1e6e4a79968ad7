"""RabbitMQ's nodes are one cluster whatever happens to one of them, and let in only whom they know, over TLS."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import amqp
import pytest
import yaml

from helpers.authority import Authority
from helpers.nodes import Node
from helpers.rabbit import AMQPS, DISTRIBUTION, METRICS, SERVICE, VHOST, RabbitCluster
from helpers.targets import only_in_drills, only_in_test_all

testinfra_hosts = ["ansible://data1"]

ONLY = "--tags=rabbitmq"
QUEUE = "critical"
NODES = ["rabbit@data1", "rabbit@data2", "rabbit@data3"]
RESTARTED = "rabbitmq : Restart nodes for what cannot be changed while they run"


def pids(cluster: RabbitCluster) -> dict[str, str]:
    return {name: node.show(SERVICE, "MainPID")["MainPID"] for name, node in cluster.nodes.items()}


@pytest.fixture
def kept(cluster: RabbitCluster) -> Iterator[Callable[[], int]]:
    """Put messages into a queue of the application that nobody consumes; return what counts those that are left."""
    count = 200
    connection = cluster.connect("data1", "administrator", cluster.secrets["vault_rabbitmq_administrator_password"], confirm_publish=True)
    channel = connection.channel()
    channel.queue_declare("test", durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
    for number in range(count):
        channel.basic_publish(amqp.Message(str(number), delivery_mode=2), "", "test")
    connection.close()

    def left() -> int:
        again = cluster.connect("data1", "administrator", cluster.secrets["vault_rabbitmq_administrator_password"])
        got = 0
        reader = again.channel()
        while reader.basic_get("test", no_ack=True):
            got += 1
        again.close()
        return got - count

    yield left
    cluster.ctl("data1", f"delete_queue --vhost={VHOST} test")


@pytest.fixture
def other_inventory(cluster: RabbitCluster, tmp_path: Path) -> Callable[[list[str]], Node]:
    """Return a function that makes an inventory in which other hosts have RabbitMQ, and returns the host that runs playbooks with it."""

    def change(hosts: list[str]) -> Node:
        inventory = tmp_path / "-".join(hosts)
        shutil.copytree(cluster.application.inventory, inventory)
        file = inventory / "hosts.yml"
        content = yaml.safe_load(file.read_text())
        content["all"]["children"]["rabbitmq"]["hosts"] = dict.fromkeys(hosts)
        file.write_text(yaml.safe_dump(content))
        return cluster.host(inventory, "app1")

    return change


# --- What it is ---


def test_all_nodes_are_one_cluster(cluster: RabbitCluster) -> None:
    for name in cluster.nodes:
        status = cluster.ask(name, "cluster_status")
        assert sorted(status["disk_nodes"]) == sorted(status["running_nodes"]) == NODES
        assert (status["partitions"], status["alarms"]) == ({}, [])


def test_there_are_only_the_users_and_vhosts_of_the_inventory(cluster: RabbitCluster) -> None:
    assert {user["user"] for user in cluster.ask("data1", "list_users")} == {"administrator", "orders", "monitoring"}
    assert [vhost["name"] for vhost in cluster.ask("data1", "list_vhosts name")] == [VHOST]


def test_it_listens_only_where_it_is_encrypted_or_the_host_itself(cluster: RabbitCluster) -> None:
    for node in cluster.nodes.values():
        sockets = node.host.check_output("ss -tlnpH").splitlines()
        listening = {line.split()[3] for line in sockets}
        erlang = {line.split()[3].rpartition(":") for line in sockets if "beam.smp" in line}
        assert {int(port) for address, _, port in erlang if not address.startswith("127.")} == {AMQPS, METRICS, DISTRIBUTION}
        assert f"{node.address}:4369" in listening
        assert not {"0.0.0.0:4369", "*:4369", "[::]:4369"} & listening


def test_its_sandbox_is_tight(cluster: RabbitCluster) -> None:
    for node in cluster.nodes.values():
        shown = node.host.check_output(f"systemd-analyze security {SERVICE} --no-pager | tail -1")
        assert float(shown.rpartition("service: ")[2].split()[0]) <= 1.5


def test_the_cookie_is_known_only_to_the_node(cluster: RabbitCluster) -> None:
    for node in cluster.nodes.values():
        file = node.host.file("/var/lib/rabbitmq/.erlang.cookie")
        assert (file.user, file.mode) == ("rabbitmq", 0o400)
        assert file.content_string == cluster.secrets["vault_rabbitmq_cookie"]
        seen = node.host.check_output(
            "cat /proc/[0-9]*/cmdline /etc/rabbitmq/* /etc/systemd/system/rabbitmq-server.service.d/* | tr '\\0' ' '"
        )
        for name, secret in cluster.secrets.items():
            assert secret not in seen, name


# --- Whom it lets in ---


def test_a_client_may_verify_each_node_by_the_name_that_all_share(cluster: RabbitCluster) -> None:
    for name in cluster.nodes:
        cluster.connect(name, server_name="rabbitmq.internal").close()
        with pytest.raises(ssl.SSLCertVerificationError):
            cluster.connect(name, server_name="rabbitmq.example")


@pytest.mark.parametrize("port", [AMQPS, DISTRIBUTION, METRICS])
def test_strangers_are_refused(cluster: RabbitCluster, port: int) -> None:
    stranger = cluster.save("stranger", Authority().issue(["orders"]))
    for node in cluster.nodes.values():
        assert answer(cluster, node.address, port, cluster.certificate) != "", "with a certificate it would have answered"
        assert answer(cluster, node.address, port, None) == ""
        assert answer(cluster, node.address, port, stranger) == ""
        assert answer(cluster, node.address, port, cluster.certificate, ssl.TLSVersion.TLSv1_1) == ""
        with socket.create_connection((node.address, port), timeout=5) as plain:
            plain.sendall(b"AMQP\x00\x00\x09\x01\r\n\r\n")
            assert not plain.recv(100).startswith((b"\x01", b"AMQP", b"HTTP"))


def answer(
    cluster: RabbitCluster,
    address: str,
    port: int,
    certificate: tuple[Path, Path] | None,
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> str:
    """Return which version of TLS a server speaks with a client once it has heard from it; '' where it hangs up."""
    context = ssl.create_default_context(cafile=str(cluster.authority))
    context.minimum_version = context.maximum_version = version
    if version < ssl.TLSVersion.TLSv1_2:
        context.set_ciphers("DEFAULT@SECLEVEL=0")
    if certificate:
        context.load_cert_chain(*certificate)
    try:
        with socket.create_connection((address, port), timeout=5) as plain, context.wrap_socket(plain, server_hostname=address) as session:
            # With TLS 1.3 a client learns only now that it is refused.
            session.settimeout(2)
            session.sendall({AMQPS: b"AMQP\x00\x00\x09\x01", METRICS: b"GET / HTTP/1.0\r\n\r\n"}.get(port, b""))
            try:
                return str(session.version()) if session.recv(1) or port == DISTRIBUTION else ""
            except TimeoutError:
                return str(session.version())
    except (ssl.SSLError, ConnectionError):
        return ""


@pytest.mark.parametrize("user", ["guest", "orders", "administrator", "nobody"])
def test_a_wrong_password_is_refused(cluster: RabbitCluster, user: str) -> None:
    for password in ("guest", ""):
        with pytest.raises((amqp.AccessRefused, amqp.NotAllowed)):
            cluster.connect("data1", user, password or user)


def test_metrics_are_given_to_a_host_with_a_certificate(cluster: RabbitCluster) -> None:
    context = ssl.create_default_context(cafile=str(cluster.authority))
    context.load_cert_chain(*cluster.certificate)
    for node in cluster.nodes.values():
        with urllib.request.urlopen(f"https://{node.address}:{METRICS}/metrics", context=context, timeout=10) as page:
            assert b"\nrabbitmq_build_info{" in page.read()


def test_urgent_messages_come_first_where_the_version_has_priorities(cluster: RabbitCluster) -> None:
    connection = cluster.connect("data1", "administrator", cluster.secrets["vault_rabbitmq_administrator_password"], confirm_publish=True)
    channel = connection.channel()
    channel.queue_declare("test", durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
    try:
        for priority in [0] * 6 + [9] * 6:
            channel.basic_publish(amqp.Message("", delivery_mode=2, priority=priority), "", "test")
        first = [channel.basic_get("test", no_ack=True).properties["priority"] for _ in range(6)]
        assert first.count(9) == (0 if cluster.ctl("data1", "version").strip().startswith("3.") else 4)
    finally:
        channel.queue_delete("test")
        connection.close()


# --- What a run does to it ---


@only_in_test_all
def test_a_check_finds_nothing_to_do(cluster: RabbitCluster) -> None:
    before = pids(cluster)
    assert cluster.application.converge(ONLY, "--check", "--diff")["changed"] == []
    assert pids(cluster) == before


@only_in_test_all
def test_a_run_after_a_node_was_killed_changes_nothing(cluster: RabbitCluster) -> None:
    cluster.nodes["data2"].host.check_output(f"systemctl kill --signal=KILL {SERVICE}")
    cluster.whole()
    assert cluster.application.converge(ONLY)["changed"] == []


@only_in_drills
def test_a_new_certificate_is_shown_without_a_restart(cluster: RabbitCluster) -> None:
    def serial(name: str) -> str:
        connection = cluster.connect(name)
        found = connection.transport.sock.getpeercert()["serialNumber"]
        connection.close()
        return str(found)

    before, processes = {name: serial(name) for name in cluster.nodes}, pids(cluster)
    cluster.renew_certificates("rabbitmq")
    for name in cluster.nodes:
        assert serial(name) != before[name]
    assert pids(cluster) == processes
    cluster.whole()


@only_in_drills
def test_a_node_whose_disk_was_replaced_joins_again(cluster: RabbitCluster, kept: Callable[[], int]) -> None:
    processes = pids(cluster)
    # The first one, which the others once joined.
    cluster.nodes["data1"].host.check_output(f"systemctl stop {SERVICE} && find /var/lib/rabbitmq -mindepth 1 -delete")
    changed = cluster.application.converge(ONLY)["changed"]
    assert "rabbitmq : Join the cluster, or be its first node" in changed
    cluster.whole()
    assert {name: pid for name, pid in pids(cluster).items() if name != "data1"} == {n: p for n, p in processes.items() if n != "data1"}
    assert kept() == 0
    assert cluster.application.converge(ONLY)["changed"] == []


@only_in_drills
def test_a_node_leaves_and_comes_with_the_inventory(
    cluster: RabbitCluster, kept: Callable[[], int], other_inventory: Callable[[list[str]], Node]
) -> None:
    fewer = other_inventory(["data1", "data2"])
    refused = fewer.run_playbook(ONLY)
    assert refused.returncode == 2
    assert "group rabbitmq has" in refused.stdout
    assert "at least three hosts" in refused.stdout

    changed = fewer.converge(ONLY, "-e", "rabbitmq_minimum_nodes=2")["changed"]
    assert "rabbitmq : Take nodes that left the inventory out of the cluster" in changed
    assert cluster.running("data1") == {"data1", "data2"}
    assert all(set(queue["members"]) == set(NODES[:2]) for queue in cluster.queues("data1"))

    changed = cluster.application.converge(ONLY)["changed"]
    assert "rabbitmq : Join the cluster, or be its first node" in changed
    cluster.whole()
    assert kept() == 0
    assert cluster.application.converge(ONLY)["changed"] == []


@only_in_drills
def test_a_rolling_restart_waits_for_a_majority_and_goes_on_where_it_stopped(cluster: RabbitCluster) -> None:
    settings = json.dumps({"rabbitmq_settings": {"channel_max": 2046}, "__rabbitmq_patience": 5})
    before = pids(cluster)
    cluster.nodes["data3"].host.check_output(f"systemctl stop {SERVICE}")
    try:
        output = cluster.application.run_playbook(ONLY, "--limit=data1,data2", "-e", settings)
        assert output.returncode == 2
        assert "rabbit@data1 is not restarted, since quorum queues still need it" in output.stdout
    finally:
        cluster.nodes["data3"].host.check_output(f"systemctl start {SERVICE}")
    cluster.whole()
    assert [pids(cluster)[name] for name in ("data1", "data2")] == [before[name] for name in ("data1", "data2")]
    changed = cluster.application.converge(ONLY, "-e", settings)["changed"]
    assert changed.count(RESTARTED) == 3
    assert set(pids(cluster).values()) & set(before.values()) == set()
    cluster.whole()
    assert cluster.ask("data2", "environment")["rabbit"]["channel_max"] == 2046
    cluster.application.converge(ONLY)
    cluster.whole()


@only_in_drills
def test_an_upgrade_takes_one_node_after_the_other(cluster: RabbitCluster) -> None:
    """The newer package is the one that is installed, under another version."""
    before = pids(cluster)
    for node in cluster.nodes.values():
        node.host.check_output("mkdir -p /srv/newer && cd /srv/newer && cp /var/cache/apt/archives/rabbitmq-server_*.deb old.deb")
        node.host.check_output("cd /srv/newer && dpkg-deb -R old.deb x && sed -i 's/^Version: .*/&+newer/' x/DEBIAN/control")
        node.host.check_output("cd /srv/newer && dpkg-deb -b x new.deb")
        index = (
            "cat x/DEBIAN/control; echo Filename: ./new.deb; stat -c 'Size: %s' new.deb; sha256sum new.deb | sed 's/ .*//; s/^/SHA256: /'"
        )
        node.host.check_output(f"cd /srv/newer && ({index}) > Packages")
        node.host.check_output("echo 'deb [trusted=yes] file:/srv/newer ./' > /etc/apt/sources.list.d/newer.list && apt-get update")
    try:
        changed = cluster.application.converge(ONLY, "-e", "rabbitmq_upgrade=true")["changed"]
        assert changed == [RESTARTED] * 3
        assert set(pids(cluster).values()) & set(before.values()) == set()
        for node in cluster.nodes.values():
            assert node.host.package("rabbitmq-server").version.endswith("+newer")
        cluster.whole()
        assert cluster.application.converge(ONLY, "-e", "rabbitmq_upgrade=true")["changed"] == []
    finally:
        for node in cluster.nodes.values():
            node.host.check_output("rm -r /srv/newer /etc/apt/sources.list.d/newer.list && apt-get update")


# --- Bad input ---


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        pytest.param(
            {
                "rabbitmq_cookie": "nX7cY2pK9mQ4wL8vD3fG6hJ1",
                "rabbitmq_address": "{{ inventory_hostname }}",
                "rabbitmq_settings": {"listeners.tcp.1": 5672},
                "rabbitmq_administrator_password": "",
                "rabbitmq_users": [
                    {"name": "guest", "password": "nX7cY2pK9mQ4wL8vD3fG6hJ1"},
                    {"name": "guest", "password": "nX7cY2pK9mQ4wL8vD3fG6hJ1", "application": "elsewhere"},
                ],
                "__rabbitmq_own_series": "9.9",
                "__rabbitmq_disk_needed_mb": 10**9,
            },
            [
                "rabbitmq_cookie .*other than the cookie .* runs on data1",
                "rabbitmq_host .*on data1: data2 is unknown",
                "rabbitmq_settings .*listeners.tcp.1",
                "rabbitmq_users .*guest.*users with different names",
                "rabbitmq_users .*guest.*any name but guest",
                "rabbitmq_administrator_password .*user who may do everything",
                "rabbitmq_users .*elsewhere.*users of applications that",
                "rabbitmq_upgrade .* in the cluster, and 9.9 for data1",
                "/var/lib/rabbitmq .*MB free.*File: none, it is / of data1",
            ],
            id="much",
        ),
        pytest.param({"rabbitmq_host": "Data"}, ["rabbitmq_host .*Data.*a short name for each host"], id="name", marks=only_in_test_all),
    ],
)
def test_bad_input_stops_the_run(cluster: RabbitCluster, settings: dict[str, Any], messages: list[str]) -> None:
    output = cluster.application.run_playbook(ONLY, "-e", json.dumps(settings))
    assert output.returncode == 2, output.stdout
    for message in messages:
        assert re.search(f"(?s)nothing was changed on any host.*{message}.*File: .*Allowed: ", output.stdout), message


@only_in_drills
def test_a_queue_that_would_have_to_change_stops_the_run(cluster: RabbitCluster) -> None:
    connection = cluster.connect("data1", "administrator", cluster.secrets["vault_rabbitmq_administrator_password"])
    connection.channel().queue_declare("reports", durable=True, auto_delete=False, arguments={"x-queue-type": "classic"})
    try:
        with pytest.raises(AssertionError, match=r"(?s)nothing was changed on any host.*rabbitmq_applications .*queue orders/reports"):
            cluster.application.converge(ONLY, "-e", json.dumps({"celery_app_queues": ["critical", "default", "batch", "reports"]}))
    finally:
        connection.channel().queue_delete("reports")
        connection.close()


@only_in_test_all
def test_an_even_number_of_nodes_is_warned_of(cluster: RabbitCluster, other_inventory: Callable[[list[str]], Node]) -> None:
    output = other_inventory(["data1", "data2", "data3", "app1"]).run_playbook("--tags=none", "--check")
    assert "4 nodes of RabbitMQ survive the loss of no more of them than 3 would" in output.stdout + output.stderr
