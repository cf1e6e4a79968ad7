"""Waiting for what a test expects, instead of for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 30, every: float = 0.1) -> Any:
    """Return the first true value of a condition; raise AssertionError, naming it, if none comes in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(every)
    raise AssertionError(f"not within {seconds} s: {what}")
