"""Tests of the action plugin `check_settings`: its functions, what it says of inventories, and playbooks/preflight.yml as a whole."""

from __future__ import annotations

import copy
import os
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from action import check_settings
from helpers import REPOSITORY
from helpers.preflight import Site
from helpers.targets import only_in_test_all

GOOD_SECRET = "nX7cY2pK9mQ4wL8vD3fG6hJ1"


# --- Names ---


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("redis_bindd", "redis_bind"),
        ("reddis_bind", "redis_bind"),
        ("celery_wroker_list", "celery_worker_list"),
        ("celery_app_time_limits", "celery_app_time_limit"),
    ],
)
def test_a_misspelt_name_is_found_with_the_one_that_was_meant(name: str, meant: str) -> None:
    assert list(check_settings.unknown_names({name, "redis_port"})) == [(name, meant)]


def test_a_name_with_the_prefix_of_a_role_must_be_known() -> None:
    assert [name for name, _ in check_settings.unknown_names({"lab_zzz", "redis_qqq"})] == ["lab_zzz", "redis_qqq"]


@pytest.mark.parametrize(
    "name",
    [
        "nginx_port",
        "timezone",
        "ansible_host",
        "vault_redis_requirepass",
        "vault_redis_bindd",
        "__redis_bindd",
        "_redis_bindd",
    ],
)
def test_names_that_are_not_ours_are_left_alone(name: str) -> None:
    assert list(check_settings.unknown_names({name})) == []


def test_every_documented_variable_is_known() -> None:
    known = check_settings.all_options()

    assert {"redis_port", "celery_app_name", "celery_worker_list", "celery_beat_scheduler", "lab_state"} <= known
    assert list(check_settings.unknown_names(set(known))) == []


def test_a_role_without_argument_specs_has_no_options() -> None:
    assert check_settings.role_options("no_such_role") == {}


# --- Secrets ---


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "is empty"),
        ("", "is empty"),
        (GOOD_SECRET, ""),
        (GOOD_SECRET[:23], "has 23 characters"),
        ("$ANSIBLE_VAULT;1.1;AES256\n3338", "is still encrypted"),
        ("changeme" + GOOD_SECRET, "looks like an example"),
        (GOOD_SECRET + "-PassWord", "looks like an example"),
        ("replace-this-" + GOOD_SECRET, "looks like an example"),
        ("abcabcabcabcabcabcabcabcabc", "looks like an example"),
        (GOOD_SECRET + "\n", "holds a line break or another control character"),
        (GOOD_SECRET + "\u2028", "holds a line break or another control character"),
    ],
)
def test_a_secret_is_judged(value: Any, problem: str) -> None:
    assert check_settings.secret_problem(value) == problem


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("redis_requirepass", "x", [("redis_requirepass", "x")]),
        ("celery_app_broker_password", "", [("celery_app_broker_password", "")]),
        (
            "redis_users",
            [{"name": "orders", "password": "x"}, {"name": "shop", "password": "y"}],
            [("redis_users[orders].password", "x"), ("redis_users[shop].password", "y")],
        ),
        ("a", {"b": {"c": [{"tls_passphrase": "x"}]}}, [("a.b.c[].tls_passphrase", "x")]),
        ("a", [[{"password": "x"}], ({"password": "y"},)], [("a[][].password", "x"), ("a[][].password", "y")]),
        ("redis_port", 6379, []),
        ("redis_bind", ["password"], []),
        ("celery_app_password_file", "/run/x", []),
        ("a", {"password_hint": "x", "passwords_kept": 3, "nopassword": True}, []),
    ],
)
def test_secrets_are_found_however_deep(name: str, value: Any, found: list[tuple[str, Any]]) -> None:
    assert list(check_settings.secrets_in(name, value)) == found


# --- Files ---


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


FILES = {
    "hosts.yml": "all:\n  hosts:\n    web1:\n      in_hosts: 1\n",
    "group_vars/all/main.yml": "everywhere: 1\n",
    "group_vars/all/vault.yml": "vault_one: 1\n",
    "group_vars/redis.yaml": "in_group: 1\nredis_port_extra: 1\n# in_comment: 1\nnested:\n  - in_list: 1\n",
    "host_vars/web1.yml": "everywhere: 2\nof_host: 1\n",
    "host_vars/web2/main.yml": "of_other_host: 1\n",
}


