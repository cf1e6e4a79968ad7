"""Tells systemd when a service serves and when it stops (sd_notify(3))."""

from __future__ import annotations

import os
import socket

from celery import Celery, signals

from celery_platform.settings import Settings


def notify(state: str) -> None:
    """Send a state ("READY=1") to systemd; does nothing where no service manager listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    # A leading @ is systemd's way to write a socket in the abstract namespace.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)


def _ready(**_: object) -> None:
    notify("READY=1\nSTATUS=Ready")


def _stopping(**_: object) -> None:
    notify("STOPPING=1\nSTATUS=Finishing the running tasks")


def install(app: Celery, settings: Settings) -> None:
    """Report a worker's consumer, or beat's first tick, as ready, and a shutdown as stopping."""
    signals.worker_ready.connect(_ready, weak=False)
    signals.beat_init.connect(_ready, weak=False)
    signals.worker_shutting_down.connect(_stopping, weak=False)
