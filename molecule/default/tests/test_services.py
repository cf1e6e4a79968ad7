"""Workers, beat and Redis are services of their own, with no more rights than they need, and know no secret they show."""

from __future__ import annotations

import json
import re
import string

import jinja2
import pytest
from ansible.plugins.filter.core import combine, flatten

from filter import escape
from helpers import REPOSITORY
from helpers.nodes import Node

testinfra_hosts = ["ansible://celery_worker"]

WORKERS = [f"celery-orders-worker@{name}.service" for name in ("critical", "default", "batch")]
CELERY = [*WORKERS, "celery-orders-beat.service"]
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
    celery = node.host.user("celery-orders")
    assert celery.shell == "/usr/sbin/nologin"
    assert {unit: len(processes) for unit, processes in report.items()} == dict(zip(CELERY, (3, 3, 2, 1), strict=True))
    for processes in report.values():
        for process in processes:
            assert (process.pop("Uid"), process.pop("Gid")) == (str(celery.uid), str(celery.gid))
            assert (process.pop("NoNewPrivs"), process.pop("Seccomp")) == ("1", "2")
            assert {int(capabilities, 16) for capabilities in process.values()} == {0}


@pytest.mark.parametrize("unit", ["celery-orders-worker@default.service", "celery-orders-beat.service", "redis-server.service"])
def test_the_sandbox_leaves_little_exposed(node: Node, unit: str) -> None:
    assert exposure_of(node, unit) <= 1.5


def test_the_application_can_write_where_it_is_told_and_at_home(node: Node) -> None:
    """And the folder that is not there is created for it."""
    folder = node.host.file("/srv/uploads/pictures")
    assert (folder.user, folder.group, folder.mode) == ("celery-orders", "celery-orders", 0o750)
    script = "cd && pwd && mkdir -p .cache/x && touch .cache/x/y /srv/uploads/pictures/x && rm -r .cache/x /srv/uploads/pictures/x"
    assert node.host.check_output("celery-exec sh -c %s", script) == "/var/lib/celery/orders"
    assert "Read-only file system" in node.host.run("celery-exec touch /srv/uploads/x").stderr


#: By what celery_app_sandbox_allow allows: what does it, and what an application is told without.
REFUSED = {
    "proc": ("open('/proc/meminfo')", "No such file or directory"),
    "processes": ("open('/proc/1/stat')", "No such file or directory"),
    "jit": ("mmap.mmap(-1, 4096, prot=7)", "Operation not permitted"),
    "nice": ("os.nice(1)", "Operation not permitted"),
    "devices": ("os.stat('/dev/celery-test')", "No such file or directory"),
    "netlink": ("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "Address family not supported by protocol"),
}
TRIES = f"""
import json, mmap, os, socket
errors = {{}}
for name, code in { ({name: code for name, (code, _) in REFUSED.items()})!r}.items():
    try:
        eval(code)
    except OSError as error:
        errors[name] = error.strerror
print(json.dumps(errors))
"""


def test_the_sandbox_lets_the_application_do_what_is_allowed_and_tells_what_is_not(node: Node) -> None:
    """One by one, at the price that the role's README tells."""
    readme = (REPOSITORY / "roles/celery_app/README.md").read_text()
    prices = {name: float(price) for name, price in re.findall(r"^\| `([a-z]+)` \|.*\| ([0-9.]+) \|$", readme, re.MULTILINE)}
    found, expected, exposures = {}, {}, {}
    node.write("/dev/celery-test", "")
    node.write("/run/systemd/system/celery-allow-test.service", "[Service]\nType=oneshot\nExecStart=/bin/true\n")
    for allowed in [[], *([name] for name in REFUSED), list(REFUSED)]:
        node.write("/etc/systemd/system/celery-allow-.service.d/platform.conf", sandbox(allowed))
        run = "systemd-run --quiet --wait --pipe --collect --unit=celery-allow-try /usr/bin/python3 -c %s"
        errors = json.loads(node.host.check_output(f"systemctl daemon-reload && {run}", TRIES))
        # From systemd 253 on, it is the kernel that denies memory, if it can, and says so in other words.
        found[str(allowed)] = {name: error.replace("Permission denied", "Operation not permitted") for name, error in errors.items()}
        expected[str(allowed)] = {name: error for name, (_, error) in REFUSED.items() if name not in allowed}
        exposures[str(allowed)] = exposure_of(node, "celery-allow-test.service")
    node.host.check_output(
        "rm -r /dev/celery-test /run/systemd/system/celery-allow-test.service /etc/systemd/system/celery-allow-.service.d"
    )
    node.host.check_output("systemctl daemon-reload")

    assert found == expected
    assert {name: exposures[f"['{name}']"] for name in REFUSED} == pytest.approx(prices, abs=0.21)
    assert exposures["[]"] <= 1.5
    assert [error for _, error in REFUSED.values() if error not in readme] == []


def sandbox(allowed: list[str]) -> str:
    """Return the sandbox as the role writes it, for a service without settings and credentials."""
    folders = [REPOSITORY / "roles" / role / "templates" for role in ("celery_app", "common")]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folders), trim_blocks=True, undefined=jinja2.ChainableUndefined)
    environment.filters |= {**escape.FilterModule().filters(), "comment": str, "regex_replace": str, "combine": combine, "flatten": flatten}
    settings = {"celery_app_name": "orders", "celery_app_user": "celery-orders", "celery_app_sandbox_allow": allowed}
    lines = environment.get_template("services.conf.j2").render(settings).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("EnvironmentFile=", "WorkingDirectory="))) + "\n"