@pytest.mark.parametrize(
    ("variable", "host", "file"),
    [
        ("everywhere", "web1", "host_vars/web1.yml"),
        ("everywhere", "web2", "group_vars/all/main.yml"),
        ("of_host", "web1", "host_vars/web1.yml"),
        ("of_other_host", "web2", "host_vars/web2/main.yml"),
        ("of_other_host", "web1", "group_vars/all/main.yml"),
        ("in_hosts", "web1", "hosts.yml"),
        ("in_group", "web1", "group_vars/redis.yaml"),
        ("in_list", "web1", "group_vars/redis.yaml"),
        ("vault_one", "web1", "group_vars/all/vault.yml"),
        ("vault_missing", "web1", "group_vars/all/vault.yml"),
        ("redis_requirepass", "web1", "group_vars/all/vault.yml"),
        ("redis_port", "web1", "group_vars/all/main.yml"),
        ("in_comment", "web1", "group_vars/all/main.yml"),
    ],
)
@pytest.mark.parametrize("inventory", ["", "hosts.yml"])
def test_the_file_that_sets_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inventory: str, variable: str, host: str, file: str
) -> None:
    write(tmp_path, FILES)
    monkeypatch.chdir(tmp_path)

    assert check_settings.defining_file(variable, tmp_path / inventory, host, ["celery", "redis"]) == file


def test_a_file_elsewhere_is_shown_with_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "inventory", FILES)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert check_settings.defining_file("of_host", tmp_path / "inventory", "web1") == f"{tmp_path}/inventory/host_vars/web1.yml"


@pytest.mark.parametrize("name", ["host_vars/web10.yml", "host_vars/web10/main.yml"])
def test_a_host_whose_name_begins_alike_is_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write(tmp_path, {name: "redis_port: 1\n", "group_vars/all/main.yml": "redis_port: 2\n"})
    monkeypatch.chdir(tmp_path)

    assert check_settings.defining_file("redis_port", tmp_path, "web1") == "group_vars/all/main.yml"


def test_a_group_wins_over_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"group_vars/all/main.yml": "redis_port: 1\n", "group_vars/redis.yml": "redis_port: 2\n"})
    monkeypatch.chdir(tmp_path)

    assert check_settings.defining_file("redis_port", tmp_path, "web1", ["redis"]) == "group_vars/redis.yml"
    assert check_settings.defining_file("redis_port", tmp_path, "web1", ["celery"]) == "group_vars/all/main.yml"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("a b", False),
        ("a\nb", True),
        ("a\tb", True),
        (["a", ["\r"]], True),
        ({"a": {"b\n": 1}}, True),
        ({"password": "a\n"}, False),
        (5, False),
    ],
)
def test_control_characters_are_found_however_deep(value: Any, found: bool) -> None:
    assert check_settings.holds_control("redis_users", value) is found


# --- Inventories, and playbooks/preflight.yml as a whole ---

SETTINGS: dict[str, Any] = {
    "ansible_connection": "local",
    "ansible_host": "127.0.0.1",
    "pki_ca_passphrase": "{{ vault_pki_ca_passphrase }}",
    "ansible_python_interpreter": "{{ ansible_playbook_python }}",
    "redis_bind": ["127.0.0.1"],
    "redis_port": 6379,
    "redis_requirepass": "{{ vault_redis_requirepass }}",
    "celery_app_name": "orders",
    "celery_app_source": str(REPOSITORY / "examples" / "orders"),
    "celery_app_application": "orders.app:app",
    "celery_app_redis_password": "{{ vault_celery_app_redis_password }}",
    "celery_app_queues": ["critical", "default"],
    "celery_app_routes": {"orders.tasks.send_email": {"queue": "critical", "priority": 3}},
    "celery_worker_list": [
        {"name": "critical", "queues": ["critical"], "concurrency": 2},
        {"name": "default", "queues": ["default"]},
    ],
}
SECRETS = {
    "vault_redis_requirepass": GOOD_SECRET,
    "vault_pki_ca_passphrase": GOOD_SECRET[4:] + GOOD_SECRET[:4],
    "vault_celery_app_redis_password": GOOD_SECRET[::-1],
}
MAIN, VAULT, HOSTS = (f"inventory/{name}" for name in ("group_vars/all/main.yml", "group_vars/all/vault.yml", "hosts.yml"))
CRITICAL, DEFAULT = SETTINGS["celery_worker_list"]


