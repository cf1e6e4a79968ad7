#!/usr/bin/python
"""Ansible module `redis_restart`: restart a Redis or Sentinel such that the site keeps a master."""

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_restart
short_description: Restart a Redis or Sentinel and wait until it serves again
description:
  - A master that has a replica first hands over to it. Writes are held for that moment, so that none is lost.
  - It returns when a replica has caught up with its master, or a Sentinel knows a quorum again. To be run on one host at a time.
options:
  sentinels: {description: "Sentinels that can order a failover, as address:port.", type: list, elements: str, default: []}
  master_name: {description: Name of the master in Sentinel., type: str, required: true}
  is_sentinel: {description: Whether it is a Sentinel itself., type: bool, default: false}
  server: {description: "The server: address, port, service, passwords, tls (files: ca, certificate, key).", type: dict, required: true}
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.redis_client import SERVER, Client, RedisError, connect, endpoint, wait_for

#: Seconds that a failover may take, and loading and synchronizing all data.
FAILOVER_TIME = 30
SYNC_TIME = 600
#: Milliseconds that writes are held at most while the master hands over.
PAUSE = 20_000


def hand_over(client: Client, arguments: dict[str, Any]) -> bool:
    """Make a replica the master, if this is the master and there is one; tell whether that was so."""
    if client.role() != "master" or not arguments["sentinels"] or client.info("replication")["connected_slaves"] == "0":
        return False
    client("CLIENT", "PAUSE", PAUSE, "WRITE")
    try:
        # From now on nothing is written: what replicas lack is on its way.
        wait_for("a replica that has everything", lambda: _caught_up(client), PAUSE / 1000)
        sentinel = wait_for("a Sentinel that orders a failover", lambda: _failover(arguments), FAILOVER_TIME)
        before = sentinel[1]
        after = wait_for("the failover", lambda: (now := _master(sentinel[0], arguments)) != before and now, FAILOVER_TIME)
        # Sentinel would say so only later. Writes that were held are refused now, and the clients ask for the new master.
        client("REPLICAOF", *after)
        client("CONFIG", "REWRITE")
        client("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    finally:
        client("CLIENT", "UNPAUSE")
    return True


def client_of(arguments: dict[str, Any]) -> Client:
    """Return a new connection to this host's server; a failover closes the earlier ones."""
    return connect(arguments["server"])


def _caught_up(client: Client) -> bool:
    state = client.info("replication")
    replicas = [dict(part.split("=") for part in value.split(",")) for name, value in state.items() if name.startswith("slave")]
    return any(replica["state"] == "online" and replica["offset"] == state["master_repl_offset"] for replica in replicas)


def _master(sentinel: Client, arguments: dict[str, Any]) -> list[str]:
    return list(sentinel("SENTINEL", "GET-MASTER-ADDR-BY-NAME", arguments["master_name"]))


def _failover(arguments: dict[str, Any]) -> tuple[Client, list[str]] | None:
    """Return the Sentinel that carries out the failover, and who was the master before; None if none does."""
    for address in arguments["sentinels"]:
        try:
            sentinel = Client(*endpoint(address), arguments["server"])
            before = _master(sentinel, arguments)
            sentinel("SENTINEL", "FAILOVER", arguments["master_name"])
            return sentinel, before
        except (OSError, RedisError):
            continue
    return None


def _serves(arguments: dict[str, Any]) -> bool:
    client = client_of(arguments)
    if arguments["is_sentinel"]:
        return str(client("SENTINEL", "CKQUORUM", arguments["master_name"])).startswith("OK")
    replication, persistence = client.info("replication"), client.info("persistence")
    # While it writes the file for data that it just copied, it would not stop, and has no copy of its own.
    writing = persistence["aof_rewrite_in_progress"] == "1" or persistence["aof_rewrite_scheduled"] == "1"
    return not writing and (replication["role"] == "master" or replication["master_link_status"] == "up")


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "server": SERVER,
            "sentinels": {"type": "list", "elements": "str", "default": []},
            "master_name": {"type": "str", "required": True},
            "is_sentinel": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    arguments = module.params
    service = arguments["server"]["service"]
    handed_over = False
    try:
        if not module.check_mode:
            if not arguments["is_sentinel"]:
                try:
                    client = client_of(arguments)
                except (OSError, RedisError):
                    pass  # It does not serve: nothing to hand over.
                else:
                    handed_over = hand_over(client, arguments)
                    wait_for("the end of the first copy of all data", lambda: _serves(arguments), SYNC_TIME)
            module.run_command(["systemctl", "restart", service], check_rc=True)
            wait_for(f"{service} in service", lambda: _serves(arguments), SYNC_TIME)
    except (OSError, RedisError) as error:
        module.fail_json(msg=f"{service}: {error}\nLook at: journalctl -u {service}")
    module.exit_json(changed=True, handed_over=handed_over)


if __name__ == "__main__":
    main()
