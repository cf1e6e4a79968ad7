"""A FastAPI site: one route in a thread, one that is a coroutine."""

from __future__ import annotations

import asyncio
import os

from celery import Celery
from fastapi import FastAPI

celery = Celery("fastapi_shop", broker=os.environ.get("BROKER", "amqp://guest@localhost//"), backend="rpc://")
app = FastAPI()


@app.get("/order/{article}")
def order(article: str) -> dict[str, str]:
    """Send a task and wait for its result."""
    result = celery.send_task("orders.tasks.update_stock", (article, -1))
    return {"id": result.id, "answer": result.get(timeout=20)}


@app.get("/later/{article}")
async def later(article: str) -> dict[str, str]:
    """Send a task that is to run later."""
    result = await asyncio.to_thread(celery.send_task, "orders.tasks.update_stock", (article, -1), countdown=60)
    return {"id": result.id}
