"""Filter for the Pythons that hosts have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

#: A version of Python and a machine, as wheels name them (PEP 425).
TARGET = re.compile(r"3\.\d{1,2}\.\d{1,2}-[a-z0-9_]{1,20}")


def python_targets(hosts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return version of Python and machine of hosts, each once (`3.11.2-x86_64`), of their facts; without those that have none.

    What a host says of itself becomes a part of commands, so nothing else passes.
    """
    found = set()
    for host in hosts:
        facts = host.get("ansible_facts", {})
        version = facts.get("python", {}).get("version", {})
        found.add(f"{version.get('major')}.{version.get('minor')}.{version.get('micro')}-{facts.get('architecture')}")
    return sorted(target for target in found if TARGET.fullmatch(target))


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Any]:
        """Return it by its name."""
        return {"python_targets": python_targets}