class Problem(NamedTuple):
    what: str
    file: str
    allowed: str


class Result(NamedTuple):
    code: int
    output: str
    message: str
    problems: list[Problem]

    def about(self, name: str) -> Problem:
        """Return the only problem that begins with a variable's name."""
        (found,) = (problem for problem in self.problems if re.match(re.escape(name) + r"[\s.\[]", problem.what))
        return found


Judge = Callable[..., Result]


class Mistake(NamedTuple):
    """Settings with one mistake, the variable that it is told of, and words of what is told and of what is allowed."""

    settings: dict[str, Any]
    variable: str
    what: str
    allowed: str


def together(mistakes: list[Mistake]) -> dict[str, Any]:
    """Return the settings of several mistakes, for one run."""
    assert len({name for mistake in mistakes for name in mistake.settings}) == sum(len(mistake.settings) for mistake in mistakes)
    return {name: value for mistake in mistakes for name, value in mistake.settings.items()}


def judge_by_playbook(_: Site, folder: Path) -> tuple[int, str, str]:
    """Run playbooks/preflight.yml; return its exit code, all that it printed, and the message that it failed with."""
    system = platform.freedesktop_os_release()
    if system["ID"] != "debian":
        pytest.skip(f"this machine stands in for a host, and {system['PRETTY_NAME']} is not one that the playbook accepts")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    completed = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", "inventory", REPOSITORY / "playbooks" / "preflight.yml"],
        env=environment | {"ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    failed = re.search(r"^fatal: .*=> *\n((?: .*\n|\n)+)", completed.stdout, re.MULTILINE)
    message = str(yaml.safe_load(textwrap.dedent(failed[1]))["msg"]) if failed else ""
    return completed.returncode, completed.stdout + completed.stderr, message


def judge_here(site: Site, _: Path) -> tuple[int, str, str]:
    """Do the same in this process, without a look at the hosts: milliseconds instead of seconds."""
    message = "\n\n".join(site.judge_hosts())
    return bool(message), message, message


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Return a function that judges an inventory; whatever happens, no secret may be shown."""
    monkeypatch.chdir(tmp_path)

    def run(
        settings: dict[str, Any] | None = None,
        secrets: dict[str, str | None] | None = None,
        *,
        without: tuple[str, ...] = (),
        redis_hosts: tuple[str, ...] = ("one",),
        worker_hosts: tuple[str, ...] = ("one",),
        beat_hosts: tuple[str, ...] = ("one",),
        sentinel_hosts: tuple[str, ...] = (),
        monitoring_hosts: tuple[str, ...] = (),
        flower_hosts: tuple[str, ...] = (),
        pki_hosts: tuple[str, ...] = ("one", "two", "three"),
        host_vars: dict[str, dict[str, Any]] | None = None,
        by: Callable[[Site, Path], tuple[int, str, str]] = judge_here,
    ) -> Result:
        groups = {"redis": redis_hosts, "redis_sentinel": sentinel_hosts, "celery_worker": worker_hosts, "celery_beat": beat_hosts}
        groups |= {"monitoring": monitoring_hosts, "celery_flower": flower_hosts}
        hosts = {host for names in groups.values() for host in names}
        groups["pki"] = tuple(host for host in pki_hosts if host in hosts)
        main = {name: value for name, value in (copy.deepcopy(SETTINGS) | (settings or {})).items() if name not in without}
        vault = {name: value for name, value in (SECRETS | (secrets or {})).items() if value is not None}
        files = {"group_vars/all/main.yml": main, "group_vars/all/vault.yml": vault}
        files |= {f"host_vars/{host}.yml": values for host, values in (host_vars or {}).items()}
        site = Site(tmp_path / "inventory", {group: names for group, names in groups.items() if names}, files)

        code, output, message = by(site, tmp_path)
        shown = [value for value in vault.values() if any(line in output for line in value.splitlines())]
        assert not shown, f"secrets in the output:\n{output}"

        problems = re.findall(r"^(\S.*)\.\n +File: (.*)\n +Allowed: (.*)$", message, re.MULTILINE)
        return Result(code, output, message, [Problem(*problem) for problem in problems])

    return run


def test_good_settings_pass(judge: Judge) -> None:
    result = judge(by=judge_by_playbook)

    assert result.code == 0, result.output
    assert result.message == ""


WRONG = {
    "names, texts and numbers": [
        Mistake({"redis_bindd": []}, "redis_bindd", "is not a variable of this project", "redis_bind, perhaps"),
        Mistake({"redis_port": "abc"}, "redis_port", "is no whole number", "1 to 65535"),
        Mistake(
            {"celery_app_timezone": "UTC\nX=1"},
            "celery_app_timezone",
            "holds a line break or another control character",
            "text of one line",
        ),
        Mistake(
            {"celery_app_environment": {"DEBUG": False, "WORKERS": 8, "LEVEL": "8"}},
            "celery_app_environment",
            'has ["DEBUG", "WORKERS"]',
            'text, in quotes where it looks like something else ("8", "false"): of no, 0644 and 1.10, YAML hands on false, 420 and 1.1',
        ),
        Mistake(
            {"redis_users": [{"name": "a", "password": GOOD_SECRET[::2] * 2, "prefix": "a*:"}]},
            "redis_users",
            'has ["a*:"]',
            "prefixes without blanks and without * ? [ ] ^ ( ) and \\, which stand for other keys in Redis's rules",
        ),
        Mistake(
            {"redis_settings": {"proc-title-template": '{title} "x'}},
            "redis_settings",
            'has ["proc-title-template"]',
            "names and values as redis.conf has them: words, those with blanks in double quotes",
        ),
        Mistake(
            {"celery_app_queues": ["critical", "default", "orphan"]},
            "celery_app_queues",
            '"orphan"',
            "queues that a worker of some host consumes (celery_worker_list)",
        ),
        Mistake(
            {"celery_worker_list": [CRITICAL, DEFAULT | {"name": "critical"}]},
            "celery_worker_list",
            'has ["critical", "critical"]',
            "workers with different names",
        ),
        Mistake({"celery_app_soft_time_limit": 901}, "celery_app_soft_time_limit", "is 901", "less than celery_app_time_limit, 900"),
        Mistake(
            {"celery_app_routes": {"orders.*": {"queue": "nowhere"}}},
            "celery_app_routes",
            "sends orders.* to nowhere",
            "one of celery_app_queues, critical, default",
        ),
    ],
    "other values": [
        Mistake(
            {"celery_app_environment": {"A": "a\tb\r\n\x1b", "B": "a\0"}},
            "celery_app_environment",
            'has ["B"]',
            "text of any characters but NUL and what is none in Unicode (half of a pair), since systemd takes no others",
        ),
        Mistake({"redis_port": 99999}, "redis_port", "is 99999", "a number from 1 to 65535"),
        Mistake(
            {"celery_worker_list": [CRITICAL | {"concurrency": 0}, DEFAULT]}, "celery_worker_list", "has [0]", "a concurrency of 1 or more"
        ),
    ],
    "limits of workers": [
        Mistake(
            {"celery_worker_list": [CRITICAL | {"soft_time_limit": 900}, DEFAULT | {"time_limit": 600}, DEFAULT | {"name": "fine"}]},
            "celery_worker_list",
            'has ["critical", "default"]',
            "workers whose soft limit is below their hard one",
        ),
    ],
}


@pytest.mark.parametrize("mistakes", WRONG.values(), ids=WRONG)
def test_wrong_settings_stop_the_run(judge: Judge, mistakes: list[Mistake]) -> None:
    result = judge(together(mistakes))

    assert result.code != 0
    assert len(result.problems) == len(mistakes)
    for mistake in mistakes:
        problem = result.about(mistake.variable)
        assert mistake.what in problem.what
        assert problem.file == MAIN
        assert mistake.allowed in problem.allowed


@pytest.mark.parametrize(
    ("value", "what"),
    [
        pytest.param(None, "is not set", id="missing", marks=only_in_test_all),
        pytest.param("Zq8vT3nB6yH1kW5r", "has 16 characters", id="short"),
        pytest.param("changeme".ljust(30, "Z"), "looks like an example", id="changeme", marks=only_in_test_all),
        pytest.param("password-Zq8vT3nB6yH1kW5rL0pX7dF2", "looks like an example", id="password", marks=only_in_test_all),
        pytest.param("$ANSIBLE_VAULT;1.1;AES256\n62363836383634386165\n", "is still encrypted", id="encrypted"),
    ],
)
def test_a_bad_secret_stops_the_run(judge: Judge, value: str | None, what: str) -> None:
    result = judge(secrets={"vault_redis_requirepass": value})

    assert len(result.problems) == 1
    problem = result.about("vault_redis_requirepass")
    assert what in problem.what
    assert problem.file == VAULT
    assert "at least 24 characters" in problem.allowed


def test_many_mistakes_are_told_at_once(judge: Judge) -> None:
    expected = [
        ("redis_bindd", "redis_bind, perhaps"),
        ("vault_redis_requirepass", "at least 24 characters"),
        ("redis_port", "a number from 1 to 65535"),
        ("celery_app_source", "an existing folder or wheel on this machine"),
        ("celery_app_soft_time_limit", "less than celery_app_time_limit"),
        ("celery_app_visibility_timeout", "more than celery_app_time_limit"),
        ("celery_app_routes", "one of celery_app_queues, critical, default, orphan"),
        ("celery_app_queues", "queues that a worker of some host consumes"),
        ("celery_worker_list", "queues that celery_app_queues names"),
        ("celery_worker_list", "a concurrency of 1 or more"),
        ("celery_beat_scheduler", "redbeat.RedBeatScheduler on several hosts (one, two)"),
        ("group redis", "one host, or several and Sentinels"),
        ("redis_replication_password", "at least 24 characters"),
        ("redis_sentinel_password", "at least 24 characters"),
    ]
    result = judge(
        {
            "redis_bindd": [],
            "celery_beat_scheduler": "django_celery_beat.schedulers:DatabaseScheduler",
            "redis_port": 0,
            "celery_app_source": "/no/such/folder",
            "celery_app_soft_time_limit": 1000,
            "celery_app_visibility_timeout": 900,
            "celery_app_routes": {"orders.*": {"queue": "nowhere"}},
            "celery_app_queues": ["critical", "default", "orphan"],
            "celery_worker_list": [CRITICAL, DEFAULT | {"concurrency": 0, "queues": ["default", "nowhere"]}],
        },
        {"vault_redis_requirepass": "Zq8vT3nB6yH1kW5r"},
        redis_hosts=("one", "two"),
        worker_hosts=("one", "two"),
        beat_hosts=("one", "two"),
        by=judge_by_playbook,
    )

    assert result.code != 0
    assert f"{len(expected)} settings are wrong; nothing was changed on any host." in result.message
    assert len(result.problems) == len(expected)
    for variable, allowed in expected:
        assert any(problem.what.startswith(f"{variable} ") and allowed in problem.allowed for problem in result.problems), variable


@only_in_test_all
def test_several_hosts_with_beat_share_a_lock(judge: Judge) -> None:
    hosts = ("one", "two")
    assert judge(worker_hosts=hosts, beat_hosts=hosts).problems == []

    problem = judge({"celery_beat_max_interval": 60}, worker_hosts=hosts, beat_hosts=hosts).about("celery_beat_max_interval")
    assert problem.allowed == "at most 10 seconds with RedBeat, whose lock runs out 30 seconds after a tick"

    without_redis = {"celery_app_broker_url": "amqp://orders@rabbit:5672/orders", "celery_app_result_backend": ""}
    problem = judge(without_redis, worker_hosts=hosts, beat_hosts=hosts).about("celery_beat_scheduler")
    assert "any other where neither broker nor result backend is Redis" in problem.allowed


THREE = ("one", "two", "three")
REPLICATED = dict.fromkeys(["redis_replication_password", "redis_sentinel_password"], "{{ vault_redis_requirepass }}")


def test_three_redis_hosts_with_three_sentinels_pass(judge: Judge) -> None:
    odd = {"redis_replication_password": "{{ vault_redis_requirepass }} '\"#\\ä"}
    result = judge(REPLICATED | odd, redis_hosts=THREE, sentinel_hosts=THREE, by=judge_by_playbook)

    assert result.code == 0, result.output


@pytest.mark.parametrize(
    ("sentinels", "settings", "variable", "what", "file", "allowed"),
    [
        pytest.param(THREE[:1], {}, "group redis_sentinel", '["one"]', HOSTS, "three hosts", id="one Sentinel"),
        pytest.param(THREE[:2], {}, "group redis_sentinel", '["one", "two"]', HOSTS, "another odd number", id="two Sentinels"),
        pytest.param(
            (*THREE, "four"), {}, "group redis_sentinel", '"four"', HOSTS, "another odd number", id="four Sentinels", marks=only_in_test_all
        ),
        pytest.param(
            THREE,
            {"redis_sentinel_quorum": 4},
            "redis_sentinel_quorum",
            "is 4",
            MAIN,
            "from 1 to the number of",
            id="quorum",
            marks=only_in_test_all,
        ),
        pytest.param(
            THREE,
            {"redis_min_replicas_to_write": 3},
            "redis_min_replicas_to_write",
            "is 3",
            MAIN,
            "0 to",
            id="replicas",
            marks=only_in_test_all,
        ),
        pytest.param(
            THREE,
            {"redis_sentinel_password": "{{ vault_redis_requirepass }}'"},
            "redis_sentinel_password",
            "a blank or a quote in the password of sentinel",
            MAIN,
            "passwords without blanks and quotes",
            id="quote",
            marks=only_in_test_all,
        ),
        pytest.param(
            THREE,
            {"redis_sentinel_port": 6379},
            "redis_sentinel_port",
            "is 6379",
            MAIN,
            "other than redis_port",
            id="port",
            marks=only_in_test_all,
        ),
    ],
)
def test_sentinels_that_cannot_decide_stop_the_run(
    judge: Judge, sentinels: tuple[str, ...], settings: dict[str, Any], variable: str, what: str, file: str, allowed: str
) -> None:
    result = judge(REPLICATED | settings, redis_hosts=THREE, sentinel_hosts=sentinels, pki_hosts=(*THREE, "four"))

    assert result.code != 0
    assert all(problem.what.startswith(f"{variable} ") for problem in result.problems), result.message
    problem = result.problems[0]
    assert what in problem.what
    assert problem.file == file
    assert allowed in problem.allowed


@pytest.mark.parametrize(
    ("address", "what"), [("no.such.host.invalid", "is unknown"), pytest.param("localhost", "is 127.0.0.1", marks=only_in_test_all)]
)
def test_an_address_that_hosts_cannot_use_stops_the_run(judge: Judge, address: str, what: str) -> None:
    result = judge(REPLICATED | {"redis_address": address}, redis_hosts=THREE, sentinel_hosts=THREE, by=judge_by_playbook)

    assert "3 settings are wrong; nothing was changed on any host." in result.message
    assert {problem.what for problem in result.problems} == {f'redis_address has "on {host}: {address} {what}"' for host in THREE}
    assert result.problems[0].file == MAIN
    assert "hosts reach" in result.problems[0].allowed


@only_in_test_all
def test_a_redis_host_without_certificate_stops_the_run(judge: Judge) -> None:
    result = judge(worker_hosts=("one", "two"), pki_hosts=("two",))

    assert result.code != 0
    assert "no certificate for one" in result.about("redis_tls").what


def test_a_mistake_of_one_host_names_its_file(judge: Judge) -> None:
    result = judge(worker_hosts=("one", "two"), host_vars={"two": {"celery_worker_concurrency": 0}}, by=judge_by_playbook)

    assert result.code != 0
    assert [(problem.what, problem.file) for problem in result.problems] == [
        ("celery_worker_concurrency is 0", "inventory/host_vars/two.yml")
    ]


def test_a_rule_shows_no_secret(judge: Judge) -> None:
    secret = "{{ vault_redis_requirepass }}"
    result = judge(
        {
            "redis_users": [{"name": "orders", "password": secret}] * 2,
            "redis_settings": {"requirepass": secret},
            "celery_app_credentials": {"api key": secret},
        },
        by=judge_by_playbook,
    )

    assert result.code != 0
    assert "3 settings are wrong" in result.message


def test_a_bad_secret_is_told_once_however_often_it_is_used(judge: Judge) -> None:
    result = judge(secrets={"vault_celery_app_redis_password": "Zq8vT3nB6yH1kW5r"})

    assert result.code != 0
    assert [(problem.what, problem.file) for problem in result.problems] == [("vault_celery_app_redis_password has 16 characters", VAULT)]


@only_in_test_all
def test_a_number_may_be_written_as_text(judge: Judge) -> None:
    result = judge({"redis_port": "6379", "celery_worker_list": [CRITICAL | {"concurrency": "2"}, DEFAULT]})

    assert result.code == 0, result.output


@only_in_test_all
def test_a_route_that_is_no_mapping_stops_the_run(judge: Judge) -> None:
    result = judge({"celery_app_routes": {"orders.*": "critical"}})

    assert result.code != 0
    assert result.about("celery_app_routes")


@only_in_test_all
def test_the_default_worker_of_another_host_counts(judge: Judge) -> None:
    result = judge(without=("celery_worker_list",), worker_hosts=("one", "two"), host_vars={"one": {"celery_worker_list": [CRITICAL]}})

    assert result.code == 0, result.output


MONITORED = {
    "redis_exporter_password": "{{ vault_redis_requirepass }}",
    "celery_monitor_redis_password": "{{ vault_redis_requirepass }}",
    "monitoring_proxy_users": [{"name": "operator", "password": "{{ vault_redis_requirepass }}"}],
    "alertmanager_webhook": "https://hooks.slack.com/services/T0/B0/x",
}


@pytest.mark.parametrize("monitoring", [pytest.param("one", marks=only_in_test_all), "two"])
def test_a_site_with_a_host_for_monitoring_passes(judge: Judge, monitoring: str) -> None:
    result = judge(MONITORED, monitoring_hosts=(monitoring,))

    assert result.code == 0, result.output


UNMEASURED = [
    Mistake({"exporters_redis_port": 9100}, "exporters_node_port", "9100", "a port of its own"),
    Mistake({"prometheus_scrape_interval": 90}, "prometheus_scrape_interval", "is 90", "5 to 60"),
    Mistake({"prometheus_retention_size": "10"}, "prometheus_retention_size", "10", "MB, GB"),
    Mistake({"alertmanager_repeat_ticket": 200}, "alertmanager_repeat_ticket", "200", "96"),
]


def test_monitoring_that_cannot_work_stops_the_run(judge: Judge) -> None:
    result = judge(MONITORED | together(UNMEASURED), monitoring_hosts=("one",), pki_hosts=())

    assert result.code != 0
    for mistake in UNMEASURED:
        problem = result.about(mistake.variable)
        assert mistake.what in problem.what
        assert problem.file == MAIN
        assert mistake.allowed in problem.allowed


@pytest.mark.parametrize(
    ("hosts", "pki", "variable", "what", "allowed"),
    [
        pytest.param(
            ("one", "two"), ("one", "two"), "group monitoring", '["one", "two"]', "one host, since", id="two", marks=only_in_test_all
        ),
        pytest.param(("two",), ("one",), "exporters_tls", "no certificate for two", "group pki", id="no certificate"),
    ],
)
def test_hosts_that_cannot_monitor_stop_the_run(
    judge: Judge, hosts: tuple[str, ...], pki: tuple[str, ...], variable: str, what: str, allowed: str
) -> None:
    result = judge(MONITORED, monitoring_hosts=hosts, pki_hosts=pki)

    assert result.code != 0
    problem = result.about(variable)
    assert what in problem.what
    assert problem.file == HOSTS
    assert allowed in problem.allowed


def test_a_wrong_webhook_is_not_shown(judge: Judge) -> None:
    result = judge(MONITORED | {"alertmanager_webhook": "hooks.slack.com/T0/B0/Zq8vT3nB6yH1kW5r"}, monitoring_hosts=("one",))

    assert "https://…" in result.about("alertmanager_webhook").allowed
    assert "Zq8vT3nB6yH1kW5r" not in result.output


@pytest.mark.parametrize(
    ("flower", "settings"),
    [
        pytest.param("one", {}, marks=only_in_test_all),
        pytest.param("two", {}, marks=only_in_test_all),
        ("one", {"celery_flower_options": {"natural_time": True}}),
    ],
)
def test_a_site_with_flower_alone_passes(judge: Judge, flower: str, settings: dict[str, Any]) -> None:
    result = judge(MONITORED | settings, flower_hosts=(flower,))

    assert result.code == 0, result.output


UNUSABLE = {
    "nobody may use it": [
        Mistake({"monitoring_proxy_users": []}, "monitoring_proxy_users", "is empty", "at least one person"),
    ],
    "names, ports and options": [
        Mistake(
            {"monitoring_proxy_users": [MONITORED["monitoring_proxy_users"][0] | {"name": "a:b"}]},
            "monitoring_proxy_users",
            'has ["a:b"]',
            "names of letters",
        ),
        Mistake({"monitoring_proxy_port": 0}, "monitoring_proxy_port", "is 0", "1 to 65535"),
        Mistake({"celery_flower_users": []}, "celery_flower_users", "is empty", "would let everyone in"),
        Mistake({"celery_flower_options": {"read_only": False}}, "celery_flower_options", 'has ["read_only"]', "no variable"),
        Mistake({"celery_monitor_user": "orders"}, "celery_monitor_user", '"orders"', "neither the application nor another user"),
    ],
    "plain text": [
        Mistake(
            {"monitoring_proxy_users": MONITORED["monitoring_proxy_users"] * 2},
            "monitoring_proxy_users",
            'has ["operator", "operator"]',
            "different names",
        ),
        Mistake({"monitoring_proxy_tls": False, "monitoring_proxy_bind": ["*"]}, "monitoring_proxy_bind", 'has ["*"]', "without TLS"),
        Mistake(
            {"celery_monitor_broker_url": "redis://monitoring:x@one/0"},
            "celery_monitor_broker_url",
            "is 'redis://monitoring:********@one/0'",
            "must hold no password",
        ),
    ],
}


@pytest.mark.parametrize("mistakes", UNUSABLE.values(), ids=UNUSABLE)
def test_flower_that_cannot_work_stops_the_run(judge: Judge, mistakes: list[Mistake]) -> None:
    result = judge(MONITORED | together(mistakes), flower_hosts=("one",))

    assert result.code != 0
    for mistake in mistakes:
        found = [problem for problem in result.problems if problem.what.startswith(mistake.variable) and mistake.allowed in problem.allowed]
        assert [mistake.what in problem.what for problem in found] == [True], result.message


def test_a_proxy_with_tls_needs_a_certificate(judge: Judge) -> None:
    result = judge(MONITORED | {"monitoring_proxy_tls": True}, flower_hosts=("one",), pki_hosts=())

    assert "no certificate for one" in result.about("monitoring_proxy_tls").what


def test_alerts_that_go_nowhere_stop_the_run_unless_that_is_meant(judge: Judge) -> None:
    result = judge(MONITORED, without=("alertmanager_webhook",), monitoring_hosts=("one",))
    problem = result.about("alertmanager_webhook")
    assert (problem.what, problem.file) == ("alertmanager_webhook is not set", MAIN)
    assert "URL that alerts are posted to" in problem.allowed
    assert '"" if nobody shall be told' in problem.allowed


@only_in_test_all
def test_a_variable_of_the_vault_may_hold_what_the_setting_that_needs_it_may(judge: Judge) -> None:
    result = judge(MONITORED | {"alertmanager_webhook": "{{ vault_alertmanager_webhook }}"}, monitoring_hosts=("one",))
    problem = result.about("vault_alertmanager_webhook")
    assert problem.file == VAULT
    assert "URL that alerts are posted to" in problem.allowed

    assert judge(MONITORED | {"alertmanager_webhook": ""}, monitoring_hosts=("one",)).code == 0
