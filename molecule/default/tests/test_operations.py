"""A second run finds nothing to do; new code is a new release; a worker that the inventory drops is gone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from helpers import REPOSITORY
from helpers.nodes import Node, wait_for
from helpers.targets import only_in_test_all

testinfra_hosts = ["ansible://celery_worker"]


def test_a_check_of_the_converged_host_finds_nothing_to_do(node: Node) -> None:
    assert node.converge("--check", "--diff")["changed"] == []


def test_a_check_of_a_new_worker_tells_what_would_change(node: Node) -> None:
    before = node.host.check_output("systemctl list-units 'celery-*' --plain --no-legend")
    workers = [{"name": "all", "queues": ["critical", "default", "batch"]}]
    changed = node.converge("--check", "-e", json.dumps({"celery_worker_list": workers}))["changed"]
    assert "celery_worker : Write the workers' units" in changed
    # The units of those that are no longer wanted.
    assert "celery_app : Check that the application starts with its settings" in changed
    assert node.host.check_output("systemctl list-units 'celery-*' --plain --no-legend") == before


@only_in_test_all
def test_a_django_project_that_nobody_adapted_is_deployed_by_inventory_alone(node: Node) -> None:
    password = node.secrets["vault_celery_app_redis_password"]
    library = Path(__file__).with_name("library.yml")
    node.converge("-e", f"@{library}")
    try:
        address = f"redis://library:{password}@{node.address}:6379"
        web = Celery("web", broker=f"{address}/0", backend=f"{address}/1", set_as_current=False)
        options = {"global_keyprefix": "library:"}
        web.conf.update(broker_transport_options=options, result_backend_transport_options=options, task_default_queue="default")
        assert [web.send_task("books.tasks.lend", ("Emma",)).get(timeout=20) for _ in range(2)] == [1, 2]
        overridden = node.host.check_output("journalctl --unit=celery-library-worker@default --output=cat --since=-5min")
        assert "accept_content of the application is overridden" in overridden
        demo = node.run_playbook("-e", f"@{library}", playbook="playbooks/operations/demo.yml")
        assert demo.returncode == 0, demo.stdout
        assert re.search(r"default: \d+ ms", demo.stdout)

        schedule = """
