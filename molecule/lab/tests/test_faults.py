"""Whatever fails under a stream of tasks: none that the broker acknowledged is lost, and tasks flow again."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from cluster import Cluster
from drills import Report, Stream
from nodes import REPOSITORY, Node

testinfra_hosts = ["ansible://app1"]

Fault = Callable[[Cluster], None]


def master_killed(cluster: Cluster) -> None:
    cluster.nodes[cluster.master()].host.check_output("systemctl kill --signal=KILL redis-server")


def master_frozen(cluster: Cluster) -> None:
    node = cluster.nodes[cluster.master()]
    node.host.check_output("systemctl kill --signal=STOP redis-server")
    time.sleep(15)
    node.host.check_output("systemctl kill --signal=CONT redis-server")


def master_alone_with_a_producer(cluster: Cluster) -> None:
    """Cut the master and the producer's host off from all other hosts, for twenty seconds."""
    master = cluster.nodes[cluster.master()]
    others = [node for node in (*cluster.nodes.values(), cluster.workers[1]) if node is not master]
    with cut_off(master, others), cut_off(cluster.workers[0], others):
        time.sleep(20)


@contextmanager
def cut_off(node: Node, others: list[Node]) -> Iterator[None]:
    """Let nothing through between a host and others."""
    addresses = ", ".join(other.address for other in others)
    chains = [
        f"chain {hook} {{ type filter hook {hook} priority -200; ip {end} {{ {addresses} }} drop; }}"
        for hook, end in (("input", "saddr"), ("output", "daddr"))
    ]
    node.host.check_output("nft %s", f"table inet drill {{ {'; '.join(chains)}; }}")
    try:
        yield
    finally:
        node.host.check_output("nft delete table inet drill")


def hosts_rebooted_in_turn(cluster: Cluster) -> None:
    for name in cluster.nodes:
        subprocess.run(["podman", "restart", "--time=30", cluster.containers[name]], check=True, capture_output=True)
        cluster.replicas_follow()


def sentinel_killed(cluster: Cluster) -> None:
    """Kill the Sentinel beside the master, then the master."""
    node = cluster.nodes[cluster.master()]
    node.host.check_output("systemctl kill --signal=KILL redis-sentinel redis-server")


def workers_killed(cluster: Cluster) -> None:
    """Kill the workers of both hosts five times, main process and children."""
    for _ in range(5):
        for node in cluster.workers:
            node.host.check_output("systemctl kill --signal=KILL celery-worker@critical")
        time.sleep(4)


@pytest.mark.parametrize(
    "fault", [workers_killed, master_killed, sentinel_killed, master_frozen, master_alone_with_a_producer, hosts_rebooted_in_turn]
)
def test_nothing_acknowledged_is_lost(cluster: Cluster, fault: Fault) -> None:
    cluster.replicas_follow()
    with Stream(cluster.workers[0], cluster.workers) as stream:
        time.sleep(2)
        fault(cluster)
        cluster.replicas_follow()
        time.sleep(5)
        report = stream.report()
    _write_down(fault, report)
    assert report.lost == []
    assert report.acknowledged > 200


def _write_down(fault: Fault, report: Report) -> None:
    """Keep the table that the drills make, for whoever reads the run."""
    with (REPOSITORY / ".lab/drills.txt").open("a") as table:
        table.write(f"{fault.__name__.replace('_', ' ')}: {report}\n")
