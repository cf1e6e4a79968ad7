"""Hides secrets in all that a worker answers to remote control: `celery inspect`, `celery control`, Flower.

Every answer of every command, those of other packages too, leaves by `reply` of the worker's node (kombu/pidbox.py).
Celery's own hide what is called a password in settings, but show transport options, in which Sentinel's password stands
(celery/worker/consumer/connection.py, info, 5.7.0).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from celery import Celery

from celery_platform.logs import Mask, masker
from celery_platform.settings import MASK, Settings

#: Keys whose texts are secrets, whatever their value. Not `routing_key`, `key_prefix` or `ssl_keyfile`.
SECRET_KEYS = re.compile(
    r"passw|passphrase|pwd|secret|token|credential|(api|access|private|encryption|signing|fernet)_?key|^keys?$", re.IGNORECASE
)


def install(app: Celery, settings: Settings) -> None:
    """Let the workers of an application answer without secrets. Comes after whatever else sets the class of nodes."""
    mask = masker(settings)
    base: Any = app.control.mailbox.node_cls

    class MaskingNode(base):  # type: ignore[misc]
        def reply(self, data: Any, *arguments: Any, **options: Any) -> None:
            # The worker's name, by which callers tell the answers apart, stays as it is.
            super().reply({name: without_secrets(answer, mask) for name, answer in data.items()}, *arguments, **options)

    app.control.mailbox.node_cls = MaskingNode


def without_secrets(value: Any, mask: Mask, is_secret: bool = False) -> Any:
    """Return an answer with asterisks for secrets: known values wherever they stand, and all texts below a secret's key."""
    if isinstance(value, Mapping):
        return {
            mask(name) if isinstance(name, str) else name: without_secrets(item, mask, is_secret or bool(SECRET_KEYS.search(str(name))))
            for name, item in value.items()
        }
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [without_secrets(item, mask, is_secret) for item in value]
    # What else JSON takes (times, UUIDs, lazy texts) is a text in it.
    return MASK if is_secret and value else mask(value.decode(errors="replace") if isinstance(value, bytes) else str(value))
