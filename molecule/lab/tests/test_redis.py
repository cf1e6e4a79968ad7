"""Redis hosts and Sentinels talk only by TLS, only with those they know, and each user does only its work."""

from __future__ import annotations

import pytest
import redis

from helpers.authority import Authority
from helpers.cluster import MASTER, PASSWORDS, REDIS, SENTINEL, Cluster
from helpers.nodes import Node, wait_for

testinfra_hosts = ["ansible://data1"]

BOTH = pytest.mark.parametrize("port", [REDIS, SENTINEL])


def test_two_replicas_have_what_the_master_was_told(cluster: Cluster) -> None:
    cluster.replicas_follow()
    master = cluster.master()
    client = cluster.client(master)
    client.set("test:copied", "yes")
    assert client.wait(2, 5000) == 2
    assert [cluster.client(name).get("test:copied") for name in cluster.nodes] == ["yes"] * 3
    client.delete("test:copied")
    assert client.config_get("min-replicas-to-write") == {"min-replicas-to-write": "1"}
    assert {cluster.client(name, SENTINEL).sentinel_master(MASTER)["quorum"] for name in cluster.nodes} == {2}


@BOTH
def test_who_has_no_certificate_of_the_site_is_refused(cluster: Cluster, port: int) -> None:
    stranger = cluster.save("stranger", Authority().issue(["data1"]))
    for name in cluster.nodes:
        assert cluster.say(name, port, "PING", tls=False)[0] == ""
        assert cluster.say(name, port, "PING")[0] == ""
        assert cluster.say(name, port, "PING", certificate=stranger)[0] == ""
        assert cluster.say(name, port, "PING", certificate=cluster.certificate)[0].startswith("-NOAUTH")


@BOTH
def test_who_has_no_password_is_refused(cluster: Cluster, port: int) -> None:
    for login in ("AUTH wrong", "AUTH default wrong", "AUTH orders wrong", "AUTH sentinel wrong", "AUTH nobody wrong"):
        refused, still_refused = cluster.say("data1", port, login, "INFO", certificate=cluster.certificate)
        assert refused.startswith("-WRONGPASS"), login
        assert still_refused.startswith("-NOAUTH"), login


def test_nothing_listens_but_tls_on_the_named_addresses(cluster: Cluster) -> None:
    for node in cluster.nodes.values():
        listening = node.host.check_output("ss -Hltnp | grep redis").splitlines()
        expected = [f"{address}:{port}" for address in ("127.0.0.1", node.address) for port in (REDIS, SENTINEL)]
        assert sorted(line.split()[3] for line in listening) == sorted(expected)


@pytest.mark.parametrize(
    ("user", "port", "allowed", "refused"),
    [
        ("orders", REDIS, ["SET orders:x 1", "GET orders:x", "DEL orders:x"], ["GET x", "CONFIG GET *", "REPLICAOF NO ONE", "KEYS *"]),
        ("orders", SENTINEL, ["SENTINEL MASTERS"], ["SENTINEL FAILOVER celery", "SENTINEL REMOVE celery", "ACL LIST", "PUBLISH x y"]),
        ("replication", REDIS, ["PING"], ["GET orders:x", "INFO", "CONFIG GET masterauth", "SUBSCRIBE x"]),
        ("sentinel", REDIS, ["INFO", "ROLE"], ["GET orders:x", "SET x 1", "CONFIG GET masterauth", "CONFIG SET port 1", "ACL LIST"]),
        ("sentinel", SENTINEL, ["PING"], ["SENTINEL MASTERS", "SENTINEL FAILOVER celery", "SENTINEL SET celery quorum 1"]),
        ("exporter", REDIS, ["INFO", "LLEN orders:x"], ["GET orders:x", "SET x 1", "CONFIG GET masterauth", "FLUSHALL"]),
        ("exporter", SENTINEL, ["INFO", "SENTINEL MASTERS"], ["SENTINEL FAILOVER celery", "SENTINEL RESET *"]),
        (
            "operator",
            REDIS,
            ["INFO", "CLIENT LIST", "GET orders:x"],
            ["SET x 1", "CONFIG GET masterauth", "ACL LIST", "FLUSHALL", "SHUTDOWN"],
        ),
        (
            "operator",
            SENTINEL,
            ["SENTINEL MASTERS", "SENTINEL CKQUORUM celery"],
            ["SENTINEL SET celery quorum 1", "SENTINEL REMOVE celery"],
        ),
    ],
)
def test_each_user_may_do_only_its_work(cluster: Cluster, user: str, port: int, allowed: list[str], refused: list[str]) -> None:
    clients = {name: cluster.client(name, port, user, cluster.secrets[f"vault_{PASSWORDS[user]}"]) for name in cluster.nodes}
    for command in allowed:
        clients[cluster.master()].execute_command(*command.split())
    for client in clients.values():
        for command in refused:
            with pytest.raises(redis.ResponseError, match=r"(?i)no permissions"):
                client.execute_command(*command.split())


def test_replication_has_no_business_in_a_sentinel(cluster: Cluster) -> None:
    with pytest.raises(redis.AuthenticationError):
        cluster.client("data1", SENTINEL, "replication", cluster.secrets["vault_redis_replication_password"]).ping()


@pytest.mark.parametrize("unit", ["redis-server.service", "redis-sentinel.service"])
def test_the_sandbox_leaves_little_exposed(node: Node, unit: str) -> None:
    state = node.show(unit, "ActiveState", "UnitFileState", "Restart")
    assert state == {"ActiveState": "active", "UnitFileState": "enabled", "Restart": "always"}
    exposure = node.host.check_output("systemd-analyze security --no-pager %s", unit).splitlines()[-1]
    assert float(exposure.split(": ")[1].split()[0]) <= 1.5, exposure


def test_no_secret_is_readable_by_others(node: Node) -> None:
    for pattern in ("/etc/redis/", "/var/lib/redis/"):
        readable = node.host.run(f"runuser -u nobody -- find {pattern} -type f -readable")
        assert readable.stdout == ""


def test_our_settings_win_over_what_redis_has_written(cluster: Cluster) -> None:
    name = next(name for name in cluster.nodes if name != cluster.master())
    node, client = cluster.nodes[name], cluster.client(name)
    ours = client.config_get("maxmemory")["maxmemory"]
    client.config_set("maxmemory", "123456789")
    client.config_set("timeout", "77")
    client.config_rewrite()
    assert "123456789" in node.host.file("/var/lib/redis/state.conf").content_string

    node.host.check_output("systemctl restart redis-server")
    cluster.replicas_follow()
    client = cluster.client(name)
    assert client.config_get("maxmemory")["maxmemory"] == ours
    assert client.config_get("timeout")["timeout"] == "0"
    assert client.role()[0] == "slave"


def test_our_settings_win_over_what_sentinel_has_written(cluster: Cluster) -> None:
    node = cluster.nodes["data1"]
    before = cluster.master()
    cluster.client("data1", SENTINEL).execute_command("SENTINEL SET", MASTER, "down-after-milliseconds", "60000")
    assert f"down-after-milliseconds {MASTER} 60000" in node.host.file("/var/lib/redis/sentinel-state.conf").content_string

    node.host.check_output("systemctl restart redis-sentinel")

    def settings() -> dict[str, object]:
        try:
            return cluster.client("data1", SENTINEL).sentinel_master(MASTER)
        except redis.ConnectionError:
            return {}

    wait_for("the Sentinel", settings)
    assert settings()["down-after-milliseconds"] == 3000
    wait_for("the other Sentinels", lambda: settings()["num-other-sentinels"] == 2)
    assert cluster.master() == before
