#!/usr/bin/python
"""Ansible module `redis_seed`: what a new Redis or Sentinel must know of the others before its first start."""

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_seed
short_description: Write the state file of a new Redis or Sentinel
description:
  - Redis and Sentinel themselves keep in this file who the master is, and change it at each failover. So it is written
    only where there is none; then the Sentinels are asked for the master, and if none answers, the Redis hosts.
  - Where nobody answers, nothing was installed yet, and I(first) becomes the master.
  - It fails, and writes nothing, if some answer and it is still not clear who the master is.
options:
  path: {description: The file., type: path, required: true}
  content: {description: "What it says, with {address} and {port} for the master's.", type: str, required: true}
  content_of_master: {description: What it says on the master itself; the same if unset., type: str}
  itself: {description: "This host, as address:port of its Redis.", type: str, required: true}
  first: {description: "The host that is the master of a new site, as address:port.", type: str, required: true}
  nodes: {description: "All Redis hosts, as address:port.", type: list, elements: str, required: true}
  sentinels: {description: "All Sentinels, as address:port.", type: list, elements: str, default: []}
  master_name: {description: Name of the master in Sentinel., type: str, required: true}
  server: {description: "The server: address, port, service, passwords, tls (files: ca, certificate, key).", type: dict, required: true}
"""

import os
import shutil
from collections.abc import Iterator
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.redis_client import SERVER, Client, RedisError, endpoint, joined


def masters_by_sentinels(sentinels: list[str], name: str, server: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Yield the epoch and address of the master as each Sentinel knows it; of two answers the higher epoch is newer."""
    for sentinel in sentinels:
        try:
            master = Client(*endpoint(sentinel), server).pairs("SENTINEL", "MASTER", name)
        except (OSError, RedisError):
            continue
        yield int(master["config-epoch"]), joined(master["ip"], master["port"])


def roles(nodes: list[str], server: dict[str, Any]) -> dict[str, str]:
    """Return what the Redis hosts that answer say they are."""
    found = {}
    for node in nodes:
        try:
            found[node] = Client(*endpoint(node), server).role()
        except (OSError, RedisError):
            continue
    return found


def find_master(arguments: dict[str, Any]) -> str:
    """Return the master as address:port.

    Raises:
        LookupError: if it is not clear who it is.
    """
    if known := list(masters_by_sentinels(arguments["sentinels"], arguments["master_name"], arguments["server"])):
        return max(known)[1]
    found = roles(arguments["nodes"], arguments["server"])
    if not found:
        return str(arguments["first"])
    masters = [node for node, role in found.items() if role == "master"]
    if len(masters) == 1:
        return masters[0]
    said = ", ".join(f"{node} is {'a replica' if role == 'slave' else role}" for node, role in found.items())
    raise LookupError(f"No Sentinel answers, and who is the master is not clear: {said}. Start the Sentinels, then run again.")


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "server": SERVER,
            "path": {"type": "path", "required": True},
            "content": {"type": "str", "required": True},
            "content_of_master": {"type": "str"},
            "itself": {"type": "str", "required": True},
            "first": {"type": "str", "required": True},
            "nodes": {"type": "list", "elements": "str", "required": True},
            "sentinels": {"type": "list", "elements": "str", "default": []},
            "master_name": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    path = module.params["path"]
    if os.path.exists(path):
        module.exit_json(changed=False)
    try:
        master = find_master(module.params)
    except LookupError as unclear:
        module.fail_json(msg=str(unclear))
    if not module.check_mode:
        content = module.params["content"]
        if master == module.params["itself"] and module.params["content_of_master"] is not None:
            content = module.params["content_of_master"]
        address, port = endpoint(master)
        with open(f"{path}.new", "w", opener=lambda name, flags: os.open(name, flags, 0o640)) as file:
            file.write(content.format(address=address, port=port))
        shutil.chown(f"{path}.new", "redis", "redis")
        os.replace(f"{path}.new", path)
    module.exit_json(changed=True, master=master)


if __name__ == "__main__":
    main()
