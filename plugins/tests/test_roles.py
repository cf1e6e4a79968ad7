"""What a role says of itself in three places must agree: defaults, argument specs, README."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import REPOSITORY

ROLES = sorted(path.name for path in (REPOSITORY / "roles").iterdir())
#: Those that no other needs to know of, or that know all others.
APART = {"site", "common", "lab"}


def defaults_of(role: str) -> dict[str, Any]:
    """Return a role's own defaults, as written; those of `site` are links to the other roles' but for one file."""
    file = next((path for path in (REPOSITORY / "roles" / role / "defaults").rglob("*.yml") if not path.is_symlink()), None)
    return (yaml.safe_load(file.read_text()) or {}) if file else {}


@pytest.mark.parametrize("role", ROLES)
def test_defaults_and_argument_specs_agree(role: str) -> None:
    folder = REPOSITORY / "roles" / role
    defaults = defaults_of(role)
    specs = yaml.safe_load((folder / "meta/argument_specs.yml").read_text())["argument_specs"]
    options = next(iter(specs.values()))["options"]

    assert set(defaults) - set(options) == set()
    documented = {name: option["default"] for name, option in options.items() if "default" in option}
    assert {name: defaults.get(name) for name in documented} == documented
    # What has no default in the specs is required, at least where something is made of it, computed, or left to others if unset.
    for name in set(options) - set(documented):
        if name in defaults:
            assert defaults[name] is None or "{{" in str(defaults[name]), f"{name} has a plain default that the specs do not name"
        else:
            assert options[name].get("required") or name in (
                "lab_host_number",
                "pki_ca_passphrase",
                "redis_replication_password",
                "redis_sentinel_password",
                "redis_exporter_password",
                "redis_operator_password",
                "rabbitmq_administrator_password",
                "celery_producer_redis_password",
                "celery_producer_rabbitmq_password",
                "celery_app_redis_password",
                "celery_app_rabbitmq_password",
                "celery_monitor_redis_password",
                "celery_monitor_rabbitmq_password",
            ), name


@pytest.mark.parametrize("role", ROLES)
def test_the_readme_is_what_make_docs_writes(role: str, tmp_path: Path) -> None:
    copy = tmp_path / role
    shutil.copytree(REPOSITORY / "roles" / role, copy)
    command = [Path(sys.executable).with_name("aar-doc"), "--output-template", REPOSITORY / "docs/role-variables.md.j2", copy, "markdown"]
    subprocess.run(command, check=True, cwd=tmp_path)

    assert (copy / "README.md").read_text() == (REPOSITORY / "roles" / role / "README.md").read_text()


def test_every_role_knows_the_variables_of_all_others() -> None:
    for kind in ("defaults", "vars"):
        links = {path.stem: path.resolve() for path in (REPOSITORY / "roles/site" / kind / "main").iterdir() if path.is_symlink()}
        assert links == {
            role: file for role in ROLES if role not in APART and (file := REPOSITORY / "roles" / role / kind / "main.yml").exists()
        }
    for role in set(ROLES) - {"site", "lab"}:
        assert yaml.safe_load((REPOSITORY / "roles" / role / "meta/main.yml").read_text())["dependencies"] == ["site"], role
    known = yaml.safe_load((REPOSITORY / "roles/site/vars/main/site.yml").read_text())["__site_roles"]
    assert {entry["role"] for entry in known} == set(ROLES) - APART


def test_a_role_reads_no_internal_variable_of_another() -> None:
    """What several roles read stands in roles/site; roles/common is made to be used by others."""
    folder = REPOSITORY / "roles"
    files = {role: [path for path in (folder / role).rglob("*") if path.is_file() and not path.is_symlink()] for role in ROLES}
    owner = {
        name: role
        for role in set(ROLES) - APART
        for path in files[role]
        if path.parent.name == "vars"
        for name in yaml.safe_load(path.read_text()) or {}
        if name.startswith("__")
    }
    read = [
        (role, name, path.name)
        for role in set(ROLES) - {"site"}
        for path in files[role]
        for name in set(re.findall(r"__[a-z]\w+", path.read_text(errors="replace"))) & set(owner)
        if owner[name] != role
    ]
    assert len(owner) > 100
    assert read == []
