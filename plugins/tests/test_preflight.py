"""What the preflight of roles says of inventories, and that the runtime package takes what it takes. No playbook is run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from action import check_settings
from celery_platform import broker
from celery_platform.settings import FIELDS, BadSettings, Settings, is_secret, load_settings
from helpers import REPOSITORY
from helpers.preflight import MAIN, ONE_HOST, SECRET, VAULT, Site, site
from helpers.targets import ALL

KEY = "A" * 43
DEFAULTS = Settings(application="orders.app:app", broker_url="memory://")


def told(problems: list[str]) -> list[str]:
    """Return of each problem what is wrong."""
    return [problem.splitlines()[0].removesuffix(".") for problem in problems]


# --- One source of rules ---


@pytest.mark.parametrize(
    ("main", "problem", "allowed"),
    [
        (
            {"celery_app_queues": ["a:b"], "celery_app_default_queue": "a:b"},
            "celery_app_queues[0][name] is 'a:b'",
            "letters, digits, _ . and -",
        ),
        (
            {"celery_app_settings": {"retry_tasks": ["orders.*"]}, "celery_app_visibility_timeout": 1000},
            "celery_app_settings.retry_backoff_max is 300",
            "less than 100, the seconds that celery_app_visibility_timeout leaves beyond celery_app_time_limit",
        ),
        ({"celery_app_settings": {"max_runs": 0}}, "celery_app_settings.max_runs is '0'", "greater than or equal to 1"),
        ({"celery_app_settings": {"rate_limits": {"x": "10/d"}}}, "celery_app_settings.rate_limits[x] is '10/d'", "10/s, 10/m, 10/h"),
        (
            {"celery_app_settings": {"encryption": "on"}},
            "celery_app_settings.encryption is on",
            "unless there is celery_app_encryption_keys",
        ),
        ({"celery_app_encryption_keys": ["x"]}, "celery_app_encryption_keys is ********", "32 bytes in base64url"),
        ({"celery_app_alert_webhook": "hook"}, "celery_app_alert_webhook is ********", "a URL, http:// or https://"),
        ({"celery_app_default_queue": "x"}, "celery_app_default_queue is x", "one of celery_app_queues, default"),
        (
            {"celery_app_broker_url": "redis://orders:pw@a:6379/0"},
            "celery_app_broker_url is 'redis://orders:********@a:6379/0'",
            "no password",
        ),
        (
            {"celery_app_broker_url": "redis://orders@::1:6379/0"},
            "celery_app_broker_url is 'redis://orders@::1:6379/0'",
            "in brackets: [::1]:6379",
        ),
        (
            {"celery_app_broker_url": "amqp://orders@a/orders", "celery_app_queues": ["default", "eu.default"]},
            "celery_app_queues has",
            "after a dot",
        ),
        ({"celery_app_settings": {"log_format": "xml"}}, "celery_app_settings has log_format xml", "one of text, json"),
        ({"celery_app_settings": {"foo": 1}}, "celery_app_settings has foo, which is unknown", "confirm_replicas, confirm_timeout"),
    ],
)
def test_what_the_runtime_refuses_is_said_of_the_roles_variable(tmp_path: Path, main: dict[str, Any], problem: str, allowed: str) -> None:
    (text,) = site(tmp_path, **main).judge()

    assert told([text])[0].startswith(problem), text
    assert allowed in text
    assert f"File: {tmp_path}/group_vars/all/main.yml\n" in text
    assert "CELERY_PLATFORM" not in text


def test_the_monitors_settings_are_judged_too(tmp_path: Path) -> None:
    monitored = site(tmp_path, ONE_HOST | {"monitoring": ["one"]}, celery_monitor_broker_url="redis://monitoring@::1:6379/0")

    assert "celery_monitor_broker_url is 'redis://monitoring@::1:6379/0'" in told(monitored.judge("celery_monitor"))


def rendered(text: str) -> dict[str, str]:
    """Return the variables in an environment file."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: "".join(shlex.split(value)) for name, _, value in (line.partition("=") for line in lines)}


