"""Tests of what a service reads from its environment, and of what Celery is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from kombu import Connection
from pydantic import ValidationError
from pydantic_settings import SettingsError

from celery_platform.settings import Settings, read_credential, with_password

Environment = Callable[..., None]


# --- From the environment ---


def test_what_is_not_set_has_a_default(environment: Environment) -> None:
    environment()

    settings = Settings()

    assert settings.application == "shop:app"
    assert settings.broker_url == "redis://orders@redis.example:6379/0"
    assert settings.result_backend is None
    assert (settings.soft_time_limit, settings.time_limit, settings.visibility_timeout) == (600, 900, 3600)
    assert (settings.queues, settings.default_queue, settings.routes) == (["default"], "default", {})


def test_values_are_read_from_the_environment(environment: Environment) -> None:
    environment(
        result_backend="redis://orders@redis.example:6379/1",
        key_prefix="orders:",
        queues='["critical", "default"]',
        default_queue="critical",
        routes='{"shop.pay": {"queue": "critical", "priority": 0}}',
        soft_time_limit="10",
        time_limit="20",
        visibility_timeout="30",
        result_expires="40",
        max_tasks_per_child="50",
        prefetch_multiplier="2",
    )

    assert Settings().model_dump() == {
        "application": "shop:app",
        "broker_url": "redis://orders@redis.example:6379/0",
        "result_backend": "redis://orders@redis.example:6379/1",
        "key_prefix": "orders:",
        "queues": ["critical", "default"],
        "default_queue": "critical",
        "routes": {"shop.pay": {"queue": "critical", "priority": 0}},
        "soft_time_limit": 10,
        "time_limit": 20,
        "visibility_timeout": 30,
        "result_expires": 40,
        "max_tasks_per_child": 50,
        "prefetch_multiplier": 2,
    }


@pytest.mark.parametrize("name", ["application", "broker_url"])
def test_what_has_no_default_must_be_set(environment: Environment, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    environment()
    monkeypatch.delenv(f"CELERY_PLATFORM_{name.upper()}")

    with pytest.raises(ValidationError, match=rf"(?m)^{name}$"):
        Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("soft_time_limit", "ten"),
        ("soft_time_limit", "0"),
        ("time_limit", "-1"),
        ("visibility_timeout", "1.5"),
        ("result_expires", "0"),
        ("max_tasks_per_child", "0"),
        ("prefetch_multiplier", "0"),
        ("queues", '{"a": 1}'),
        ("routes", '{"shop.pay": "critical"}'),
    ],
)
def test_a_value_that_does_not_fit_is_named(environment: Environment, name: str, value: str) -> None:
    environment(**{name: value})

    with pytest.raises(ValidationError, match=rf"(?m)^{name}"):
        Settings()


@pytest.mark.parametrize("name", ["queues", "routes"])
def test_a_value_that_is_not_json_is_named(environment: Environment, name: str) -> None:
    environment(**{name: "critical,default"})

    with pytest.raises(SettingsError, match=f'"{name}"'):
        Settings()


@pytest.mark.parametrize(("soft", "hard", "visibility"), [("30", "20", "40"), ("20", "20", "40"), ("10", "40", "30"), ("10", "30", "30")])
def test_limits_must_be_in_order(environment: Environment, soft: str, hard: str, visibility: str) -> None:
    environment(soft_time_limit=soft, time_limit=hard, visibility_timeout=visibility)

    with pytest.raises(ValidationError, match=f"CELERY_PLATFORM_SOFT_TIME_LIMIT.* {soft}, {hard} and {visibility} seconds"):
        Settings()


# --- Secrets ---


def test_a_credential_is_read_without_its_last_newline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broker_password").write_text(" p w\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))

    assert read_credential("broker_password") == " p w"
    assert read_credential("result_backend_password") is None


def test_without_systemd_there_is_no_credential() -> None:
    assert read_credential("broker_password") is None


@pytest.mark.parametrize("password", ["simple", "a/b@c:d%e#f?g", "%2F", "[x]", "ä ö+", "$`'\"\\"])
@pytest.mark.parametrize("url", ["redis://orders@redis.example:6379/0", "rediss://orders@[fd00::1]:6379/0?ssl_cert_reqs=required"])
def test_a_password_arrives_as_it_is(url: str, password: str) -> None:
    changed = with_password(url, password)

    parts = urlsplit(changed)
    assert unquote(parts.password or "") == password
    assert changed.replace(f":{parts.password}@", "@", 1) == url
    # What Celery itself makes of it.
    connection = Connection(changed)
    assert (connection.userid, connection.password, connection.port) == ("orders", password, 6379)


def test_a_url_without_user_gets_a_password_too() -> None:
    assert with_password("redis://redis.example/0", "x@y") == "redis://:x%40y@redis.example/0"


@pytest.mark.parametrize("url", ["redis://orders@h/0", "redis://:old@h/0", "memory://", "redis+socket:///run/redis.sock"])
@pytest.mark.parametrize("password", [None, ""])
def test_without_a_password_a_url_stays_as_it_is(url: str, password: str | None) -> None:
    assert with_password(url, password) == url


def test_a_password_replaces_the_one_in_the_url() -> None:
    assert with_password("redis://orders:old@h/0", "new") == "redis://orders:new@h/0"


# --- What Celery is told ---


def config(environment: Environment, **values: str) -> dict[str, Any]:
    environment(**values)
    return Settings().celery_config()


def test_urls_get_the_passwords_of_their_credentials(environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broker_password").write_text("for/broker\n")
    (tmp_path / "result_backend_password").write_text("for/results\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))

    told = config(environment, result_backend="redis://orders@h/1")

    assert told["broker_url"] == "redis://orders:for%2Fbroker@redis.example:6379/0"
    assert told["result_backend"] == "redis://orders:for%2Fresults@h/1"


def test_there_need_not_be_a_result_backend(environment: Environment) -> None:
    assert config(environment)["result_backend"] is None


def test_only_json_is_sent_and_taken(environment: Environment) -> None:
    told = config(environment)

    assert told["accept_content"] == ["json"]
    assert {told["task_serializer"], told["result_serializer"], told["event_serializer"]} == {"json"}


def test_no_task_is_lost_with_its_worker(environment: Environment) -> None:
    told = config(environment)

    assert told["task_acks_late"] is True
    assert told["task_reject_on_worker_lost"] is True
    assert told["worker_prefetch_multiplier"] == 1
    assert told["broker_connection_retry_on_startup"] is True
    assert told["broker_connection_max_retries"] is None
    assert told["beat_sync_every"] == 1


def test_a_half_open_connection_is_noticed(environment: Environment) -> None:
    told = config(environment)

    for name in ("broker_transport_options", "result_backend_transport_options"):
        assert told[name]["socket_timeout"] == 30
        assert told[name]["socket_connect_timeout"] == 5
        assert told[name]["socket_keepalive"] is True
        assert told[name]["health_check_interval"] == 10


def test_a_lost_task_is_looked_for_soon_after_the_visibility_timeout(environment: Environment) -> None:
    options = config(environment, visibility_timeout="1000")["broker_transport_options"]

    assert options["visibility_timeout"] == 1000
    assert options["unacked_restore_interval"] * options["unacked_restore_throttle"] <= 2
    assert options["unacked_mutex_expire"] <= 15


def test_the_settings_of_the_service_are_told(environment: Environment) -> None:
    told = config(
        environment,
        key_prefix="shop:",
        soft_time_limit="10",
        time_limit="20",
        max_tasks_per_child="5",
        prefetch_multiplier="3",
        result_expires="7",
    )

    assert told["broker_transport_options"]["global_keyprefix"] == "shop:"
    assert told["result_backend_transport_options"]["global_keyprefix"] == "shop:"
    # They would go into every message, and win over the limits of the worker that runs the task.
    assert not {"task_soft_time_limit", "task_time_limit"} & set(told)
    assert (told["worker_max_tasks_per_child"], told["worker_prefetch_multiplier"], told["result_expires"]) == (5, 3, 7)


@pytest.mark.parametrize(("zone", "told"), [(None, "UTC"), ("Europe/Berlin", "Europe/Berlin")])
def test_the_time_zone_is_that_of_the_service(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, zone: str | None, told: str
) -> None:
    if zone:
        monkeypatch.setenv("TZ", zone)

    assert config(environment)["timezone"] == told
