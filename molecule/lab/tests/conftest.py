"""What the tests of the lab share: its Redis hosts."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Return the Redis hosts and Sentinels of the inventory under test."""
    return Cluster(Path(request.config.getoption("ansible_inventory")).resolve(), tmp_path_factory.mktemp("client"))
