"""What the tests of the scenario share: its RabbitMQ nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from rabbit import RabbitCluster


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RabbitCluster:
    """Return the data hosts of the inventory under test."""
    return RabbitCluster(Path(request.config.getoption("ansible_inventory")).resolve(), tmp_path_factory.mktemp("client"))
