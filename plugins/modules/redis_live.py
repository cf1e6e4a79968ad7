#!/usr/bin/python
"""Ansible module `redis_live`: a running Redis or Sentinel follows its files, without a restart wherever it can."""

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_live
short_description: Apply changed settings and users to a running Redis or Sentinel
description:
  - Settings that differ from the files are changed by CONFIG SET, SENTINEL SET and SENTINEL CONFIG SET, users by
    ACL SETUSER. That cuts no connection, which ACL LOAD would.
  - What cannot be changed live is returned as C(restart), a list of reasons.
options:
  unit_files: {description: Files that it must be restarted for if they are newer than its start., type: list, elements: path, default: []}
  settings: {description: Its files with settings., type: list, elements: path, required: true}
  acl: {description: Its file with users., type: path, required: true}
  sentinel: {description: "For a Sentinel: name of the master, quorum, and state, the file that it writes itself.", type: dict}
  server: {description: "The server: address, port, service, passwords, tls (files: ca, certificate, key).", type: dict, required: true}
"""

import os
import re
import ssl

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.redis_client import SERVER, Client, RedisError, connect, lines_of, wait_for

END = "-----END CERTIFICATE-----"
UNITS = {"": 1, "k": 1000, "kb": 1024, "m": 1000**2, "mb": 1024**2, "g": 1000**3, "gb": 1024**3}
#: Seconds that a server may take to load its data.
LOAD_TIME = 120
#: Seconds that a replica may take to reach its master, which may just start, and to copy all its data.
LINK_TIME = 30
SYNC_TIME = 600


def plain(value: str) -> str:
    """Return a setting's value as CONFIG GET prints it: sizes in bytes."""
    size = re.fullmatch(r"(\d+)([kmg]b?)?", value.lower())
    return str(int(size[1]) * UNITS[size[2] or ""]) if size else value


