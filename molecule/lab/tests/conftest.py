"""What the tests of the lab share: its data hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.rabbit import RabbitCluster


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RabbitCluster:
    """Return the RabbitMQ nodes, Redis hosts and Sentinels of the inventory under test."""
    return RabbitCluster(Path(request.config.getoption("ansible_inventory")).resolve(), tmp_path_factory.mktemp("client"))