from django_celery_beat.models import IntervalSchedule, PeriodicTask
every, _ = IntervalSchedule.objects.get_or_create(every=1, period="seconds")
PeriodicTask.objects.get_or_create(name="lend", defaults={"task": "books.tasks.lend", "args": '["Ulysses"]', "interval": every})
"""
        node.host.check_output("celery-exec python manage.py shell -c %s", schedule)
        log = node.host.file("/var/log/celery/library/beat.log")
        wait_for("a periodic task from the database", lambda: "Sending due task lend" in log.content_string, seconds=30)
        assert web.send_task("books.tasks.lend", ("Ulysses",)).get(timeout=20) > 1
        web.close()
        # What it writes beside its code stays where the next release finds it.
        assert node.host.file("/opt/celery/library/current/app/logs").linked_to == "/var/lib/celery/library/app/logs"
        assert node.host.file("/var/lib/celery/library/app/logs/loans.log").contains("Ulysses")
        # The application that the inventory no longer names.
        assert node.host.run("systemctl list-units --plain --no-legend 'celery-orders-*'").stdout == ""
        assert node.host.file("/etc/celery").listdir() == ["library"]
    finally:
        node.converge()
    assert node.host.file("/etc/celery").listdir() == ["orders"]


@pytest.fixture
def closed(node: Node) -> Iterator[None]:
    """Let the host reach nothing but its own network, and refuse all else at once."""
    chain = "type filter hook output priority 0; oif lo accept; ip daddr %s accept; reject"
    node.host.check_output("nft %s", f"table inet closed {{ chain output {{ {chain % (node.address.rpartition('.')[0] + '.0/24')}; }}; }}")
    yield
    node.host.check_output("nft delete table inet closed")


@only_in_test_all
@pytest.mark.usefixtures("closed")
def test_a_host_that_reaches_no_package_index_gets_wheels_from_the_controller(node: Node, orders: Celery, tmp_path: Path) -> None:
    source = tmp_path / "orders"
    shutil.copytree(REPOSITORY / "examples/orders", source, ignore=shutil.ignore_patterns("__pycache__"))
    with (source / "orders/tasks.py").open("a") as tasks:
        tasks.write('\n\n@app.task\ndef greet() -> str:\n    """Show that this release runs."""\n    return "closed"\n')
    settings = {"celery_app_source": str(source), "celery_app_build_environment": {"PIP_RETRIES": "0"}}
    without = node.run_playbook("-e", json.dumps(settings))
    assert without.returncode == 2
    assert "cannot build the release, and nothing was switched" in without.stdout

    node.converge("-e", json.dumps(settings | {"celery_app_vendor": True}))
    assert orders.send_task("orders.tasks.greet", queue="default").get(timeout=20) == "closed"
    assert not node.host.file("/opt/celery/orders/current/vendor").exists
    assert node.converge("-e", json.dumps(settings | {"celery_app_vendor": True}))["changed"] == []
    node.converge()


def test_another_distribution_stops_the_run(node: Node) -> None:
    node.host.check_output("cp /usr/lib/os-release /tmp/os-release && mv /etc/debian_version /tmp/debian_version")
    node.host.check_output("printf 'NAME=Ubuntu\\nID=ubuntu\\nVERSION_ID=24.04\\n' > /usr/lib/os-release")
    try:
        with pytest.raises(AssertionError, match=r"runs Ubuntu 24\.04.*Allowed: hosts with Debian 12 or 13"):
            node.converge()
    finally:
        node.host.check_output("cp /tmp/os-release /usr/lib/os-release && mv /tmp/debian_version /etc/debian_version")


def test_new_code_is_a_new_release_and_the_old_one_is_kept(node: Node, orders: Celery, tmp_path: Path) -> None:
    def running() -> tuple[str, list[str]]:
        release = node.host.check_output("readlink -f /opt/celery/orders/current")
        return release, [node.show(f"celery-orders-worker@{name}", "MainPID")["MainPID"] for name in ("critical", "default")]

    first, pids = running()
    built = node.host.file(f"{first}/.complete").mtime
    source = tmp_path / "orders"
    shutil.copytree(REPOSITORY / "examples/orders", source, ignore=shutil.ignore_patterns("__pycache__"))
    with (source / "orders/tasks.py").open("a") as tasks:
        tasks.write('\n\n@app.task\ndef greet() -> str:\n    """Show that this release runs."""\n    return "new release"\n')

    git = ["git", "-C", source, "-c", "user.name=Test", "-c", "user.email=test@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "Greet"], ["tag", "v2"]):
        subprocess.run([*git, *command], check=True)

    # Changes of the workers, to spare a run: one takes over the queue of another that goes, with a limit of its own.
    workers = [{"name": "critical", "queues": ["critical"]}, {"name": "default", "queues": ["default", "batch"], "soft_time_limit": 3}]
    node.converge("-e", json.dumps({"celery_app_source": f"git+file://{source}@v2", "celery_worker_list": workers}))
    second, new_pids = running()
    assert second != first
    assert not set(pids) & set(new_pids)
    assert orders.send_task("orders.tasks.greet", queue="default").get(timeout=20) == "new release"
    assert not node.host.file("/etc/systemd/system/celery-orders-worker@batch.service").exists
    assert node.show("celery-orders-worker@batch", "ActiveState")["ActiveState"] == "inactive"
    assert orders.send_task("orders.tasks.batch_report", ("2026-11-20", 3)).get(timeout=20)["total"] == 3

    interrupted = orders.send_task("orders.tasks.batch_import", (60,)).get(timeout=20)
    assert re.fullmatch(r"interrupted with 5[67] s to go", interrupted)

    node.converge()
    assert running()[0] == first
    assert node.host.file(f"{first}/.complete").mtime == built
    assert node.host.file(f"{second}/.complete").exists
    assert node.host.service("celery-orders-worker@batch").is_running
