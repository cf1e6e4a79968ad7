"""Waiting for what a test expects, instead of for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 30, every: float = 0.1, why: Callable[[], Any] = str) -> Any:
    """Return the first true value of a condition; raise AssertionError, naming it and `why`, if none comes in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(every)
    raise AssertionError(f"not within {seconds} s: {what} {why()}".rstrip())
