"""Filters for the workers of an inventory."""

from __future__ import annotations

from filter.workers import worker_names, worker_units, workers_that_cannot_grow, workers_without_grace


def test_workers_are_known_by_what_their_host_calls_itself() -> None:
    hostvars = {
        "app1": {"ansible_facts": {"nodename": "app1.example"}, "celery_worker_list": [{"name": "critical"}, {"name": "batch"}]},
        "app2": {},
    }
    assert worker_names(["app1", "app2"], hostvars) == [
        "celery@critical.app1.example",
        "celery@batch.app1.example",
        "celery@default.app2",
    ]


def test_a_host_that_calls_itself_something_odd_has_its_name_of_the_inventory() -> None:
    for said in ("a b", "a\nExecStartPre=/bin/true", "a%n", "", "a" * 256, "$(x)"):
        assert worker_names(["app1"], {"app1": {"ansible_facts": {"nodename": said}}}) == ["celery@default.app1"]


def test_each_worker_has_a_unit() -> None:
    batch = {"name": "batch", "queues": ["batch"]}
    assert worker_units([batch], "/etc/units/celery-shop-worker") == [
        {"path": "/etc/units/celery-shop-worker@batch.service", "template": "celery-worker.service.j2", "vars": {"worker": batch}}
    ]


def test_workers_whose_soft_limit_is_not_below_their_hard_one() -> None:
    workers = [
        {"name": "as the application"},
        {"name": "long", "soft_time_limit": 900},
        {"name": "short", "time_limit": "600"},
        {"name": "both", "soft_time_limit": 900, "time_limit": 1000},
    ]
    assert workers_without_grace(workers, 600, 900) == ["long", "short"]
    assert workers_without_grace(workers[:1], 900, 600) == []


def test_workers_that_cannot_grow() -> None:
    workers = [
        {"name": "good", "concurrency": 2, "concurrency_max": 3},
        {"name": "by default", "concurrency_max": "3"},
        {"name": "same", "concurrency": 3, "concurrency_max": 3},
        {"name": "threads", "pool": "threads", "concurrency": 1, "concurrency_max": 3},
    ]
    assert workers_that_cannot_grow(workers, 2, "prefork") == ["same", "threads"]
    assert workers_that_cannot_grow(workers[1:2], 3, "prefork") == ["by default"]
    assert workers_that_cannot_grow(workers[:1], 2, "solo") == ["good"]
