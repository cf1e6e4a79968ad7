"""How Celery reaches its broker and its result backend: URLs with their passwords, TLS, Sentinel, timeouts."""

from __future__ import annotations

import os
import ssl
from contextlib import suppress
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import redis
from celery import Celery
from kombu import connection
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from celery_platform.settings import SecretStr, Settings

#: Seconds. kombu's defaults wait for ever on a half-open connection. A frozen Redis is given up after SOCKET_TIMEOUT by who
#: sends a task, and after twice the interval of health checks by who waits for one; sooner with Sentinel, which has named
#: another master by then: so long after the time that replicas have for a publish.
SOCKET_TIMEOUT = 10
SENTINEL_SOCKET_TIMEOUT = 2
CONNECT_TIMEOUT = 5
HEALTH_CHECK_INTERVAL = 5
SENTINEL_HEALTH_CHECK_INTERVAL = 2
#: The same for RabbitMQ, whose heartbeats find a dead connection sooner.
RABBITMQ_TIMEOUT = 30
#: Seconds until a publisher takes a message for lost that RabbitMQ does not confirm: longer than the election of a leader.
CONFIRM_TIMEOUT = 30
#: Seconds between two looks for a lost broker: at first, by how much more each time, and at most. Celery leaves kombu's
#: 2, 4, 6 … 30, by which a worker finds the new master of a failover seconds after the producers did.
LOOK_INTERVAL = {"interval_start": 0.5, "interval_step": 0.1, "interval_max": 5}


#: Variables of the environment by which Celery overrides its configuration (celery/app/utils.py, Settings, 5.7.0).
URLS_OF_CELERY = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND")


class Connection(connection.Connection):
    """A connection that finds its broker soon after it is there again."""

    def ensure_connection(self, *args: Any, **options: Any) -> Any:
        """Connect as kombu does, but look more often unless told how often."""
        return super().ensure_connection(*args, **(LOOK_INTERVAL if len(args) < 3 else {}) | options)  # type: ignore[no-untyped-call]


def install(app: Celery, _: Settings) -> None:
    """Let an application use such connections."""
    app.amqp.Connection = Connection


def override_environment() -> None:
    """Let the deployment's broker and result backend win over the environment, as they do over the application's configuration."""
    for name in URLS_OF_CELERY:
        os.environ.pop(name, None)


def with_password(url: str, password: SecretStr | None) -> str:
    """Return the URL, or each of several with `;` between them, with this password for its user."""
    if password is None:
        return url
    return ";".join(_with_password(one, password.get_secret_value()) for one in url.split(";"))


def _with_password(url: str, password: str) -> str:
    parts = urlsplit(url)
    if not parts.netloc:
        return url
    login, _, host = parts.netloc.rpartition("@")
    user = login.partition(":")[0]
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))


def celery_config(settings: Settings) -> dict[str, Any]:
    """Return Celery's own settings for the broker and the result backend."""
    config: dict[str, Any] = {
        "broker_url": with_password(settings.broker_url, settings.broker_password),
        "broker_pool_limit": settings.pool_limit,
        "broker_connection_retry_on_startup": True,
        # None is "for ever": a worker waits for its broker, it does not give up after 100 tries.
        "broker_connection_max_retries": None,
        "task_publish_retry_policy": {
            "max_retries": settings.publish_timeout,
            "interval_start": 0.1,
            "interval_step": 0.2,
            "interval_max": 1.0,
        },
    }
    if settings.uses_redis_broker:
        # kombu looks for unacknowledged messages every 100 s, and a killed worker's lock holds it off for
        # 300 s: a lost worker's tasks would wait that long beyond the visibility timeout.
        sweep = {"unacked_restore_interval": 2, "unacked_restore_throttle": 1, "unacked_mutex_expire": 15}
        confirm = {"confirm_replicas": settings.confirm_replicas, "confirm_timeout": settings.confirm_timeout}
        config["broker_transport_options"] = _redis_options(settings, settings.broker_url) | sweep | confirm
        if tls := redis_tls(settings, settings.broker_url):
            config["broker_use_ssl"] = tls
    if settings.uses_rabbitmq:
        config["broker_heartbeat"] = 20
        config["broker_transport_options"] = {
            "confirm_publish": True,
            "confirm_timeout": CONFIRM_TIMEOUT,  # guards.py
            "declare": settings.declare_queues,  # guards.py
            "read_timeout": RABBITMQ_TIMEOUT,
            "write_timeout": RABBITMQ_TIMEOUT,
        }
        if settings.broker_url.startswith("amqps"):
            config["broker_use_ssl"] = _rabbitmq_tls(settings)
    config |= _result_config(settings)
    return config


