#!/usr/bin/python
"""Ansible module `certificate_check`: try a certificate and its key as services will use them. Runs on the host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: certificate_check
short_description: Try a certificate, its key and its CA in a TLS handshake
description:
  - Plays server and client in memory, each verifying the other, with the TLS library and the default rules of the
    host's Python. Needs nothing but Python; changes nothing. The key stays in the module.
options:
  certificate:
    description: File of the certificate, followed by intermediate ones if there are any.
    type: path
    required: true
  key:
    description: File of its key.
    type: path
    required: true
  ca:
    description: File of the CAs that must have signed it.
    type: path
    required: true
  names:
    description: Names and addresses that the certificate must hold.
    type: list
    elements: str
    default: []
  group:
    description: Group that must be able to read the key. Not checked if unset.
    type: str
  service:
    description: Address and port of a service, as C(127.0.0.1:6379) or C([::1]:6379), that is asked which certificate it shows.
    type: str
author: Celery Platform
"""

RETURN = r"""
problems:
  description: What is wrong, in words, under C(ca), C(certificate) and C(key); empty if nothing is.
  returned: always
  type: dict
days_left:
  description: Whole days until the certificate expires, below zero if it has. Unset if it cannot be told.
  returned: always
  type: int
older_than_ca:
  description: Whether the file of the CAs was written after the certificate.
  returned: always
  type: bool
key_file:
  description: C(owner), C(group) and C(mode) of the key, as C(root), C(ssl-cert) and C(0640). Unset if there is none.
  returned: always
  type: dict
shown:
  description: Whether the service shows this very certificate. Unset if it does not answer, or I(service) is unset.
  returned: always
  type: bool
content:
  description: The certificate as text, '' if there is none.
  returned: always
  type: str
"""

import grp
import pwd
import socket
import ssl
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DAY = 86400  # seconds
#: Turns of client and server after which a handshake has ended; TLS 1.2 needs three (RFC 5246, 7.3), TLS 1.3 two.
ROUNDS = 10


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None) -> dict[str, Any]:
    """Let two contexts greet each other in memory; return the server's certificate as the client sees it.

    Raises ssl.SSLError, with the library's own reason, if one refuses the other.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_side=False, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    # With TLS 1.3 the client is done before the server has judged its certificate: only if both are done, all is well.
    waiting = set(ends)
    for _ in range(ROUNDS):
        for end in ends:
            try:
                end.do_handshake()
                waiting.discard(end)
            except ssl.SSLWantReadError:
                continue
        if not waiting:
            return dict(ends[0].getpeercert() or {})
    raise ssl.SSLError("the handshake does not end")


def reason(error: ssl.SSLError) -> str:
    """Return why a certificate was refused, without OpenSSL's codes."""
    return getattr(error, "verify_message", "") or (error.reason or str(error)).lower().replace("_", " ")


def days_until(not_after: str) -> int:
    """Return the whole days until a date as ssl writes it, rounded down."""
    return int((ssl.cert_time_to_seconds(not_after) - time.time()) // DAY)


def readable_by(group: str, path: Path) -> bool:
    """Tell whether a process that has only this group beyond `nobody` can read a file. Needs root."""
    test = ["/usr/bin/test", "-r", path]
    return subprocess.run(test, user="nobody", group="nogroup", extra_groups=[group]).returncode == 0  # noqa: S603


def describe(key: Path) -> dict[str, str] | None:
    """Return whose file a key is, and its mode; None if there is none. Who has no name has a number."""
    if not key.is_file():
        return None
    about = key.stat()
    try:
        owner = pwd.getpwuid(about.st_uid).pw_name
    except KeyError:
        owner = str(about.st_uid)
    try:
        group = grp.getgrgid(about.st_gid).gr_name
    except KeyError:
        group = str(about.st_gid)
    return {"owner": owner, "group": group, "mode": f"{stat.S_IMODE(about.st_mode):04o}"}


def check_key(key: Path, group: str | None) -> str:
    """Say what is wrong with who can read the key; '' if nothing is."""
    if key.stat().st_mode & 0o007:
        return f"{key} is open to everyone on the host"
    if group:
        try:
            grp.getgrnam(group)
        except KeyError:
            return f"cannot be given to the group {group}, which the host does not have"
        if not readable_by(group, key):
            return f"{key} cannot be read by the group {group}"
    return ""


def check(certificate: Path, key: Path, ca: Path, names: list[str], group: str | None) -> tuple[dict[str, str], int | None]:
    """Return what is wrong, by file, and the days left until the certificate expires."""
    for name, path in (("ca", ca), ("certificate", certificate), ("key", key)):
        if not path.is_file():
            return {name: f"{path} does not exist on the host"}, None

    try:
        client = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=ca)
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
    except ssl.SSLError:
        return {"ca": f"{ca} holds no certificate in PEM format"}, None
    # Any name is right until it is asked for one.
    client.check_hostname = False
    server.verify_mode = ssl.CERT_REQUIRED
    try:
        for context in (client, server):
            context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return {"key": f"{key} is not the key of {certificate}"}, None
        return {"certificate": f"{certificate} and {key} cannot be loaded ({reason(error)})"}, None

    try:
        days_left = days_until(handshake(server, client, None)["notAfter"])
    except ssl.SSLError as error:
        return {"certificate": f"{certificate} is refused: {reason(error)}"}, None

    client.check_hostname = True
    missing = []
    for name in names:
        try:
            handshake(server, client, name)
        except ssl.SSLError:
            missing.append(name)
    problems = {"certificate": f"{certificate} lacks {', '.join(missing)}"} if missing else {}
    if problem := check_key(key, group):
        problems["key"] = problem
    return problems, days_left


def shows(service: str, certificate: Path, key: Path) -> bool | None:
    """Tell whether a service shows just this certificate in a handshake; None if nobody answers there."""
    address, _, port = service.rpartition(":")
    target = (address.strip("[]"), int(port))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # What is asked is which certificate it has, not whether it is a good one.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        context.load_cert_chain(certificate, key)
        with (
            socket.create_connection(target, timeout=10) as connection,
            context.wrap_socket(connection) as session,
        ):
            theirs = session.getpeercert(binary_form=True)
    except ssl.SSLError:
        return False
    except OSError:
        return None
    first, end, _ = certificate.read_text().partition("-----END CERTIFICATE-----")
    return theirs == ssl.PEM_cert_to_DER_cert(first[first.index("-----BEGIN") :] + end)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "certificate": {"type": "path", "required": True},
            "key": {"type": "path", "required": True, "no_log": False},
            "ca": {"type": "path", "required": True},
            "names": {"type": "list", "elements": "str", "default": []},
            "group": {"type": "str"},
            "service": {"type": "str"},
        },
        supports_check_mode=True,
    )
    certificate, key, ca = (Path(module.params[name]) for name in ("certificate", "key", "ca"))
    service = module.params["service"]
    try:
        problems, days_left = check(certificate, key, ca, module.params["names"], module.params["group"])
        module.exit_json(
            changed=False,
            problems=problems,
            days_left=days_left,
            older_than_ca=certificate.is_file() and ca.is_file() and certificate.stat().st_mtime < ca.stat().st_mtime,
            key_file=describe(key),
            shown=shows(service, certificate, key) if service and certificate.is_file() else None,
            content=certificate.read_text() if certificate.is_file() else "",
        )
    except (OSError, ValueError) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
