"""Redis refuses everyone but its users, and its users everything but their work."""

from __future__ import annotations

import socket
import time

import pytest
import redis

from helpers.nodes import Node, wait_for

testinfra_hosts = ["ansible://redis"]


def answer(node: Node, *lines: str) -> list[str]:
    """Return what Redis says to lines that come from another host, as they stand on the wire."""
    with socket.create_connection((node.address, 6379), timeout=5) as connection:
        connection.sendall("".join(f"{line}\r\n" for line in lines).encode())
        replies = connection.makefile()
        return [replies.readline().rstrip() for _ in lines]


def test_strangers_are_refused(node: Node) -> None:
    assert answer(node, "PING")[0].startswith("-NOAUTH")
    assert answer(node, "GET orders:key")[0].startswith("-NOAUTH")
    for login in ("AUTH wrong", "AUTH default wrong", "AUTH orders wrong", "AUTH nobody wrong"):
        refused, still_refused = answer(node, login, "PING")
        assert refused.startswith("-WRONGPASS"), login
        assert still_refused.startswith("-NOAUTH"), login


def test_it_is_reachable_on_the_named_addresses_only(node: Node) -> None:
    listening = node.host.check_output("ss -Hltn sport = :6379")
    assert sorted(line.split()[3] for line in listening.splitlines()) == sorted(["127.0.0.1:6379", f"{node.address}:6379"])

    node.host.check_output("ip address add 192.0.2.53/32 dev lo")
    try:
        connect = "timeout 3 bash -c '</dev/tcp/%s/6379'"
        assert node.host.run(connect % "192.0.2.53").rc != 0
        assert node.host.run(connect % node.address).rc == 0
    finally:
        node.host.check_output("ip address del 192.0.2.53/32 dev lo")


@pytest.mark.parametrize(
    "command",
    [
        "CONFIG GET maxmemory",
        "CONFIG SET maxmemory 1",
        "FLUSHALL",
        "FLUSHDB",
        "KEYS *",
        "DEBUG JMAP",
        "ACL LIST",
        "MONITOR",
        "SAVE",
        "SHUTDOWN NOSAVE",
        "REPLICAOF NO ONE",
        "SCRIPT FLUSH",
        "EVAL return(1) 0",
        "CLIENT LIST",
        "GET other:key",
        "SET other:key 1",
        "LPUSH other:queue 1",
        "PUBLISH other:channel 1",
        "PSUBSCRIBE *",
    ],
)
def test_the_application_may_do_only_its_work(node: Node, command: str) -> None:
    application = node.redis("orders", node.secrets["vault_celery_app_redis_password"])
    # DEBUG is switched off for everyone, which Redis says before it looks at the user.
    with pytest.raises(redis.ResponseError, match=r"(?i)no permissions|DEBUG command not allowed"):
        application.execute_command(*command.split())


def test_the_application_may_use_its_own_keys(node: Node) -> None:
    application = node.redis("orders", node.secrets["vault_celery_app_redis_password"])
    application.set("orders:test", "1", ex=60)
    assert application.get("orders:test") == "1"
    application.delete("orders:test")


def test_it_keeps_what_it_acknowledged_when_it_is_killed(node: Node) -> None:
    admin = node.redis_admin()
    settings = admin.config_get("*")
    assert (settings["appendonly"], settings["maxmemory-policy"], settings["protected-mode"]) == ("yes", "noeviction", "yes")
    assert int(settings["maxmemory"]) > 0

    admin.set("test:kept", "yes")
    time.sleep(1.5)  # appendfsync everysec
    before = node.show("redis-server", "MainPID")
    node.host.check_output("systemctl kill --signal=KILL redis-server")

    def answers() -> bool:
        try:
            return bool(node.redis_admin().ping())
        except redis.exceptions.ConnectionError:
            return False

    wait_for("a new Redis", lambda: node.show("redis-server", "MainPID") != before and answers())
    assert node.redis_admin().getdel("test:kept") == "yes"
