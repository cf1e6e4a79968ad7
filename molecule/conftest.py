"""What all scenarios' tests share: the host under test, a producer outside it, the journal on failure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import testinfra.host
from celery import Celery

from helpers.nodes import Node


@pytest.fixture(scope="module")
def node(host: testinfra.host.Host, request: pytest.FixtureRequest) -> Node:
    """Return the host under test."""
    return Node(host, Path(request.config.getoption("ansible_inventory")).resolve())


@pytest.fixture(scope="module")
def orders(node: Node) -> Iterator[Celery]:
    """Return a producer outside the hosts, as a web application would have it: it knows task names and a broker."""
    address = f"redis://orders:{node.secrets['vault_celery_app_redis_password']}@{node.address}:6379"
    app = Celery("producer", broker=f"{address}/0", backend=f"{address}/1", set_as_current=False)
    options = {"global_keyprefix": "orders:"}
    app.conf.update(
        broker_transport_options=options,
        result_backend_transport_options=options,
        task_routes={"orders.tasks.batch_*": "batch", "orders.tasks.update_stock": "default", "orders.tasks.*": "critical"},
        task_default_queue="default",
    )
    yield app
    app.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add the end of the journal to the report of a test that failed."""
    outcome = yield
    report = outcome.get_result()
    if report.failed and (node := getattr(item, "funcargs", {}).get("node")):
        journal = node.host.run("journalctl --no-pager --lines=60 --unit='celery*' --unit=redis-server")
        report.sections.append((f"journal of {node.address}", journal.stdout))
