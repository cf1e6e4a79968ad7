"""The application as its developers write it: no broker, no limits, no queues. Deployment brings those."""

from celery import Celery

app = Celery("orders", include=["orders.tasks"])

app.conf.beat_schedule = {
    "expire-carts": {"task": "orders.tasks.expire_carts", "schedule": 10.0},
}
