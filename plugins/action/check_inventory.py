"""Action plugin `check_inventory`: find what was never filled in, before a host is contacted. Runs on the controller.

The inventories that come with this project hold addresses and names that are set aside for documentation. A host that is
called so cannot be reached, and the connection's error would not say why.
"""

from __future__ import annotations

import fnmatch
import functools
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ansible.parsing.vault import is_encrypted
from ansible.plugins.action import ActionBase

try:
    # Where a value was read: internal to ansible-core 2.19, and used in messages only.
    from ansible._internal._datatag._tags import Origin
except ImportError:
    Origin = None

#: Addresses and names for documentation: RFC 5737 (IPv4), RFC 3849 (IPv6), RFC 2606 (names).
EXAMPLE = re.compile(
    r"(?<![\d.])(?:192\.0\.2|198\.51\.100|203\.0\.113)\.\d{1,3}(?!\d|\.\d)"
    r"|(?<![\w:])2001:0?db8:[0-9a-f:]*"
    r"|(?<![\w.-])(?:[\w-]+\.)*example\.(?:com|net|org)(?![\w-]|\.\w)",
    re.IGNORECASE,
)
#: A variable of the vault in a template, unless it has a default there.
REFERENCE = re.compile(r"\b(vault_\w+)\b(?!\s*\|\s*(?:default|d)\b)")


class Place(NamedTuple):
    """Where a value stands; the line is 0 if that is unknown."""

    file: str
    line: int


def place_of(value: Any) -> Place | None:
    """Return where a value stands; None if it stands in no file, as facts, and what is given with -e."""
    tag = Origin.get_tag(value) if Origin else None
    return Place(shown(Path(tag.path)), tag.line_num or 0) if tag and tag.path else None


def texts_in(value: Any) -> Iterator[str]:
    """Yield each text in a value, however deep it lies in lists and dicts; none that is encrypted by itself."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def shown(path: Path) -> str:
    """Return a path as a reader types it: relative to the current folder where it lies below that."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@functools.cache
def plain_text_in_git(path: Path) -> bool:
    """Return whether a file is not encrypted, and git keeps it, or would with the next commit."""
    if not path.is_file() or is_encrypted(path.read_bytes()) or not (program := shutil.which("git")):
        return False
    command = [program, "-C", path.parent, "ls-files", "--error-unmatch", "--", path.name]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603


class ActionModule(ActionBase):
    """No arguments. Judges the variables of all hosts of the play, as the inventory writes them.

    Variables that match a glob in the variable `check_settings_ignore` are not judged.
    """

    _requires_connection = False
    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Fail with one message that lists all that is wrong, by file and line."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        inventory = Path(variables.get("inventory_dir") or Path.cwd())
        hosts = {host: variables["hostvars"].raw_get(host) for host in variables["groups"]["all"]}
        known = {name for values in hosts.values() for name in values}
        problems: set[tuple[Place, str]] = set()
        missing: set[str] = set()
        for host in variables["ansible_play_hosts_all"]:
            ignored = self._templar.template(hosts[host].get("check_settings_ignore") or [])
            own = {name: value for name, value in hosts[host].items() if not any(fnmatch.fnmatch(name, glob) for glob in ignored)}
            problems |= set(self._problems(host, own))
            missing |= {name for text in texts_in(own) if "{{" in text for name in REFERENCE.findall(text)} - known
        # Alone, they are for check_settings to report, with all else that is wrong with the settings.
        if problems and missing:
            text = f"not set: {', '.join(sorted(missing))}; `make secrets` writes them"
            problems.add((Place(shown(inventory / "group_vars/all/vault.yml"), 0), text))
        if not problems:
            return result
        message = [f"{shown(inventory)} is not ready; nothing was changed, and no host was contacted."]
        file = ""
        for place, text in sorted(problems):
            if place.file != file:
                file = place.file
                message += ["", file]
            message.append(f"    line {place.line}: {text}" if place.line else f"    {text}")
        return result | {"failed": True, "msg": "\n".join(message)}

    @staticmethod
    def _problems(host: str, values: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        file = Place(shown(Path(values.get("inventory_file") or "")), 0)
        if "ansible_host" not in values and EXAMPLE.search(host):
            yield file, f"the host {host} is an example; allowed: one of yours"
        for name, value in values.items():
            for text in texts_in(value):
                place = place_of(text) or (file if name == "ansible_host" else None)
                # Only the example is shown: the rest may be a secret.
                if place and (found := EXAMPLE.search(text)):
                    of = f" of {host}" if name == "ansible_host" else ""
                    yield place, f"{name}{of} is an example ({found[0]}); allowed: one of yours"
                if place and text and name.startswith("vault_") and plain_text_in_git(Path(place.file).resolve()):
                    yield Place(place.file, 0), f"in plain text, and in git; allowed: .venv/bin/ansible-vault encrypt {place.file}"
