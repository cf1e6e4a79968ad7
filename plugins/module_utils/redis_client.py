"""What our modules need of Redis and Sentinel: a connection, with TLS and a login, and the files that they own."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: The argument that every module takes: a server of this host, or how to log in to servers of other hosts.
SERVER = {
    "type": "dict",
    "required": True,
    "options": {
        "address": {"type": "str", "required": True},
        "port": {"type": "int", "required": True},
        "service": {"type": "str", "required": True},
        # Passwords of the user `default`. A server that was not told of the first one yet still wants the second one.
        "passwords": {"type": "list", "elements": "str", "no_log": True, "required": True},
        # Keys: ca, certificate, key. Without them connections are not encrypted.
        "tls": {"type": "dict", "default": {}},
    },
}


class RedisError(Exception):
    """What the server answered in place of a result."""


class Client:
    """A connection. Replies are int, str, None, or lists of them."""

    def __init__(self, address: str, port: int, server: dict[str, Any], timeout: float = 3) -> None:
        """Connect and log in.

        Raises:
            OSError: if nobody answers, or not as TLS wants it.
            RedisError: if no password is accepted.
        """
        connection = socket.create_connection((address, port), timeout)
        self.encrypted = bool(server["tls"])
        if files := server["tls"]:
            context = ssl.create_default_context(cafile=files["ca"])
            context.load_cert_chain(files["certificate"], files["key"])
            connection = context.wrap_socket(connection, server_hostname=address)
        self._connection = connection
        self._replies = connection.makefile("rb")
        for number, password in enumerate(server["passwords"], 1):
            try:
                self("AUTH", "default", password)
                return
            except RedisError:
                if number == len(server["passwords"]):
                    raise

    def __call__(self, *words: str | int) -> Any:
        """Send a command and return its reply."""
        sent = [str(word).encode() for word in words]
        self._connection.sendall(b"*%d\r\n" % len(sent) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in sent))
        return self._reply()

    def _reply(self) -> Any:
        line = self._replies.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the connection was closed")
        kind, rest = line[:1], line[1:-2]
        if kind == b"-":
            raise RedisError(rest.decode(errors="replace"))
        if kind == b"+":
            return rest.decode()
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else self._replies.read(int(rest) + 2)[:-2].decode(errors="replace")
        if kind == b"*":
            return None if rest == b"-1" else [self._reply() for _ in range(int(rest))]
        raise ConnectionError("this is no Redis, or it wants TLS")

    def pairs(self, *words: str | int) -> dict[str, str]:
        """Return a reply of names and values as a dict."""
        reply = self(*words)
        return dict(zip(reply[::2], reply[1::2], strict=True))

    def info(self, section: str) -> dict[str, str]:
        """Return a section of INFO."""
        return dict(line.split(":", 1) for line in self("INFO", section).splitlines() if ":" in line)

    def certificate(self) -> bytes | None:
        """Return the certificate that the server shows, in DER format."""
        return self._connection.getpeercert(binary_form=True) if isinstance(self._connection, ssl.SSLSocket) else None

    def role(self) -> str:
        """Return `master` or `slave`."""
        return str(self("ROLE")[0])


def connect(server: dict[str, Any], seconds: float = 0) -> Client:
    """Return a connection to a server of this host once it has loaded its data, waiting so long for it.

    A server that still runs as it did before TLS was switched on is reached as well.

    Raises:
        OSError: if none answers in time, or at once if its certificate is of no CA that this host trusts.
        RedisError: if it refuses the login.
    """

    def ready() -> Client | None:
        try:
            client = Client(server["address"], server["port"], server)
        except ssl.SSLCertVerificationError:
            raise
        except OSError:
            if not server["tls"]:
                raise
            client = Client(server["address"], server["port"], server | {"tls": {}})
        return None if client.info("persistence").get("loading") == "1" else client

    end = time.monotonic() + seconds
    while True:
        try:
            if client := ready():
                return client
        except (OSError, RedisError) as error:
            if time.monotonic() >= end or "WRONGPASS" in str(error) or isinstance(error, ssl.SSLCertVerificationError):
                raise
        if time.monotonic() >= end:
            raise TimeoutError("it still loads its data")
        time.sleep(0.2)


def wait_for(what: str, condition: Callable[[], Any], seconds: float) -> Any:
    """Return the first true value of a condition; raise TimeoutError, naming it, if none comes in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except (OSError, RedisError):
            pass
        time.sleep(0.2)
    raise TimeoutError(f"not within {seconds:.0f} s: {what}")


def endpoint(text: str) -> tuple[str, int]:
    """Return address and port of `address:port`, where an IPv6 address stands in brackets."""
    address, _, port = text.rpartition(":")
    return address.strip("[]"), int(port)


def joined(address: str, port: str) -> str:
    """Return `address:port` as the filter `endpoint` writes it (plugins/filter/addresses.py)."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


#: How Redis reads a line of redis.conf (sdssplitargs in its sds.c): words between blanks, of plain text, or in quotes to their end.
QUOTED = re.compile(r""""((?:[^"\\]|\\.)*)"(?=\s|$)|'((?:[^'\\]|\\'|\\(?!'))*)'(?=\s|$)""")
WORD = re.compile(rf"(?:{QUOTED.pattern}|[^\"'\s])+")
ESCAPED = re.compile(r"\\(?:x([0-9a-fA-F]{2})|(.))")
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "a": "\a"}


def words_of(line: str) -> list[str]:
    """Return the words of a line of redis.conf.

    Raises:
        ValueError: if Redis would refuse its quotes.
    """
    if WORD.sub("", line).strip():
        raise ValueError("unbalanced quotes in a line of redis.conf")
    return [QUOTED.sub(_unquoted, word[0]) for word in WORD.finditer(line)]


def _unquoted(quoted: re.Match[str]) -> str:
    if quoted[2] is not None:
        return quoted[2].replace("\\'", "'")
    return ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else ESCAPES.get(found[2], found[2]), quoted[1])


def lines_of(path: str) -> Iterator[list[str]]:
    """Yield the words of each line of a configuration file that says something."""
    for line in Path(path).read_text().split("\n"):
        if line.strip() and not line.startswith("#"):
            yield words_of(line)