class Live:
    """A running server beside the files that say how it should be."""

    def __init__(self, client: Client, module: AnsibleModule) -> None:
        self.client = client
        self.arguments = module.params
        self.server = module.params["server"]
        self.check = module.check_mode
        self._run = module.run_command
        self.changed: list[str] = []
        self.restart: list[str] = []

    def is_newer(self, path: str) -> bool:
        """Tell whether a file is newer than the start of the service."""
        command = ["systemctl", "show", self.server["service"], "--property=ActiveEnterTimestamp", "--timestamp=us+utc", "--value"]
        _, started, _ = self._run(command, check_rc=True)
        _, seconds, _ = self._run(["date", "--utc", "+%s.%N", "--date", started.strip()], check_rc=True)
        return os.stat(path).st_mtime > float(seconds)

    def shows_old_certificate(self) -> bool:
        """Tell whether the server shows another certificate than the one in the file."""
        if not self.client.encrypted:
            return False
        with open(self.server["tls"]["certificate"]) as file:
            wanted = ssl.PEM_cert_to_DER_cert(file.read().partition(END)[0] + END)
        return self.client.certificate() != wanted

    def settings(self) -> None:
        """Change the settings of a Redis."""
        wanted = {words[0].lower(): " ".join(words[1:]) for path in self.arguments["settings"] for words in lines_of(path)}
        before = self.client.pairs("CONFIG", "GET", "*")
        different = {name: value for name, value in wanted.items() if plain(value) != before.get(name)}
        if self.shows_old_certificate():
            # The value is a file's name: setting it again reads the file again.
            different |= {name: wanted[name] for name in ("tls-cert-file", "tls-key-file")}
            self.changed.append("certificate")
        elif self.client.encrypted and self.is_newer(self.server["tls"]["ca"]) and not self.check:
            # Whether it knows the CAs of today cannot be seen, and reading them again harms nobody.
            self.client("CONFIG", "SET", "tls-ca-cert-file", wanted["tls-ca-cert-file"])
        if self.check:
            self.changed += different
            return
        if not different:
            return
        try:
            # In one command, since some settings (all of TLS) are only valid together.
            self.client("CONFIG", "SET", *(word for pair in different.items() for word in pair))
        except RedisError:
            for name, value in different.items():
                try:
                    self.client("CONFIG", "SET", name, value)
                except RedisError as error:
                    self.restart.append(f"{name}: {error}")
        after = self.client.pairs("CONFIG", "GET", "*")
        self.changed += [name for name in different if after.get(name) != before.get(name)]

    def sentinel(self) -> None:
        """Change the settings of a Sentinel, all but those of its own server."""
        if self.shows_old_certificate():
            self.restart.append("certificate")
        elif self.client.encrypted and self.is_newer(self.server["tls"]["ca"]):
            self.restart.append("CAs")
        name, quorum, state = (self.arguments["sentinel"][key] for key in ("master", "quorum", "state"))
        present = self.client.pairs("SENTINEL", "MASTER", name)
        # What it does not show, it writes down, without quotes.
        with open(state) as file:
            lines = [line.split() for line in file]
        hidden = {words[1]: words[3] for words in lines if words[:1] == ["sentinel"] and words[2:3] == [name] and len(words) == 4}
        common = self.client.pairs("SENTINEL", "CONFIG", "GET", "*")
        wanted = [["quorum", name, str(quorum)]]
        wanted += [words[1:] for path in self.arguments["settings"] for words in lines_of(path) if words[0] == "sentinel"]
        for option, *rest in wanted:
            command: list[str] = []
            if option == "myid":
                continue
            if rest[0] == name and len(rest) == 2:
                if (present | hidden).get(option) != rest[1]:
                    command = ["SENTINEL", "SET", name, option, rest[1]]
            elif common.get(option) != rest[0]:
                command = ["SENTINEL", "CONFIG", "SET", option, rest[0]]
            if command:
                self.changed.append(option)
                if not self.check:
                    self.client(*command)

    def listed_users(self) -> dict[str, str]:
        """Return the rules of all users by name."""
        # Redis 7.0 names this default for users that were reset, but not for those that it read from the file.
        return {line.split()[1]: line.replace(" sanitize-payload", "") for line in self.client("ACL", "LIST")}

    def users(self) -> None:
        """Change the users, without cutting the connections of those that stay."""
        # The words of this file have no quotes.
        with open(self.arguments["acl"]) as file:
            wanted = {words[1]: words[2:] for words in map(str.split, file) if words}
        before = self.listed_users()
        unwanted = sorted(set(before) - set(wanted))
        if self.check:
            self.changed += sorted(set(before) ^ set(wanted))
            return
        for name, rules in wanted.items():
            self.client("ACL", "SETUSER", name, "reset", *rules)
        if unwanted:
            self.client("ACL", "DELUSER", *unwanted)
        after = self.listed_users()
        self.changed += [f"user {name}" for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def follows(client: Client) -> bool:
    """Tell whether a replica gets its master's data; false as well while it is still copying them.

    Raises:
        LookupError: if it does not even begin to, for some time.
    """
    state = client.info("replication")
    if int(state.get("master_link_down_since_seconds", 0)) > LINK_TIME and state["master_sync_in_progress"] == "0":
        raise LookupError(f"the master, {state['master_host']}, does not answer, or not to this replica")
    return state["master_link_status"] == "up"


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "server": SERVER,
            "unit_files": {"type": "list", "elements": "path", "default": []},
            "settings": {"type": "list", "elements": "path", "required": True},
            "acl": {"type": "path", "required": True},
            "sentinel": {"type": "dict"},
        },
        supports_check_mode=True,
    )
    arguments = module.params
    service = arguments["server"]["service"]
    try:
        try:
            client = connect(arguments["server"], seconds=0 if module.check_mode else LOAD_TIME)
        except OSError:
            if not module.check_mode:
                raise
            module.exit_json(changed=False, settings=[], restart=[], role="")
        live = Live(client, module)
        if arguments["sentinel"]:
            live.sentinel()
        else:
            live.settings()
        live.users()
        live.restart += [f"{path} is newer" for path in arguments["unit_files"] if live.is_newer(path)]
        role = client.role()
        if role == "slave" and not module.check_mode:
            wait_for(f"data from the master, {client.info('replication')['master_host']}", lambda: follows(client), SYNC_TIME)
    except ssl.SSLCertVerificationError as error:
        told = "If CAs were exchanged at once, not one after the other as roles/pki/README.md has it, restart it on all hosts"
        module.fail_json(msg=f"{service} on this host does not talk to it: {error}\n{told}: systemctl restart {service}")
    except (OSError, RedisError, LookupError) as error:
        module.fail_json(msg=f"{service} on this host does not serve as configured: {error}\nLook at: journalctl -u {service}")
    module.exit_json(changed=bool(live.changed), settings=live.changed, restart=live.restart, role=role)


if __name__ == "__main__":
    main()
