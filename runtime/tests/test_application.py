"""The commands `check` and `round-trip`: real applications, good and broken; real brokers and workers."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from celery_platform import application, systemd
from helpers.sentinels import Servers
from helpers.shop import store_of
from helpers.sites import Site, cli, free_port

GOOD = """
from celery import Celery
app = Celery("shop", include=["shop_tasks"])
"""


@pytest.fixture
def broken(site: Site) -> Site:
    """A site whose broker does not exist: a check needs none."""
    site.set(broker_url="redis://127.0.0.1:1/0")
    site.write(GOOD)
    (site.folder / "shop_tasks.py").write_text("from shop import app\n@app.task\ndef sell():\n    pass\n")
    return site


def test_an_application_that_loads_is_ok(broken: Site) -> None:
    assert cli(broken, "check").stdout == "ok: 1 tasks of shop:app\n"
    broken.set(application="shop")
    assert cli(broken, "check").stdout == "ok: 1 tasks of shop\n"
    broken.set(application="shop.app")
    assert cli(broken, "check").stdout == "ok: 1 tasks of shop.app\n"


def test_a_redis_cluster_is_told(broken: Site, tmp_path: Path) -> None:
    with Servers(tmp_path) as servers:
        cluster = servers.redis(cluster_enabled="yes", cluster_config_file="nodes.conf", cluster_port=str(free_port()))
        broken.set(result_backend=f"redis://127.0.0.1:{cluster}/0")
        assert "Error: The result backend is a Redis Cluster" in cli(broken, "check", status=1).stderr
        broken.set(result_backend=f"redis://127.0.0.1:{servers.redis()}/0")
        assert cli(broken, "check").stdout == "ok: 1 tasks of shop:app\n"


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ("import json\n\nimport no_such_thing\n", "ModuleNotFoundError: No module named 'no_such_thing', at .*/shop_tasks.py:3"),
        ("def sell(:\n", r"SyntaxError: invalid syntax .*, at .*/shop_tasks.py:1"),
        ("import sys\nsys.exit(0)\n", r"SystemExit: 0, at .*/shop_tasks.py:2"),
        ("import os\nos.environ['TOKEN']\n", r"KeyError: 'TOKEN', at .*/shop_tasks.py:2"),
        (
            "try:\n    int('x')\nexcept ValueError as error:\n    raise RuntimeError('no price, redis://:s3cret@host') from error\n",
            r"RuntimeError: no price, redis://:\*{8}@host, at .*/shop_tasks.py:4\n  caused by ValueError: .*'x', at .*/shop_tasks.py:2",
        ),
    ],
)
def test_a_task_module_that_fails_is_told(broken: Site, tasks: str, told: str) -> None:
    (broken.folder / "shop_tasks.py").write_text(tasks)
    assert re.fullmatch(told, cli(broken, "check", status=1).stderr.strip())


@pytest.mark.parametrize(
    ("name", "source", "told"),
    [
        ("shop:ap", GOOD, r"module shop has no attribute 'ap' \(did you mean app\?\)"),
        ("shop.ap", GOOD, r"module shop has no attribute 'ap' \(did you mean app\?\)"),
        ("shop:json", "import json\n" + GOOD, r"json of module shop is no Celery application \(did you mean app\?\)"),
        ("shop", "", "module shop has no Celery application"),
        ("shopp:app", GOOD, "ModuleNotFoundError: No module named 'shopp'.*"),
        ("shop:app", "import os\nos.no_such_thing\n", "AttributeError: module 'os' has no attribute 'no_such_thing', at .*/shop.py:2"),
        ("shop:app", "from celery import Nothing\n", "ImportError: cannot import name 'Nothing' from 'celery' .*, at .*/shop.py:1"),
        (
            "shop:app",
            "from celery import Celery\napp = Celery('shop')\napp.config_from_object('settings')\n",
            r"KeyError: 'SECRET', at .*/settings.py:2",
        ),
    ],
)
def test_an_application_that_is_not_there_is_told(broken: Site, name: str, source: str, told: str) -> None:
    (broken.folder / "settings.py").write_text("import os\nsecret = os.environ['SECRET']\n")
    broken.set(application=name)
    broken.write(source)
    for command in ("check", "config"):
        assert re.fullmatch(told, cli(broken, command, status=1).stderr.strip())
    assert re.search(told, broken.run("celery", "-A", "celery_platform.worker:app", "worker", check=False).stderr)


def test_no_traceback_in_the_journal_shows_a_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(systemd, "stderr_is_journal", lambda: True)
    for name, value in {"APPLICATION": "shop:app", "BROKER_URL": "memory://", "SECRET_VARIABLES": '["TOKEN"]'}.items():
        monkeypatch.setenv(f"CELERY_PLATFORM_{name}", value)
    monkeypatch.setenv("TOKEN", "s3cret/1")
    with pytest.raises(SystemExit), application.explained():
        raise ValueError(os.environ["TOKEN"])
    journal = capsys.readouterr().err

    assert "Traceback" in journal
    assert journal.count("ValueError: ********") == 2
    assert "s3cret" not in journal


def test_bad_settings_are_told_as_elsewhere(broken: Site) -> None:
    broken.set(time_limit="soon")
    assert "CELERY_PLATFORM_TIME_LIMIT" in cli(broken, "check", status=78).stderr


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ('""', "django.core.exceptions.ImproperlyConfigured: The SECRET_KEY setting must not be empty."),
        ('os.environ["SECRET_KEY"]', r"KeyError: 'SECRET_KEY', at .*/shop_settings.py:2"),
        ('environ("SECRET_KEY")', r"django.core.exceptions.ImproperlyConfigured: Set SECRET_KEY, at .*/shop_settings.py:"),
        ('"x" * 60', ""),
    ],
)
def test_django_without_its_secret_key_is_told(broken: Site, key: str, told: str) -> None:
    environ = (
        "def environ(name):\n    from django.core.exceptions import ImproperlyConfigured\n    raise ImproperlyConfigured('Set ' + name)\n"
    )
    apps = 'INSTALLED_APPS = ["shop_app"]\n'
    key_line = f"import os\nSECRET_KEY = {key}\n" if "environ(" not in key else f"{environ}SECRET_KEY = {key}\n"
    (broken.folder / "shop_settings.py").write_text(key_line + apps)
    app = broken.folder / "shop_app"
    app.mkdir()
    (app / "__init__.py").touch()
    (app / "tasks.py").write_text("from celery import shared_task\n@shared_task\ndef lend():\n    pass\n")
    broken.write(
        "import os\nfrom celery import Celery\nos.environ['DJANGO_SETTINGS_MODULE'] = 'shop_settings'\n"
        "app = Celery('shop')\napp.config_from_object('django.conf:settings', namespace='CELERY')\napp.autodiscover_tasks()\n"
    )
    run = cli(broken, "check", status=1 if told else 0)
    assert re.match(told, run.stderr)
    assert "not found" not in run.stderr
    if not told:
        assert run.stdout == "ok: 1 tasks of shop:app\n"
        (app / "tasks.py").write_text("from shop_app import nothing\n")
        assert "ImportError: cannot import name 'nothing'" in cli(broken, "check", status=1).stderr


@pytest.fixture(params=["redis", "rabbitmq"])
def queues(request: pytest.FixtureRequest, site: Site, redis_url: str) -> Site:
    """A site with all that could be in a ping's way, on each broker."""
    site.write("from celery import Celery\napp = Celery('shop')\napp.conf.task_ignore_result = True\n")
    site.set(broker_url=f"{redis_url}/0", result_backend=f"{redis_url}/1", key_prefix="shop:", publish_timeout="2")
    site.set(queues=json.dumps([{"name": "default"}, {"name": "critical", "priority": 9}, {"name": "batch"}]))
    site.set(routes='{"*": {"queue": "batch", "priority": 1}}', breakers='{"*": {}}', rate_limits='{"*": "1/h"}', retry_tasks='["*"]')
    site.set(encryption="on")
    site.secret(encryption_keys=cli(site, "generate-key").stdout)
    if request.param == "rabbitmq":
        site.set(broker_url=request.getfixturevalue("rabbitmq")[0])
        site.secret(broker_password="guest")
    return site


