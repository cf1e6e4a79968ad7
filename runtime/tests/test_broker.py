"""Connections to brokers that come and go."""

from __future__ import annotations

import time
from pathlib import Path

from sentinels import Servers
from sites import Site, wait_for

SHOP = """
from celery import Celery
app = Celery("shop")
"""


def test_a_broker_that_is_there_again_is_found_soon(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.write(SHOP)
    with Servers(tmp_path) as servers:
        port = servers.redis()
        site.set(broker_url=f"redis://127.0.0.1:{port}/0")
        with site.worker("--without-mingle"):
            servers.kill(port)
            # kombu's own intervals would make it look again after 2, 6 and 12 seconds.
            time.sleep(6.5)
            assert "Cannot connect" in site.log()
            back = time.monotonic()
            servers.redis(port=port)
            wait_for("a connected worker", lambda: site.log().count("Connected to redis") == 2)
            assert time.monotonic() - back < 3
