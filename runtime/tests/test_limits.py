"""Time limits of a worker: real workers, real kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from celery import Celery

from celery_platform.dead_letters import RedisStore
from helpers.sites import Site, wait_for

SHOP = """
import os, time
from celery import Celery

app = Celery("shop", broker=os.environ["BARE"], backend=os.environ["BARE"])
app.conf.task_track_started = True

def work(self):
    with open(self.request.id, "w") as file:
        print(time.time(), file=file)
    time.sleep(90)

work_of_task = app.task(name="of-task", bind=True, time_limit=1)(work)
work_of_call = app.task(name="of-call", bind=True)(work)
work_of_worker = app.task(name="of-worker", bind=True, soft_time_limit=60)(work)
"""


def send_all(app: Celery, prefix: str) -> dict[str, str]:
    limits = {"of-task": {}, "of-call": {"time_limit": 1}, "of-worker": {}}
    return {name: app.send_task(name, task_id=prefix + name, **options).id for name, options in limits.items()}


def test_a_hard_limit_below_the_soft_one_holds(site: Site, redis_url: str) -> None:
    """The worker's limits are 5 and 6 seconds. Without the guard, they take the place of those of 1, and 60 that of 6."""
    url = f"{redis_url}/2"
    site.write(SHOP)
    site.environment["BARE"] = url
    site.set(broker_url=f"{redis_url}/0", result_backend=f"{redis_url}/1", soft_time_limit="5", time_limit="6", dead_letters="false")
    command = [Path(sys.executable).with_name("celery"), "-A", "shop", "worker", "--concurrency=3", "--soft-time-limit=5", "--time-limit=6"]
    options = {"env": os.environ | site.environment, "cwd": site.folder}
    with (site.folder / "bare.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log, **options) as bare:
        try:
            plain, ours = Celery(broker=url, backend=url, set_as_current=False), site.producer()
            ids = send_all(plain, "bare-")
            with site.worker("--queues=default", "--concurrency=3"):
                ids |= {f"our {name}": id for name, id in send_all(ours, "our-").items()}
                wait_for(
                    "our tasks' ends", lambda: all(ours.AsyncResult(f"our-{name}").failed() for name in ("of-task", "of-call", "of-worker"))
                )
            wait_for("the other tasks' ends", lambda: all(plain.AsyncResult(f"bare-{name}").failed() for name in ("of-task", "of-call")))
            assert not plain.AsyncResult("bare-of-worker").ready()

            def took(app: Celery, id: str) -> float:
                # A task that is told and killed at once may still have time to say that it was told.
                assert type(app.AsyncResult(id).result).__name__ in ("TimeLimitExceeded", "SoftTimeLimitExceeded")
                return app.AsyncResult(id).date_done.timestamp() - float((site.folder / id).read_text())

            for name in ("of-task", "of-call"):
                assert took(ours, f"our-{name}") < took(plain, f"bare-{name}") - 2
            assert took(ours, "our-of-worker") < 30
        finally:
            bare.kill()


DYING = """
import os, signal, sys, time
from celery import Celery

app = Celery("shop")

@app.task(name="dies")
def dies(closes_early):
    if closes_early:
        # As a process does that ends on a busy machine: its pipes are closed, but it cannot be waited for yet.
        frame = sys._getframe()
        while "child_w" not in frame.f_locals:
            frame = frame.f_back
        os.close(frame.f_locals["child_w"])
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)

@app.task(name="sleeps", bind=True)
def sleeps(self, seconds):
    with open(self.request.id, "w"):
        time.sleep(seconds)
"""


def dying(site: Site, redis_url: str, **settings: str) -> None:
    site.write(DYING)
    site.set(broker_url=f"{redis_url}/0", result_backend=f"{redis_url}/1", max_runs="1", **settings)


@pytest.mark.parametrize("closes_early", [True, False])
def test_a_lost_process_is_no_time_limit(site: Site, redis_url: str, closes_early: bool) -> None:
    """Without the guard, those that close their pipes early are found after 5 s, and given up after 4 s."""
    dying(site, redis_url, soft_time_limit="3", time_limit="4")
    with site.worker("--queues=default", "--concurrency=2"):
        app = site.producer()
        ids = [app.send_task("dies", (closes_early,)).id for _ in range(10)]
        found = [app.AsyncResult(id).get(timeout=60, propagate=False) for id in ids]
        assert [type(error).__name__ for error in found] == ["WorkerLostError"] * 10
        letters = wait_for("the dead letters", lambda: (found := RedisStore(app).list()) and len(found) == 10 and found)
        assert {letter.reason for letter in letters} == {"worker-lost"}
        assert max(letter.failed - letter.received for letter in letters) < 8


def test_a_worker_that_stood_still_kills_no_task_that_was_done_in_time(site: Site, redis_url: str) -> None:
    dying(site, redis_url, soft_time_limit="2", time_limit="3")
    with site.worker("--queues=default", "--concurrency=2") as worker:
        app = site.producer()
        done = [app.send_task("sleeps", (1,)) for _ in range(2)]
        wait_for("the tasks", lambda: all((site.folder / result.id).exists() for result in done))
        time.sleep(0.3)
        worker.send_signal(signal.SIGSTOP)
        time.sleep(5)
        worker.send_signal(signal.SIGCONT)
        # It still kills what does run too long.
        hung = app.send_task("sleeps", (60,))
        assert type(hung.get(timeout=30, propagate=False)).__name__ in ("TimeLimitExceeded", "SoftTimeLimitExceeded")
        assert [result.get(timeout=5) for result in done] == [None, None]
        assert "limit" not in site.log()[: site.log().index(hung.id)]
        wait_for("its dead letter, the only one", lambda: [letter.id for letter in RedisStore(app).list()] == [hung.id])
