"""The settings of a service: from the environment (`CELERY_PLATFORM_*`), secrets from systemd credentials."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import quote, urlsplit, urlunsplit

from kombu.entity import Exchange, Queue
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Seconds = Annotated[int, Field(gt=0)]


def read_credential(name: str) -> str | None:
    """Return a credential that systemd handed to this service (LoadCredential=), or None if it did not."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(folder, name) if folder else None
    return path.read_text().rstrip("\n") if path and path.exists() else None


def with_password(url: str, password: str | None) -> str:
    """Return the URL with this password for its user; unchanged if there is none, or no host to log in to."""
    parts = urlsplit(url)
    if not password or not parts.netloc:
        return url
    login, _, host = parts.netloc.rpartition("@")
    user = login.partition(":")[0]
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))


class Settings(BaseSettings):
    """What a service is told. Raises `pydantic.ValidationError`, naming the variable, if a value does not fit."""

    model_config = SettingsConfigDict(env_prefix="CELERY_PLATFORM_")

    #: The user's application, as `celery -A` takes it.
    application: str
    #: Without passwords: these are the credentials `broker_password` and `result_backend_password`.
    broker_url: str
    result_backend: str | None = None
    #: What all keys and channels in Redis begin with.
    key_prefix: str = ""
    default_queue: str = "default"
    queues: list[str] = ["default"]
    #: Queue and priority by task name; globs allowed, first match wins.
    routes: dict[str, dict[str, Any]] = {}
    #: A task is told to stop after the soft limit, its process is killed after the hard one.
    soft_time_limit: Seconds = 600
    time_limit: Seconds = 900
    #: Redis hands a task out again if it was not acknowledged for so long.
    visibility_timeout: Seconds = 3600
    result_expires: Seconds = 3600
    max_tasks_per_child: Annotated[int, Field(ge=1)] = 1000
    prefetch_multiplier: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _values_fit_together(self) -> Self:
        if not self.soft_time_limit < self.time_limit < self.visibility_timeout:
            raise ValueError(
                "CELERY_PLATFORM_SOFT_TIME_LIMIT < CELERY_PLATFORM_TIME_LIMIT < CELERY_PLATFORM_VISIBILITY_TIMEOUT must hold, "
                f"but they are {self.soft_time_limit}, {self.time_limit} and {self.visibility_timeout} seconds"
            )
        if self.default_queue not in self.queues:
            raise ValueError(f"CELERY_PLATFORM_DEFAULT_QUEUE must be one of CELERY_PLATFORM_QUEUES, {self.queues}")
        return self

    def celery_config(self) -> dict[str, Any]:
        """Return these settings, and what a production service needs besides, as Celery's own."""
        redis_options = {
            "global_keyprefix": self.key_prefix,
            "visibility_timeout": self.visibility_timeout,
            # A half-open connection must be noticed: kombu's default is to wait for ever.
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
        }
        return {
            "broker_url": with_password(self.broker_url, read_credential("broker_password")),
            "result_backend": self.result_backend and with_password(self.result_backend, read_credential("result_backend_password")),
            # kombu looks for unacknowledged messages every 100 s, and a killed worker's lock holds it off for
            # 300 s: a lost worker's tasks would wait that long beyond the visibility timeout.
            "broker_transport_options": redis_options
            | {"unacked_restore_interval": 2, "unacked_restore_throttle": 1, "unacked_mutex_expire": 15},
            "result_backend_transport_options": redis_options,
            "broker_connection_retry_on_startup": True,
            # None is "for ever": a worker waits for its broker, it does not give up after 100 tries.
            "broker_connection_max_retries": None,
            "broker_pool_limit": 10,
            "task_publish_retry_policy": {"max_retries": 60, "interval_start": 0.1, "interval_step": 0.2, "interval_max": 1.0},
            "accept_content": ["json"],
            "task_serializer": "json",
            "result_serializer": "json",
            "event_serializer": "json",
            # A misspelt queue is an error for the sender, not a queue that nobody consumes.
            "task_queues": [Queue(name, Exchange(name), routing_key=name) for name in self.queues],
            "task_create_missing_queues": False,
            "task_default_queue": self.default_queue,
            "task_routes": self.routes,
            "task_acks_late": True,
            "task_reject_on_worker_lost": True,
            "task_track_started": True,
            "worker_prefetch_multiplier": self.prefetch_multiplier,
            "worker_max_tasks_per_child": self.max_tasks_per_child,
            "worker_send_task_events": True,
            "task_send_sent_event": True,
            "result_expires": self.result_expires,
            # A killed beat must not send again what it has sent: by default it notes that every three minutes.
            "beat_sync_every": 1,
            "timezone": os.environ.get("TZ", "UTC"),
            "enable_utc": True,
        }