names = st.text(st.sampled_from("ab.:_- é"), min_size=1, max_size=3) | st.sampled_from(["default", "a", "b", "a.b"])
numbers = st.integers(-1, 5) | st.integers(800, 4000) | st.sampled_from(["900", "soon", 2.5])
globs = st.sampled_from(["orders.*", "x"])
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "celery_app_queues": st.lists(names | st.fixed_dictionaries({"name": names}, optional={"priority": st.integers(-1, 11)}), max_size=3),
    "celery_app_default_queue": names,
    "celery_app_routes": st.dictionaries(
        globs, st.fixed_dictionaries({}, optional={"queue": names, "priority": st.integers(-1, 11)}) | names
    ),
    "celery_app_soft_time_limit": numbers,
    "celery_app_time_limit": numbers,
    "celery_app_visibility_timeout": numbers,
    "celery_app_result_expires": numbers,
    "celery_app_broker_url": st.sampled_from(["redis://orders@[::1]:6379/0", "redis://orders@::1:6379/0", "redis://a:x/0", "redis://a/x"])
    | st.sampled_from(["sentinel://orders@[::1]:26379/0;sentinel://b/0", "amqp://orders@a;amqps://b", "amqp://a:b@c", "http://a"]),
    "celery_app_result_backend": st.sampled_from(["", "redis://orders@a:6379/1", "redis://orders@fd00::2:6379/1"]),
    "celery_app_encryption_keys": st.lists(st.sampled_from([KEY, "short"]), max_size=2),
    "celery_app_alert_webhook": st.sampled_from(["", "https://hooks.example/x", "hooks.example"]),
    "celery_app_settings": st.fixed_dictionaries(
        {},
        optional={
            "retry_tasks": st.lists(globs, max_size=2) | globs,
            "retry_backoff": numbers,
            "retry_backoff_max": numbers,
            "breakers": st.dictionaries(globs, st.fixed_dictionaries({}, optional={"failures": numbers, "reset": numbers})),
            "rate_limits": st.dictionaries(globs, st.sampled_from(["10/m", "10/d", "0/s"])),
            "max_runs": numbers | st.none(),
            "confirm_replicas": st.integers(-1, 2),
            "confirm_timeout": st.integers(0, 10),
            "redis_transport": st.sampled_from(["atomic", "kombu", "other"]),
            "encryption": st.sampled_from(["off", "on", "migrate", True]),
            "log_level": st.sampled_from(["INFO", "info"]),
            "dead_letters": st.sampled_from([True, "no", "perhaps"]),
        },
    ),
}
outcomes: set[str] = set()


