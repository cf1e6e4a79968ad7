"""To be written."""

from __future__ import annotations

from celery import Celery

from celery_platform.settings import Settings


def install(app: Celery, settings: Settings) -> None:
    """Do nothing yet."""
