"""Tests of the action plugin `check_inventory`: what was never filled in stops a run before a host is contacted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from action import check_inventory
from helpers import REPOSITORY

BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("203.0.113.21", "203.0.113.21"),
        ("192.0.2.0/24", "192.0.2.0"),
        ("198.51.100.7:6379", "198.51.100.7"),
        ("10.192.0.2.7", ""),
        ("192.0.21.7", ""),
        ("2001:db8::7", "2001:db8::7"),
        ("2001:DB8:1::", "2001:DB8:1::"),
        ("2001:db80::7", ""),
        ("https://hooks.example.org/services/T0", "hooks.example.org"),
        ("git+ssh://git@git.example.com/shop.git", "git.example.com"),
        ("someone@example.net.", "example.net"),
        ("app1.example.org", "app1.example.org"),
        ("myexample.org", ""),
        ("my-example.org", ""),
        ("example.organic", ""),
        ("example.org.shop.de", ""),
        ("examples/orders", ""),
    ],
)
def test_what_is_an_example(text: str, found: str) -> None:
    match = check_inventory.EXAMPLE.search(text)

    assert (match[0] if match else "") == found


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{{ vault_a }}", ["vault_a"]),
        ("{{ vault_a | default('') }} {{ vault_b|d('x') }}", []),
        ("{{ [vault_a, vault_b | string] | join }}", ["vault_a", "vault_b"]),
    ],
)
def test_variables_of_the_vault_that_are_needed(text: str, names: list[str]) -> None:
    assert check_inventory.REFERENCE.findall(text) == names


def preflight(inventory: Path, *options: str | Path) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    completed = subprocess.run(
        [BIN / "ansible-playbook", "-i", inventory, REPOSITORY / "site.yml", "--tags", "none", *options],
        env=environment | {"ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_TIMEOUT": "2"},
        cwd=inventory.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    return completed.returncode, completed.stdout + completed.stderr


def message(output: str) -> list[str]:
    """Return the lines of the one message."""
    lines = [line.strip() for line in output.partition("msg: |-\n")[2].partition("PLAY RECAP")[0].splitlines()]
    return [line for line in lines if line]


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    """Return an inventory of one's own, in a git repository."""
    folder = tmp_path / "inventories/shop"
    (folder / "group_vars/all").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (folder / "hosts.yml").write_text("all:\n  hosts:\n    one:\n      ansible_host: 127.0.0.9\n      ansible_port: 9\n")
    return folder


@pytest.mark.parametrize("environment", ["production", "staging"])
def test_an_inventory_as_it_comes_says_what_to_fill_in_and_contacts_no_host(environment: str) -> None:
    folder = f"inventories/{environment}"
    code, output = preflight(REPOSITORY / folder)
    lines = message(output)

    assert code != 0
    assert "UNREACHABLE" not in output
    assert lines[0] == f"{folder} is not ready; nothing was changed, and no host was contacted."
    told = {}
    for line in lines[1:]:
        if line.startswith("inventories/"):
            told[file := line] = []
        else:
            told[file].append(line)
    # Each address of hosts.yml, by its line.
    hosts = (REPOSITORY / folder / "hosts.yml").read_text().splitlines()
    expected = [number for number, line in enumerate(hosts, 1) if "ansible_host:" in line]
    assert [int(line.split()[1].rstrip(":")) for line in told[f"{folder}/hosts.yml"]] == expected
    settings = [line for file, lines in told.items() if "group_vars" in file for line in lines]
    for name in ("celery_app_source", "monitoring_proxy_sources"):
        assert [line for line in settings if name in line], name
    # All that vault.yml.example names, and nothing else.
    example = (REPOSITORY / folder / "group_vars/all/vault.yml.example").read_text().splitlines()
    (line,) = told[f"{folder}/group_vars/all/vault.yml"]
    names = line.removeprefix("not set: ").partition(";")[0].split(", ")
    assert names == sorted(line.partition(":")[0] for line in example if line.startswith("vault_"))
    assert "make secrets" in line


def test_an_inventory_that_is_filled_in_goes_on_to_its_hosts(inventory: Path) -> None:
    (inventory / "group_vars/all/main.yml").write_text("redis_requirepass: '{{ vault_a }}'\nlater: \"{{ vault_b | default('') }}\"\n")
    (inventory / "group_vars/all/vault.yml").write_text("vault_a: x\n")
    code, output = preflight(inventory, "-e", "note=192.0.2.1")

    assert code != 0
    assert "not ready" not in output
    assert "UNREACHABLE" in output


def test_examples_are_found_however_deep_and_no_secret_is_shown(inventory: Path) -> None:
    shutil.move(inventory / "hosts.yml", inventory / "hosts.ini")
    (inventory / "hosts.ini").write_text("[redis]\ntwo.example.org\nthree ansible_host=203.0.113.3\n")
    (inventory / "group_vars/all/main.yml").write_text(
        "a:\n  - b: {c: 'x 192.0.2.1'}\nnote: me@example.org\ncheck_settings_ignore: [not*]\n"
    )
    (inventory / "group_vars/all/vault.yml").write_text("vault_hook: https://hooks.example.org/Zq8vT3nB6yH1kW5r\n")
    code, output = preflight(inventory)

    assert code != 0
    assert "Zq8vT3nB6yH1kW5r" not in output
    assert message(output)[1:] == [
        "inventories/shop/group_vars/all/main.yml",
        "line 2: a is an example (192.0.2.1); allowed: one of yours",
        "inventories/shop/group_vars/all/vault.yml",
        "line 1: vault_hook is an example (hooks.example.org); allowed: one of yours",
        "inventories/shop/hosts.ini",
        "the host two.example.org is an example; allowed: one of yours",
        "line 3: ansible_host of three is an example (203.0.113.3); allowed: one of yours",
    ]


def test_a_vault_in_plain_text_that_git_knows_stops_the_run(inventory: Path) -> None:
    vault = inventory / "group_vars/all/vault.yml"
    (inventory.parent / "password").write_text("x")
    vault.write_text("vault_a: x\n")
    assert "UNREACHABLE" in preflight(inventory)[1]

    subprocess.run(["git", "add", "--all"], cwd=inventory, check=True)
    output = preflight(inventory)[1]
    assert message(output)[1:] == [
        "inventories/shop/group_vars/all/vault.yml",
        "in plain text, and in git; allowed: .venv/bin/ansible-vault encrypt inventories/shop/group_vars/all/vault.yml",
    ]

    encrypt = [BIN / "ansible-vault", "encrypt", "--vault-password-file", inventory.parent / "password", vault]
    subprocess.run(encrypt, check=True, capture_output=True)
    assert "UNREACHABLE" in preflight(inventory, "--vault-password-file", inventory.parent / "password")[1]


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("inventories/quickstart/group_vars/all/vault.yml", True),
        ("inventories/lab/group_vars/all/vault.yml", True),
        ("molecule/lab/inventory/group_vars/all/vault.yml", True),
        ("inventories/lab/lab.yml", True),
        ("inventories/production/group_vars/all/vault.yml", False),
        ("inventories/shop/group_vars/all/vault.yml", False),
        ("inventories/shop/pki/ca.key", False),
    ],
)
def test_git_takes_the_vaults_of_environments_that_are_no_labs(path: str, ignored: bool) -> None:
    assert (subprocess.run(["git", "check-ignore", "--quiet", path], cwd=REPOSITORY).returncode == 0) is ignored
