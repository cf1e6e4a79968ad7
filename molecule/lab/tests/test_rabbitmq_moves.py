"""A site changes its broker while tasks flow: none is lost, and the tests that follow find Redis as the broker."""

from __future__ import annotations

from cluster import Cluster
from drills import Stream
from nodes import wait_for

testinfra_hosts = ["ansible://app1"]


def test_a_site_moves_to_redis_while_tasks_flow(cluster: Cluster) -> None:
    def move(*arguments: str) -> None:
        cluster.application.converge(*arguments, playbook="playbooks/operations/move_broker.yml")

    send = "print(app.send_task('orders.tasks.send_email', (4711,), countdown=180, ignore_result=True).id)"
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
