"""Workers, beat and Redis are services of their own, with no more rights than they need, and know no secret they show."""

from __future__ import annotations

import json
import string

import pytest
from nodes import Node

import escape

testinfra_hosts = ["ansible://celery_worker"]

WORKERS = [f"celery-worker@{name}.service" for name in ("critical", "default", "batch")]
CELERY = [*WORKERS, "celery-beat.service"]
PRINTABLE = "".join(map(chr, range(0x20, 0x7F))) + "ß€😀"
TEXTS = [
    PRINTABLE,
    PRINTABLE[::-1],
    *string.punctuation,
    *(f"a{c}" for c in string.punctuation),
    "%n",
    "$HOME",
    "${HOME}",
    "a\\nb",
    "'a b'",
    " a ",
]


def test_every_service_runs_now_and_at_boot(node: Node) -> None:
    pids = set()
    for unit in [*CELERY, "redis-server.service"]:
        state = node.show(unit, "ActiveState", "SubState", "UnitFileState", "Restart", "MainPID")
        pids.add(state.pop("MainPID"))
        assert state == {"ActiveState": "active", "SubState": "running", "UnitFileState": "enabled", "Restart": "always"}, unit
    assert len(pids) == 5
    assert node.host.check_output("systemctl list-units --failed --plain --no-legend") == ""


def test_no_process_of_ours_has_a_capability_or_another_user(node: Node) -> None:
    report = json.loads(
        node.python(
            """
import json, pathlib, sys
found = {}
for unit in sys.argv[1:]:
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if not folder.joinpath("cgroup").read_text().rstrip().endswith("/" + unit):
                continue
            status = dict(line.split(":", 1) for line in folder.joinpath("status").read_text().splitlines())
        except (FileNotFoundError, ProcessLookupError):
            continue
        names = ("Uid", "Gid", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
        found.setdefault(unit, []).append({name: status[name].split()[-1] for name in names})
print(json.dumps(found))
""",
            *CELERY,
        )
    )
    celery = node.host.user("celery")
    assert celery.shell == "/usr/sbin/nologin"
    assert {unit: len(processes) for unit, processes in report.items()} == dict(zip(CELERY, (3, 3, 2, 1), strict=True))
    for processes in report.values():
        for process in processes:
            assert (process.pop("Uid"), process.pop("Gid")) == (str(celery.uid), str(celery.gid))
            assert (process.pop("NoNewPrivs"), process.pop("Seccomp")) == ("1", "2")
            assert {int(capabilities, 16) for capabilities in process.values()} == {0}


@pytest.mark.parametrize("unit", ["celery-worker@default.service", "celery-beat.service", "redis-server.service"])
def test_the_sandbox_leaves_little_exposed(node: Node, unit: str) -> None:
    exposure = node.host.check_output("systemd-analyze security --no-pager %s", unit).splitlines()[-1]
    assert float(exposure.split(": ")[1].split()[0]) <= 1.5, exposure


def test_the_application_cannot_write_where_it_runs(node: Node) -> None:
    denied = node.host.run("celery-exec sh -c 'for d in /opt/celery/current/ /etc/celery/ /usr/; do touch $d/x && echo $d; done'")
    assert denied.stdout == ""
    assert denied.stderr.count("Read-only file system") == 3


@pytest.mark.parametrize("signal", ["TERM", "HUP", "INT"])
def test_a_command_of_celery_exec_ends_with_who_called_it(node: Node, signal: str) -> None:
    ended = node.host.run(f"echo $(timeout --signal={signal} 3 celery-exec sleep 300; echo $?)")
    assert ended.stdout.strip() == "124"
    assert node.host.check_output("systemctl list-units --no-legend 'celery-exec-*'") == ""


def test_no_secret_is_readable_by_others(node: Node) -> None:
    """Look where secrets leak: command lines, environments, units, the journal, and every file that `nobody` can read."""
    found = node.python(
        f"""
import os, pathlib, subprocess
secrets = {list(node.secrets.values())!r}

def look(where, text):
    for number, secret in enumerate(secrets):
        if secret.encode() in text:
            print(where, "holds secret", number)

for process in pathlib.Path("/proc").glob("[0-9]*"):
    for name in ("cmdline", "environ"):
        try:
            look(process / name, (process / name).read_bytes())
        except OSError:
            pass
run = lambda *command: subprocess.run(command, capture_output=True).stdout
look("systemctl show", run("systemctl", "show", "*", "--all"))
look("systemctl cat", run("systemctl", "cat", "*"))
look("the journal", run("journalctl", "--no-pager", "--output=export"))
look("acl file", pathlib.Path("/etc/redis/users.acl").read_bytes())

os.setgroups([]), os.setgid(65534), os.setuid(65534)
read = 0
for top in ("/etc", "/opt", "/var", "/run", "/tmp", "/home", "/root", "/srv", "/usr/local"):
    for folder, _, files in os.walk(top):
        for name in files:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and os.access(path, os.R_OK) and os.path.getsize(path) < 20_000_000:
                with open(path, "rb") as file:
                    look(path, file.read())
                read += 1
print("read", read)
"""
    )
    report = found.splitlines()
    assert int(report.pop().removeprefix("read ")) > 100
    assert report == []


def test_credentials_reach_the_services_by_systemd_only(node: Node) -> None:
    folder = node.host.file("/etc/celery/current/credentials")
    assert (folder.user, folder.mode) == ("root", 0o700)
    for name in ("broker_password", "result_backend_password"):
        file = node.host.file(f"/etc/celery/current/credentials/{name}")
        assert (file.user, file.group, file.mode) == ("root", "root", 0o600)
    assert (
        node.host.check_output("celery-exec sh -c 'cat $CREDENTIALS_DIRECTORY/broker_password'")
        == node.secrets["vault_celery_redis_password"]
    )


def test_systemd_reads_back_arguments_and_variables(node: Node) -> None:
    """What the filters of plugins/filter/escape.py write into units and their files, as a service sees it."""
    variables = {f"V{number}": text for number, text in enumerate([*TEXTS, "", "two\nlines", " \t "])}
    arguments = [*TEXTS, "two words"]
    node.write("/etc/escape-test.env", "".join(f"{name}={escape.environment_file(text)}\n" for name, text in variables.items()))
    shown = "import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open('/run/escape-test.json', 'w'))"
    words = ["-c", shown, *(f"--x={text}" for text in arguments)]
    unit = [
        "[Unit]",
        f"Description={escape.systemd_value('x' + PRINTABLE + 'x')}",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        "EnvironmentFile=/etc/escape-test.env",
        f"ExecStart=/usr/bin/python3 {' '.join(map(escape.systemd_exec_arg, words))}",
    ]
    node.write("/run/systemd/system/escape-test.service", "\n".join(unit) + "\n")
    node.host.check_output("systemctl daemon-reload && systemctl start escape-test.service")
    read_arguments, environment = json.loads(node.host.file("/run/escape-test.json").content_string)
    description = node.show("escape-test.service", "Description")["Description"]
    node.host.check_output(
        "systemctl stop escape-test.service; rm /run/systemd/system/escape-test.service /etc/escape-test.env && systemctl daemon-reload"
    )

    assert read_arguments == [f"--x={text}" for text in arguments]
    assert {name: environment.get(name) for name in variables} == variables
    assert description == f"x{PRINTABLE}x"