def redis_client(settings: Settings, url: str, password: SecretStr | None, timeout: float) -> redis.Redis:
    """Return a client for the Redis behind a URL of the settings; it connects with its first command.

    It waits so many seconds for a connection or an answer, and does not try again.
    """
    hosts = [urlsplit(one) for one in with_password(url, password).split(";")]
    times = {"socket_timeout": timeout, "socket_connect_timeout": timeout, "retry": Retry(NoBackoff(), 0)}
    options: dict[str, Any] = times | {
        "username": hosts[0].username or None,
        "password": unquote(hosts[0].password) if hosts[0].password else None,
        "db": int(hosts[0].path.strip("/") or 0),
    }
    if tls := redis_tls(settings, url):
        options |= {"ssl": True} | tls
    if not url.startswith("sentinel"):
        return redis.Redis(host=hosts[0].hostname or "127.0.0.1", port=hosts[0].port or 6379, **options)
    sentinels = [(host.hostname or "127.0.0.1", host.port or 26379) for host in hosts]
    sentinel: Any = Sentinel(sentinels, sentinel_kwargs=sentinel_options(settings) | times)  # type: ignore[no-untyped-call]
    master: redis.Redis = sentinel.master_for(settings.sentinel_master, **options)
    return master


def redis_clusters(settings: Settings) -> list[str]:
    """Return which of broker and result backend is a Redis Cluster, whose keys Celery cannot use together.

    One that does not answer, or does not tell (some providers allow no INFO), is taken for none.
    """
    found = []
    places = {"broker": (settings.broker_url, settings.broker_password)}
    places["result backend"] = (settings.result_backend or "", settings.result_backend_password)
    for name, (url, password) in places.items():
        if url.startswith(("redis://", "rediss://")):
            with suppress(redis.RedisError, OSError), redis_client(settings, url, password, CONNECT_TIMEOUT) as client:
                found += [name] if client.info("cluster")["cluster_enabled"] else []
    return found


def _result_config(settings: Settings) -> dict[str, Any]:
    url = settings.result_backend
    if url is None:
        return {"result_backend": None, "task_ignore_result": True}
    config: dict[str, Any] = {"result_backend": with_password(url, settings.result_backend_password)}
    if url.startswith(("redis", "sentinel")):
        config["result_backend_transport_options"] = _redis_options(settings, url) | {"retry_policy": {"timeout": 5.0}}
        config["redis_socket_timeout"] = socket_timeout(settings, url)
        config["redis_socket_connect_timeout"] = CONNECT_TIMEOUT
        config["redis_socket_keepalive"] = True
        config["redis_backend_health_check_interval"] = _health_check_interval(url)
        if tls := redis_tls(settings, url):
            config["redis_backend_use_ssl"] = tls
    return config


def socket_timeout(settings: Settings, url: str) -> int:
    """Return how many seconds a command may take with the Redis behind a URL of the settings."""
    return settings.confirm_timeout + SENTINEL_SOCKET_TIMEOUT if url.startswith("sentinel") else SOCKET_TIMEOUT


def _health_check_interval(url: str) -> int:
    return SENTINEL_HEALTH_CHECK_INTERVAL if url.startswith("sentinel") else HEALTH_CHECK_INTERVAL


def _redis_options(settings: Settings, url: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "global_keyprefix": settings.key_prefix,
        "visibility_timeout": settings.visibility_timeout,
        "socket_timeout": socket_timeout(settings, url),
        "socket_connect_timeout": CONNECT_TIMEOUT,
        "socket_keepalive": True,
        "health_check_interval": _health_check_interval(url),
    }
    if url.startswith("sentinel"):
        options |= {"master_name": settings.sentinel_master, "sentinel_kwargs": sentinel_options(settings)}
    return options


def sentinel_options(settings: Settings) -> dict[str, Any]:
    """Return how redis-py connects to Sentinel itself: user, password, TLS, timeouts."""
    # With options of its own, redis-py derives no timeout for these connections.
    options: dict[str, Any] = {"socket_timeout": CONNECT_TIMEOUT, "socket_connect_timeout": CONNECT_TIMEOUT}
    if settings.sentinel_password:
        options["password"] = settings.sentinel_password.get_secret_value()
        if settings.sentinel_user:
            options["username"] = settings.sentinel_user
    if tls := redis_tls(settings, "sentinel"):
        options |= {"ssl": True} | tls
    return options


def redis_tls(settings: Settings, url: str) -> dict[str, Any] | None:
    """Return redis-py's options for TLS with the Redis behind a URL of the settings, or None for plain text."""
    if not url.startswith("rediss") and not (url.startswith("sentinel") and settings.tls_ca_file):
        return None
    return {
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
        "ssl_check_hostname": True,
        # None: those of the system.
        "ssl_ca_certs": str(settings.tls_ca_file) if settings.tls_ca_file else None,
        "ssl_certfile": str(settings.tls_cert_file) if settings.tls_cert_file else None,
        "ssl_keyfile": str(settings.tls_key_file) if settings.tls_key_file else None,
    }


def _rabbitmq_tls(settings: Settings) -> dict[str, Any]:
    return {
        "cert_reqs": ssl.CERT_REQUIRED,
        "ca_certs": str(settings.tls_ca_file) if settings.tls_ca_file else None,
        "certfile": str(settings.tls_cert_file) if settings.tls_cert_file else None,
        "keyfile": str(settings.tls_key_file) if settings.tls_key_file else None,
        # None is each host's own name (guards.py); without an entry, py-amqp verifies no name.
        "server_hostname": settings.tls_server_name,
    }
