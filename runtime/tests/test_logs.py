"""Tests of the log, which goes both to a file and to the journal (a service's standard error)."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import signals

from celery_platform import logs

SOURCES = Path(logs.__file__).parents[1]
FORMAT = "[%(levelname)s] %(message)s"

# What Celery does when a worker starts; then a line from each source of lines.
WORKER = """
import sys
from celery import Celery
from celery.utils.log import get_logger, get_task_logger
from celery_platform import logs

logs.connect()
app = Celery("shop", broker="memory://")
app.log.setup("INFO", logfile=sys.argv[1] if len(sys.argv) > 1 else None, redirect_stdouts=True, redirect_level="WARNING")
get_logger("celery.worker").info("line of the worker")
get_task_logger("shop.tasks").info("line of a task")
print("line on standard output")
print("line on standard error", file=sys.stderr)
get_logger("celery.worker").debug("line too detailed")
"""
LINES = ["line of the worker", "line of a task", "line on standard output", "line on standard error"]


@pytest.mark.parametrize("to_file", [True, False])
def test_each_line_is_in_the_journal_once_and_in_the_file_once(tmp_path: Path, to_file: bool) -> None:
    file = tmp_path / "worker.log"

    completed = subprocess.run(
        [sys.executable, "-c", WORKER, *([file] if to_file else [])],
        env={"PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    for line in LINES:
        assert completed.stderr.count(line) == 1, completed.stderr
    assert "too detailed" not in completed.stderr
    assert file.exists() == to_file
    if to_file:
        assert file.read_text().splitlines() == completed.stderr.splitlines()


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """Yield a logger that nobody else uses, with nobody but us connected to Celery's signals."""
    for signal in (signals.after_setup_logger, signals.after_setup_task_logger):
        monkeypatch.setattr(signal, "receivers", [])
    logger = logging.Logger("celery_platform.test", logging.INFO)
    yield logger
    for handler in logger.handlers:
        handler.close()


@pytest.mark.parametrize("signal", [signals.after_setup_logger, signals.after_setup_task_logger])
def test_the_journal_gets_the_format_of_the_file(
    logger: logging.Logger, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, signal: signals.Signal
) -> None:
    # In a process of a pool, standard error leads back into the log.
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    file = logging.FileHandler(tmp_path / "a.log")
    file.setFormatter(logging.Formatter("file: %(message)s"))
    logger.addHandler(file)
    logs.connect()

    for _ in range(2):
        signal.send(sender=None, logger=logger, loglevel=logging.INFO, logfile="a.log", format=FORMAT, colorize=False)
    logger.info("hello")

    assert capfd.readouterr().err == "file: hello\n"
    assert (tmp_path / "a.log").read_text() == "file: hello\n"


def test_without_a_handler_of_a_file_the_journal_gets_the_format_of_celery(
    logger: logging.Logger, capfd: pytest.CaptureFixture[str]
) -> None:
    logs.connect()

    signals.after_setup_logger.send(sender=None, logger=logger, loglevel=logging.INFO, logfile="a.log", format=FORMAT, colorize=False)
    logger.info("hello")

    assert capfd.readouterr().err == "[INFO] hello\n"


def test_a_log_that_goes_to_the_journal_anyway_is_left_alone(logger: logging.Logger) -> None:
    logs.connect()

    signals.after_setup_logger.send(sender=None, logger=logger, loglevel=logging.INFO, logfile=None, format=FORMAT, colorize=False)

    assert logger.handlers == []
