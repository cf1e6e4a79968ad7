"""From each host and from the controller only declared ports answer; no rules can shut ssh out for good."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import testinfra

from helpers import REPOSITORY
from helpers.nodes import Node, wait_for
from helpers.targets import only_in_test_all

TABLE = "nft --stateless list table inet celery_platform"
#: A service that nobody declared listens here, on every host.
UNDECLARED = 8099
CLIENTS = {"redis", "redis_sentinel", "celery_worker", "celery_beat", "celery_flower", "monitoring"}
#: A group of all hosts.
EVERYWHERE = {"lab"}
PROXY = 443
#: Who may reach what, beside ssh: port, groups of its hosts, groups that it is let in from.
DECLARED = [
    (6379, {"redis"}, CLIENTS),
    (26379, {"redis_sentinel"}, CLIENTS),
    (5671, {"rabbitmq"}, CLIENTS - {"redis", "redis_sentinel"}),
    (15691, {"rabbitmq"}, {"monitoring"}),
    (4369, {"rabbitmq"}, {"rabbitmq"}),
    (25672, {"rabbitmq"}, {"rabbitmq"}),
    (PROXY, {"celery_flower", "monitoring"}, EVERYWHERE),
    (9100, EVERYWHERE, {"monitoring"}),
    (9121, {"redis"}, {"monitoring"}),
    (9122, {"redis_sentinel"}, {"monitoring"}),
]
SCAN = """
import concurrent.futures, socket, sys
def answers(target):
    address, port = target.rsplit(":", 1)
    try:
        socket.create_connection((address, int(port)), timeout=4).close()
        return True
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
with concurrent.futures.ThreadPoolExecutor(200) as pool:
    print(*[target for target, open in zip(sys.argv[1:], pool.map(answers, sys.argv[1:])) if open], sep="\\n")
"""


class Lab:
    """All hosts, by name."""

    def __init__(self, inventory: Path) -> None:
        listed = subprocess.run(["ansible-inventory", "-i", inventory, "--list"], capture_output=True, check=True, text=True)
        groups = json.loads(listed.stdout)
        self.groups = {name: set(group.get("hosts", [])) for name, group in groups.items() if name != "_meta"}
        hosts = {name: testinfra.get_host(f"ansible://{name}?ansible_inventory={inventory}") for name in groups["_meta"]["hostvars"]}
        self.nodes = {name: Node(host, inventory) for name, host in hosts.items()}
        self.inventory = inventory

    def may_reach(self, source: str, target: str, port: int) -> bool:
        """Tell whether one host may reach a port of another."""
        members = [{group for group, hosts in self.groups.items() if name in hosts} for name in (target, source)]
        return port == 22 or any(port == flow and members[0] & to and members[1] & origin for flow, to, origin in DECLARED)

    def listening(self, name: str) -> set[int]:
        """Return the TCP ports of a host on which something listens for others."""
        lines = self.nodes[name].host.check_output("ss --tcp --listening --numeric --no-header").splitlines()
        addresses = [line.split()[3].rsplit(":", 1) for line in lines]
        return {int(port) for address, port in addresses if not address.startswith(("127.", "[::1]"))}

    def listening_all(self) -> dict[str, tuple[str, int]]:
        """Return all listening ports of all hosts, as address:port, with host and port."""
        return {f"{self.nodes[name].address}:{port}": (name, port) for name in self.nodes for port in self.listening(name)}

    def converge(self, name: str, **settings: object) -> list[str]:
        """Set up the firewall of one host, with settings; return which tasks changed something."""
        arguments = ["--limit", name, "-e", json.dumps(settings)]
        changed: list[str] = self.nodes[name].converge(*arguments, playbook="playbooks/firewall.yml")["changed"]
        return changed

    def container(self, name: str) -> str:
        """Return the container that a host runs in; other containers know it by this name."""
        command = ["podman", "ps", "--filter", f"label=celery-lab={self.inventory}", "--format", "{{.Names}}"]
        names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
        return next(container for container in names if container.endswith(f"-{name}"))


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Return the hosts, on each of which something listens that no flow declares."""
    lab = Lab(Path(request.config.getoption("ansible_inventory")).resolve())
    serve = f"systemctl stop undeclared 2>/dev/null; systemd-run --quiet --unit=undeclared --collect python3 -m http.server {UNDECLARED}"
    for name, node in lab.nodes.items():
        node.host.check_output(serve)
        wait_for(f"the listener of {name}", lambda name=name: UNDECLARED in lab.listening(name))
    yield lab
    for node in lab.nodes.values():
        node.host.run("systemctl stop undeclared")