def test_each_queue_answers(queues: Site) -> None:
    with queues.worker("--queues=default,critical"):
        for _ in range(2):
            run = cli(queues, "round-trip", "--timeout=2", status=1)
            assert re.search(r"^default: \d+ ms$", run.stdout, re.MULTILINE)
            assert re.search(r"^critical: \d+ ms$", run.stdout, re.MULTILINE)
            assert "batch: no answer in 2 s" in run.stdout
            assert "no answer from batch" in run.stderr
    time.sleep(1)
    # What came too late does nothing, and is no dead letter.
    with queues.worker("--queues=default,critical,batch"):
        assert cli(queues, "round-trip").stdout.count(" ms\n") == 3
        # Nor does what a hostile message brings along.
        hostile = "send_task('celery_platform.ping', (1, {'a': 2}), {'x': 3}, queue='default', ignore_result=False).get(timeout=20)"
        assert queues.run("python", "-c", f"from celery_platform.worker import app; print(app.{hostile})").stdout == "pong\n"
        assert store_of(queues.producer()).list() == []


def test_a_broker_that_is_away_is_told(queues: Site) -> None:
    queues.set(broker_url="redis://127.0.0.1:1/0")
    start = time.monotonic()
    run = cli(queues, "round-trip", "--timeout=2", status=1)
    assert "cannot be reached: Error 111 connecting to 127.0.0.1:1" in run.stderr
    assert time.monotonic() - start < 8


