"""Tests of revokes that outlive the only worker: real workers, killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery.worker import state

from celery_platform.revokes import Revokes
from helpers.sites import Site, wait_for

SHOP = """
from celery import Celery

app = Celery("shop")

@app.task(name="note")
def note(name):
    with open("ran", "a") as file:
        print(name, file=file)
"""


@pytest.mark.parametrize(("broker", "pool"), [("redis", "prefork"), ("rabbitmq", "threads")])
def test_a_revoked_task_does_not_run_after_the_only_worker_was_killed(
    request: pytest.FixtureRequest, site: Site, redis_url: str, broker: str, pool: str
) -> None:
    site.write(SHOP)
    site.set(broker_url=f"{redis_url}/0", key_prefix="shop:", queues='["default", "later"]')
    if broker == "rabbitmq":
        site.set(broker_url=request.getfixturevalue("rabbitmq")[0])
        site.secret(broker_password="guest")
    site.environment["STATE_DIRECTORY"] = f"{site.folder}:{site.folder}/tmp"
    app = site.producer()
    with site.worker("--queues=default", f"--pool={pool}") as worker:
        revoked = app.send_task("note", ("revoked",), queue="later").id
        app.send_task("note", ("stamped",), queue="later", stamped_headers=["order"], order="7")
        assert app.control.revoke(revoked, reply=True, limit=1, timeout=10)
        assert app.control.revoke_by_stamped_headers({"order": ["7"]}, reply=True, limit=1, timeout=10)
        app.send_task("note", ("wanted",), queue="later")
        worker.kill()
        worker.wait()
    with site.worker("--queues=later", f"--pool={pool}"):
        ran = site.folder / "ran"
        wait_for("the task that is wanted", lambda: ran.exists() and "wanted" in ran.read_text())
    assert ran.read_text() == "wanted\n"


def test_what_is_kept_is_bounded_and_may_be_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "REVOKES_MAX", 3)
    path = tmp_path / "revoked"
    for number in range(4):
        Revokes(path).keep([str(number), "0"])
    Revokes(path).keep([["order", 7]])
    with path.open("ab") as file:
        file.write(b'\xff\n[1]\n7\n"3"\n"cut o')
    assert Revokes(path).load() == ["2", "3", ["order", 7]]
    Revokes(path).keep(["4"])
    assert Revokes(path).load() == ["3", ["order", 7], "4"]
    assert path.read_text() == '"3"\n["order", 7]\n"4"\n'
    revokes = Revokes(path)
    for number in range(20):
        revokes.keep([str(number), "x" * 600])
        kept = path.read_text()
        assert len(kept.splitlines()) <= 7
        assert "x" not in kept
    assert revokes.load() == ["17", "18", "19"]
