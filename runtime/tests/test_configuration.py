"""What Celery is told: connections, queues, routes; and what of the application's own settings stays."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

import pytest
from celery import Celery
from celery.exceptions import QueueNotFound
from kombu import Connection, Exchange, Queue

from celery_platform import broker, configuration
from celery_platform.settings import SecretStr, load_settings
from helpers.sites import Site, wait_for

Environment = Callable[..., None]


def applied(app: Celery) -> dict[str, configuration.Choice]:
    choices = configuration.apply(app, load_settings())
    configuration.tell(choices)
    return {choice.name: choice for choice in choices}


# --- Connections ---


@pytest.mark.parametrize("password", ["simple", "a/b@c:d%e#f?g", "%2F", "$`'\"\\", "".join(map(chr, range(0x20, 0x7F))) + "ß€😀"])
@pytest.mark.parametrize("url", ["redis://shop@redis.example:6379/0", "rediss://shop@[fd00::1]:6379/0", "redis://shop:old@h:6379/0"])
def test_a_password_arrives_as_it_is(url: str, password: str) -> None:
    changed = broker.with_password(url, SecretStr(password))

    assert unquote(urlsplit(changed).password or "") == password
    connection = Connection(changed)
    assert (connection.userid, connection.password, connection.port) == ("shop", password, 6379)


@pytest.mark.parametrize("url", ["redis://shop@a:6379/0", "rediss://shop@a:6379/0", "sentinel://shop@a:1/0;sentinel://shop@b:1/0"])
@pytest.mark.parametrize("broker_url", ["", "amqps://shop@a:5671/v;amqps://shop@b:5671/v"])
def test_a_worker_tells_nobody_its_secrets(environment: Environment, url: str, broker_url: str) -> None:
    """As it does when it is asked for its settings: celery/worker/control.py, conf."""
    secrets = {name: f"Zq8vT3-{name}" for name in ("broker_password", "result_backend_password", "sentinel_password")}
    secrets |= {"encryption_keys": "Zq8vT3".ljust(43, "x"), "alert_webhook": "https://Zq8vT3"}
    environment(broker_url=broker_url or url, result_backend=url, secrets=secrets)
    app = Celery("shop")
    configuration.apply(app, load_settings())

    assert "Zq8vT3" in repr(app.conf.table(with_defaults=True, censored=False))
    assert "Zq8vT3" not in repr(app.conf.table(with_defaults=True, censored=True))


@pytest.mark.parametrize("url", ["memory://", "redis+socket:///run/redis.sock"])
def test_a_url_without_host_needs_no_password(url: str) -> None:
    assert broker.with_password(url, SecretStr("x")) == url


def test_all_hosts_of_a_broker_get_the_password(environment: Environment) -> None:
    environment(broker_url="amqps://shop@a:5671/v;amqps://shop@b:5671/v", tls_server_name="rabbitmq", secrets={"broker_password": "pw"})
    config = broker.celery_config(load_settings())

    assert config["broker_url"] == "amqps://shop:pw@a:5671/v;amqps://shop:pw@b:5671/v"
    assert config["broker_use_ssl"]["cert_reqs"] is ssl.CERT_REQUIRED
    assert config["broker_use_ssl"]["server_hostname"] == "rabbitmq"
    assert config["broker_transport_options"]["confirm_publish"] is True


def test_sentinel_gets_its_own_password_and_tls(environment: Environment) -> None:
    environment(
        broker_url="sentinel://shop@a:26379/0;sentinel://shop@b:26379/0",
        result_backend="sentinel://shop@a:26379/1",
        key_prefix="shop:",
        tls_ca_file="/etc/ssl/certs/ca-certificates.crt",
        secrets={"broker_password": "pw", "result_backend_password": "pw", "sentinel_password": "spw"},
    )
    config = broker.celery_config(load_settings())

    for options in (config["broker_transport_options"], config["result_backend_transport_options"]):
        assert options["master_name"] == "celery"
        assert options["global_keyprefix"] == "shop:"
        assert options["sentinel_kwargs"]["password"] == "spw"
        assert options["sentinel_kwargs"]["ssl"] is True
    assert config["broker_use_ssl"]["ssl_check_hostname"] is True
    assert config["redis_backend_use_ssl"]["ssl_cert_reqs"] is ssl.CERT_REQUIRED


def test_without_result_backend_no_result_is_kept(environment: Environment) -> None:
    environment()
    config = broker.celery_config(load_settings())

    assert (config["result_backend"], config["task_ignore_result"]) == (None, True)


# --- Queues and routes ---


@pytest.mark.parametrize(
    ("name", "options", "queue", "priority"),
    [
        ("shop.pay.card", {}, "critical", 0),
        ("shop.report", {}, "batch", 6),
        ("shop.report", {"queue": "critical"}, "critical", 6),
        ("other", {}, "default", None),
        ("other", {"queue": "batch"}, "batch", 9),
    ],
)
def test_a_task_goes_where_its_route_says(environment: Environment, name: str, options: dict[str, str], queue: str, priority: int) -> None:
    environment(
        queues='["default", "critical", {"name": "batch", "priority": 9}]',
        routes='{"shop.pay.*": {"queue": "critical", "priority": 0}, "shop.*": {"queue": "batch", "priority": 6}}',
    )
    app = Celery("shop", set_as_current=False)
    applied(app)
    route = app.amqp.Router().route(dict(options), name)

    assert (route["queue"].name, route.get("priority")) == (queue, priority)


@pytest.mark.parametrize("url", ["redis://h/0", "amqp://h//"])
def test_an_unknown_queue_is_an_error_for_the_sender(environment: Environment, url: str) -> None:
    environment(broker_url=url)
    app = Celery("shop", set_as_current=False)
    applied(app)

    with pytest.raises(QueueNotFound):
        app.amqp.Router().route({"queue": "critcal"}, "shop.pay")


def test_queues_are_quorum_queues_on_rabbitmq(environment: Environment) -> None:
    environment(broker_url="amqp://h//")
    app = Celery("shop", set_as_current=False)
    applied(app)

    assert {queue.queue_arguments["x-queue-type"] for queue in app.amqp.queues.values()} == {"quorum"}
    assert {queue.exchange.type for queue in app.amqp.queues.values()} == {"topic"}


# --- The application's own settings ---


def test_the_application_keeps_what_is_as_safe(environment: Environment) -> None:
    environment()
    app = Celery("shop", set_as_current=False)
    app.conf.update(task_time_limit=700, timezone="Europe/Berlin", result_expires=60)
    settings = configuration.with_own(app, load_settings())
    choices = applied(app)

    assert (settings.time_limit, app.conf.timezone, app.conf.result_expires) == (700, "Europe/Berlin", 60)
    assert app.conf.task_time_limit is None  # the worker's: limits.py
    assert choices["task_time_limit"].source == "application"
    assert choices["task_soft_time_limit"].source == "default"


def test_the_environment_wins_over_the_application(environment: Environment) -> None:
    environment(time_limit="800")
    app = Celery("shop", set_as_current=False)
    app.conf.task_time_limit = 700
    assert configuration.with_own(app, load_settings()).time_limit == 800
    (choice,) = (choice for choice in applied(app).values() if choice.reason)

    assert (choice.name, choice.source, choice.overridden) == ("task_time_limit", "environment", 700)
    assert choice.reason == "CELERY_PLATFORM_TIME_LIMIT is set"


@pytest.mark.parametrize(
    ("own", "limits", "told"),
    [
        ({"task_time_limit": 300}, (200, 300, 3600), ""),
        ({"task_soft_time_limit": 1200}, (1200, 1800, 3600), ""),
        ({"task_soft_time_limit": 60.5, "task_time_limit": 90}, (61, 90, 3600), ""),
        ({"task_time_limit": 5400}, (600, 900, 3600), "VISIBILITY_TIMEOUT is 3600; allowed: more than CELERY_PLATFORM_TIME_LIMIT, 5400"),
        ({"task_time_limit": 5400, "broker_transport_options": {"visibility_timeout": 43200}}, (600, 5400, 43200), ""),
        ({"task_time_limit": "x"}, (600, 900, 3600), "CELERY_PLATFORM_TIME_LIMIT is 'x'; allowed"),
        ({"broker_transport_options": {"visibility_timeout": 100}}, (600, 900, 3600), "VISIBILITY_TIMEOUT is 100; allowed: more than"),
    ],
)
def test_limits_of_the_application_hold_where_they_fit(
    environment: Environment, own: dict[str, object], limits: tuple[int, ...], told: str
) -> None:
    environment(result_backend="redis://shop@redis.example:6379/1")
    app = Celery("shop", set_as_current=False)
    app.conf.update(own)
    settings = configuration.with_own(app, load_settings())
    choices = applied(app)

    assert (settings.soft_time_limit, settings.time_limit, settings.visibility_timeout) == limits
    assert app.conf.broker_transport_options["visibility_timeout"] == limits[2]
    reasons = [choice.reason for choice in choices.values() if choice.reason]
    assert len(reasons) == bool(told)
    assert told in "".join(reasons)


@pytest.mark.parametrize("url", ["redis://h/0", "amqp://h//"])
def test_routes_and_queues_of_the_application_hold_where_they_fit(
    environment: Environment, caplog: pytest.LogCaptureFixture, url: str
) -> None:
    environment(broker_url=url, queues='["default", "main", "media", "slow"]', routes='{"shop.pay": {"queue": "slow"}}')
    app = Celery("shop", set_as_current=False)
    app.conf.task_queues = (Queue("main"), Queue("media", Exchange("media"), routing_key="media"))
    app.conf.task_default_queue = "main"
    app.conf.task_routes = (
        {"shop.video.*": {"queue": "media", "priority": 7}, "shop.pay": "main", "shop.mail": "nowhere"},
        lambda name, *_, **__: {"routing_key": "media"} if name == "shop.image" else None,
    )
    choices = applied(app)

    def route(name: str) -> tuple[str, int | None]:
        found = app.amqp.Router().route({}, name)
        return found["queue"].name, found.get("priority")

    assert [route(name) for name in ("shop.video.cut", "shop.pay", "shop.image", "shop.other")] == [
        ("media", 7),
        ("slow", None),
        ("media", None),
        ("main", None),
    ]
    for _ in range(2):
        assert route("shop.mail") == ("main", None)
    assert caplog.text.count("sends shop.mail to nowhere, which is none of CELERY_PLATFORM_QUEUES") == 1
    assert choices["task_default_queue"].source == "application"
    assert [choice.reason for choice in choices.values() if choice.reason] == ["none of CELERY_PLATFORM_QUEUES: nowhere"]
    shown = {choice.name: choice.value for choice in configuration.in_force(list(choices.values()), load_settings())}
    assert shown["task_routes"][0] == {"shop.pay": {"queue": "slow"}}
    assert shown["task_routes"][1]["shop.mail"] == "nowhere"


@pytest.mark.parametrize(
    ("own", "name", "told"),
    [
        ({"task_queues": [Queue("default"), Queue("media")]}, "task_queues", "none of CELERY_PLATFORM_QUEUES: media"),
        ({"task_queues": {"default": {"exchange": "x"}}}, "task_queues", "exchange, routing key or arguments of default"),
        (
            {"task_default_queue": "celery"},
            "task_default_queue",
            "DEFAULT_QUEUE is celery; allowed: one of CELERY_PLATFORM_QUEUES",
        ),
        ({"broker_transport_options": {"priority_steps": [0, 9]}}, "broker_transport_options", "it belongs to the deployment"),
        ({"broker_url": "redis://:s3cret@localhost"}, "broker_url", "CELERY_PLATFORM_BROKER_URL is set"),
        ({"result_backend": "redis://localhost"}, "result_backend", "it belongs to the deployment"),
        ({"result_accept_content": ["pickle"]}, "result_accept_content", "pickle is impossible here"),
        ({"task_create_missing_queues": True}, "task_create_missing_queues", "it belongs to the deployment"),
    ],
)
def test_each_overridden_value_is_one_warning(
    environment: Environment, caplog: pytest.LogCaptureFixture, own: dict[str, object], name: str, told: str
) -> None:
    environment()
    app = Celery("shop", set_as_current=False)
    app.conf.update(own)
    choice = applied(app)[name]

    assert choice.overridden == own[name]
    (warning,) = caplog.messages
    assert warning.startswith(f"{name} of the application is overridden")
    assert told in warning
    assert "s3cret" not in warning


def test_an_application_keeps_its_results_in_its_database(environment: Environment) -> None:
    for given in (
        {},
        {"result_backend": "redis://h/1", "result_backend_is_default": "true"},
        {"result_backend": "redis://h/1", "result_backend_is_default": "false"},
    ):
        environment(**given)
        app = Celery("shop", set_as_current=False)
        app.conf.result_backend = "django-db"
        choice = applied(app)["result_backend"]
        chosen = given.get("result_backend_is_default") == "false"
        assert app.conf.result_backend == ("redis://h/1" if chosen else "django-db")
        assert (choice.source, bool(choice.reason)) == (("environment", True) if chosen else ("application", False))
        assert app.conf.task_ignore_result is False


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("accept_content", ["json", "pickle"], ["json"]),
        ("task_serializer", "pickle", "json"),
        ("task_acks_late", False, True),
        ("task_reject_on_worker_lost", False, True),
    ],
)
def test_what_is_less_safe_is_overridden_with_a_warning(
    environment: Environment, caplog: pytest.LogCaptureFixture, name: str, value: object, instead: object
) -> None:
    environment()
    app = Celery("shop", set_as_current=False)
    app.conf[name] = value
    with caplog.at_level(logging.WARNING):
        applied(app)

    assert app.conf[name] == instead
    assert f"{name} of the application is overridden" in caplog.text


def test_a_result_backend_that_was_used_too_early_is_made_anew(environment: Environment) -> None:
    environment(result_backend="redis://shop@redis.example:6379/1")
    app = Celery("shop", set_as_current=False, backend="cache+memory://")
    assert "Cache" in type(app.backend).__name__
    applied(app)

    assert app.backend.connparams["host"] == "redis.example"


def test_a_namespace_of_the_application_is_understood(environment: Environment) -> None:
    """As Django projects configure Celery: CELERY_TASK_TIME_LIMIT."""
    environment()
    app = Celery("shop", set_as_current=False)
    app.config_from_object(
        {"CELERY_TASK_TIME_LIMIT": 700, "CELERY_ACCEPT_CONTENT": ["pickle"], "CELERY_BROKER_URL": "redis://x"}, namespace="CELERY"
    )
    assert configuration.with_own(app, load_settings()).time_limit == 700
    applied(app)

    assert app.conf.accept_content == ["json"]
    assert app.conf.broker_url == "redis://shop@redis.example:6379/0"


def test_bad_settings_end_a_service_before_it_starts(site: Site) -> None:
    site.write("from celery import Celery\napp = Celery('shop')\n")
    site.set(broker_url="redis://h/0", time_limitt="1")
    ended = site.run("celery", "-A", "celery_platform.worker:app", "worker", check=False)

    assert ended.returncode == 78
    assert "CELERY_PLATFORM_TIME_LIMITT is no setting" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_users_tasks_run(site: Site, redis_url: str) -> None:
    site.write("from celery import Celery\napp = Celery('shop')\n\n@app.task(name='add')\ndef add(a, b):\n    return a + b\n")
    site.set(broker_url=f"{redis_url}/0", result_backend=f"{redis_url}/1", key_prefix="shop:", queues='["default", "critical"]')
    with site.worker("--queues=default,critical"):
        producer = site.producer()
        assert producer.send_task("add", (1, 2)).get(timeout=10) == 3
        assert producer.send_task("add", (1, 2), queue="critical").get(timeout=10) == 3
        wait_for("both in the log", lambda: site.log().count("succeeded in") == 2)


def test_a_worker_has_the_limits_of_the_settings_or_of_its_command_line(site: Site, redis_url: str) -> None:
    site.write(
        "import time\nfrom celery import Celery\nfrom celery.exceptions import SoftTimeLimitExceeded\napp = Celery('shop')\n\n"
        "@app.task(name='work')\ndef work():\n    start = time.monotonic()\n    try:\n        time.sleep(20)\n"
        "    except SoftTimeLimitExceeded:\n        return time.monotonic() - start\n"
    )
    site.set(broker_url=f"{redis_url}/0", result_backend=f"{redis_url}/1", soft_time_limit="1", time_limit="10")
    with site.worker("--queues=default"):
        assert 0.9 < site.producer().send_task("work").get(timeout=10) < 2
    with site.worker("--queues=default", "--soft-time-limit=3"):
        assert 2.9 < site.producer().send_task("work").get(timeout=10) < 4


def test_what_the_application_sets_holds_and_what_does_not_is_told_once(site: Site, redis_url: str) -> None:
    site.write(
        "import time\nfrom celery import Celery\nfrom celery.exceptions import SoftTimeLimitExceeded\n"
        "app = Celery('shop', broker='redis://:s3cret@localhost')\n"
        "app.conf.update(task_soft_time_limit=1, task_time_limit=10, task_default_queue='media', task_serializer='pickle')\n"
        "app.conf.task_routes = {'work': {'queue': 'slow'}, 'gone': {'queue': 'nowhere'}}\n\n"
        "@app.task(name='send')\ndef send():\n    return work.delay().id\n\n"
        "@app.task(name='work', bind=True)\ndef work(self):\n    try:\n        time.sleep(20)\n"
        "    except SoftTimeLimitExceeded:\n        return self.request.delivery_info['routing_key']\n"
    )
    site.set(broker_url=f"{redis_url}/0", result_backend=f"{redis_url}/1", queues='["default", "media", "slow"]')
    with site.worker("--queues=media,slow"):
        sent = site.producer().send_task("send", queue="media").get(timeout=10)
        assert site.producer().AsyncResult(sent).get(timeout=10) == "slow"
    for name in ("broker_url", "task_serializer", "task_routes"):
        assert site.log().count(f"{name} of the application is overridden") == 1
    assert site.log().count("is overridden") == 3
    assert "s3cret" not in site.log()
