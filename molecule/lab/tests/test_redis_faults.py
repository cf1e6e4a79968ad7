"""Whatever fails under a stream of tasks: none that the broker acknowledged is lost, and tasks flow again.

`make drills` repeats what chance has a part in, and does the same with kombu's own transport.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable

import pytest

from helpers.cluster import Cluster
from helpers.drills import BROKERS_KILLED, RECOVERY, Report, cut_off, drill, kill_workers
from helpers.targets import only_in_drills, only_in_test_all

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


def hosts_rebooted_in_turn(cluster: Cluster) -> None:
    """Reboot all but the producer's."""
    for name in (*cluster.nodes, "app2"):
        subprocess.run(["podman", "restart", "--time=30", cluster.containers[name]], check=True, capture_output=True)
        cluster.replicas_follow()
    cluster.workers[1].booted()


def sentinel_and_master_killed(cluster: Cluster) -> None:
    """Kill the Sentinel beside the master, too."""
    node = cluster.nodes[cluster.master()]
    node.host.check_output("systemctl kill --signal=KILL redis-sentinel redis-server")


def workers_killed(cluster: Cluster) -> None:
    kill_workers(cluster.workers)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(master_frozen, marks=only_in_test_all),
        pytest.param(workers_killed, marks=only_in_test_all),
        pytest.param(sentinel_and_master_killed, marks=only_in_test_all),
        pytest.param(master_alone_with_a_producer, marks=only_in_drills),
        pytest.param(hosts_rebooted_in_turn, marks=only_in_drills),
    ],
)
def test_nothing_acknowledged_is_lost(cluster: Cluster, fault: Fault) -> None:
    assert redis_drill(cluster, fault).lost == []


@only_in_test_all
def test_tasks_flow_again_soon_after_the_master_was_killed(cluster: Cluster) -> None:
    reports = [redis_drill(cluster, master_killed) for _ in range(BROKERS_KILLED)]
    assert [report.lost for report in reports] == [[]] * BROKERS_KILLED
    assert statistics.median(report.longest_pause for report in reports) <= RECOVERY


@only_in_drills
def test_a_site_changes_its_transport_while_tasks_flow(cluster: Cluster) -> None:
    """Each time the producer, which goes on, uses the other transport than the workers do by then."""

    def to(**settings: str) -> Fault:
        arguments = ["--tags=celery_app,celery_worker,celery_beat", "-e", json.dumps({"celery_app_settings": settings})]
        return lambda cluster: str(cluster.application.converge(*arguments))

    try:
        assert redis_drill(cluster, to(redis_transport="kombu"), "workers change to kombu's transport").lost == []
        redis_drill(cluster, workers_killed, "workers killed, with kombu's transport")
    finally:
        report = redis_drill(cluster, to(), "workers change to the atomic transport")
    assert report.lost == []


def redis_drill(cluster: Cluster, fault: Fault, name: str = "") -> Report:
    name = f"Redis, {name or fault.__name__.replace('_', ' ')}"
    return drill(name, cluster.workers, lambda: fault(cluster), cluster.replicas_follow)
