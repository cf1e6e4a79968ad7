"""A user's application, deployed as the services see it; its workers are real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

import celery_platform
from celery_platform import configuration
from celery_platform.settings import load_settings
from helpers.waiting import wait_for as wait_for


def free_port() -> int:
    """Return a TCP port of the loopback address that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Site:
    """An application of a user, deployed: its folder, the environment and the credentials that a unit would give it."""

    def __init__(self, folder: Path, credentials: str = "credentials") -> None:
        self.folder = folder
        self.credentials = folder / credentials
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
        command = [
            Path(sys.executable).with_name("celery"),
            "-A",
            "celery_platform.worker:app",
            "worker",
            "--loglevel=INFO",
            "--concurrency=1",
            *arguments,
        ]
        start = len(self.log())
        with (self.folder / "worker.log").open("ab") as log:
            worker = subprocess.Popen(command, env=os.environ | self.environment, cwd=self.folder, stdout=log, stderr=log)
        try:
            try:
                wait_for("a ready worker", lambda: " ready." in self.log()[start:] or worker.poll() is not None, seconds=90)
            except AssertionError as error:
                error.add_note(self.log()[start:])
                raise
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

    @contextmanager
    def flower(self, *arguments: str) -> Iterator[Callable[[str], str]]:
        """Run Flower until the block ends; yield what returns a page, or nothing where there is none (yet); its log is `flower.log`."""
        port = free_port()
        monitor = "celery_platform.monitor:app"
        command = [Path(sys.executable).with_name("celery"), "-A", monitor, "flower", "--address=127.0.0.1", f"--port={port}", *arguments]

        def get(path: str) -> str:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
                    return str(answer.read().decode())
            except OSError:
                return ""

        with (
            (self.folder / "flower.log").open("wb") as log,
            subprocess.Popen(command, env=os.environ | self.environment, cwd=self.folder, stdout=log, stderr=log) as flower,
        ):
            try:
                wait_for("Flower", lambda: get("healthcheck"), seconds=60)
                yield get
            finally:
                flower.kill()

    def log(self) -> str:
        """Return what all workers so far printed."""
        path = self.folder / "worker.log"
        return path.read_text() if path.exists() else ""

    def producer(self) -> Celery:
        """Return an application that knows only task names, with the site's settings, as a web service would have it."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            settings = load_settings()
        app = Celery("producer", set_as_current=False)
        app.conf.update(configuration.celery_config(settings))
        return app


def cli(site: Site, *arguments: str, status: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command `celery-platform` as an operator does; raise AssertionError if it ends with another status."""
    run = site.run("python", "-m", "celery_platform.cli", *arguments, check=False, **options)
    assert run.returncode == status, run.stdout + run.stderr
    return run
