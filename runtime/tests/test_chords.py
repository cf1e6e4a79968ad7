"""Tests of chords whose parts end later than results are kept: real workers, results kept for a second."""

from __future__ import annotations

import json
import re

import pytest
import redis
from celery import chain, chord, group, signature

from helpers.sites import Site, wait_for

SHOP = """
import json
from celery import Celery
from celery_platform import chords

app = Celery("shop")
chords.SENDING = 1

@app.task(name="part")
def part(number):
    return number

@app.task(name="body")
def body(results, name):
    with open(name, "w") as file:
        json.dump(results, file)

@app.task(name="told")
def told(request, error, traceback):
    with open("told", "a") as file:
        print(error, file=file)
"""


@pytest.mark.parametrize(("broker", "pool"), [("redis", "prefork"), ("rabbitmq", "threads")])
def test_a_chord_waits_longer_than_results_are_kept_and_tells_when_it_is_dropped(
    request: pytest.FixtureRequest, site: Site, redis_url: str, broker: str, pool: str
) -> None:
    site.write(SHOP)
    site.set(broker_url=f"{redis_url}/0", result_backend=f"{redis_url}/1", key_prefix="shop:", result_expires="1", chord_expires="4")
    if broker == "rabbitmq":
        site.set(broker_url=request.getfixturevalue("rabbitmq")[0])
        site.secret(broker_password="guest")
    app = site.producer()

    def send(name: str, later: int, nested: bool = False) -> None:
        first, second, third, last = (signature("part", (number,), app=app, immutable=True) for number in (1, 2, 3, 4))
        parts = [chain(first, group([second, third], app=app), app=app) if nested else first, last.set(countdown=later)]
        body = signature("body", kwargs={"name": name}, app=app)
        chord(parts, body.on_error(signature("told", app=app)), app=app).apply_async()

    with site.worker("--queues=default", f"--pool={pool}"):
        send("late", 2)
        send("late and nested", 2, nested=True)
        send("dropped", 7)
        wait_for("the bodies", lambda: all((site.folder / name).exists() for name in ("late", "late and nested")))
        told = site.folder / "told"
        wait_for("that one is told", lambda: told.exists() and told.read_text())
    assert json.loads((site.folder / "late").read_text()) == [1, 4]
    assert json.loads((site.folder / "late and nested").read_text()) == [[2, 3], 4]
    assert not (site.folder / "dropped").exists()
    assert re.fullmatch(r"chord \S+ is dropped: its parts ended more than 4 s apart, so body never runs\n", told.read_text())
    # That they are done is known for five minutes (claim).
    left = redis.Redis.from_url(f"{redis_url}/1")
    wait_for("nothing else that is left", lambda: all(key.endswith(b".c") for key in left.keys("*taskset*")))
