"""Filters for the workers of an inventory (`celery_worker_list`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

#: What a host may call itself: letters, digits, dots and hyphens (hostname(7)), and underscores, which Linux takes as well.
HOST_NAME = re.compile(r"[A-Za-z0-9_.-]{1,255}")
DEFAULT_WORKERS = [{"name": "default", "queues": ["default"]}]


def worker_names(hosts: Iterable[str], hostvars: Mapping[str, Any]) -> list[str]:
    """Return the names under which the workers of these hosts are known to Celery: `celery@<worker>.<what the host calls itself>`.

    What a host says of itself is used only if it is the name of a host; else, or if it said nothing, its name in the inventory is.
    """
    names = []
    for host in hosts:
        said = str(hostvars[host].get("ansible_facts", {}).get("nodename", ""))
        name = said if HOST_NAME.fullmatch(said) else host
        names += [f"celery@{worker['name']}.{name}" for worker in hostvars[host].get("celery_worker_list", DEFAULT_WORKERS)]
    return names


def worker_units(workers: Iterable[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """Return the unit file of each worker as `config_files` takes it, with `worker` for its template; its path begins with `prefix`."""
    return [
        {"path": f"{prefix}@{worker['name']}.service", "template": "celery-worker.service.j2", "vars": {"worker": worker}}
        for worker in workers
    ]


def workers_without_grace(workers: Iterable[dict[str, Any]], soft: int, hard: int) -> list[str]:
    """Return the names of workers whose tasks would be asked to stop only when they are already killed, by limits of their own.

    Args:
        workers: entries of `celery_worker_list`.
        soft: the application's limits in seconds, which hold where a worker has none.
        hard: see soft.
    """
    return [
        worker.get("name", "")
        for worker in workers
        if {"soft_time_limit", "time_limit"} & worker.keys()
        and int(worker.get("soft_time_limit", soft)) >= int(worker.get("time_limit", hard))
    ]


def workers_that_cannot_grow(workers: Iterable[dict[str, Any]], concurrency: int, pool: str) -> list[str]:
    """Return the names of workers whose `concurrency_max` is not above their concurrency, or whose pool does not grow with the load.

    Args:
        workers: entries of `celery_worker_list` that have one.
        concurrency: what holds where a worker says none.
        pool: what holds where a worker says none.
    """
    return [
        worker.get("name", "")
        for worker in workers
        if worker.get("pool", pool) != "prefork" or int(worker["concurrency_max"]) <= int(worker.get("concurrency", concurrency))
    ]


class FilterModule:
    """What Ansible looks for in this file."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "worker_names": worker_names,
            "worker_units": worker_units,
            "workers_without_grace": workers_without_grace,
            "workers_that_cannot_grow": workers_that_cannot_grow,
        }
