#!/usr/bin/python
"""Ansible module `rabbitmq_definitions`: vhosts, users, permissions, policies and queues of a RabbitMQ cluster, from one document."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rabbitmq_definitions
short_description: Make vhosts, users, permissions, policies, exchanges, queues and bindings of a RabbitMQ cluster as a document says
description:
  - Only what differs is imported. A password is set if the one that the cluster knows is another.
  - "What is ours and no longer in the document is removed: users with our mark among their tags and the user guest, permissions of our
    users, and policies whose names begin with our mark in the document's vhosts. Vhosts, exchanges, queues and bindings are never
    removed, since they may hold messages. All else belongs to others."
  - What RabbitMQ cannot change, such as the arguments of a queue, is a conflict. Then nothing is changed at all; the module fails, or
    only returns C(conflicts) in check mode, also from a node that does not run yet.
options:
  node: {description: The name of a node of the cluster on this host., type: str, required: true}
  definitions: {description: "The document, in the form of rabbitmqctl export_definitions.", type: dict, required: true}
  passwords: {description: Passwords by names of users of the document., type: dict, required: true}
  mark: {description: What tells ours from those of others., type: str, default: celery-platform}
"""

import base64
import hashlib
import hmac
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.rabbitmq_cli import Rabbit, RabbitError, wait_for

Item = dict[str, Any]
Key = tuple[str, ...]

#: What names one of a kind. All of a binding does: it has nothing else.
KEYS = {
    "vhosts": ("name",),
    "users": ("name",),
    "permissions": ("vhost", "user"),
    "policies": ("vhost", "name"),
    "exchanges": ("vhost", "name"),
    "queues": ("vhost", "name"),
    "bindings": ("vhost", "source", "routing_key", "destination_type", "destination", "arguments"),
}
#: What RabbitMQ takes as it is, or not at all (rabbitmq.com/docs/queues: property equivalence).
FIXED = ("exchanges", "queues")
#: How ours are removed.
REMOVED = {"users": "delete_user", "permissions": "clear_permissions", "policies": "clear_policy"}
#: Seconds that an import may take.
IMPORT_TIME = 60
HASHING = "rabbit_password_hashing_sha256"


