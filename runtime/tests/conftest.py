"""What the tests of the runtime share."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Start without what systemd or a shell may have set; return a function that sets variables of ours."""
    for name in list(os.environ):
        if name.startswith("CELERY_PLATFORM_") or name in {"CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "TZ"}:
            monkeypatch.delenv(name)

    def set_ours(**values: str) -> None:
        for name, value in ({"application": "shop:app", "broker_url": "redis://orders@redis.example:6379/0"} | values).items():
            monkeypatch.setenv(f"CELERY_PLATFORM_{name.upper()}", value)

    return set_ours
