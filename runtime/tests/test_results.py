"""Results: a real Redis that goes away for a while, real workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from helpers.brokers import lasting_redis
from helpers.sites import Site, free_port, wait_for

SHOP = """
import time
from pathlib import Path
from celery import Celery

app = Celery("shop")

@app.task(name="slow")
def slow():
    Path("started").touch()
    time.sleep(1)
    return "done"
"""


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_a_task_does_not_fail_while_the_result_backend_is_away(site: Site, redis_url: str, tmp_path: Path, pool: str) -> None:
    port = free_port()
    site.set(broker_url=f"{redis_url}/0", queues='["default"]', result_backend=f"redis://127.0.0.1:{port}/0")
    site.write(SHOP)
    app = site.producer()
    with lasting_redis(port, tmp_path), site.worker("--queues=default", f"--pool={pool}"):
        # Away when the first one ends, and when the second one begins.
        results = [app.send_task("slow"), app.send_task("slow")]
        wait_for("the first one's start", (site.folder / "started").exists)
        redis.Redis(port=port).shutdown()
        wait_for("tries", lambda: "Failed operation _store_result. Retrying" in site.log())
        with lasting_redis(port, tmp_path):
            assert [result.get(timeout=30) for result in results] == ["done", "done"]
    assert "dead letter" not in site.log()