@pytest.mark.parametrize("queues", ["redis"], indirect=True)
def test_a_result_backend_that_is_away_is_told(queues: Site) -> None:
    queues.set(result_backend="redis://127.0.0.1:1/0")
    run = cli(queues, "round-trip", "--timeout=2", status=1)
    assert "default: not sent: RuntimeError" in run.stdout
    assert "result store" in run.stdout
    assert "no answer from default, critical, batch" in run.stderr


@pytest.mark.parametrize("queues", ["redis"], indirect=True)
def test_without_a_result_backend_nothing_is_claimed(queues: Site) -> None:
    del queues.environment["CELERY_PLATFORM_RESULT_BACKEND"]
    assert cli(queues, "round-trip").stdout.count("sent; there is no result backend") == 3


def test_a_task_that_no_worker_would_take_is_told(broken: Site) -> None:
    (broken.folder / "shop_tasks.py").write_text(
        "from shop import app\n@app.task(name='sell', serializer='pickle')\ndef sell():\n    pass\n"
    )
    told = cli(broken, "check", status=1).stderr
    assert told.startswith("task sell has serializer='pickle'; allowed: json (pickle is impossible here")


FACTORY = """
from types import SimpleNamespace
from celery import Celery

def make_celery(name="shop"):
    app = Celery(name, broker="redis://127.0.0.1:1/9", include=["shop_tasks"])
    app.set_default()
    return app

def create_app(config=None, **more):
    return SimpleNamespace(extensions={"celery": make_celery()})

def needs(app):
    return make_celery()

def none():
    return None

flask_app = create_app()
"""


@pytest.mark.parametrize("name", ["shop:create_app", "shop:create_app()", "shop:make_celery", "shop.make_celery", "shop:flask_app"])
def test_a_factory_is_called(broken: Site, name: str) -> None:
    broken.write(FACTORY)
    (broken.folder / "shop_tasks.py").write_text("from celery import shared_task\n@shared_task\ndef sell():\n    pass\n")
    broken.set(application=name)
    assert cli(broken, "check").stdout == f"ok: 1 tasks of {name}\n"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("shop:needs", r"needs of module shop needs arguments \(app\); name a Celery application, or a factory that needs none"),
        ("shop:none", "none of module shop is no Celery application"),
    ],
)
def test_a_factory_that_cannot_be_called_is_told(broken: Site, name: str, told: str) -> None:
    broken.write(FACTORY)
    broken.set(application=name)
    assert re.fullmatch(told, cli(broken, "check", status=1).stderr.strip())


def test_a_factory_that_is_called_once_more_gives_the_same_application(site: Site, redis_url: str) -> None:
    site.write(FACTORY)
    (site.folder / "shop_tasks.py").write_text(
        "from celery import Celery\nfrom shop import create_app\n"
        "celery = create_app().extensions['celery']\npartner = Celery('partner', broker='redis://partner/0', set_as_current=False)\n"
        "@celery.task(name='sell')\ndef sell():\n    return pay.delay().id, partner.conf.broker_url\n"
        "@celery.task(name='pay')\ndef pay():\n    return 'paid'\n"
    )
    site.set(application="shop:create_app", broker_url=f"{redis_url}/0", result_backend=f"{redis_url}/1", key_prefix="shop:")
    with site.worker("--queues=default"):
        payment, partners = site.producer().send_task("sell").get(timeout=10)
        assert site.producer().AsyncResult(payment).get(timeout=10) == "paid"
        assert partners == "redis://partner/0"
