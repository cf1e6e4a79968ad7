"""A real RabbitMQ for the tests, and a Redis that goes and comes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from helpers.sites import free_port
from helpers.waiting import wait_for


@contextmanager
def lasting_redis(port: int, folder: Path) -> Iterator[None]:
    """Run a Redis on a port of the loopback address until the block ends; the next one in the folder has what it had."""
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        with redis.Redis(port=port, retry=Retry(ConstantBackoff(0.1), 100)) as client:
            client.ping()
        yield
        server.terminate()


@contextmanager
def running_rabbitmq(folder: Path, settings: str) -> Iterator[Callable[..., str]]:
    """Run RabbitMQ with the settings of a rabbitmq.conf until the block ends; return a function that runs rabbitmqctl."""
    distribution = free_port()
    (folder / "rabbitmq.conf").write_text(f"{settings}log.console = true\n")
    (folder / "enabled_plugins").write_text("[].\n")
    environment = os.environ | {
        "HOME": str(folder),
        "RABBITMQ_NODENAME": f"test{distribution}@localhost",
        "RABBITMQ_DIST_PORT": str(distribution),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
    }

    def control(*arguments: str) -> str:
        command = ["/usr/lib/rabbitmq/bin/rabbitmqctl", "--quiet", *arguments]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    with (folder / "out").open("wb") as out:
        server = subprocess.Popen(
            ["/usr/lib/rabbitmq/bin/rabbitmq-server"], env=environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            wait_for("RabbitMQ", lambda: b"Server startup complete" in (folder / "out").read_bytes(), seconds=60)
            yield control
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


@pytest.fixture(scope="session")
def rabbitmq_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Callable[..., str]]]:
    """Start RabbitMQ on the loopback addresses; return its IPv4 address, and a function that runs rabbitmqctl."""
    port = free_port()
    listeners = f"listeners.tcp.1 = 127.0.0.1:{port}\nlisteners.tcp.2 = ::1:{port}\nloopback_users = none\n"
    with running_rabbitmq(tmp_path_factory.mktemp("rabbitmq"), listeners) as control:
        yield f"amqp://guest@127.0.0.1:{port}", control


@pytest.fixture
def rabbitmq(rabbitmq_node: tuple[str, Callable[..., str]]) -> Iterator[tuple[str, Callable[..., str]]]:
    """Return the address of an empty vhost of its own (amqp://guest@host:port/name; password `guest`), and rabbitmqctl for it."""
    url, control = rabbitmq_node
    name = f"test{time.monotonic_ns()}"
    control("add_vhost", name)
    control("set_permissions", "--vhost", name, "guest", ".*", ".*", ".*")
    yield f"{url}/{name}", lambda command, *arguments: control(command, "--vhost", name, *arguments)
    control("delete_vhost", name)