@pytest.fixture
def app(lab: Lab) -> str:
    """Return a host whose absence harms no other test."""
    return sorted(lab.groups["celery_worker"])[0]


def scan(node: Node, targets: list[str]) -> set[str]:
    """Return which of the targets (address:port) answer a host, be it with a refusal."""
    return set(node.python(SCAN, *targets).split())


def knock(address: str, port: int | str, seconds: float = 4) -> bool:
    """Tell whether a port answers this machine."""
    try:
        socket.create_connection((address, int(port)), timeout=seconds).close()
    except OSError:
        return False
    return True


def abandon(lab: Lab, name: str, rollback_seconds: int) -> None:
    """Load rules that shut ssh out, and kill Ansible before it can do anything about it."""
    settings = {"firewall_extra_rules": ["tcp dport 22 drop"], "firewall_rollback_seconds": rollback_seconds}
    command = ["ansible-playbook", "-i", lab.inventory, "playbooks/firewall.yml", "--limit", name, "-e", json.dumps(settings)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, start_new_session=True) as run:
        try:
            wait_for("the end of ssh", lambda: not knock(lab.nodes[name].address, 22, seconds=2), seconds=90, every=0.1)
        finally:
            os.killpg(run.pid, signal.SIGKILL)


def test_a_scan_of_all_hosts_from_each_other_finds_only_the_declared_ports(lab: Lab) -> None:
    targets = lab.listening_all()
    assert {port for _, port in targets.values()} >= {
        22,
        UNDECLARED,
        *(port for port, to, _ in DECLARED if any(lab.groups.get(group) for group in to)),
    }
    for source, node in lab.nodes.items():
        others = {address: at for address, at in targets.items() if at[0] != source}
        expected = {address for address, (name, port) in others.items() if lab.may_reach(source, name, port)}
        assert scan(node, list(others)) == expected, source


def test_a_host_reaches_itself_by_its_address_and_the_world_by_name(lab: Lab) -> None:
    for name, node in lab.nodes.items():
        own = f"{node.address}:{UNDECLARED}"
        assert scan(node, [own]) == {own}
        other = next(other for other in lab.nodes if other != name)
        assert lab.nodes[other].address in node.host.check_output("getent ahostsv4 %s", lab.container(other))


def test_the_controller_finds_only_ssh_and_what_the_site_declares(lab: Lab) -> None:
    targets = lab.listening_all()
    declared = {flow["port"] for node in lab.nodes.values() for flow in node.variables.get("firewall_flows", [])}
    with ThreadPoolExecutor(len(targets)) as pool:
        answers = pool.map(lambda target: knock(*target.split(":")), targets)
        assert {at for at, answer in zip(targets.values(), answers, strict=True) if answer} == {
            (name, port) for name, port in targets.values() if port in {22, PROXY, *declared}
        }


def test_what_is_dropped_and_let_in_is_counted(lab: Lab, app: str) -> None:
    def count(comment: str) -> int:
        rules = lab.nodes[app].host.check_output("nft list table inet celery_platform")
        found = re.search(rf'counter packets (\d+) bytes \d+ \w+ comment "{comment}"', rules)
        assert found, rules
        return int(found[1])

    dropped, let_in = count("not declared"), count("ssh")
    knock(lab.nodes[app].address, UNDECLARED, seconds=0.5)
    knock(lab.nodes[app].address, 22)
    assert (count("not declared") > dropped, count("ssh") > let_in) == (True, True)


def test_rules_that_shut_ssh_out_are_taken_back_and_the_run_fails(lab: Lab, app: str) -> None:
    node = lab.nodes[app]
    before = node.host.check_output(TABLE), node.host.file("/etc/nftables.d/celery_platform.nft").content_string
    shut = {"firewall_extra_rules": ["tcp dport 22 drop"], "firewall_rollback_seconds": 10}

    with pytest.raises(AssertionError, match=rf"{app} has its former rules again and can be reached; the new ones shut out ssh"):
        lab.converge(app, **shut)

    assert (node.host.check_output(TABLE), node.host.file("/etc/nftables.d/celery_platform.nft").content_string) == before
    assert node.host.run("systemctl list-units --all --plain --no-legend 'nftables-celery-rollback*'").stdout == ""
    assert lab.converge(app) == []


