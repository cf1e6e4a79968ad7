"""The dashboards hold what Grafana knows, by its own classes for dashboards, panels and their options."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

FOLDER = Path(__file__).resolve().parents[2] / "roles/dashboards/files/dashboards"

register_default_plugins()


def lost(written: Any, read: Any, place: str = "") -> Iterator[str]:
    """Yield the places of what stands in one document and not in the other; what was added to that one is left out."""
    if isinstance(written, dict) and isinstance(read, dict):
        for key, value in written.items():
            yield from lost(value, read.get(key), f"{place}.{key}")
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for number, pair in enumerate(zip(written, read, strict=True)):
            yield from lost(*pair, f"{place}[{number}]")
    elif written != read:
        yield place


@pytest.mark.parametrize("name", ["overview", "workers", "brokers"])
def test_grafana_reads_all_of_a_dashboard(name: str) -> None:
    """What its classes do not know they leave out; what they take for granted they add."""
    written = json.loads((FOLDER / f"{name}.json").read_text())
    assert list(lost(written, json.loads(JSONEncoder().encode(Dashboard.from_json(written))))) == []


def test_all_dashboards_are_tested() -> None:
    assert {file.stem for file in FOLDER.glob("*.json")} == {"overview", "workers", "brokers"}
