"""Real servers and real workers for the tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from helpers.brokers import rabbitmq, rabbitmq_node
from helpers.sites import Site, free_port, wait_for
from helpers.targets import only_in_test_all

__all__ = ["rabbitmq", "rabbitmq_node"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to `make test-all` what is shown with the pool `prefork` as well."""
    for item in items:
        if {"threads", "solo"} & set(re.split(r"[\[\]-]", item.name)):
            item.add_marker(only_in_test_all)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start Redis on the loopback address; return its address without a path: redis://127.0.0.1:port."""
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log) as server:
        url = f"redis://127.0.0.1:{port}"
        wait_for("Redis", lambda: _answers(url))
        yield url
        server.terminate()


def _answers(url: str) -> bool:
    try:
        return bool(redis.Redis.from_url(url).ping())
    except redis.exceptions.ConnectionError:
        return False


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """Return the address of an empty Redis."""
    redis.Redis.from_url(redis_server).flushall()
    return redis_server


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Return an empty site; the caller writes its application and settings."""
    folder = tmp_path / "site"
    folder.mkdir()
    yield Site(folder)
    shutil.rmtree(folder)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Return a function that sets this process's settings: `environment(broker_url=…, secrets={"broker_password": …})`."""
    for name in [name for name in os.environ if name.startswith("CELERY_PLATFORM_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)

    def set_all(*, secrets: dict[str, str] | None = None, **settings: str) -> None:
        base = {"application": "shop:app", "broker_url": "redis://shop@redis.example:6379/0"}
        for name, value in (base | settings).items():
            monkeypatch.setenv(f"CELERY_PLATFORM_{name.upper()}", value)
        if secrets:
            folder = tmp_path / "secrets"
            folder.mkdir(exist_ok=True)
            for name, value in secrets.items():
                (folder / name).write_text(value)
            monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))

    return set_all
