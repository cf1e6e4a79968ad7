"""A host that the inventory takes out of a group no longer runs what the group has."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from helpers.nodes import Node
from helpers.targets import only_in_test_all

testinfra_hosts = ["ansible://celery_worker"]


@only_in_test_all
def test_beat_ends_where_the_inventory_no_longer_has_it(node: Node, tmp_path: Path) -> None:
    folder = tmp_path / "inventory"
    shutil.copytree(node.inventory, folder)
    hosts = yaml.safe_load((folder / "hosts.yml").read_text())
    del hosts["all"]["children"]["celery_beat"]
    (folder / "hosts.yml").write_text(yaml.safe_dump(hosts))
    workers = node.show("celery-orders-worker@default", "MainPID")
    without = Node(node.host, folder)
    try:
        # Nothing is stopped before that is asked for.
        without.converge("--check")
        assert node.host.service("celery-orders-beat").is_running
        assert "Stop beat" in without.converge()["changed"]
        assert node.show("celery-orders-beat", "ActiveState", "LoadState") == {"ActiveState": "inactive", "LoadState": "not-found"}
        assert node.show("celery-orders-worker@default", "MainPID") == workers
        assert without.converge()["changed"] == []
    finally:
        node.converge()
    assert node.host.service("celery-orders-beat").is_running
    assert node.host.service("celery-orders-beat").is_enabled