def exposure_of(node: Node, unit: str) -> float:
    last = node.host.check_output("systemd-analyze security --no-pager %s", unit).splitlines()[-1]
    return float(last.split(": ")[1].split()[0])


def test_the_application_cannot_write_where_it_runs(node: Node) -> None:
    denied = node.host.run(
        "celery-exec sh -c 'for d in /opt/celery/orders/current/ /etc/celery/orders/ /usr/; do touch $d/x && echo $d; done'"
    )
    assert denied.stdout == ""
    assert denied.stderr.count("Read-only file system") == 3


def test_celery_exec_is_told_the_application_where_there_are_several(node: Node) -> None:
    folder = "cd && basename $PWD"
    assert node.host.check_output("celery-exec --application orders sh -c %s", folder) == "orders"
    node.host.check_output("mkdir -p /etc/celery/shop/current/release")
    try:
        refused = node.host.run("celery-exec true")
        assert (refused.rc, refused.stderr.strip()) == (2, "This host has several applications. Say which, by --application: orders shop.")
        assert node.host.check_output("celery-exec --application orders sh -c %s", folder) == "orders"
        assert node.host.run("celery-exec --application order true").rc == 2
    finally:
        node.host.check_output("rm -r /etc/celery/shop")


@pytest.mark.parametrize("signal", ["TERM", "HUP", "INT"])
def test_a_command_of_celery_exec_ends_with_who_called_it(node: Node, signal: str) -> None:
    ended = node.host.run(f"echo $(timeout --signal={signal} 3 celery-exec sleep 300; echo $?)")
    assert ended.stdout.strip() == "124"
    assert node.host.check_output("systemctl list-units --no-legend 'celery-orders-*exec-*'") == ""


def test_celery_exec_tells_why_systemd_could_not_start_a_command(node: Node) -> None:
    folder = "/run/systemd/system/celery-orders-exec-.service.d"
    node.write(f"{folder}/broken.conf", "[Service]\nSupplementaryGroups=nobody-knows-it\n")
    node.host.check_output("systemctl daemon-reload")
    try:
        failed = node.host.run("celery-exec true")
        assert failed.rc == 216
        assert "status=216/GROUP" in failed.stderr
    finally:
        node.host.check_output(f"rm -r {folder} && systemctl daemon-reload")


