"""Lets the events of a task tell its name and queue, and of a failure once.

Celery tells the name with the first two of a task's events only, and the queue with the first one, which its sender
sends, or does not: who sees the others alone (roles/celery_monitor) could not say what they are about.
"""

from __future__ import annotations

import functools
from typing import Any

from celery import Celery
from celery.worker.request import Request

from celery_platform.queues import DELAY
from celery_platform.settings import Settings


def install(app: Celery, settings: Settings) -> None:
    """Let the requests of this process tell so."""
    send_event = Request.send_event

    @functools.wraps(send_event)
    def told(request: Any, type: str, **fields: Any) -> Any:
        if type == "task-failed":
            # At its hard time limit, Celery sends this twice.
            if getattr(request, "_celery_platform_failed", False):
                return None
            request._celery_platform_failed = True
        queue = DELAY.sub("", request.delivery_info.get("routing_key") or "")
        return send_event(request, type, **{"name": request.name, "queue": queue} | fields)

    Request.send_event = told
