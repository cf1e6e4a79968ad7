"""Tests of `make environment`, in a copy of this checkout: what it makes, and the way from there to settings that pass."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from action import create_environment
from helpers import REPOSITORY
from helpers.targets import only_in_test_all

BIN = Path(sys.executable).parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of what `make environment` and `make secrets` use, with leftovers of the other environments."""
    for name in ("ansible.cfg", "Makefile", "requirements.txt", "inventories", "playbooks", "plugins", "roles", "runtime", "examples"):
        source = REPOSITORY / name
        ignore = shutil.ignore_patterns("__pycache__", "vault.yml", *(["lab.yml", "pki"] if name == "inventories" else []))
        shutil.copytree(source, tmp_path / name, symlinks=True, ignore=ignore) if source.is_dir() else shutil.copy2(source, tmp_path / name)
    (tmp_path / ".venv").symlink_to(BIN.parent)
    for environment in ("production", "quickstart"):
        folder = tmp_path / "inventories" / environment
        (folder / "group_vars/all/vault.yml").write_text("vault_redis_requirepass: of-another-environment\n")
        (folder / "lab.yml").write_text("lab: {}\n")
        (folder / "pki").mkdir()
    return tmp_path


def make(checkout: Path, *arguments: str) -> tuple[int, str]:
    """Run make as a user does, but never let it install anything."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "MAKE"))}
    environment |= {"ANSIBLE_NOCOLOR": "1", "HOME": str(checkout)}
    command = ["make", "--silent", "--old-file=.venv/controller", *arguments]
    completed = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600)
    return completed.returncode, completed.stdout + completed.stderr


@pytest.mark.parametrize(("source", "hosts"), [pytest.param("production", 6, marks=only_in_test_all), ("quickstart", 1)])
def test_an_environment_of_ones_own_is_made_filled_in_and_passes(checkout: Path, source: str, hosts: int) -> None:
    code, output = make(checkout, "environment", "ENV=shop", *([] if source == "production" else [f"FROM={source}"]))
    assert code == 0, output

    shop = checkout / "inventories/shop"
    files = sorted(str(path.relative_to(shop)) for path in shop.rglob("*") if path.is_file())
    assert files == ["group_vars/all/main.yml", "group_vars/all/vault.yml.example", "hosts.yml"]
    inventory = yaml.safe_load((shop / "hosts.yml").read_text())["all"]
    assert "lab" not in inventory["children"]
    assert source not in (shop / "hosts.yml").read_text()
    # Each place that it names is one.
    named = re.findall(r"^ +(inventories/\S+):(\d+): (\w+),", output, re.MULTILINE)
    assert {name for _, _, name in named} >= {"ansible_user", "celery_app_name", "celery_app_source", "celery_worker_list"}
    for file, line, name in named:
        assert (checkout / file).read_text().splitlines()[int(line) - 1].strip().startswith(f"{name}:")
    assert len([name for _, _, name in named if name == "ansible_host"]) == hosts

    # It is not overwritten.
    (shop / "hosts.yml").write_text((shop / "hosts.yml").read_text() + "# mine\n")
    code, output = make(checkout, "environment", "ENV=shop")
    assert code != 0
    assert "left as it is" in output
    assert (shop / "hosts.yml").read_text().endswith("# mine\n")

    # As it is, it stops; filled in, it passes.
    local = ["-e", "ansible_connection=local", "-e", f"ansible_python_interpreter={sys.executable}", "-e", "firewall_state=absent"]
    # One host of each kind is enough.
    preflight = [BIN / "ansible-playbook", "-i", shop, "playbooks/preflight.yml", *local, "--limit", "data1,app1,ops1,shop1"]
    environment = os.environ | {"ANSIBLE_CONFIG": str(checkout / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "HOME": str(checkout)}
    completed = subprocess.run(preflight, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600)
    assert completed.returncode != 0
    assert len(set(re.findall(r"ansible_host of (\w+) is an example", completed.stdout))) == min(hosts, 3)

    code, output = make(checkout, "secrets", "ENV=shop")
    assert code == 0, output
    for path in shop.rglob("*.yml"):
        text = re.sub(r"203\.0\.113\.|192\.0\.2\.", "10.77.0.", path.read_text())
        text = re.sub(r"git\+https://git\.example\.org\S+", "examples/orders", text).replace("hooks.example.org", "hooks.slack.com")
        path.write_text(text)
    if platform.freedesktop_os_release()["ID"] != "debian":
        pytest.skip("this machine stands in for the hosts, and they must have Debian")
    completed = subprocess.run(preflight, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600)
    assert completed.returncode == 0, completed.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ENV=../shop"], 'ENV is "../shop"'),
        ([], 'ENV is ""'),
        (["ENV=lab"], "There is an inventories/lab already"),
        (["ENV=shop", "FROM=lab"], 'FROM is "lab"'),
    ],
)
def test_names_that_are_refused(checkout: Path, arguments: list[str], told: str) -> None:
    before = sorted((checkout / "inventories").iterdir())
    code, output = make(checkout, "environment", *arguments)

    assert code != 0
    assert told in output
    assert sorted((checkout / "inventories").iterdir()) == before


@pytest.mark.parametrize("name", ["a b", "Shop", "-shop", "1shop", "shop/x", "shop\n", "x" * 32, "$(id)"])
def test_a_name_is_a_word(name: str) -> None:
    assert not create_environment.NAME.fullmatch(name)


def test_addresses_of_the_other_environment_are_not_copied(checkout: Path) -> None:
    hosts = checkout / "inventories/production/hosts.yml"
    hosts.write_text(hosts.read_text().replace("203.0.113.21", "10.1.2.3").replace("203.0.113.41", "ops.shop.de"))
    assert make(checkout, "environment", "ENV=shop")[0] == 0

    text = (checkout / "inventories/shop/hosts.yml").read_text()
    assert "10.1.2.3" not in text
    assert "shop.de" not in text
