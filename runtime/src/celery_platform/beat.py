"""Lets several beats share a schedule, of which one is active: settings of RedBeat (`beat --scheduler=redbeat.RedBeatScheduler`).

RedBeat keeps the schedule, and when each entry last ran, in Redis, beside a lock that the active beat extends with each
tick. When it is gone, the lock runs out and another one takes over. A beat that finds its lock lost ends, and stands by
once systemd has started it again. The arguments of entries are in Redis in plain text, also with encryption on.

A beat that ticks tells so by the event `beat-tick`: the active one of several, or the only one.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from celery import Celery, signals

from celery_platform import broker
from celery_platform.dead_letters import RETRY_POLICY
from celery_platform.settings import Settings

logger = logging.getLogger(__name__)

#: Seconds without a tick after which another beat takes over. Beat ticks at least every `--max-interval` seconds.
LOCK_TIMEOUT = 30
#: Seconds for which commands are tried again when Redis is away.
RETRY_PERIOD = 60
#: Seconds between two events that tell of ticks, at least.
TELL_INTERVAL = 5


def celery_config(settings: Settings) -> dict[str, Any]:
    """Return RedBeat's settings, or none if neither the broker nor the result backend is Redis."""
    store = settings.redis_store
    if store is None:
        return {}
    url, password = store
    options: dict[str, Any] = {
        "retry_period": RETRY_PERIOD,
        "socket_timeout": broker.socket_timeout(settings, url),
        # Not in the URL: workers tell their settings to whoever may ask them (`inspect conf`, Flower), and Celery hides what is
        # called a password, but in none of RedBeat's URLs.
        "password": password.get_secret_value() if password else None,
    }
    tls = broker.redis_tls(settings, url)
    if url.startswith("sentinel"):
        hosts = [urlsplit(one) for one in url.split(";")]
        options |= {
            "sentinels": [(host.hostname, host.port or 26379) for host in hosts],
            "service_name": settings.sentinel_master,
            "sentinel_kwargs": broker.sentinel_options(settings),
            "username": hosts[0].username,
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


def install(app: Celery, settings: Settings) -> None:
    """Let the ticks of a beat be seen by who follows events."""
    ticked = threading.Event()

    def tell() -> None:
        events = app.events.Dispatcher(hostname=socket.gethostname(), enabled=False, buffer_while_offline=False)
        while ticked.wait():
            ticked.clear()
            try:
                with app.producer_pool.acquire(block=True) as producer:
                    events.publish("beat-tick", {}, producer, retry=True, retry_policy=RETRY_POLICY)
            except Exception as error:
                logger.debug("A tick is not told: %s", error)
            time.sleep(TELL_INTERVAL)

    def watch(sender: Any, **_: Any) -> None:
        tick = sender.scheduler.tick

        def tick_and_note(*args: Any, **options: Any) -> Any:
            pause = tick(*args, **options)
            ticked.set()
            return pause

        sender.scheduler.tick = tick_and_note
        # From a thread of its own: beat must not wait for a broker that is away.
        threading.Thread(target=tell, daemon=True, name="ticks").start()

    signals.beat_init.connect(watch, weak=False)
