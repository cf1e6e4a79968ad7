"""A site changes its broker while tasks flow: none is lost, and the tests that follow find Redis as the broker."""

from __future__ import annotations

from datetime import datetime

from helpers.cluster import Cluster
from helpers.drills import Stream
from helpers.nodes import Node, wait_for

testinfra_hosts = ["ansible://app1"]


def restarts(node: Node) -> list[tuple[int, int]]:
    """Return when each worker and beat of a host last left its former state, and was up, in microseconds since 1970."""
    listed = node.host.check_output("systemctl list-units --plain --no-legend 'celery-orders-worker@*' celery-orders-beat.service")
    units = [line.split()[0] for line in listed.splitlines()]
    assert len(units) > 1
    times = []
    for unit in units:
        # With --timestamp=us+utc: "Thu 2026-11-26 02:06:54.123456 UTC".
        shown = node.host.check_output("systemctl show %s --timestamp=us+utc -p ActiveExitTimestamp -p ActiveEnterTimestamp --value", unit)
        times.append(
            tuple(sorted(int(datetime.strptime(line, "%a %Y-%m-%d %H:%M:%S.%f UTC").timestamp() * 1e6) for line in shown.split("\n")))
        )
    return times


def test_a_site_moves_to_redis_while_tasks_flow(cluster: Cluster) -> None:
    def move(*arguments: str) -> None:
        cluster.application.converge(*arguments, playbook="playbooks/operations/move_broker.yml")

    send = "print(app.send_task('orders.tasks.send_email', (4711,), countdown=100, ignore_result=True).id)"
    later = cluster.application.celery_python(send)
    with Stream(cluster.application, cluster.workers, rate=10) as stream:
        # As the site's own file; the inventory's, which is kept in git, comes before it.
        (cluster.application.inventory / "group_vars/all/test_moved.yml").write_text("---\ncelery_broker: redis\n")
        move()
        # The producer, as one that is not deployed from here, still sends to the other broker.
        stream.stop()
        move("--limit=celery_worker")
        report = stream.report()
        wait_for("the task that waited for its time", lambda: later in stream.ended(), seconds=180, every=2)
    assert (report.refused, report.lost) == ([], [])
    assert report.acknowledged > 300

    # One host after the other: the services of app2 were not touched before those of app1 were all up again.
    first, second = (cluster.host(cluster.application.inventory, name) for name in ("app1", "app2"))
    assert max(up for _, up in restarts(first)) < min(down for down, _ in restarts(second))
