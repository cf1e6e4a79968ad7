"""The shop's tasks. Each is safe to run twice, as late acknowledgement asks of every task."""

from __future__ import annotations

import time

from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.log import get_task_logger

from orders.app import app

logger = get_task_logger(__name__)


class CardDeclined(Exception):
    """The bank refused a payment."""


@app.task
def send_email(order: int, subject: str = "Your order") -> str:
    """Tell the customer (queue: critical)."""
    logger.info("email for order %s: %s", order, subject)
    return f"email for order {order} sent"


@app.task
def process_payment(order: int, cents: int) -> dict[str, int]:
    """Charge the customer (queue: critical)."""
    logger.info("payment for order %s", order)
    return {"order": order, "charged": cents}


@app.task
def decline_payment(order: int) -> None:
    """Fail, always: for trying out what happens to tasks that do."""
    raise CardDeclined(f"order {order}")


@app.task
def update_stock(article: str, pieces: int) -> str:
    """Count what is left (queue: default)."""
    logger.info("stock of %s: %+d", article, pieces)
    return f"{article}: {pieces:+d}"


@app.task
def batch_report(day: str, rows: int = 1000) -> dict[str, object]:
    """Add up a day's sales (queue: batch)."""
    return {"day": day, "total": sum(range(rows))}


@app.task
def batch_import(seconds: float) -> str:
    """Work for so many seconds (queue: batch); when told to stop, say how far it got."""
    logger.info("import started")
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            time.sleep(0.1)
    except SoftTimeLimitExceeded:
        left = end - time.monotonic()
        logger.warning("import interrupted with %.0f s to go", left)
        return f"interrupted with {left:.0f} s to go"
    logger.info("import finished")
    return "finished"


@app.task
def expire_carts() -> str:
    """Forget carts that nobody came back for; beat sends it every ten seconds."""
    return "no cart expired"
