"""The command `celery-platform queues`, on each broker and with real workers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.shop import letter, shop, store_of
from helpers.sites import Site, cli, wait_for

__all__ = ["shop"]


def status(site: Site, code: int = 0) -> dict[str, Any]:
    told = json.loads(cli(site, "queues", "--json", status=code).stdout)
    return {"dead_letters": told["dead_letters"]} | {queue["name"]: (queue["waiting"], queue["consumers"]) for queue in told["queues"]}


def test_tasks_without_a_consumer_stand_out_and_end_with_1(shop: Site) -> None:
    shop.set(queues='["default", {"name": "urgent", "priority": 3}]', routes='{"mails.*": {"queue": "urgent"}}')
    app = shop.producer()
    # Nothing waits: that nobody consumes is no fault yet.
    assert status(shop) == {"dead_letters": 0, "default": (0, 0), "urgent": (0, 0)}

    for number in range(3):
        app.send_task("mails.send", queue="urgent", priority=number)
    store_of(app).add(letter("1"))
    with shop.worker("--queues=default"):
        wait_for("the status", lambda: status(shop, 1) == {"dead_letters": 1, "default": (0, 1), "urgent": (3, 0)}, seconds=20)
        shown = cli(shop, "queues", status=1).stdout.splitlines()
        assert [line.split() for line in shown[1:]] == [
            ["default", "0", "1"],
            ["urgent", "3", "0", "no", "consumer"],
            ["1", "dead", "letters"],
        ]

    with shop.worker("--queues=default,urgent", "--without-mingle", "--without-gossip"):
        wait_for("the tasks to be taken", lambda: status(shop)["urgent"] == (0, 1), seconds=20)


@pytest.mark.parametrize("shop", ["redis"], indirect=True)
def test_a_broker_that_is_away_is_an_error_in_one_line(shop: Site) -> None:
    shop.set(broker_url="redis://127.0.0.1:1/0")
    assert cli(shop, "queues", "--json", status=1).stderr.startswith("Error: ConnectionError")
