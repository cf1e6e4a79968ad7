"""What users of Redis may do besides Celery's own, by the role's rules and a real Redis; producers: runtime/tests/test_producer.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from helpers.preflight import SECRET, site
from helpers.sentinels import Servers


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[redis.Redis]:
    """Return a client that is logged in as a user for a cache, of a Redis that has others' keys as well."""
    rules = site(tmp_path, redis_users=[{"name": "cache", "purpose": "cache", "password": SECRET}]).render("redis/templates/users.acl.j2")
    (line,) = re.findall(r"^user cache (.*)$", rules, re.MULTILINE)
    with Servers(tmp_path) as servers:
        port = servers.redis()
        server = servers.client(port)
        server.execute_command("ACL", "SETUSER", "cache", "reset", *line.replace("+client|setinfo", "").split())
        server.lpush("orders:default", "a task")
        with redis.Redis(port=port, username="cache", password=SECRET, decode_responses=True) as client:
            yield client


def test_a_cache_keeps_what_it_likes_below_its_prefix(cache: redis.Redis) -> None:
    cache.set("cache:a", "1", ex=60)
    cache.incr("cache:a")
    with cache.pipeline() as pipe:
        pipe.hset("cache:h", "x", "y").zadd("cache:z", {"a": 1}).lpush("cache:l", "x").expire("cache:l", 9)
        pipe.execute()
    assert cache.brpop(["cache:l"], timeout=1) == ("cache:l", "x")
    with cache.lock("cache:lock", timeout=5):
        assert cache.get("cache:a") == "2"
    pubsub = cache.pubsub()
    pubsub.subscribe("cache:news")
    assert cache.publish("cache:news", "x") == 1
    pubsub.close()


@pytest.mark.parametrize(
    "command",
    [
        ("GET", "orders:default"),
        ("RPOP", "orders:default"),
        ("DEL", "orders:default"),
        ("PUBLISH", "/0.celery.pidbox", "x"),
        ("PSUBSCRIBE", "*"),
        ("SCAN", "0"),
        ("KEYS", "*"),
        ("RANDOMKEY",),
        ("FLUSHDB",),
        ("CONFIG", "GET", "*"),
        ("CLIENT", "LIST"),
        ("SCRIPT", "KILL"),
        ("SHUTDOWN",),
        ("EVAL", "return redis.call('RPOP', 'orders:default')", "0"),
        ("SORT", "cache:l", "GET", "orders:*"),
        ("COPY", "orders:default", "cache:stolen"),
    ],
    ids=" ".join,
)
def test_a_cache_reaches_nothing_else(cache: redis.Redis, command: tuple[str, ...]) -> None:
    with pytest.raises(redis.exceptions.ResponseError, match=r"permission|can't access"):
        cache.execute_command(*command)
