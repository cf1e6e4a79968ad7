"""Settings from the environment and from credentials; what does not fit is named, and no secret is shown."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from celery_platform.settings import BadSettings, load_settings, planned_problems

Environment = Callable[..., None]


def test_what_is_not_set_has_a_default(environment: Environment) -> None:
    environment()
    settings = load_settings()

    assert (settings.soft_time_limit, settings.time_limit, settings.max_tasks_per_child) == (600, 900, 1000)
    assert [queue.name for queue in settings.queues] == ["default"]
    assert (settings.result_expires, settings.pool_limit, settings.result_backend) == (86400, 10, None)


def test_values_are_read_from_the_environment_and_from_credentials(environment: Environment) -> None:
    environment(
        queues='["critical", {"name": "default", "priority": 5}]',
        routes='{"shop.pay*": {"queue": "critical", "priority": 0}}',
        time_limit="700",
        log_arguments="true",
        secrets={"broker_password": "s3cret\n"},
    )
    settings = load_settings()

    assert [(queue.name, queue.priority) for queue in settings.queues] == [("critical", None), ("default", 5)]
    assert settings.routes["shop.pay*"].queue == "critical"
    assert settings.time_limit == 700
    assert settings.log_arguments is True
    assert settings.broker_password is not None
    assert settings.broker_password.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(settings)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("time_limitt", "1", "CELERY_PLATFORM_TIME_LIMITT is no setting; allowed: CELERY_PLATFORM_TIME_LIMIT, perhaps"),
        ("time_limit", "soon", "CELERY_PLATFORM_TIME_LIMIT is 'soon'; allowed: Input should be a valid integer"),
        ("max_runs", "0", "CELERY_PLATFORM_MAX_RUNS is '0'; allowed: Input should be greater than or equal to 1"),
        ("log_format", "xml", "CELERY_PLATFORM_LOG_FORMAT is 'xml'; allowed: Input should be 'text' or 'json'"),
        ("soft_time_limit", "900", "CELERY_PLATFORM_SOFT_TIME_LIMIT is 900; allowed: less than CELERY_PLATFORM_TIME_LIMIT, 900"),
        ("visibility_timeout", "900", "CELERY_PLATFORM_VISIBILITY_TIMEOUT is 900; allowed: more than CELERY_PLATFORM_TIME_LIMIT, 900"),
        ("queues", '["a", "a", "default"]', "CELERY_PLATFORM_QUEUES is ['a', 'a', 'default']; allowed: each name once"),
        ("queues", "critical,default", "CELERY_PLATFORM_QUEUES is 'critical,default'; allowed: Input should be a valid list"),
        ("queues", '["a:b", "default"]', "CELERY_PLATFORM_QUEUES[0][name] is 'a:b'; allowed: letters, digits"),
        ("default_queue", "nowhere", "CELERY_PLATFORM_DEFAULT_QUEUE is nowhere; allowed: one of CELERY_PLATFORM_QUEUES"),
        ("routes", '{"x": {"queue": "nowhere"}}', "CELERY_PLATFORM_ROUTES sends x to nowhere; allowed: one of CELERY_PLATFORM_QUEUES"),
        ("routes", '{"x": {"que": "default"}}', "CELERY_PLATFORM_ROUTES[x][que] is 'default'; allowed: Extra inputs"),
        ("broker_url", "http://x", "CELERY_PLATFORM_BROKER_URL is 'http://x'; allowed: must begin with redis://"),
        ("broker_url", "redis://shop@::1:6379/0", "CELERY_PLATFORM_BROKER_URL is 'redis://shop@::1:6379/0'; allowed: must give hosts"),
        ("result_backend", "sentinel://[::1]:26379/0;sentinel://::1:26379/0", "26379/0'; allowed: must give hosts as name:port"),
        ("broker_url", "redis://shop@[::1]:6379/x", "allowed: must end with the number of a database"),
        ("encryption", "on", "CELERY_PLATFORM_ENCRYPTION is on; allowed: off, unless there is a credential encryption_keys"),
        ("breakers", '{"x": {"failures": 0}}', "CELERY_PLATFORM_BREAKERS[x][failures] is 0; allowed: Input should be greater than"),
        ("breakers", '{"x": {"reset": 1351}}', "CELERY_PLATFORM_BREAKERS[x][reset] is 1351; allowed: half of 2700 at most"),
        ("rate_limits", '{"x": "10/d"}', "CELERY_PLATFORM_RATE_LIMITS[x] is '10/d'; allowed: a number a second"),
        ("retry_backoff", "301", "CELERY_PLATFORM_RETRY_BACKOFF is 301; allowed: at most CELERY_PLATFORM_RETRY_BACKOFF_MAX, 300"),
        ("tls_ca_file", "/no/such/file", "CELERY_PLATFORM_TLS_CA_FILE is '/no/such/file'; allowed: must be a file"),
        ("tls_cert_file", "/etc/hostname", "TLS_CERT_FILE and CELERY_PLATFORM_TLS_KEY_FILE are not both set; allowed: both or neither"),
    ],
)
def test_a_bad_value_is_told_with_its_variable_and_what_is_allowed(environment: Environment, name: str, value: str, told: str) -> None:
    environment(**{name: value})

    with pytest.raises(BadSettings) as error:
        load_settings()
    assert told in str(error.value)


def test_retries_on_redis_come_before_it_hands_out_a_task_again(environment: Environment) -> None:
    environment(retry_tasks='["*"]', retry_backoff_max="2700")
    with pytest.raises(
        BadSettings, match=r"RETRY_BACKOFF_MAX is 2700; allowed: less than 2700, the seconds that CELERY_PLATFORM_VISIBILITY"
    ):
        load_settings()

    environment(retry_tasks='["*"]', retry_backoff_max="2700", broker_url="amqp://shop@a//")
    assert load_settings().retry_backoff_max == 2700


def test_all_mistakes_are_told_at_once(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(max_runs="x", pool_limit="y", time_limitt="1")
    monkeypatch.delenv("CELERY_PLATFORM_APPLICATION")

    with pytest.raises(BadSettings) as error:
        load_settings()
    assert len(str(error.value).splitlines()) == 4
    assert "CELERY_PLATFORM_APPLICATION is not set" in str(error.value)


@pytest.mark.parametrize("variable", ["broker_password", "encryption_keys", "alert_webhook", "sentinel_password"])
def test_a_secret_in_the_environment_is_refused_and_not_shown(environment: Environment, variable: str) -> None:
    environment(**{variable: "s3cret"})

    with pytest.raises(BadSettings, match=f"is a secret; allowed: the credential {variable}, not the environment") as error:
        load_settings()
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize("url", ["amqp://shop@a//;amqp://shop:s3cret@b//", "http://:s3cret@b", "redis://shop:s3cret@::1/0"])
def test_a_password_in_a_url_is_refused_and_not_shown(environment: Environment, url: str) -> None:
    environment(broker_url=url)

    with pytest.raises(BadSettings, match="must hold no password") as error:
        load_settings()
    assert "s3cret" not in str(error.value)


def test_conflicts_are_told_beside_values_that_do_not_fit(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(queues='["a:b"]', default_queue="x", soft_time_limit="900", visibility_timeout="1", pool_limit="x")
    monkeypatch.delenv("CELERY_PLATFORM_BROKER_URL")

    with pytest.raises(BadSettings) as error:
        load_settings()
    # Nothing of what depends on the queues or on the broker.
    assert [line.split()[0] for line in str(error.value).splitlines()] == [
        "CELERY_PLATFORM_BROKER_URL",
        "CELERY_PLATFORM_POOL_LIMIT",
        "CELERY_PLATFORM_QUEUES[0][name]",
        "CELERY_PLATFORM_SOFT_TIME_LIMIT",
    ]


def test_a_service_elsewhere_is_judged_by_what_it_is_given_alone(environment: Environment) -> None:
    environment(max_runs="0", secrets={"encryption_keys": "x"})
    given = {"APPLICATION": "shop:app", "BROKER_URL": "rediss://shop@a:6379/0", "TLS_CA_FILE": "/there/ca.crt", "ENCRYPTION": "on"}

    problems = planned_problems({f"CELERY_PLATFORM_{name}": value for name, value in given.items()}, {})
    assert problems == ["CELERY_PLATFORM_ENCRYPTION is on; allowed: off, unless there is a credential encryption_keys"]
