"""Sends the log to the journal also where Celery writes it to a file."""

from __future__ import annotations

import logging
import sys
from typing import Any

from celery import Celery, signals

from celery_platform.settings import Settings


def _also_to_stderr(logger: logging.Logger, loglevel: int, logfile: str | None, format: str, **_: Any) -> None:
    if not logfile or any(type(handler) is logging.StreamHandler for handler in logger.handlers):
        return
    # sys.stderr is Celery's proxy into this very logger by now.
    handler = logging.StreamHandler(sys.__stderr__)
    file_handler = next((h for h in logger.handlers if isinstance(h, logging.FileHandler)), None)
    handler.setFormatter(file_handler.formatter if file_handler else logging.Formatter(format))
    logger.addHandler(handler)


def install(app: Celery, settings: Settings) -> None:
    """Add the journal to the worker's and the tasks' loggers, in every process of a pool."""
    signals.after_setup_logger.connect(_also_to_stderr, weak=False)
    signals.after_setup_task_logger.connect(_also_to_stderr, weak=False)
