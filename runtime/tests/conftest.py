"""Real servers and real workers for the tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

import celery_platform


def free_port() -> int:
    """Return a TCP port of the loopback address that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 30, every: float = 0.1) -> Any:
    """Return the first true value of a condition; raise AssertionError, naming it, if none comes in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(every)
    raise AssertionError(f"not within {seconds} s: {what}")


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


@pytest.fixture(scope="session")
def rabbitmq_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Callable[..., str]]]:
    """Start RabbitMQ on the loopback address; return its address, and a function that runs rabbitmqctl."""
    # Erlang's sockets have a limit on the length of their paths, so not below pytest's folder.
    folder, port, distribution = tmp_path_factory.mktemp("rabbitmq"), free_port(), free_port()
    (folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{port}\nloopback_users = none\nlog.console = true\n")
    (folder / "enabled_plugins").write_text("[].\n")
    environment = os.environ | {
        "HOME": str(folder),
        "RABBITMQ_NODENAME": f"test{port}@localhost",
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
        server = subprocess.Popen(["/usr/lib/rabbitmq/bin/rabbitmq-server"], env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            wait_for("RabbitMQ", lambda: b"Server startup complete" in (folder / "out").read_bytes(), seconds=60)
            yield f"amqp://guest@127.0.0.1:{port}", control
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


@pytest.fixture
def rabbitmq(rabbitmq_node: tuple[str, Callable[..., str]]) -> Iterator[tuple[str, Callable[..., str]]]:
    """Return the address of an empty vhost of its own (amqp://guest@host:port/name; password `guest`), and rabbitmqctl for it."""
    url, control = rabbitmq_node
    name = f"test{time.monotonic_ns()}"
    control("add_vhost", name)
    control("set_permissions", "--vhost", name, "guest", ".*", ".*", ".*")
    yield f"{url}/{name}", lambda command, *arguments: control(command, "--vhost", name, *arguments)
    control("delete_vhost", name)


class Site:
    """An application of a user, deployed: its folder, the environment and the credentials that a unit would give it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.credentials = folder / "credentials"
        self.credentials.mkdir()
        self.environment = {
            "CELERY_PLATFORM_APPLICATION": "shop:app",
            "CREDENTIALS_DIRECTORY": str(self.credentials),
            "PYTHONPATH": f"{folder}:{Path(celery_platform.__file__).parents[1]}",
            "PYTHONUNBUFFERED": "1",
        }

    def write(self, source: str) -> None:
        """Write the user's module `shop`."""
        (self.folder / "shop.py").write_text(source)

    def set(self, **settings: str) -> None:
        """Set variables: `set(broker_url=…)` is CELERY_PLATFORM_BROKER_URL."""
        self.environment |= {f"CELERY_PLATFORM_{name.upper()}": value for name, value in settings.items()}

    def secret(self, **secrets: str) -> None:
        """Write credentials."""
        for name, value in secrets.items():
            (self.credentials / name).write_text(value)

    def run(self, *command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command of the virtual environment as the services run."""
        program = Path(sys.executable).with_name(command[0])
        environment = os.environ | self.environment
        run = subprocess.run([program, *command[1:]], env=environment, cwd=self.folder, text=True, capture_output=True, **options)
        assert not check or run.returncode == 0, run.stdout + run.stderr
        return run

    @contextmanager
    def worker(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a worker until the block ends (or it is killed in it); `self.log()` is what it printed."""
        command = [Path(sys.executable).with_name("celery"), "-A", "celery_platform.worker:app", "worker", "--loglevel=INFO", "--concurrency=1", *arguments]
        start = len(self.log())
        with (self.folder / "worker.log").open("ab") as log:
            worker = subprocess.Popen(command, env=os.environ | self.environment, cwd=self.folder, stdout=log, stderr=log)
        try:
            wait_for("a ready worker", lambda: " ready." in self.log()[start:] or worker.poll() is not None)
            assert worker.poll() is None, self.log()[start:]
            yield worker
        finally:
            if worker.poll() is None:
                worker.terminate()
                try:
                    worker.wait(20)
                except subprocess.TimeoutExpired:
                    worker.kill()
                    worker.wait()

    def log(self) -> str:
        """Return what all workers so far printed."""
        path = self.folder / "worker.log"
        return path.read_text() if path.exists() else ""

    def producer(self) -> Celery:
        """Return an application that knows only task names, with the site's settings, as a web service would have it."""
        from celery_platform.configuration import celery_config
        from celery_platform.settings import load_settings

        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            settings = load_settings()
        app = Celery("producer", set_as_current=False)
        app.conf.update(celery_config(settings))
        return app


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Return an empty site; the caller writes its application and settings."""
    folder = tmp_path / "site"
    folder.mkdir()
    yield Site(folder)
    shutil.rmtree(folder)
