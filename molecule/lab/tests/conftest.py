"""What the tests of the lab share: its data hosts, and web servers of the site's own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from helpers import web as servers
from helpers.nodes import Node
from helpers.rabbit import RabbitCluster


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RabbitCluster:
    """Return the RabbitMQ nodes, Redis hosts and Sentinels of the inventory under test."""
    return RabbitCluster(Path(request.config.getoption("ansible_inventory")).resolve(), tmp_path_factory.mktemp("client"))


@pytest.fixture
def web(cluster: RabbitCluster) -> Iterator[Node]:
    """Install web servers that send tasks on a host that runs no workers, and return it."""
    node = cluster.host(cluster.application.inventory, "ops1")
    servers.install(node)
    # A further file of the inventory, as a site adds it.
    passwords = {f"celery_producer_{broker}_password": secrets.token_urlsafe(24) for broker in ("redis", "rabbitmq")}
    group = {"hosts": {"ops1": {}}, "vars": {"celery_producer_units": servers.UNITS}}
    file = node.inventory / "test_web.yml"
    file.write_text(yaml.safe_dump({"all": {"children": {"celery_producer": group}, "vars": passwords}}))
    try:
        node.converge()
        yield node
    finally:
        file.unlink()
        node.converge()
        node.host.check_output(f"systemctl disable --now {' '.join(servers.UNITS)}")
