"""What `make status` makes of what hosts and broker tell."""

from __future__ import annotations

import json
from typing import Any

import pytest

from filter.status import site_status
from modules.service_status import describe, judge, parse, plain


def unit(**properties: str) -> dict[str, str]:
    """Return a worker that runs, with some properties changed."""
    running = {
        "Id": "celery-orders-worker@batch.service",
        "LoadState": "loaded",
        "ActiveState": "active",
        "SubState": "running",
        "UnitFileState": "enabled",
        "NRestarts": "0",
        "ActiveEnterTimestampMonotonic": "10000000",
        "Result": "success",
        "StatusText": "Consuming batch",
    }
    return running | properties


@pytest.mark.parametrize(
    ("changed", "judgement"),
    [
        ({}, ("running", False)),
        ({"NRestarts": "1", "ActiveEnterTimestampMonotonic": "995000000"}, ("running", False)),
        ({"NRestarts": "3", "ActiveEnterTimestampMonotonic": "995000000"}, ("restarting", True)),
        ({"NRestarts": "3"}, ("running", False)),
        ({"SubState": "exited"}, ("exited", False)),
        ({"ActiveState": "activating", "SubState": "start"}, ("starting", True)),
        # A worker that cannot start, in its second try and in the pause between two.
        ({"ActiveState": "activating", "SubState": "start", "NRestarts": "1"}, ("failed", True)),
        ({"ActiveState": "activating", "SubState": "auto-restart"}, ("failed", True)),
        ({"ActiveState": "failed", "SubState": "failed"}, ("failed", True)),
        ({"ActiveState": "failed", "SubState": "failed", "UnitFileState": "static"}, ("failed", True)),
        ({"ActiveState": "inactive", "SubState": "dead"}, ("stopped", True)),
        ({"ActiveState": "inactive", "SubState": "dead", "UnitFileState": "disabled"}, None),
        ({"ActiveState": "inactive", "SubState": "dead", "UnitFileState": "static"}, None),
        ({"LoadState": "not-found"}, None),
        ({"Transient": "yes"}, None),
    ],
)
def test_a_service_is_judged_by_its_unit(changed: dict[str, str], judgement: tuple[str, bool] | None) -> None:
    assert judge(unit(**changed), uptime=1000) == judgement


def test_what_is_wrong_is_told_by_the_last_line_of_the_log() -> None:
    assert describe(unit(), "running", "") == "Consuming batch"
    assert describe(unit(NRestarts="7"), "failed", "KeyError: 'X'") == "restarted 7 times; KeyError: 'X'"
    assert describe(unit(Result="exit-code"), "failed", "no money") == "exit-code; no money"
    assert describe(unit(NRestarts="1"), "failed", "") == "restarted once"


def test_a_log_is_no_command_to_a_terminal() -> None:
    assert plain("first\n\x1b]0;owned\x07\n\n") == "\N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER}"
    assert len(plain("x" * 1000)) == 300


def test_units_are_read_as_systemctl_prints_them() -> None:
    shown = "Id=a.service\nDescription=x=y\n\nId=b.service\nDescription=\n"
    assert parse(shown) == [{"Id": "a.service", "Description": "x=y"}, {"Id": "b.service", "Description": ""}]
    assert parse("") == []


def told(services: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"__status_services": {"services": services}, "__pki_certificate": {"skipped": True}} | more


def queues(*rows: tuple[str, int, int], dead: int = 0) -> dict[str, Any]:
    named = [dict(zip(("name", "waiting", "consumers"), row, strict=True)) for row in rows]
    return {"rc": 0, "stdout": json.dumps({"queues": named, "dead_letters": dead})}


GOOD = {"name": "celery-orders-beat", "state": "running", "what": "Next task in 10 s", "wrong": False}


def test_a_site_in_order_is_a_table_without_problems() -> None:
    hostvars = {
        "app1": told(
            [GOOD], __status_queues=queues(("default", 3, 2), ("batch", 0, 0)), __pki_certificate={"problems": {}, "days_left": 9}
        ),
        "data1": told([], __status_queues={"skipped": True, "changed": False}),
    }
    status = site_status(hostvars, ["app1", "data1"], ["app1", "data1"])
    assert status["problems"] == []
    assert [line.split() for line in status["table"].splitlines()] == [
        ["HOST", "SERVICE", "STATE", "WHAT"],
        ["app1", "celery-orders-beat", "running", "Next", "task", "in", "10", "s"],
        ["app1", "certificate", "valid", "9", "days", "left"],
        [],
        ["QUEUE", "WAITING", "CONSUMERS"],
        ["default", "3", "2"],
        ["batch", "0", "0"],
        ["dead", "letters", "0"],
    ]


def test_each_thing_that_is_wrong_stands_out() -> None:
    refused = {"problems": {"certificate": "has expired"}, "days_left": -1}
    hostvars = {
        "app1": told([GOOD | {"state": "failed", "wrong": True, "what": "exit-code; no money"}], __pki_certificate=refused),
        "app2": told([GOOD], __status_queues=queues(("default", 3, 0), dead=2), __pki_certificate={"problems": {"key": "is not there"}}),
    }
    status = site_status(hostvars, ["app1", "app2", "data1"], ["app1", "app2"])
    assert status["problems"] == [
        "celery-orders-beat on app1 is failed",
        "certificate on app1 is refused",
        "certificate on app2 is refused",
        "queue default has 3 tasks and no consumer",
        "data1 does not answer",
    ]
    for row in (r"FAILED     exit-code; no money", "REFUSED    has expired", "NO CONSUMER", "NO ANSWER", "dead-letters list"):
        assert row in status["table"]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ({"rc": 78, "stdout": "", "stderr": "Settings are wrong:\nCELERY_PLATFORM_\x1bX"}, "CELERY_PLATFORM_X"),
        ({"rc": 124, "stdout": "", "stderr": ""}, "no answer"),
        ({"rc": 2, "failed": True, "msg": "No such file: timeout"}, "No such file: timeout"),
    ],
)
def test_queues_that_cannot_be_read_are_wrong(result: dict[str, Any], reason: str) -> None:
    assert site_status({"app1": told([GOOD], __status_queues=result)}, ["app1"], ["app1"])["problems"] == [
        f"the queues cannot be read: {reason}"
    ]
