"""Lets several beats share a schedule, of which one is active: settings of RedBeat (`beat --scheduler=redbeat.RedBeatScheduler`).

RedBeat keeps the schedule, and when each entry last ran, in Redis, beside a lock that the active beat extends with each
tick. When it is gone, the lock runs out and another one takes over. A beat that finds its lock lost ends, and stands by
once systemd has started it again. The arguments of entries are in Redis in plain text, also with encryption on.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote, urlsplit

from celery_platform import broker
from celery_platform.settings import Settings

#: Seconds without a tick after which another beat takes over. Beat ticks at least every `--max-interval` seconds.
LOCK_TIMEOUT = 30
#: Seconds for which commands are tried again when Redis is away.
RETRY_PERIOD = 60


def celery_config(settings: Settings) -> dict[str, Any]:
    """Return RedBeat's settings, or none if neither the broker nor the result backend is Redis."""
    store = settings.redis_store
    if store is None:
        return {}
    url = broker.with_password(*store)
    options: dict[str, Any] = {"retry_period": RETRY_PERIOD, "socket_timeout": broker.socket_timeout(url)}
    tls = broker.redis_tls(settings, url)
    if url.startswith("sentinel"):
        hosts = [urlsplit(one) for one in url.split(";")]
        options |= {
            "sentinels": [(host.hostname, host.port or 26379) for host in hosts],
            "service_name": settings.sentinel_master,
            "sentinel_kwargs": broker.sentinel_options(settings),
            "username": hosts[0].username,
            "password": unquote(hosts[0].password) if hosts[0].password else None,
            "db": int(hosts[0].path.strip("/") or 0),
        }
        url = "redis-sentinel://"
    return {
        "redbeat_redis_url": url,
        "redbeat_redis_options": options,
        "redbeat_redis_use_ssl": tls,
        "redbeat_key_prefix": f"{settings.key_prefix}redbeat:",
        "redbeat_lock_timeout": LOCK_TIMEOUT,
    }
