"""What the preflight of roles says of inventories, and that the runtime package takes what it takes. No playbook is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from preflight import REPOSITORY, Site

import check_settings
from celery_platform import broker
from celery_platform.settings import BadSettings, Settings, is_secret, load_settings

SECRET = "nX7cY2pK9mQ4wL8vD3fG6hJ1"
KEY = "A" * 43
MAIN = {
    "ansible_host": "127.0.0.1",
    "redis_requirepass": "{{ vault_redis_requirepass }}",
    "redis_users": [{"name": "orders", "password": "{{ vault_celery_redis_password }}"}],
    "celery_app_name": "orders",
    "celery_app_source": str(REPOSITORY / "examples" / "orders"),
    "celery_app_application": "orders.app:app",
    "celery_app_redis_password": "{{ vault_celery_redis_password }}",
}
VAULT = {"vault_redis_requirepass": SECRET, "vault_celery_redis_password": SECRET[::-1]}
ONE_HOST = {"redis": ["one"], "celery_worker": ["one"], "celery_beat": ["one"]}


def site(folder: Path, groups: dict[str, list[str]] | None = None, *, vault: dict[str, Any] | None = None, **main: Any) -> Site:
    files = {"group_vars/all/main.yml": MAIN | main, "group_vars/all/vault.yml": VAULT if vault is None else vault}
    return Site(folder, groups or ONE_HOST, files)


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
        ({"celery_app_settings": {"foo": 1}}, "celery_app_settings has foo, which is unknown", "breakers, child_start_timeout"),
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
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
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
    own |= {"tls_ca_file", "tls_cert_file", "tls_key_file", "tls_server_name", "declare_queues"}

    assert set(documented) | own == {name for name in Settings.model_fields if not is_secret(name)}


@pytest.mark.parametrize(
    ("role", "variable", "setting"),
    [
        *(("celery_app", f"celery_app_{name}", name) for name in ("soft_time_limit", "time_limit", "visibility_timeout", "result_expires")),
        *(("celery_app", f"celery_app_{name}", name) for name in ("default_queue", "max_tasks_per_child", "routes")),
        ("redis_sentinel", "redis_sentinel_master", "sentinel_master"),
    ],
)
def test_roles_and_runtime_have_the_same_defaults(role: str, variable: str, setting: str) -> None:
    defaults = yaml.safe_load((REPOSITORY / "roles" / role / "defaults/main.yml").read_text())

    assert defaults[variable] == Settings.model_fields[setting].default


def test_roles_and_runtime_have_the_same_queues() -> None:
    defaults = yaml.safe_load((REPOSITORY / "roles/celery_app/defaults/main.yml").read_text())

    assert defaults["celery_app_queues"] == [queue.name for queue in Settings.model_fields["queues"].default]


# --- All mistakes in one round ---


def test_rules_are_judged_beside_a_missing_variable(tmp_path: Path) -> None:
    vault = {"vault_redis_requirepass": SECRET}
    problems = site(tmp_path, vault=vault, celery_app_source="/no/such", celery_app_default_queue="x", celery_app_time_limit=9).judge()

    assert sorted(told(problems)) == [
        "celery_app_default_queue is x",
        "celery_app_soft_time_limit is 600",
        'celery_app_source is "/no/such"',
        "vault_celery_redis_password is not set",
    ]


def test_nothing_is_laid_on_what_depends_on_a_wrong_value(tmp_path: Path) -> None:
    problems = site(tmp_path, celery_app_queues="default", celery_app_time_limit="soon", celery_app_default_queue="x").judge()

    assert sorted(told(problems)) == ["celery_app_queues is text, not a list", "celery_app_time_limit is no whole number"]


def test_what_is_missing_is_told_once_for_all_hosts_and_roles(tmp_path: Path) -> None:
    groups = {"redis": ["one"], "celery_worker": ["one", "two"], "celery_beat": ["two"]}
    here = site(tmp_path, groups, vault={})
    problems = {problem for role in ("celery_app", "celery_worker") for host in ("one", "two") for problem in here.judge(role, host)}

    assert told(list(problems)) == ["vault_celery_redis_password is not set"]


@pytest.mark.parametrize("example", [True, False])
def test_a_missing_secret_belongs_into_the_vault(tmp_path: Path, example: bool) -> None:
    here = site(tmp_path, vault={})
    (tmp_path / "group_vars/all/vault.yml").unlink()
    if example:
        (tmp_path / "group_vars/all/vault.yml.example").write_text("vault_celery_redis_password: changeme\n")
        (tmp_path / "group_vars/all/vault.yml~").write_text("vault_celery_redis_password: changeme\n")
    (problem,) = here.judge()

    assert f"File: {tmp_path}/group_vars/all/vault.yml\n" in problem


# --- Messages ---


@pytest.mark.parametrize(
    ("main", "problem"),
    [
        ({"celery_app_environment": {"CELERY_PLATFORM_X": "1", "A": "b"}}, 'celery_app_environment has ["CELERY_PLATFORM_X"]'),
        ({"celery_app_environment": {"TOKEN": "s3cr3t\rline"}}, 'celery_app_environment has ["TOKEN"]'),
        ({"celery_app_environment": {"A-B": "1"}}, 'celery_app_environment has ["A-B"]'),
        ({"celery_app_credentials": {"api key": SECRET}}, 'celery_app_credentials has ["api key"]'),
        ({"celery_app_credentials": {"api": ""}}, 'celery_app_credentials has ["api"]'),
        ({"celery_app_log_days": "x"}, "celery_app_log_days is no whole number"),
        ({"celery_app_allow_jit": "perhaps"}, "celery_app_allow_jit is neither true nor false"),
        ({"celery_app_environment": "A=1 b"}, "celery_app_environment is no mapping"),
        ({"celery_broker": "kafka"}, "celery_broker is kafka"),
    ],
)
def test_a_message_names_the_key_and_no_value(tmp_path: Path, main: dict[str, Any], problem: str) -> None:
    problems = site(tmp_path, **main).judge()

    assert problem in told(problems), problems
    assert "s3cr3t" not in "".join(problems)


@pytest.mark.parametrize(
    ("worker", "problem"),
    [
        ({"name": "a"}, "celery_worker_list has an entry without queues"),
        ({"name": "a", "queues": ["default"], "concurrency": "x"}, "celery_worker_list has concurrency, which is no whole number"),
        ({"name": "a", "queues": ["default"], "pool": "gevent"}, "celery_worker_list has pool gevent"),
        ({"name": "a", "queues": ["default"], "conc": 1}, "celery_worker_list has conc, which is unknown"),
        ({"name": "a", "queues": ["default"], "cpu_weight": 0}, "celery_worker_list has [0]"),
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


@pytest.mark.parametrize("playbook", sorted((REPOSITORY / "playbooks").glob("*.yml")), ids=lambda path: path.stem)
def test_plays_know_the_variables_that_their_roles_take_from_others(playbook: Path) -> None:
    """The names of public variables of other roles, in what a role of the play writes, are those of roles that the play names."""
    for play in yaml.safe_load(playbook.read_text()):
        roles = {entry["role"] for entry in play.get("roles", [])}
        known = roles | {
            task["ansible.builtin.import_role"]["name"] for task in play.get("pre_tasks", []) if "ansible.builtin.import_role" in task
        }
        for role in roles:
            texts = [
                path.read_text()
                for folder in ("vars", "templates")
                for path in (REPOSITORY / "roles" / role / folder).rglob("*")
                if path.is_file()
            ]
            used = {
                word for text in texts for word in re.findall(r"\b[a-z]\w+\b(?! *\| *default)(?!['\"])", re.sub(r"(?m)^\s*#.*$", "", text))
            }
            for other in (path.name for path in (REPOSITORY / "roles").iterdir()):
                defaults = yaml.safe_load((REPOSITORY / "roles" / other / "defaults/main.yml").read_text()) or {}
                assert other in known or not used & set(defaults), f"{playbook.name}: {role} uses {used & set(defaults)}"


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