def hashed(password: str, salt: bytes | None = None) -> str:
    """Return a password as RabbitMQ keeps it: base64(salt + SHA-256(salt + password)), with a salt of 4 bytes.

    From rabbitmq.com/docs/passwords, "Computing Password Hash".
    """
    salt = salt or secrets.token_bytes(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def knows(user: Item, password: str) -> bool:
    """Tell whether an exported user has this password."""
    known = user.get("password_hash") or ""
    salt = base64.b64decode(known)[:4]
    return user.get("hashing_algorithm") == HASHING and hmac.compare_digest(known, hashed(password, salt or b"none"))


def by_key(document: dict[str, Any], kind: str) -> dict[Key, Item]:
    """Return a document's items of a kind by what names them."""
    return {tuple(item[name] if name != "arguments" else json.dumps(item[name]) for name in KEYS[kind]): item for item in document[kind]}


def title(kind: str, key: Key) -> str:
    """Return how an operator calls an item: `queue orders/critical`."""
    name = "policy" if kind == "policies" else kind.removesuffix("s")
    return f"{name} {'/'.join(key[:2])} {' '.join(key[2:]).removesuffix('{}')}".strip()


class Difference:
    """What a document has that a cluster lacks, and the other way round."""

    def __init__(self, found: dict[str, Any], definitions: dict[str, Any], passwords: dict[str, str], mark: str) -> None:
        self.passwords = passwords
        self.imported: dict[str, list[Item]] = {}
        self.removed: list[tuple[str, Key]] = []
        self.changes: list[str] = []
        self.conflicts: list[str] = []
        for kind in KEYS:
            self._compare(kind, by_key(definitions, kind), by_key(found, kind))
        users = {item["name"] for item in found["users"] if mark in item["tags"]} | {"guest"}
        users -= self._remove("users", definitions, found, lambda key: key[-1] in users)
        # The permissions of those have gone with them.
        self._remove("permissions", definitions, found, lambda key: key[-1] in users)
        vhosts = {item["name"] for item in definitions["vhosts"]}
        self._remove("policies", definitions, found, lambda key: key[0] in vhosts and key[-1].startswith(mark))

    def _compare(self, kind: str, wanted: dict[Key, Item], found: dict[Key, Item]) -> None:
        for key, item in wanted.items():
            present = found.get(key)
            different = [name for name, value in item.items() if present is not None and present.get(name) != value]
            if kind == "users":
                password = self.passwords[item["name"]]
                item = item | {"password_hash": hashed(password), "hashing_algorithm": HASHING}
                if present is not None and knows(present, password):
                    item["password_hash"] = present["password_hash"]
                elif present is not None:
                    different.append("password")
            if present is None:
                self.changes.append(f"add {title(kind, key)}")
            elif not different or kind == "vhosts":
                # 3.10 cannot change a vhost either, but its default is for queues of others only.
                continue
            elif kind in FIXED:
                now, then = ({name: one.get(name) for name in different} for one in (present, item))
                self.conflicts.append(f"{title(kind, key)} has {json.dumps(now)}, not {json.dumps(then)}")
                continue
            else:
                self.changes.append(f"change {title(kind, key)}: {', '.join(different)}")
            self.imported.setdefault(kind, []).append(item)

    def _remove(self, kind: str, definitions: dict[str, Any], found: dict[str, Any], ours: Callable[[Key], bool]) -> set[str]:
        """Remove what is ours and no longer wanted; return the names of that."""
        unwanted = [key for key in sorted(by_key(found, kind).keys() - by_key(definitions, kind).keys()) if ours(key)]
        self.removed += [(kind, key) for key in unwanted]
        self.changes += [f"remove {title(kind, key)}" for key in unwanted]
        return {key[-1] for key in unwanted}


class Cluster:
    """The definitions of a cluster, beside the document that says how they should be."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.rabbit = Rabbit(module, module.params["node"])

    def difference(self) -> Difference:
        """Return what differs; of a node that does not run yet, in check mode, all.

        Raises:
            RabbitError: if the node does not tell.
        """
        found: dict[str, Any] = {kind: [] for kind in KEYS}
        try:
            if not self.module.check_mode or self.module.get_bin_path("rabbitmqctl"):
                found = json.loads(self.rabbit("export_definitions", "-"))
        except RabbitError:
            if not self.module.check_mode:
                raise
        return Difference(found, **{name: self.module.params[name] for name in ("definitions", "passwords", "mark")})

    def follow(self, difference: Difference) -> None:
        """Change what differs.

        Raises:
            RabbitError: if the node refuses.
        """
        if difference.imported:
            # The command runs as this user. From its standard input, 4.0's reads for ever.
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "definitions.json")
                with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                    json.dump(difference.imported, file)
                for one in (folder, path):
                    shutil.chown(one, "rabbitmq")
                self.rabbit("import_definitions", path)
        for kind, key in difference.removed:
            where = ["--vhost", key[0]] if kind != "users" else []
            self.rabbit(REMOVED[kind], *where, key[-1])
        # The command does not wait for the import, and does not tell what was refused.
        wait_for(lambda: not self.difference().changes, IMPORT_TIME, "The definitions were not all accepted (look at the node's log)")


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "node": {"type": "str", "required": True},
            "definitions": {"type": "dict", "required": True},
            "passwords": {"type": "dict", "required": True, "no_log": True},
            "mark": {"type": "str", "default": "celery-platform"},
        },
        supports_check_mode=True,
    )
    cluster = Cluster(module)
    try:
        difference = cluster.difference()
        if not module.check_mode:
            if difference.conflicts:
                raise RabbitError("RabbitMQ cannot change what exists, and nothing was changed: " + "; ".join(difference.conflicts))
            if difference.changes:
                cluster.follow(difference)
    except RabbitError as error:
        module.fail_json(msg=str(error))
    told = {"changes": difference.changes, "conflicts": difference.conflicts}
    module.exit_json(changed=bool(difference.changes), **told, diff={"prepared": "".join(f"{change}\n" for change in difference.changes)})


if __name__ == "__main__":
    main()
