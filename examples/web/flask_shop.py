"""A Flask site made by a factory, with its Celery application where Flask's documentation puts it."""

from __future__ import annotations

from celery import Celery, shared_task
from flask import Flask


@shared_task(name="orders.tasks.update_stock")
def update_stock(article: str, pieces: int) -> str:
    """Stand for the task, which workers run."""
    raise NotImplementedError


def create_app() -> Flask:
    """Make the site."""
    site = Flask(__name__)
    site.config["CELERY"] = {"broker_url": "redis://localhost", "result_backend": "redis://localhost"}
    celery = Celery(site.name)
    celery.config_from_object(site.config["CELERY"])
    celery.set_default()
    site.extensions["celery"] = celery

    @site.get("/order/<article>")
    def order(article: str) -> dict[str, str]:
        """Send a task and wait for its result."""
        result = update_stock.delay(article, -1)
        return {"id": result.id, "answer": result.get(timeout=20)}

    return site