def test_no_secret_is_readable_by_others(node: Node) -> None:
    """Look where secrets leak: command lines, environments, units, the journal, and every file that `nobody` can read.

    Only the services' own environments hold what is meant for them.
    """
    given = [node.secrets["vault_redis_requirepass"][::-1], node.variables["celery_app_credentials"]["provider_password"]]
    found = node.python(
        f"""
import os, pathlib, subprocess
secrets, given = {list(node.secrets.values())!r}, {given!r}

def look(where, text, *others):
    for number, secret in enumerate([*secrets, *others]):
        if secret.encode() in text:
            print(where, "holds secret", number)

for process in pathlib.Path("/proc").glob("[0-9]*"):
    for name in ("cmdline", "environ"):
        try:
            ours = name == "environ" and process.stat().st_uid == {node.host.user("celery-orders").uid}
            look(process / name, (process / name).read_bytes(), *([] if ours else given))
        except OSError:
            pass
run = lambda *command: subprocess.run(command, capture_output=True).stdout
look("systemctl show", run("systemctl", "show", "*", "--all"), *given)
look("systemctl cat", run("systemctl", "cat", "*"), *given)
look("the journal", run("journalctl", "--no-pager", "--output=export"), *given)
look("acl file", pathlib.Path("/etc/redis/users.acl").read_bytes())

os.setgroups([]), os.setgid(65534), os.setuid(65534)
read = 0
for top in ("/etc", "/opt", "/var", "/run", "/tmp", "/home", "/root", "/srv", "/usr/local"):
    for folder, _, files in os.walk(top):
        for name in files:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and os.access(path, os.R_OK) and os.path.getsize(path) < 20_000_000:
                with open(path, "rb") as file:
                    look(path, file.read(), *given)
                read += 1
print("read", read)
"""
    )
    report = found.splitlines()
    assert int(report.pop().removeprefix("read ")) > 100
    assert report == []


def test_credentials_reach_the_services_by_systemd_only(node: Node) -> None:
    folder = node.host.file("/etc/celery/orders/current/credentials")
    assert (folder.user, folder.mode) == ("root", 0o700)
    for name in ("broker_password", "result_backend_password"):
        file = node.host.file(f"/etc/celery/orders/current/credentials/{name}")
        assert (file.user, file.group, file.mode) == ("root", "root", 0o600)
    assert (
        node.host.check_output("celery-exec sh -c 'cat $CREDENTIALS_DIRECTORY/broker_password'")
        == node.secrets["vault_celery_app_redis_password"]
    )


def test_what_the_application_is_given_arrives_as_it_is_written(node: Node) -> None:
    """Variables, secret ones, and credentials without a byte more, in the services and in celery-exec."""
    secret = f"{node.secrets['vault_redis_requirepass'][::-1]} '$\\%n\n"
    wanted = {**node.variables["celery_app_environment"], "MAIL_PASSWORD": secret}
    assert wanted["ODD_TEXT"].startswith("a\tb\r\nc  \x1b ' \" ` $HOME ${HOME} %n \\ #x")
    environments = json.loads(
        node.python(
            "import json, pathlib, sys\n"
            "texts = [pathlib.Path('/proc', pid, 'environ').read_bytes().decode() for pid in sys.argv[1:]]\n"
            "print(json.dumps([dict(line.split('=', 1) for line in text.split(chr(0)) if line) for text in texts]))",
            *(node.show(unit, "MainPID")["MainPID"] for unit in CELERY),
        )
    )
    shown = (
        "import json, os, sys; from celery_platform import logs, settings; "
        "text = open(os.environ['PROVIDER_PASSWORD_FILE']).read(); hidden = logs.masker(settings.load_settings()); "
        "print(json.dumps([dict(os.environ), text, hidden(text), hidden(os.environ['MAIL_PASSWORD'])]))"
    )
    environment, provided, *hidden = json.loads(node.host.check_output("celery-exec python -c %s", shown))
    for found in (environment, *environments):
        assert {name: found.get(name) for name in wanted} == wanted
    assert provided == node.variables["celery_app_credentials"]["provider_password"]
    assert [text.strip() for text in hidden] == ["********", "********"]
    file = node.host.file("/etc/celery/orders/current/secret.env")
    assert (file.user, file.group, file.mode) == ("root", "root", 0o600)


def test_systemd_reads_back_arguments_and_variables(node: Node) -> None:
    """What the filters of plugins/filter/escape.py write into units and their files, as a service sees it."""
    variables = {f"V{number}": text for number, text in enumerate([*TEXTS, "", "two\nlines", " \t ", "".join(map(chr, range(1, 0x20)))])}
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
