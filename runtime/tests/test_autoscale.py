"""Workers that grow with the load (`--autoscale`): tasks, time limits, lost processes and signs of life are as with a fixed pool."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from celery_platform.dead_letters import RedisStore
from helpers.managers import Manager
from helpers.sites import Site, wait_for

SHOP = """
import os, time
from celery import Celery
app = Celery("shop")

@app.task(name="nap")
def nap(seconds):
    begun = time.time()
    time.sleep(seconds)
    return os.getpid(), begun, time.time()

@app.task(name="die")
def die():
    os.kill(os.getpid(), 9)
"""


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that are not done."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_worker_grows_while_tasks_wait_and_shrinks_again(site: Site, redis_url: str, tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    site.write(SHOP)
    site.set(broker_url=f"{redis_url}/0", result_backend=f"{redis_url}/1", key_prefix="shop:", soft_time_limit="6", time_limit="8")
    site.environment |= {"AUTOSCALE_KEEPALIVE": "2", "NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": str(6_000_000)}
    producer = site.producer()
    with site.worker("--queues=default", "--autoscale=3,1") as worker:
        assert len(children(worker.pid)) == 1
        runs = [producer.send_task("nap", (2,)) for _ in range(6)]
        ends = [result.get(timeout=40) for result in runs]
        times = [(begun, ended) for _, begun, ended in ends]
        assert max(sum(begun < at <= ended for begun, ended in times) for _, at in times) == 3
        wait_for("the worker to shrink", lambda: len(children(worker.pid)) == 1, seconds=30)

        # A limit holds in processes that were added, and one that is lost costs its own task only.
        late = [producer.send_task("nap", (60,)) for _ in range(2)] + [producer.send_task("die")]
        naps = [producer.send_task("nap", (1,)) for _ in range(4)]
        assert all(len(result.get(timeout=60)) == 3 for result in naps)
        wait_for("their ends", lambda: all(result.failed() for result in late), seconds=60)
        wait_for("their dead letters", lambda: len(RedisStore(producer).list()) == 3, seconds=30)
        assert worker.poll() is None
        assert manager.silent() < 6
        begin = time.monotonic()
        os.kill(worker.pid, signal.SIGTERM)
        worker.wait(20)
        assert time.monotonic() - begin < 15
