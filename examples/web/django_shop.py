"""A Django site whose Celery application reads its settings from those of Django, as Celery's documentation has it."""

from __future__ import annotations

import secrets

import django
from celery import Celery
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path

settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    SECRET_KEY=secrets.token_urlsafe(),
    CELERY_BROKER_URL="redis://localhost:6379/0",
    CELERY_RESULT_BACKEND="redis://localhost:6379/1",
    CELERY_TASK_SERIALIZER="json",
)
django.setup()
app = Celery("django_shop")
app.config_from_object("django.conf:settings", namespace="CELERY")


def order(request: HttpRequest, article: str) -> JsonResponse:
    """Send a task and wait for its result."""
    result = app.send_task("orders.tasks.update_stock", (article, -1))
    return JsonResponse({"id": result.id, "answer": result.get(timeout=20)})


urlpatterns = [path("order/<str:article>", order)]
application = get_wsgi_application()