@only_in_test_all
def test_the_host_takes_rules_back_by_itself_when_ansible_is_killed(lab: Lab, app: str) -> None:
    before = lab.nodes[app].host.check_output(TABLE)
    abandon(lab, app, rollback_seconds=30)
    wait_for("ssh", lambda: knock(lab.nodes[app].address, 22), seconds=90)
    assert lab.nodes[app].host.check_output(TABLE) == before
    assert lab.converge(app) == []


def test_a_table_of_others_survives_and_changes_by_hand_do_not(lab: Lab, app: str) -> None:
    host = lab.nodes[app].host
    before = host.check_output(TABLE)
    host.check_output("nft 'add table inet others; add chain inet others c; add rule inet others c tcp dport 80 counter'")
    try:
        others = host.check_output("nft list table inet others")
        host.check_output("nft insert rule inet celery_platform input accept")
        assert lab.converge(app) == ["firewall : Load the rules, with a way back"]
        assert host.check_output(TABLE) == before
        assert host.check_output("nft list table inet others") == others
    finally:
        host.run("nft delete table inet others")


def test_debians_unit_does_not_leave_the_host_open(lab: Lab, app: str) -> None:
    host = lab.nodes[app].host
    before = host.check_output(TABLE)
    for verb in ("start", "reload", "restart", "stop"):
        host.check_output(f"systemctl {verb} nftables")
        assert host.check_output(TABLE) == before, verb


@only_in_test_all
def test_absent_opens_the_host_and_leaves_nothing(lab: Lab, app: str) -> None:
    node = lab.nodes[app]
    try:
        lab.converge(app, firewall_state="absent")
        assert "celery_platform" not in node.host.check_output("nft list tables")
        assert node.show("nftables-celery", "LoadState", "ActiveState") == {"LoadState": "not-found", "ActiveState": "inactive"}
        left = node.host.check_output("find /etc /run -name '*nftables-celery*' -o -name 'celery_platform.nft*'")
        assert left == ""
        assert lab.converge(app, firewall_state="absent") == []
        assert knock(node.address, UNDECLARED)
    finally:
        lab.converge(app)
    assert node.host.check_output("systemctl is-enabled nftables-celery") == "enabled"


@only_in_test_all
def test_settings_that_cannot_work_are_refused_before_a_host_is_touched(lab: Lab, app: str) -> None:
    before = lab.nodes[app].host.check_output(TABLE)
    flows = [{"name": "web", "port": 80443, "from": ["everywhere"]}, {"name": "x", "port": 80, "from": ["celery_wroker"]}]
    with pytest.raises(AssertionError) as refused:
        lab.nodes[app].converge("-e", json.dumps({"firewall_flows": flows}))
    assert "web: the port 80443 must be a number from 1 to 65535" in str(refused.value)
    assert "celery_wroker is no group and no host of the inventory" in str(refused.value)
    with pytest.raises(AssertionError) as refused:
        lab.converge(app, firewall_ssh_sources=["192.0.2.0/24", app])
    assert "firewall_ssh_sources has" in str(refused.value)
    assert "from which this run reaches" in str(refused.value)
    assert lab.nodes[app].host.check_output(TABLE) == before


def test_after_a_reboot_the_kept_rules_are_there_before_any_service(lab: Lab, app: str) -> None:
    node = lab.nodes[app]
    before, booted = node.host.check_output(TABLE), node.host.check_output("stat -c %Y /proc/1")
    abandon(lab, app, rollback_seconds=600)
    subprocess.run(["podman", "restart", lab.container(app)], check=True, capture_output=True)
    wait_for("ssh", lambda: knock(node.address, 22), seconds=90)
    wait_for("the end of booting", lambda: node.host.run("systemctl is-system-running").stdout.strip() in {"running", "degraded"}, 90)

    assert node.host.check_output("stat -c %Y /proc/1") != booted
    assert node.host.check_output(TABLE) == before
    stamps = [
        node.show(unit, stamp)[stamp]
        for unit, stamp in (
            ("nftables-celery", "ActiveEnterTimestampMonotonic"),
            ("network-pre.target", "ActiveEnterTimestampMonotonic"),
            ("ssh", "ExecMainStartTimestampMonotonic"),
        )
    ]
    assert 0 < int(stamps[0]) <= int(stamps[1]) <= int(stamps[2])
