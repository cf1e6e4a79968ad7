"""Playbooks are found whole from any folder, judge settings before a lab starts, and remove a lab without its secrets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import REPOSITORY

OPERATIONS = sorted(path for path in REPOSITORY.glob("playbooks/operations/*.yml") if path.name != "move_broker.yml")
ANSIBLE_PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")


def run(command: list[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    return subprocess.run(command, cwd=folder, env=variables | environment, text=True, capture_output=True)


def cloned(environment: str, folder: Path) -> Path:
    """Return an inventory as it is in a fresh clone, in a folder of its own."""
    ignored = shutil.ignore_patterns("vault.yml", "lab.yml", "pki")
    return Path(shutil.copytree(REPOSITORY / "inventories" / environment, folder / environment, ignore=ignored))


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    """The quickstart's inventory."""
    return cloned("quickstart", tmp_path)


@pytest.mark.parametrize("playbooks", [[REPOSITORY / "site.yml"], OPERATIONS], ids=["site", "operations"])
def test_playbooks_are_found_whole_from_another_folder(tmp_path: Path, playbooks: list[Path]) -> None:
    checked = run([ANSIBLE_PLAYBOOK, "-i", REPOSITORY / "inventories/quickstart", *playbooks, "--syntax-check"], tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count("playbook: ") == len(playbooks)


def judged(inventory: Path, folder: Path, *lines: str) -> str:
    """Return what is printed when the inventory's lab is to be started with these further settings."""
    main = inventory / "group_vars/all/main.yml"
    main.write_text("\n".join([main.read_text(), *lines, ""]))
    told = run([ANSIBLE_PLAYBOOK, "-i", inventory, REPOSITORY / "playbooks/lab.yml"], folder)
    assert told.returncode == 2, told.stdout + told.stderr
    assert "Start or stop the lab hosts" not in told.stdout
    assert not (inventory / "lab.yml").exists()
    return told.stdout


def test_wrong_settings_are_told_before_a_host_is_started(inventory: Path, tmp_path: Path) -> None:
    """From another folder, so that our plugins must be found there, too."""
    passwords = "redis_requirepass: short\ncelery_app_redis_password: '{{ vault_nothing }}'"
    told = judged(inventory, tmp_path, "redis_bindd: [127.0.0.1]", passwords)
    for problem in ("redis_bindd is not a variable of", "redis_requirepass has 5 characters", "vault_nothing is not set"):
        assert problem in told


def test_an_application_that_is_not_there_is_told_before_a_host_is_started(tmp_path: Path) -> None:
    """In the lab of six hosts, whose settings pass although no host has an address yet."""
    told = judged(cloned("lab", tmp_path), REPOSITORY, "celery_app_source: examples/none")
    assert "examples/none" in told
    assert "1 setting is wrong" in told, told


def test_a_lab_is_removed_without_the_password_of_its_vault(inventory: Path) -> None:
    (inventory / "lab.yml").write_text("lab: {}\n")
    (inventory / "group_vars/all/vault.yml").write_text("$ANSIBLE_VAULT;1.1;AES256\n6162\n")
    removed = run(["make", "destroy", f"INVENTORY={inventory}"], REPOSITORY)
    assert removed.returncode == 0, removed.stdout + removed.stderr
    assert not (inventory / "lab.yml").exists()
