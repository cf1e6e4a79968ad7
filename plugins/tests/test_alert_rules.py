"""Alert rules: what promtool says of them, and that each has a test that fires, one that does not, and a runbook.

The rules are templates (roles/prometheus/templates/rules), with delimiters of their own. The tests of promtool
(roles/prometheus/tests) name the rendered files.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from filter import escape
from helpers import REPOSITORY

ROLE = REPOSITORY / "roles" / "prometheus"
RUNBOOKS = REPOSITORY / "docs" / "runbooks"
FILES = sorted(path.name.removesuffix(".yml.j2") for path in (ROLE / "templates/rules").glob("*.yml.j2"))
SITE = {
    "ansible_managed": "Ansible managed",
    "prometheus_runbook_url": "https://ops1/prometheus/user/runbooks",
    "prometheus_queue_length": 1000,
    "prometheus_longest_task": 900,
    "prometheus_unacknowledged_after": 3600,
    "site_pace": 1,
    "__prometheus_worker_hosts": ["app1", "app2"],
    "__prometheus_beat_hosts": ["app1", "app2"],
    "__prometheus_beat_interval": 5,
}


def rendered(folder: Path, **site: Any) -> list[Path]:
    """Write the rules of a site into a folder, as the role does, and return the files."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROLE / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        variable_start_string="<<",
        variable_end_string=">>",
        block_start_string="<%",
        block_end_string="%>",
        comment_start_string="<#",
        comment_end_string="#>",
    )
    environment.filters |= escape.FilterModule().filters()
    files = [folder / f"{name}.yml" for name in FILES]
    for file in files:
        file.write_text(environment.get_template(f"rules/{file.name}.j2").render(SITE | site))
    return files


def promtool(*arguments: str | Path, folder: Path) -> None:
    completed = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr


def alerts(files: list[Path]) -> dict[str, dict[str, Any]]:
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    return {rule["alert"]: rule for rule in rules}


def checks() -> list[dict[str, Any]]:
    documents = [yaml.safe_load((ROLE / "tests" / f"{name}.yml").read_text()) for name in FILES]
    return [check for document in documents for test in document["tests"] for check in test.get("alert_rule_test", [])]


@pytest.mark.parametrize(
    "site",
    [
        pytest.param({}, id="lab"),
        pytest.param({"site_pace": 60}, id="hurried"),
        pytest.param({"__prometheus_beat_hosts": [], "__prometheus_worker_hosts": []}, id="without Celery"),
    ],
)
def test_promtool_takes_the_rules(tmp_path: Path, site: dict[str, Any]) -> None:
    promtool("check", "rules", *rendered(tmp_path, **site), folder=tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_alerts_fire_when_they_should(tmp_path: Path, name: str) -> None:
    rendered(tmp_path)
    shutil.copy(ROLE / "tests" / f"{name}.yml", tmp_path / f"test_{name}.yml")
    promtool("test", "rules", f"test_{name}.yml", folder=tmp_path)


def test_each_alert_is_tested_both_ways(tmp_path: Path) -> None:
    known = set(alerts(rendered(tmp_path)))

    assert {check["alertname"] for check in checks() if check.get("exp_alerts")} == known
    # It always fires.
    assert {check["alertname"] for check in checks() if not check.get("exp_alerts")} == known - {"Watchdog"}


def test_each_alert_says_what_it_means_and_what_to_do(tmp_path: Path) -> None:
    for name, rule in alerts(rendered(tmp_path)).items():
        assert rule["labels"]["severity"] in (("none",) if name == "Watchdog" else ("page", "ticket")), name
        assert "for" in rule, name
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}, name
        assert rule["annotations"]["runbook_url"] == f"{SITE['prometheus_runbook_url']}/{name}.html"


def test_each_for_duration_is_argued() -> None:
    for name in FILES:
        text = (ROLE / "templates/rules" / f"{name}.yml.j2").read_text()
        assert len(re.findall(r"^ +#.*\n +- alert:", text, re.MULTILINE)) == text.count("- alert:"), name


def test_each_alert_has_a_runbook_and_each_runbook_an_alert(tmp_path: Path) -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"} == set(alerts(rendered(tmp_path)))
    for path in RUNBOOKS.glob("*.md"):
        headings = re.findall(r"^## (.+)$", path.read_text(), re.MULTILINE)
        assert path.stem == "README" or headings == ["What it means", "What users notice", "Look", "Do", "It is over"], path


def test_the_role_writes_all_rules() -> None:
    assert set(re.findall(r"template: rules/(\w+).yml.j2", (ROLE / "tasks/main.yml").read_text())) == set(FILES)
