"""A master that is lost is replaced while tasks flow, and a run of the playbook respects who is the master now."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from helpers import web as servers
from helpers.cluster import PASSWORDS, REDIS, SENTINEL, Cluster
from helpers.drills import RECOVERY, Report, Stream
from helpers.flower_client import Flower
from helpers.nodes import Node, wait_for
from helpers.targets import only_in_drills, only_in_test_all

testinfra_hosts = ["ansible://app1"]

ONLY_REDIS = "--tags=redis,redis_sentinel"


@pytest.fixture(scope="module")
def failed_over(cluster: Cluster) -> dict[str, Any]:
    """Kill the master under a stream of tasks; return who it was, who is it now, and what became of the tasks."""
    cluster.replicas_follow()
    cluster.forget_refusals()
    before = cluster.master()
    with Stream(cluster.application, cluster.workers, results=True) as stream:
        cluster.nodes[before].host.check_output("systemctl kill --signal=KILL redis-server")
        after = wait_for("another master", lambda: (name := cluster.master()) != before and name, seconds=60)
        stream.goes_on()
        return {"before": before, "after": after, "report": stream.report()}


def nothing_went_wrong(report: Report) -> bool:
    """Tell whether all tasks were taken at once, ran, and have a result."""
    assert (report.refused, report.lost, report.without_result, report.failed) == ([], [], [], [])
    return report.acknowledged > 100


def test_tasks_flow_on_when_the_master_is_killed(failed_over: dict[str, Any]) -> None:
    assert nothing_went_wrong(failed_over["report"])
    assert failed_over["report"].longest_pause <= RECOVERY


def test_the_old_master_comes_back_as_a_replica(cluster: Cluster, failed_over: dict[str, Any]) -> None:
    cluster.replicas_follow(2)
    assert cluster.client(failed_over["before"]).role()[0] == "slave"
    assert cluster.master() == failed_over["after"]


def test_a_failover_needs_no_right_that_a_user_lacks(cluster: Cluster, failed_over: dict[str, Any]) -> None:
    assert cluster.refusals() == []


def test_flower_sees_tasks_after_a_failover(cluster: Cluster, failed_over: dict[str, Any]) -> None:
    flower = Flower(cluster.host(cluster.application.inventory, "ops1"), cluster.authority)
    flower.sees(cluster.application)
    assert len(flower.workers()) == 6
    assert "sentinel://" in flower.page("/flower/broker")


@only_in_test_all
def test_web_servers_send_on_when_the_master_is_killed(cluster: Cluster, web: Node) -> None:
    cluster.replicas_follow()
    before = cluster.master()

    def kill() -> None:
        cluster.nodes[before].host.check_output("systemctl kill --signal=KILL redis-server")
        wait_for("another master", lambda: cluster.master() not in ("", before), seconds=60)

    servers.send_through("Redis, master killed", web, kill, cluster.replicas_follow)


def test_a_run_after_a_failover_changes_nothing(cluster: Cluster, failed_over: dict[str, Any]) -> None:
    assert cluster.application.converge()["changed"] == []
    assert cluster.master() == failed_over["after"]
    assert cluster.client(failed_over["before"]).role()[0] == "slave"


def test_a_check_tells_what_would_change_and_changes_nothing(cluster: Cluster) -> None:
    pids = {name: node.show("redis-server", "MainPID") for name, node in cluster.nodes.items()}
    wanted = {"redis_maxmemory": "200mb", "redis_sentinel_down_after": 6000}
    changed = cluster.application.converge(ONLY_REDIS, "--check", "-e", json.dumps(wanted))["changed"]
    assert set(changed) == {"redis : Write the files of Redis", "redis_sentinel : Write the files of Sentinel"}
    assert {name: node.show("redis-server", "MainPID") for name, node in cluster.nodes.items()} == pids
    assert cluster.client("data1").config_get("maxmemory")["maxmemory"] != str(200 * 1024**2)


@only_in_test_all
def test_a_host_that_is_down_is_left_out_and_one_that_was_rebuilt_joins_the_master(cluster: Cluster) -> None:
    cluster.client(cluster.master()).set("test:before", "yes")
    lost = "data1" if cluster.master() != "data1" else "data2"
    others = [name for name in cluster.nodes if name != lost]
    wanted = ["-e", json.dumps({"redis_settings": {"slowlog-max-len": 256}, "redis_sentinel_down_after": 4000})]
    subprocess.run(["podman", "stop", "--time=5", cluster.containers[lost]], check=True, capture_output=True)
    try:
        master = cluster.master()
        output = cluster.application.run_playbook(ONLY_REDIS, *wanted)
        assert output.returncode == 4, output.stdout
        assert f"No answer from {lost}: left as it is. All other hosts are served." in output.stdout
        for name in others:
            assert cluster.client(name).config_get("slowlog-max-len")["slowlog-max-len"] == "256"
        assert cluster.client(others[0], SENTINEL).sentinel_master("celery")["down-after-milliseconds"] == 4000
    finally:
        subprocess.run(["podman", "start", cluster.containers[lost]], check=True, capture_output=True)
    node = cluster.nodes[lost]
    node.booted()

    # A disk that was replaced: no data, and nothing of what Redis and Sentinel knew.
    node.host.check_output("systemctl stop redis-sentinel redis-server && find /var/lib/redis -mindepth 1 -delete")
    assert node.host.run("systemctl start redis-server").rc != 0, "it must not start as an empty master"
    node.host.check_output("systemctl stop redis-server")
    cluster.application.converge(ONLY_REDIS, *wanted)
    cluster.replicas_follow(2)
    assert cluster.master() == master
    assert cluster.client(lost).role()[0] == "slave"
    assert cluster.client(lost).get("test:before") == "yes"
    assert {cluster.client(name, SENTINEL).sentinel_master("celery")["num-other-sentinels"] for name in cluster.nodes} == {2}
    assert cluster.application.converge(ONLY_REDIS, *wanted)["changed"] == []


@only_in_drills
def test_passwords_change_and_redis_restarts_while_tasks_flow(cluster: Cluster) -> None:
    """The settings hold new passwords beside the old ones, and one that Redis takes at its start only."""
    cluster.replicas_follow()
    old = cluster.secrets
    names = ["redis_requirepass", *PASSWORDS.values()]
    new = {name: old[f"vault_{name}"][::-1] for name in names}
    databases = 1 + max(int(cluster.client(name).config_get("databases")["databases"]) for name in cluster.nodes)
    settings = {
        "redis_settings": {"databases": databases},
        **new,
    }
    before = cluster.master()
    pids = {name: node.show("redis-server", "MainPID") for name, node in cluster.nodes.items()}
    sentinels = {name: node.show("redis-sentinel", "MainPID") for name, node in cluster.nodes.items()}
    try:
        both = [{"name": user, "previous_password": old[f"vault_{name}"]} for user, name in PASSWORDS.items()]
        changing = settings | {"redis_users": both, "redis_previous_requirepass": old["vault_redis_requirepass"]}
        with Stream(cluster.application, cluster.workers, results=True) as stream:
            changed = cluster.application.converge("-e", json.dumps(changing))["changed"]
            stream.goes_on()
            report = stream.report()
        assert "redis : Restart replicas for what cannot be changed while they run" in changed
        assert "redis : Restart the master for what cannot be changed while it runs" in changed
        assert nothing_went_wrong(report)
        assert report.longest_publish < 15
        assert cluster.master() != before
        for name, node in cluster.nodes.items():
            assert node.show("redis-server", "MainPID") != pids[name]
            assert cluster.client(name).config_get("databases")["databases"] == str(databases)
            # Sentinel learns passwords while it runs.
            assert node.show("redis-sentinel", "MainPID") == sentinels[name]
        for password in (old["vault_celery_app_redis_password"], new["celery_app_redis_password"]):
            assert all(cluster.client(name, port, "orders", password).ping() for name in cluster.nodes for port in (REDIS, SENTINEL))

        cluster.application.converge(ONLY_REDIS, "-e", json.dumps(settings))
        for name in cluster.nodes:
            for port in (REDIS, SENTINEL):
                with pytest.raises(redis.AuthenticationError):
                    cluster.client(name, port, "orders", old["vault_celery_app_redis_password"]).ping()
                assert cluster.client(name, port, "orders", new["celery_app_redis_password"]).ping()
    finally:
        # Back: the old ones are now the new ones, and Redis restarts once more.
        both = [{"name": user, "previous_password": new[name]} for user, name in PASSWORDS.items()]
        back = {"redis_users": both, "redis_previous_requirepass": new["redis_requirepass"]}
        cluster.application.converge("-e", json.dumps(back))
    cluster.replicas_follow()


@only_in_test_all
def test_a_new_certificate_is_shown_without_a_restart_of_redis_while_tasks_flow(cluster: Cluster) -> None:
    def shown(name: str, port: int) -> bytes:
        client = cluster.client(name, port)
        connection = client.connection_pool.get_connection()
        return bytes(connection._sock.getpeercert(binary_form=True))

    before = {(name, port): shown(name, port) for name in cluster.nodes for port in (REDIS, SENTINEL)}
    pids = {name: node.show("redis-server", "MainPID") for name, node in cluster.nodes.items()}
    with Stream(cluster.application, cluster.workers, results=True) as stream:
        cluster.renew_certificates("redis", "redis_sentinel")
        stream.goes_on()
        report = stream.report()
    assert nothing_went_wrong(report)
    for (name, port), certificate in before.items():
        assert shown(name, port) != certificate, (name, port)
    assert {name: node.show("redis-server", "MainPID") for name, node in cluster.nodes.items()} == pids


@pytest.fixture
def data1(cluster: Cluster) -> Iterator[Node]:
    """Return a data host whose disk for Redis is covered by another, which a test may spoil."""
    node = cluster.nodes["data1"]
    node.host.check_output("mount -t tmpfs -o size=20m tmpfs /var/lib/redis")
    yield node
    node.host.check_output("umount /var/lib/redis")


@only_in_test_all
def test_a_full_or_read_only_disk_stops_the_run(cluster: Cluster, data1: Node) -> None:
    full = cluster.application.run_playbook()
    assert full.returncode == 2
    assert 'has "20 MB free"' in full.stdout
    assert "File: none, it is /var/lib/redis of data1" in full.stdout
    data1.host.check_output("mount -o remount,ro /var/lib/redis")
    read_only = cluster.application.run_playbook()
    assert 'has "on a read-only disk"' in read_only.stdout
    assert "nothing was changed on any host" in read_only.stdout


@only_in_test_all
def test_a_name_that_stands_for_the_host_itself_only_stops_the_run(cluster: Cluster) -> None:
    hosts = "".join(f"{node.address} {name}\\n" for name, node in cluster.nodes.items() if name != "data2")
    node = cluster.nodes["data2"]
    node.host.check_output(f"cp /etc/hosts /tmp/hosts && printf '127.0.1.1 data2\\n{hosts}' > /etc/hosts")
    try:
        output = cluster.application.run_playbook("-e", json.dumps({"redis_address": "{{ inventory_hostname }}"}))
        assert output.returncode == 2
        assert "data2 is 127.0.1.1" in output.stdout
        assert "nothing was changed on any host" in output.stdout
    finally:
        node.host.check_output("cat /tmp/hosts > /etc/hosts")