@given(
    main=st.fixed_dictionaries({}, optional=VALUES) | st.one_of([st.fixed_dictionaries({name: value}) for name, value in VALUES.items()])
)
@settings(
    max_examples=25 if ALL else 6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_whatever_the_preflight_takes_the_runtime_takes(tmp_path_factory: pytest.TempPathFactory, main: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("site")
    here = site(folder, **main)
    problems = here.judge()
    outcomes.add("refused" if problems else "taken")
    event("refused" if problems else "taken")
    if problems:
        return
    (folder / "credentials").mkdir()
    for name, secret in here.value("__celery_app_all_credentials").items():
        (folder / "credentials" / name).write_text(secret)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rendered(here.render("celery_app/templates/celery.env.j2")).items():
            patch.setenv(name, value)
        patch.setenv("CREDENTIALS_DIRECTORY", str(folder / "credentials"))
        try:
            broker.celery_config(load_settings())
        except BadSettings as error:
            raise AssertionError(f"{main}: {error}") from error


def test_some_of_these_were_taken_and_some_refused() -> None:
    assert outcomes == {"taken", "refused"}


def test_the_settings_of_the_roles_are_those_of_the_runtime() -> None:
    documented = check_settings.role_options("celery_app")["celery_app_settings"]["options"]
    own = {"application", "broker_url", "result_backend", "key_prefix", "queues", "default_queue", "routes", "soft_time_limit"}
    own |= {"time_limit", "visibility_timeout", "result_expires", "max_tasks_per_child", "sentinel_master", "sentinel_user"}
    own |= {"result_backend_is_default", "tls_ca_file", "tls_cert_file", "tls_key_file", "tls_server_name", "declare_queues"}
    own |= {"secret_variables"}

    assert set(documented) | own == {name for name in FIELDS if not is_secret(name)}


@pytest.mark.parametrize(
    ("role", "variable", "setting"),
    [
        ("celery_app", "celery_app_routes", "routes"),
        ("redis_sentinel", "redis_sentinel_master", "sentinel_master"),
    ],
)
def test_roles_and_runtime_have_the_same_defaults(role: str, variable: str, setting: str) -> None:
    defaults = yaml.safe_load((REPOSITORY / "roles" / role / "defaults/main.yml").read_text())

    assert defaults[variable] == getattr(DEFAULTS, setting)


def test_what_nobody_set_is_left_to_the_application_and_the_runtime(tmp_path: Path) -> None:
    unset = ("soft_time_limit", "time_limit", "visibility_timeout", "result_expires", "max_tasks_per_child", "default_queue", "routes")
    here = site(tmp_path)
    variables = rendered(here.render("celery_app/templates/celery.env.j2"))
    assert not {f"CELERY_PLATFORM_{name.upper()}" for name in unset} & variables.keys()
    assert variables["CELERY_PLATFORM_RESULT_BACKEND_IS_DEFAULT"] == "true"
    # What other roles reckon with is the runtime's.
    for name in ("soft_time_limit", "time_limit", "visibility_timeout"):
        assert here.value(f"site_{name}") == getattr(DEFAULTS, name)

    chosen = {"celery_app_time_limit": 800, "celery_app_result_backend": "redis://orders@a:6379/1"}
    variables = rendered(site(tmp_path / "chosen", **chosen).render("celery_app/templates/celery.env.j2"))
    assert variables["CELERY_PLATFORM_TIME_LIMIT"] == "800"
    assert "CELERY_PLATFORM_RESULT_BACKEND_IS_DEFAULT" not in variables


def test_roles_and_runtime_have_the_same_queues() -> None:
    defaults = yaml.safe_load((REPOSITORY / "roles/celery_app/defaults/main.yml").read_text())

    assert defaults["celery_app_queues"] == [queue.name for queue in DEFAULTS.queues]


# --- All mistakes in one round ---


def test_rules_are_judged_beside_a_missing_variable(tmp_path: Path) -> None:
    vault = {"vault_redis_requirepass": SECRET}
    problems = site(tmp_path, vault=vault, celery_app_source="/no/such", celery_app_default_queue="x", celery_app_time_limit=9).judge()

    assert sorted(told(problems)) == [
        "celery_app_default_queue is x",
        "celery_app_soft_time_limit is 600",
        'celery_app_source is "/no/such"',
        "vault_celery_app_redis_password is not set",
    ]


def test_nothing_is_laid_on_what_depends_on_a_wrong_value(tmp_path: Path) -> None:
    problems = site(tmp_path, celery_app_queues="default", celery_app_time_limit="soon", celery_app_default_queue="x").judge()

    assert sorted(told(problems)) == ["celery_app_queues is text, not a list", "celery_app_time_limit is no whole number"]


def test_what_is_missing_is_told_once_for_all_hosts_and_roles(tmp_path: Path) -> None:
    groups = {"redis": ["one"], "celery_worker": ["one", "two"], "celery_beat": ["two"]}
    here = site(tmp_path, groups, vault={})
    problems = {problem for role in ("celery_app", "celery_worker") for host in ("one", "two") for problem in here.judge(role, host)}

    assert told(list(problems)) == ["vault_celery_app_redis_password is not set"]


@pytest.mark.parametrize("example", [True, False])
def test_a_missing_secret_belongs_into_the_vault(tmp_path: Path, example: bool) -> None:
    here = site(tmp_path, vault={})
    (tmp_path / "group_vars/all/vault.yml").unlink()
    if example:
        (tmp_path / "group_vars/all/vault.yml.example").write_text("vault_celery_app_redis_password: changeme\n")
        (tmp_path / "group_vars/all/vault.yml~").write_text("vault_celery_app_redis_password: changeme\n")
    (problem,) = here.judge()

    assert f"File: {tmp_path}/group_vars/all/vault.yml\n" in problem


# --- Messages ---


@pytest.mark.parametrize(
    ("main", "problem"),
    [
        ({"celery_app_environment": {"CELERY_PLATFORM_X": "1", "A": "b"}}, 'celery_app_environment has ["CELERY_PLATFORM_X"]'),
        ({"celery_app_environment": {"TOKEN": "s3cr3t\0line"}}, 'celery_app_environment has ["TOKEN"]'),
        ({"celery_app_environment": {"A-B": "1"}}, 'celery_app_environment has ["A-B"]'),
        ({"celery_app_credentials": {"api key": SECRET}}, 'celery_app_credentials has ["api key"]'),
        ({"celery_app_credentials": {"api": ""}}, 'celery_app_credentials has ["api"]'),
        ({"celery_app_log_days": "x"}, "celery_app_log_days is no whole number"),
        ({"celery_app_sandbox_allow": ["jit", "x"]}, "celery_app_sandbox_allow is x"),
        ({"celery_app_environment": "A=1 b"}, "celery_app_environment is no mapping"),
        ({"celery_broker": "kafka"}, "celery_broker is kafka"),
    ],
)
def test_a_message_names_the_key_and_no_value(tmp_path: Path, main: dict[str, Any], problem: str) -> None:
    problems = site(tmp_path, **main).judge()

    assert told(problems) == [problem]
    assert "s3cr3t" not in "".join(problems)


def test_secrets_of_the_application_are_judged_by_name(tmp_path: Path) -> None:
    secret = "s3cr3t"
    main = {
        "celery_app_credentials": dict.fromkeys(["broker_password", "sentinel_password", "api-key", "api.key"], secret)
        | {"number": 12345678},
        "celery_app_environment": {"A": "1", "NUMBER_FILE": "/x"},
        "celery_app_secret_environment": dict.fromkeys(["CELERY_PLATFORM_X", "A B", "A", "API_KEY_FILE", "GOOD"], secret)
        | {"EMPTY": "", "NUL": f"{secret}\0", "NUMBER": 12345678, "VAULT": "$ANSIBLE_VAULT;1.1"},
    }
    problems = site(tmp_path, **main).judge()

    assert told(problems) == [
        'celery_app_environment has ["NUMBER_FILE"]',
        'celery_app_secret_environment has ["CELERY_PLATFORM_X"]',
        'celery_app_secret_environment has ["A B"]',
        'celery_app_secret_environment has ["A", "API_KEY_FILE"]',
        'celery_app_secret_environment has ["NUMBER"]',
        'celery_app_secret_environment has ["EMPTY", "VAULT"]',
        'celery_app_secret_environment has ["NUL"]',
        'celery_app_credentials has ["broker_password", "sentinel_password"]',
        'celery_app_credentials has ["api-key", "api.key", "broker_password", "number", "sentinel_password"]',
        'celery_app_credentials has ["number"]',
    ]
    assert secret not in "".join(problems)


@pytest.mark.parametrize(
    ("name", "refused"),
    [("shop", False), ("next-shop", False), ("shop_2", False), ("next", True), ("monitor", True), ("Shop", True), ("2shop", True)],
)
def test_an_application_has_a_name_that_units_and_folders_can_have(tmp_path: Path, name: str, refused: bool) -> None:
    problems = site(tmp_path, celery_app_name=name).judge()

    assert any(problem.startswith("celery_app_name is ") and "beginning with a letter" in problem for problem in problems) is refused


@pytest.mark.parametrize(
    ("role", "groups", "missing"),
    [
        ("exporters", {"redis": ["one"], "monitoring": ["one"]}, ["redis_exporter_password is not set"]),
        ("redis", {"redis": ["one", "two"]}, ["redis_replication_password is not set", "redis_sentinel_password is not set"]),
        ("redis", {"redis": ["one"]}, []),
        ("rabbitmq", {"rabbitmq": ["one"]}, ["rabbitmq_administrator_password is not set"]),
    ],
)
def test_a_password_of_a_user_whom_the_site_needs_must_be_set(
    tmp_path: Path, role: str, groups: dict[str, list[str]], missing: list[str]
) -> None:
    problems = told(site(tmp_path, groups, rabbitmq_cookie=SECRET).judge(role))

    assert [problem for problem in problems if "password" in problem] == missing


def test_a_producer_has_the_settings_of_the_services_as_another_user(tmp_path: Path) -> None:
    here = site(tmp_path, {**ONE_HOST, "celery_producer": ["web"]}, celery_producer_redis_password=SECRET, pki_private_ca=False)
    variables = rendered(here.render("celery_producer/templates/producer.env.j2", "web"))
    services = rendered(here.render("celery_app/templates/celery.env.j2"))
    own = {name: value for name, value in variables.items() if services.get(name) != value}
    assert own == {
        "CELERY_LOADER": "celery_platform.producer:Loader",
        "PYTHONPATH": "/opt/celery-producer/orders",
        "CELERY_PLATFORM_BROKER_URL": "rediss://orders-producer@127.0.0.1:6379/0",
        "CELERY_PLATFORM_RESULT_BACKEND": "rediss://orders-producer@127.0.0.1:6379/1",
    }
    assert here.value("__celery_producer_credentials", "web") == dict.fromkeys(["broker_password", "result_backend_password"], SECRET)

    foreign = {"celery_app_broker_url": "amqps://me@broker.example.net/me", "celery_app_broker_password": "Provider-secret-19c"}
    here = site(tmp_path / "foreign", {"celery_producer": ["web"]}, celery_app_result_backend="", **foreign)
    assert here.value("__celery_producer_credentials", "web") == {"broker_password": "Provider-secret-19c"}


@pytest.mark.parametrize("scheme", ["rediss", "amqps"])
def test_a_broker_of_others_has_a_certificate_of_a_ca_that_the_system_knows(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}://me@broker.example.net:6380/0"
    foreign = {"celery_app_broker_url": url, "celery_app_broker_password": "Provider-secret-19c", "celery_app_result_backend": ""}
    here = site(tmp_path, {"celery_worker": ["one"], "celery_flower": ["one"]}, **foreign)
    for template in ("celery_app/templates/celery.env.j2", "celery_monitor/templates/monitor.env.j2"):
        variables = rendered(here.render(template))
        assert variables["CELERY_PLATFORM_BROKER_URL"] == url
        assert not [name for name in variables if "TLS" in name or "SENTINEL" in name or "RESULT_BACKEND" in name]
    assert here.value("__celery_monitor_credentials") == {"broker_password": "Provider-secret-19c"}
    assert here.judge() == here.judge("celery_monitor") == []

    here = site(tmp_path / "named", {"celery_worker": ["one"]}, celery_app_tls_ca_file="/etc/ssl/provider.pem", **foreign)
    assert rendered(here.render("celery_app/templates/celery.env.j2"))["CELERY_PLATFORM_TLS_CA_FILE"] == "/etc/ssl/provider.pem"


def test_variables_of_celery_itself_are_refused_with_what_to_set_instead(tmp_path: Path) -> None:
    named = {"CELERY_BROKER_URL": "redis://x", "CELERY_LOADER": "x", "CELERY_MINE": "x"}
    for variable in ("celery_app_environment", "celery_app_secret_environment"):
        (problem,) = site(tmp_path / variable, **{variable: named}).judge()
        assert told([problem]) == [f'{variable} has ["CELERY_BROKER_URL", "CELERY_LOADER"]']
        assert "celery_broker chooses the broker" in problem


@pytest.mark.parametrize(
    ("settings", "told_of"),
    [
        ({"celery_producer_units": ["gunicorn.service", "web@1.service"]}, []),
        ({"celery_producer_units": ["gunicorn", "a/b.service"]}, ['celery_producer_units has ["gunicorn", "a/b.service"]']),
        ({"celery_producer_units": ["celery-orders-beat.service"]}, ['celery_producer_units has ["celery-orders-beat.service"]']),
        ({"celery_producer_user": "orders"}, ['celery_producer_user is "orders"']),
        ({"celery_producer_python_path": ["lib"]}, ['celery_producer_python_path has ["lib"]']),
        ({"celery_producer_redis_password": "short"}, ["celery_producer_redis_password has 5 characters"]),
    ],
)
def test_what_a_producer_is_told(tmp_path: Path, settings: dict[str, Any], told_of: list[str]) -> None:
    here = site(tmp_path, {**ONE_HOST, "celery_producer": ["one"]}, **({"celery_producer_redis_password": SECRET} | settings))

    assert told(here.judge("celery_producer")) == told_of


def test_users_of_the_brokers_are_those_who_have_a_password_and_what_the_inventory_says_of_them(tmp_path: Path) -> None:
    users = [
        {"name": "orders", "previous_password": SECRET, "databases": [0, 2]},
        {"name": "cache", "password": SECRET, "prefix": "cache:"},
    ]
    passwords = dict.fromkeys(["redis_sentinel_password", "celery_monitor_redis_password", "celery_app_rabbitmq_password"], SECRET)
    here = site(tmp_path, redis_users=users, **passwords)

    assert here.value("site_redis_users") == [
        users[1],
        {"name": "monitoring", "purpose": "monitoring", "password": SECRET},
        {"name": "orders", "purpose": "application", "password": SECRET[::-1], "previous_password": SECRET, "databases": [0, 2]},
        {"name": "sentinel", "purpose": "sentinel", "password": SECRET},
    ]
    assert here.value("site_rabbitmq_users") == [{"name": "orders", "purpose": "worker", "password": SECRET}]
    assert here.judge("redis") == []
    nobody = site(tmp_path / "nobody", redis_users=[{"name": "cache"}])
    assert told(nobody.judge("redis")) == ['redis_users has ["cache"]']


def test_folders_that_can_be_opened_and_others(tmp_path: Path) -> None:
    good = ["/srv/uploads", "/srv/.cache/a..b", "/var/lib/shop", "/homes/x", "/optional"]
    odd = ["/", "srv", "/srv/../etc", "/srv/.", "/srv//x", "/srv/a b", "/srv/a\\", "/srv/%n"]
    closed = ["/etc", "/home/shop", "/opt/celery/current", "/tmp/x", "/usr/lib"]
    problems = site(tmp_path, celery_app_writable_paths=[*good, *odd, *closed]).judge()

    assert told(problems) == [f"celery_app_writable_paths has {json.dumps(paths)}" for paths in (odd, closed)]


def test_a_variable_that_has_moved_is_told_with_what_took_its_place(tmp_path: Path) -> None:
    (problem,) = site(tmp_path, celery_app_allow_jit=True).judge()

    assert problem.startswith("celery_app_allow_jit is not a variable of this project.\n")
    assert problem.endswith("Allowed: celery_app_sandbox_allow: [jit], which has taken its place")


def test_a_secret_of_the_application_is_taken_as_it_is(tmp_path: Path) -> None:
    given = {"mail_password": "Provider-secret-19c", "tls_passphrase": "a\n", "PASSWORD": "x"}
    main: dict[str, Any] = {"celery_app_credentials": given, "celery_app_secret_environment": given}
    main |= {"celery_app_broker_url": "amqps://me@broker.example.net/me", "celery_app_broker_password": "Provider-secret-19c"}

    assert site(tmp_path, **main).judge() == []


def test_a_password_of_our_own_brokers_is_long_though_it_comes_by_another_name(tmp_path: Path) -> None:
    here = site(tmp_path, vault=VAULT | {"vault_celery_app_redis_password": "Zq8vT3nB6yH1kW5r"})

    assert told(here.judge()) == ["vault_celery_app_redis_password has 16 characters"]


@pytest.mark.parametrize(
    ("worker", "problem"),
    [
        ({"name": "a"}, "celery_worker_list has an entry without queues"),
        ({"name": "a", "queues": ["default"], "concurrency": "x"}, "celery_worker_list has concurrency, which is no whole number"),
        ({"name": "a", "queues": ["default"], "pool": "gevent"}, "celery_worker_list has pool gevent"),
        ({"name": "a", "queues": ["default"], "conc": 1}, "celery_worker_list has conc, which is unknown"),
        ({"name": "a", "queues": ["default"], "cpu_weight": 0}, "celery_worker_list has [0]"),
        ({"name": "a", "queues": ["default"], "cpu_quota": "1.5"}, 'celery_worker_list has ["1.5"]'),
        ({"name": "a", "queues": ["default"], "concurrency_max": 2}, 'celery_worker_list has ["a"]'),
        ({"name": "a", "queues": ["default"], "cpu_weight": 10001}, "celery_worker_list has [10001]"),
    ],
)
def test_a_message_about_a_worker_says_what_is_wrong_with_it(tmp_path: Path, worker: dict[str, Any], problem: str) -> None:
    assert told(site(tmp_path, celery_worker_list=[worker]).judge("celery_worker")) == [problem]


@pytest.mark.parametrize("weight", [1, 10000, "200"])
def test_a_worker_may_have_a_weight(tmp_path: Path, weight: Any) -> None:
    assert site(tmp_path, celery_worker_list=[{"name": "a", "queues": ["default"], "cpu_weight": weight}]).judge("celery_worker") == []


@pytest.mark.parametrize("group", ["redis", "redis_sentinel", "rabbitmq", "celery_worker", "celery_beat", "prometheus", "lab"])
def test_the_names_of_groups_are_fixed(tmp_path: Path, group: str) -> None:
    (problem,) = site(tmp_path, **{f"{group}_group": "cache"}).judge()

    assert told([problem]) == [f"{group}_group is not a variable of this project"]
    assert "the names of groups are fixed" in problem


def test_redbeat_needs_a_redis_not_a_name_like_it(tmp_path: Path) -> None:
    main = {"celery_beat_scheduler": "redbeat.RedBeatScheduler", "celery_app_result_backend": ""}
    urls = {"amqp://orders@redis-host/redis": ["celery_beat_scheduler is"], "redis://orders@a/0": [], "sentinel://orders@a/0": []}
    for number, (url, expected) in enumerate(urls.items()):
        problems = site(tmp_path / str(number), celery_app_broker_url=url, **main).judge("celery_beat")
        assert [text.partition(" is")[0] + " is" for text in told(problems)] == expected, url


def test_a_file_that_is_no_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    site(tmp_path)
    (tmp_path / "group_vars/all/main.yml").write_text("a: 1\nb: [1, 2\nc: 3\n")
    completed = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", tmp_path, REPOSITORY / "playbooks" / "preflight.yml"],
        env=os.environ | {"ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
    )

    assert completed.returncode != 0
    assert f"Origin: {tmp_path}/group_vars/all/main.yml:3:" in completed.stderr


# --- What roles make of an inventory ---


def test_alerts_know_how_often_each_scheduler_ticks(tmp_path: Path) -> None:
    groups = {"celery_beat": ["one", "two"], "monitoring": ["three"]}
    inventories: list[tuple[dict[str, list[str]], dict[str, Any], int]] = [
        (groups, {}, 5),
        (groups | {"celery_beat": ["one"]}, {}, 60),
        (groups | {"celery_beat": ["one"]}, {"celery_beat_scheduler": "redbeat.RedBeatScheduler"}, 5),
        (groups | {"celery_beat": ["one"]}, {"celery_beat_max_interval": 20}, 20),
    ]
    for number, (hosts, of_beat, interval) in enumerate(inventories):
        files = {"group_vars/all/main.yml": MAIN, "group_vars/celery_beat.yml": of_beat}
        here = Site(tmp_path / str(number), hosts, files)
        assert here.value("__prometheus_beat_interval", "three") == interval, of_beat


def test_the_proxy_finds_prometheus_and_alertmanager_at_their_ports(tmp_path: Path) -> None:
    here = site(tmp_path, ONE_HOST | {"monitoring": ["one"]}, prometheus_port=19090, alertmanager_port=19093)

    addresses = here.value("__monitoring_proxy_backends | map(attribute='address')")
    assert addresses == ["http://127.0.0.1:19090", "http://127.0.0.1:19093"]


@pytest.mark.parametrize(
    ("redis_bind", "url"),
    [
        (["127.0.0.1"], "redis://orders@127.0.0.1:6379/0"),
        (["::1"], "redis://orders@[::1]:6379/0"),
        (["-::1", "x"], "redis://orders@[::1]:6379/0"),
    ],
)
def test_a_service_reaches_the_redis_of_its_host(tmp_path: Path, redis_bind: list[str], url: str) -> None:
    assert site(tmp_path, redis_bind=redis_bind).value("celery_app_broker_url") == url


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="this machine has no systemd")
def test_what_the_sandbox_lets_the_application_do_costs_what_is_told(tmp_path: Path) -> None:
    readme = (REPOSITORY / "roles/celery_app/README.md").read_text()
    allowed = check_settings.role_options("celery_app")["celery_app_sandbox_allow"]["choices"]
    ways = [[], *([name] for name in allowed), allowed]
    files = {f"host_vars/h{number}.yml": {"celery_app_sandbox_allow": names} for number, names in enumerate(ways)}
    main = MAIN | {"celery_app_writable_paths": ["/srv/uploads"], "__celery_app_revision": "current"}
    main |= {"celery_app_broker_url": "redis://127.0.0.1:6379/0", "celery_app_result_backend": ""}
    hosts = [f"h{number}" for number in range(len(ways))]
    here = Site(tmp_path, {"redis": hosts[:1], "celery_worker": hosts}, {"group_vars/all/main.yml": main | VAULT, **files})
    costs = {}
    for host, names in zip(hosts, ways, strict=True):
        unit = tmp_path / f"{host}.service"
        unit.write_text(here.render("celery_app/templates/services.conf.j2", host) + "ExecStart=/bin/true\n")
        command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        assert shown.stderr == ""
        costs[" ".join(names)] = float(re.findall(r"level for .*: ([0-9.]+)", shown.stdout)[0])
    base, whole = costs.pop(""), costs.pop(" ".join(allowed))
    stated = {name: float(cost) for name, cost in re.findall(r"^\| `([a-z]+)` \|.*\| ([0-9.]+) \|$", readme, re.MULTILINE)}
    ends = re.findall(r"([0-9.]+) without any, ([0-9.]+) with all", readme)[0]

    assert base <= 1.5
    # Other releases of systemd may round otherwise.
    assert stated == pytest.approx(costs, abs=0.11)
    assert tuple(map(float, ends)) == pytest.approx((base, whole), abs=0.11)


def test_ipv6_addresses_stand_in_brackets_everywhere(tmp_path: Path) -> None:
    hosts = ["one", "two", "three"]
    groups = dict.fromkeys(("redis", "redis_sentinel", "rabbitmq"), hosts) | {"celery_worker": ["four"], "monitoring": ["four"]}
    addresses = {host: f"fd00::{number}" for number, host in enumerate([*hosts, "four"], 1)}
    files: dict[str, dict[str, Any]] = {"group_vars/all/main.yml": {name: value for name, value in MAIN.items() if name != "ansible_host"}}
    files |= {f"host_vars/{host}.yml": {"ansible_host": address} for host, address in addresses.items()}
    here = Site(tmp_path, groups, files)

    urls = [f"sentinel://orders@[fd00::{number}]:26379/0" for number in (1, 2, 3)]
    assert sorted(here.value("celery_app_broker_url", "four").split(";")) == urls
    assert sorted(here.value("rabbitmq_endpoints", "four")) == ["[fd00::1]:5671", "[fd00::2]:5671", "[fd00::3]:5671"]
    assert here.value("__exporters_redis_target", "one") == "rediss://[fd00::1]:6379"
    assert here.value("__prometheus_proxy_url", "four") == "http://localhost:8080"
    assert "IP:fd00::1" in here.value("__pki_subject_alt_name", "one")
    assert "IP:::1" in here.value("__pki_subject_alt_name", "one")
    assert '"[fd00::1]:9100"' in here.render("prometheus/templates/prometheus.yml.j2", "four")


def test_services_log_what_tasks_do_unless_told_otherwise(tmp_path: Path) -> None:
    here = site(tmp_path)
    assert 'CELERY_PLATFORM_LOG_LEVEL="INFO"' in here.render("celery_app/templates/celery.env.j2")
    (tmp_path / "quiet").mkdir()
    here = site(tmp_path / "quiet", celery_app_settings={"log_level": "WARNING"})
    assert 'CELERY_PLATFORM_LOG_LEVEL="WARNING"' in here.render("celery_app/templates/celery.env.j2")
