"""What our modules need of Redis and Sentinel: a connection, with TLS and a login, and the files that they own."""

from __future__ import annotations

import shlex
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Arguments that every module takes which talks to Redis or Sentinel.
LOGIN = {
    "user": {"type": "str", "default": "default"},
    # The second one is the previous one: a server that was not told yet still wants it.
    "passwords": {"type": "list", "elements": "str", "no_log": True, "required": True},
    # Keys: ca, certificate, key. Without them the connection is not encrypted.
    "tls": {"type": "dict", "default": {}},
}


class RedisError(Exception):
    """What the server answered in place of a result."""


class Client:
    """A connection. Replies are int, str, None, or lists of them."""

    def __init__(self, address: str, port: int, login: dict[str, Any], timeout: float = 3) -> None:
        """Connect and log in.

        Raises:
            OSError: if nobody answers, or not as TLS wants it.
            RedisError: if no password is accepted.
        """
        connection = socket.create_connection((address, port), timeout)
        if files := login["tls"]:
            context = ssl.create_default_context(cafile=files["ca"])
            context.load_cert_chain(files["certificate"], files["key"])
            connection = context.wrap_socket(connection, server_hostname=address)
        self._connection = connection
        self._replies = connection.makefile("rb")
        for number, password in enumerate(login["passwords"], 1):
            try:
                self("AUTH", login["user"], password)
                return
            except RedisError:
                if number == len(login["passwords"]):
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

    def role(self) -> str:
        """Return `master` or `slave`."""
        return str(self("ROLE")[0])


def connect(address: str, port: int, login: dict[str, Any], seconds: float = 0) -> Client:
    """Return a connection to a server of this host that has loaded its data, waiting so long for it.

    A server that still runs as it did before TLS was switched on or off is reached as well.

    Raises:
        OSError: if none answers in time.
        RedisError: if it refuses the login.
    """

    def ready() -> Client | None:
        try:
            client = Client(address, port, login)
        except OSError:
            if not login["tls"]:
                raise
            client = Client(address, port, login | {"tls": {}})
        return None if client.info("persistence").get("loading") == "1" else client

    end = time.monotonic() + seconds
    while True:
        try:
            if client := ready():
                return client
        except (OSError, RedisError) as error:
            if time.monotonic() >= end or "WRONGPASS" in str(error):
                raise
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
    """Return address and port of `address:port`."""
    address, _, port = text.rpartition(":")
    return address, int(port)


def lines_of(path: str) -> Iterator[list[str]]:
    """Yield the words of each line of a configuration file that says something."""
    for line in Path(path).read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            yield shlex.split(line)
