"""Whatever fails under a stream of tasks: none that RabbitMQ acknowledged is lost, and tasks flow again.

`make drills` repeats what chance has a part in.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers import web as servers
from helpers.drills import BROKERS_KILLED, QUEUE, RECOVERY, WORKER, Report, cut_off, drill, kill_workers
from helpers.nodes import Node, wait_for
from helpers.rabbit import SERVICE, RabbitCluster
from helpers.targets import FULL, only_in_drills, only_in_test_all

testinfra_hosts = ["ansible://app1"]

Fault = Callable[[RabbitCluster], None]

KILL = f"systemctl kill --signal=KILL {SERVICE}"


def leader_killed(cluster: RabbitCluster) -> None:
    cluster.nodes[cluster.leader(QUEUE)].host.check_output(KILL)


def two_nodes_killed_in_turn(cluster: RabbitCluster) -> None:
    for _ in range(2):
        leader_killed(cluster)
        cluster.whole()


def leader_cut_off(cluster: RabbitCluster) -> None:
    """Cut the leader off from the other nodes for thirty seconds; clients reach all of them."""
    leader = cluster.nodes[cluster.leader(QUEUE)]
    with cut_off(leader, [node for node in cluster.nodes.values() if node is not leader]):
        time.sleep(30)


def leader_alone_with_a_producer(cluster: RabbitCluster) -> None:
    """Cut the leader and the producer's host off from all other hosts, for twenty seconds."""
    leader = cluster.nodes[cluster.leader(QUEUE)]
    others = [node for node in (*cluster.nodes.values(), cluster.workers[1]) if node is not leader]
    with cut_off(leader, others), cut_off(cluster.workers[0], others):
        time.sleep(20)


def disk_full(cluster: RabbitCluster) -> None:
    """Fill a node's disk to its last byte for fifteen seconds, after a while in which it says that it is nearly full."""
    node = cluster.nodes["data1"].host
    folder, copy = "/var/lib/rabbitmq", "/var/lib/rabbitmq-copy"
    move = f"systemctl stop {SERVICE} && {{}} && systemctl start {SERVICE}"
    node.check_output(
        move.format(f"cp -a {folder} {copy} && mount -t tmpfs -o size=2g tmpfs {folder} && cp -aT {copy} {folder} && rm -r {copy}")
    )
    try:
        cluster.whole()
        node.check_output(f"fallocate -l $(($(df --output=avail -B1 {folder} | tail -1) - 500000000)) {folder}/filled")
        wait_for("the alarm", lambda: "disk" in str(cluster.ask("data2", "cluster_status")["alarms"]), seconds=60)
        time.sleep(5)
        node.run(f"head -c 600M /dev/zero >> {folder}/filled")
        time.sleep(15)
        node.check_output(f"rm {folder}/filled")
        cluster.whole()
    finally:
        node.check_output(
            move.format(f"rm -f {folder}/filled && cp -a {folder} {copy} && umount {folder} && cp -aT {copy} {folder} && rm -r {copy}")
        )


def nodes_restarted(cluster: RabbitCluster) -> None:
    """Let the playbook restart all nodes, for a setting that they read at their start."""
    for node in cluster.nodes.values():
        node.host.check_output("touch /etc/rabbitmq/rabbitmq.conf")
    changed = cluster.application.converge("--tags=rabbitmq")["changed"]
    assert len(changed) == len(cluster.nodes), changed


def hosts_rebooted_at_once(cluster: RabbitCluster) -> None:
    def reboot(name: str) -> None:
        subprocess.run(["podman", "restart", "--time=60", cluster.containers[name]], check=True, capture_output=True)
        cluster.nodes[name].booted()

    with ThreadPoolExecutor() as pool:
        list(pool.map(reboot, cluster.nodes))


def workers_killed(cluster: RabbitCluster) -> None:
    kill_workers(cluster.workers)


def workers_stopped(cluster: RabbitCluster) -> None:
    """Stop and start the workers of one host, then of the other, three times, each with tasks in hand."""
    for _ in range(3):
        for node in cluster.workers:
            node.host.check_output(f"systemctl restart {WORKER}")


@pytest.mark.parametrize(
    "fault",
    [
        workers_killed,
        pytest.param(workers_stopped, marks=only_in_drills),
        pytest.param(two_nodes_killed_in_turn, marks=only_in_drills),
        leader_cut_off,
        pytest.param(leader_alone_with_a_producer, marks=only_in_drills),
        pytest.param(disk_full, marks=only_in_test_all),
        pytest.param(nodes_restarted, marks=only_in_drills),
        pytest.param(hosts_rebooted_at_once, marks=only_in_drills),
    ],
)
def test_nothing_acknowledged_is_lost(cluster: RabbitCluster, fault: Fault) -> None:
    report = rabbit_drill(cluster, fault)
    assert report.lost == []
    if fault is workers_stopped:
        assert report.duplicated == 0
    if FULL:
        test_a_run_after_all_that_changes_nothing(cluster)


def test_tasks_flow_again_soon_after_the_leader_was_killed(cluster: RabbitCluster) -> None:
    reports = [rabbit_drill(cluster, leader_killed) for _ in range(BROKERS_KILLED)]
    assert [report.lost for report in reports] == [[]] * BROKERS_KILLED
    assert statistics.median(report.longest_pause for report in reports) <= RECOVERY


@only_in_test_all
def test_web_servers_send_on_when_a_leader_is_killed(cluster: RabbitCluster, web: Node) -> None:
    cluster.whole()
    servers.send_through("RabbitMQ, leader killed", web, lambda: leader_killed(cluster), cluster.whole)


@only_in_test_all
def test_a_run_after_all_that_changes_nothing(cluster: RabbitCluster) -> None:
    assert cluster.application.converge("--tags=rabbitmq")["changed"] == []


def rabbit_drill(cluster: RabbitCluster, fault: Fault) -> Report:
    return drill(f"RabbitMQ, {fault.__name__.replace('_', ' ')}", cluster.workers, lambda: fault(cluster), cluster.whole)
