"""What runs on the controller: never through sudo, whatever the inventory says of its hosts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import REPOSITORY

BIN = Path(sys.executable).parent
FILES = sorted(path for folder in ("playbooks", "roles", "molecule") for path in (REPOSITORY / folder).rglob("*.yml"))
LOCAL = ("localhost", "127.0.0.1", "local")


def tasks_that_need_no_sudo(item: Any, variables: Mapping[str, Any] | None = None, local: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the name of each task that is the controller's or says `become: false`, and what its variable says."""
    if isinstance(item, list):
        for part in item:
            yield from tasks_that_need_no_sudo(part, variables, local)
    elif isinstance(item, Mapping) and "name" in item:
        variables = {**(variables or {}), **(item.get("vars") or {})}
        keys = ("hosts", "connection", "delegate_to")
        local = local or any(item.get(key) in LOCAL for key in keys) or "local_action" in item or item.get("become") is False
        parts = [item[key] for key in ("pre_tasks", "roles", "tasks", "post_tasks", "handlers", "block", "rescue", "always") if key in item]
        if local and not [part for part in parts if isinstance(part, list) and any("name" in task for task in part)]:
            yield item["name"], variables.get("ansible_become")
        yield from tasks_that_need_no_sudo(parts, variables, local)


def test_no_task_of_the_controller_becomes_root() -> None:
    found = [
        (str(path.relative_to(REPOSITORY)), *task)
        for path in FILES
        if isinstance(content := yaml.safe_load(path.read_text()), list)
        for task in tasks_that_need_no_sudo(content)
    ]

    assert len(found) >= 10
    # The keyword `become: false` is not enough: a variable of the inventory wins over it.
    assert [task for task in found if task[2] is not False] == []


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return a folder with an inventory whose hosts need sudo, and a sudo that fails."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sudo").write_text("#!/bin/sh\necho sudo was asked >&2\nexit 1\n")
    (tmp_path / "bin/sudo").chmod(0o755)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/requirements.txt").write_text("celery==5.7.0\n")
    variables = {
        "ansible_become": True,
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "celery_app_name": "shop",
        "celery_app_source": str(tmp_path / "shop"),
        "celery_app_build_directory": str(tmp_path / "cache"),
        "pki_ca_passphrase": "nX7cY2pK9mQ4wL8vD3fG6hJ1",
        "pki_ca_directory": str(tmp_path / "pki"),
    }
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": {"one": None}, "vars": variables}}))
    tasks = [
        {"name": "Pack", "ansible.builtin.import_role": {"name": "celery_app", "tasks_from": "pack.yml"}},
        {"name": "Make the CA", "ansible.builtin.import_role": {"name": "pki", "tasks_from": "ca.yml"}},
        {"name": "Become root", "ansible.builtin.command": "true", "tags": ["never", "sudo"]},
    ]
    (tmp_path / "play.yml").write_text(yaml.safe_dump([{"name": "Work", "hosts": "all", "gather_facts": False, "tasks": tasks}]))
    return tmp_path


def run(site: Path, *options: str) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    environment |= {"ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "HOME": str(site)}
    environment["PATH"] = f"{site / 'bin'}:{environment['PATH']}"
    # Ansible asks nobody to become who he is already.
    environment["ANSIBLE_BECOME_ALLOW_SAME_USER"] = "true"
    completed = subprocess.run(
        [BIN / "ansible-playbook", "-i", "hosts.yml", "play.yml", *options],
        env=environment,
        cwd=site,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return completed.returncode, completed.stdout + completed.stderr


def test_the_controller_needs_no_sudo_where_the_hosts_do(site: Path) -> None:
    code, output = run(site)
    assert code == 0, output
    assert (site / "pki/ca.crt").is_file()

    code, output = run(site, "--tags", "sudo")
    assert code != 0
    assert "sudo was asked" in output


def test_a_long_list_of_requirements_without_version_is_cut_short(site: Path) -> None:
    (site / "shop/requirements.txt").write_text("".join(f"package{number}\n" for number in range(217)))
    code, output = run(site)

    assert code != 0
    told = "package0 (requirements.txt:1), package1 (requirements.txt:2), package2 (requirements.txt:3) and 214 more."
    assert told in " ".join(output.split())
    assert "package3" not in output
    assert len(output) < 3000
