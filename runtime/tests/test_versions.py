"""The versions of Celery and kombu that applications may pin, each installed as a host installs it, with real workers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from celery import Celery

from celery_platform import redis_transport, versions
from celery_platform.settings import BadSettings, Settings
from helpers.sites import Site
from helpers.targets import only_in_test_all

RUNTIME = Path(__file__).parents[1]
VERSIONS = ("5.4", "5.5", "5.6", "5.7")

SHOP = """
import time
from celery import Celery
app = Celery("shop", set_as_current=True)
# As Django projects do.
app.config_from_object({"CELERY_ACCEPT_CONTENT": ["pickle"]}, namespace="CELERY")

@app.task
def add(a, b):
    return a + b

@app.task
def total(numbers):
    return sum(numbers)

@app.task
def fail():
    raise ValueError("no stock")

@app.task(bind=True, max_retries=2)
def again(self):
    if self.request.retries < 2:
        raise self.retry(countdown=1)
    return self.request.retries

@app.task
def sleep(seconds):
    time.sleep(seconds)
    return seconds
"""
#: What a user does with all of it, in the environment of that version; prints what came of it.
USER = """
import json, time
from celery import chord, group
from celery_platform.worker import app
from celery_platform.dead_letters import store_of
from celery_platform.settings import load_settings
from shop import add, again, fail, sleep, total
done = {}
done["result"] = add.delay(1, 2).get(timeout=20)
done["a batch"] = sorted(group(add.s(n, n) for n in range(5))().get(timeout=20))
done["a chord"] = chord([add.s(n, 1) for n in range(3)])(total.s()).get(timeout=20)
start = time.monotonic()
add.apply_async((1, 2), countdown=2).get(timeout=20)
done["a countdown"] = 1.5 < time.monotonic() - start < 8
done["no early one"] = add.apply_async((1, 2), countdown=0.3).get(timeout=20)
done["a retry"] = again.delay().get(timeout=20)
done["a failure"] = type(fail.delay().get(timeout=20, propagate=False)).__name__
deadline = time.monotonic() + 10
while not (letters := [(letter.task, letter.reason) for letter in store_of(app, load_settings()).list()]) and time.monotonic() < deadline:
    time.sleep(0.2)
done["a dead letter"] = letters
done["remote control"] = len(app.control.ping(timeout=5))
try:
    add.apply_async((1, 2), queue="misspelt")
except Exception as error:
    done["a wrong queue"] = type(error).__name__
done["own settings"] = [app.conf.accept_content]
print(json.dumps(done))
"""
EXPECTED = {
    "result": 3,
    "a batch": [0, 2, 4, 6, 8],
    "a chord": 6,
    "a countdown": True,
    "no early one": 3,
    "a retry": 2,
    "a failure": "ValueError",
    "a dead letter": [["shop.fail", "failed"]],
    "remote control": 1,
    "a wrong queue": "QueueNotFound",
    "own settings": [["json"]],
}


@pytest.fixture(scope="module", params=VERSIONS)
def pinned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Install a minor version, as an application that pins it gets it; return it and the path of its Python."""
    folder = tmp_path_factory.mktemp("version")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pins = [f"celery[redis]=={request.param}.*", f"kombu=={request.param}.*"]
    subprocess.run([folder / "bin/pip", "install", "--quiet", *pins, RUNTIME], check=True)
    subprocess.run([folder / "bin/pip", "check"], check=True)
    found = subprocess.run([folder / "bin/pip", "list", "--format=json"], check=True, capture_output=True, text=True).stdout
    print({item["name"]: item["version"] for item in json.loads(found) if item["name"] in ("celery", "kombu", "redis", "amqp")})
    return f"{request.param} {folder}/bin/python"


@only_in_test_all
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_all_that_a_user_does(
    site: Site, pinned: str, broker: str, pool: str, redis_url: str, rabbitmq: tuple[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    minor, python = pinned.split(" ")
    monkeypatch.setattr(sys, "executable", python)
    site.write(SHOP)
    (site.folder / "user.py").write_text(USER)
    site.set(broker_url=f"{redis_url}/0" if broker == "redis" else rabbitmq[0], result_backend=f"{redis_url}/1", key_prefix="shop:")
    if broker == "rabbitmq":
        site.secret(broker_password="guest")
    with site.worker("--queues=default", f"--pool={pool}"):
        done = json.loads(site.run("python", "user.py", timeout=120).stdout.splitlines()[-1])

    assert done == EXPECTED
    print(f"Celery {minor}, {broker}, {pool}: {len(done)} of {len(EXPECTED)}")
    assert ("kombu's own Redis transport is used" in site.log()) == (broker == "redis" and minor != "5.7")
    assert "accept_content of the application is overridden" in site.log()


def settings(url: str, **more: str) -> Settings:
    return Settings(application="shop:app", broker_url=url, **more, given=frozenset(more))


def test_the_transport_for_redis_is_kombus_own_where_ours_is_not_proven(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_transport, "PROVEN", ("0.1",))
    monkeypatch.setattr(redis_transport.transports, "TRANSPORT_ALIASES", before := dict(redis_transport.transports.TRANSPORT_ALIASES))
    redis_transport.install(Celery("shop", set_as_current=False), settings("redis://h/0"))

    assert before == redis_transport.transports.TRANSPORT_ALIASES
    assert f"it is proven with kombu 0.1, and this is {version('kombu')}" in caplog.text

    with pytest.raises(BadSettings, match="allowed: kombu"):
        redis_transport.install(Celery("shop", set_as_current=False), settings("redis://h/0", redis_transport="atomic"))


@pytest.mark.parametrize(
    "configure",
    [
        lambda app: app.conf.update(task_time_limit=7),
        lambda app: setattr(app.conf, "task_time_limit", 7),
        lambda app: app.config_from_object({"task_time_limit": 7}),
        lambda app: app.config_from_object({"CELERYD_TASK_TIME_LIMIT": 7}),
        lambda app: app.config_from_object({"SHOP_TASK_TIME_LIMIT": 7}, namespace="SHOP"),
        lambda app: app.add_defaults({"task_time_limit": 7}),
    ],
)
def test_what_an_application_sets_is_known_however_it_does(configure: Callable[[Celery], None]) -> None:
    app = Celery("shop", set_as_current=False)
    configure(app)

    assert (versions.is_set(app, "task_time_limit"), versions.is_set(app, "task_acks_late")) == (True, False)
