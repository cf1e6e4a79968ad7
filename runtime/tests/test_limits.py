"""Time limits of a worker: real workers, real kills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from celery import Celery
from sites import Site, wait_for

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
