"""A Django project with Celery, as Celery's own documentation has it; nothing in it knows of this platform."""

from library.celery import app as celery_app

__all__ = ("celery_app",)
