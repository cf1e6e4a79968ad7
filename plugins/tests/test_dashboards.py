"""The dashboards hold what Grafana knows, by its own classes for dashboards, panels and their options."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
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


# --- What counts failures ---

#: The exporter for Celery answers, and one task has succeeded again and again; none has failed.
HEALTHY = {
    'up{job="celery", instance="ops1"}': "1+0x120",
    'celery_worker_up{worker="celery@a"}': "1+0x120",
    'celery_tasks_total{task="shop.pay", state="succeeded"}': "0+1x120",
}
#: The exporter does not answer, or its host is gone.
DOWN = {'up{job="celery", instance="ops1"}': "0+0x120"}


def of_failures() -> list[str]:
    """Return the queries, as Prometheus gets them, that count what failed or is missing by the exporter for Celery."""
    panels = [panel for file in FOLDER.glob("*.json") for panel in json.loads(file.read_text())["panels"]]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    found = [query for query in queries if "failed" in query.partition(" or ")[0] or "count(celery_worker_up" in query]
    return [query.replace("$__rate_interval", "1m").replace("$task", ".*") for query in found]


@pytest.mark.parametrize(("series", "value"), [pytest.param(HEALTHY, 0, id="none failed"), pytest.param(DOWN, None, id="not known")])
def test_no_failure_is_0_and_not_to_know_is_no_data(tmp_path: Path, series: dict[str, str], value: int | None) -> None:
    queries = [f"sum({query})" for query in of_failures()]
    samples = [] if value is None else [{"labels": "{}", "value": value}]
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": query, "eval_time": "30m", "exp_samples": samples} for query in queries],
    }
    assert len(queries) >= 4
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
