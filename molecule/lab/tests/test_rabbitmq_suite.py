"""Celery's own integration tests pass against the cluster, over TLS, as a user that may do what a worker needs and no more."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from helpers import REPOSITORY
from helpers.rabbit import AMQPS, RabbitCluster
from helpers.sentinels import Servers
from helpers.targets import only_in_drills

testinfra_hosts = ["ansible://data1"]

NAME = "suite"
FOLDER = REPOSITORY / ".lab/suite"
PLUGINS = ["celery", "click", "order", "rerunfailures", "subtests", "timeout"]
TOOLS = ["pytest", *(f"pytest-{name}" for name in PLUGINS), "django", "sqlalchemy"]
#: Seconds for a file of tests; all but `test_canvas` take less than two minutes.
LIMIT = 1500

#: Files of tests that have nothing to do with this broker.
OTHER_SERVERS = {
    "test_backend": "needs an account of Azure",
    "test_cache_backend": "needs memcached",
    "test_connection_recovery": "is for Redis as the broker",
    "test_backend_leak_in_fixture_teardown": "needs no broker, and takes longer than a limit of its own",
}
#: Tests that expect what this project has other defaults for.
OTHER_DEFAULTS = {
    "test_active": "arguments are not shown",
    "test_active_queues": "queues are quorum queues, on an exchange of type topic",
    "test_query_task": "arguments are not shown",
    "test_scheduled": "a countdown waits in the broker, not in the worker",
    "test_task_success": "arguments are not logged",
    "test_task_failed": "arguments are not logged",
    "test_task_sent_event_respects_publish_retry_limit": "publishing has a limit of time, not of tries",
    "test_concurrency_auto_sizes_prefork_pool": "starts a worker of its own, which has no certificate",
}
#: Tests that expect of the worker to get a task later than its sender goes on, which here waits for the confirmation.
RACES = {"test_replaced_task_nesting_level_0"}


@pytest.fixture(scope="module")
def python() -> Path:
    """Return the Python of an environment with the runtime package, and the tests of the Celery in it."""
    python = FOLDER / "venv/bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER / "venv"], check=True)
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    runtime = REPOSITORY / "runtime"
    subprocess.run([*pip, "install", "--constraint", runtime / "constraints.txt", runtime, *TOOLS], check=True)
    version = subprocess.check_output([python, "-c", "import celery; print(celery.__version__)"], text=True).strip()
    source = FOLDER / f"celery-{version}"
    if not source.exists():
        subprocess.run([*pip, "download", "--no-deps", "--no-binary=celery", f"--dest={FOLDER}", f"celery=={version}"], check=True)
        subprocess.run(["tar", "-C", FOLDER, "-xf", f"{source}.tar.gz"], check=True)
    # Not where Celery's own source would be found before the installed one.
    subprocess.run(["rm", "-rf", FOLDER / "t"], check=True)
    subprocess.run(["cp", "-r", source / "t", source / "pyproject.toml", FOLDER], check=True)
    return python


@pytest.fixture(scope="module")
def environment(cluster: RabbitCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Give the suite a vhost and a user of its own; return what its processes need to know."""
    folder = tmp_path_factory.mktemp("suite")
    password = secrets.token_urlsafe(24)
    (folder / "broker_password").write_text(password)
    main = yaml.safe_load((REPOSITORY / "inventories/lab/group_vars/all/main.yml").read_text())
    wanted = {
        "rabbitmq_applications": [
            {"name": main["celery_app_name"], "queues": main["celery_app_queues"]},
            {"name": NAME, "queues": ["celery"]},
        ],
        "rabbitmq_users": [{"name": NAME, "password": password, "application": NAME}],
    }
    (folder / "wanted.json").write_text(json.dumps(wanted))
    cluster.application.converge("--tags=rabbitmq", "-e", f"@{folder / 'wanted.json'}")
    nodes = [f"{node.address}:{AMQPS}/{NAME}" for node in cluster.nodes.values()]
    certificate, key = cluster.certificate
    with Servers(folder) as servers:
        port = servers.redis()
        results = f"redis://127.0.0.1:{port}/0"
        yield {
            "PYTHONPATH": f"{FOLDER}:{REPOSITORY}/molecule",
            "CELERY_PLATFORM_APPLICATION": "t:app",
            "CELERY_PLATFORM_BROKER_URL": ";".join(f"amqps://{NAME}@{node}" for node in nodes),
            "CELERY_PLATFORM_RESULT_BACKEND": results,
            "CELERY_PLATFORM_QUEUES": '["celery"]',
            "CELERY_PLATFORM_DEFAULT_QUEUE": "celery",
            "CELERY_PLATFORM_DECLARE_QUEUES": "false",
            "CELERY_PLATFORM_TLS_CA_FILE": str(cluster.authority),
            "CELERY_PLATFORM_TLS_CERT_FILE": str(certificate),
            "CELERY_PLATFORM_TLS_KEY_FILE": str(key),
            "CELERY_PLATFORM_TLS_SERVER_NAME": "rabbitmq.internal",
            "CREDENTIALS_DIRECTORY": str(folder),
            "TEST_BROKER": ";".join(f"amqps://{NAME}:{password}@{node}" for node in nodes),
            "TEST_BACKEND": results,
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(port),
        }
    cluster.application.converge("--tags=rabbitmq")
    cluster.ctl("data1", f"delete_vhost {NAME}")


@only_in_drills
def test_celerys_own_tests_pass(cluster: RabbitCluster, python: Path, environment: dict[str, str]) -> None:
    def refusals() -> int:
        log = f"journalctl --unit=rabbitmq-server --no-pager --since=@{started}"
        return sum(node.host.check_output(log).lower().count("refused") for node in cluster.nodes.values())

    started = int(cluster.application.host.check_output("date +%s"))
    found: dict[str, set[str]] = {}
    for file in sorted((FOLDER / "t/integration").glob("test_*.py")):
        if file.stem in OTHER_SERVERS:
            continue
        report = FOLDER / f"{file.stem}.xml"
        command = [python, "-m", "pytest", "-p", "helpers.celery_suite", "--tb=short", "-q", f"--junitxml={report}", file]
        with report.with_suffix(".txt").open("w") as output:
            subprocess.run(command, cwd=FOLDER, env=os.environ | environment, stdout=output, stderr=output, timeout=LIMIT)
        for case in ET.parse(report).iter("testcase"):
            outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
            found.setdefault(outcome, set()).add(case.get("name", ""))
    counts = ", ".join(f"{outcome} {len(names)}" for outcome, names in sorted(found.items()))
    with (REPOSITORY / ".lab/drills.txt").open("a") as table:
        table.write(f"Celery's own integration tests: {counts}\n")
    assert (found.get("failure", set()) | found.get("error", set())) - RACES == set(OTHER_DEFAULTS)
    assert len(found["passed"]) > 300
    assert refusals() == 0
