"""Filters for addresses: how they are written with a port and in URLs, and by which one a service of this host is reached."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import Any


def in_url(address: str) -> str:
    """Return an address or a name as URLs hold it: IPv6 in brackets (RFC 3986, 3.2.2) and in its shortest form, all else as it is."""
    bare = address.strip("[]")
    return f"[{compressed(bare)}]" if ":" in bare else address


def endpoint(address: str, port: int | str) -> str:
    """Return `address:port`, with an IPv6 address in brackets."""
    return f"{in_url(address)}:{port}"


def endpoints(addresses: Iterable[str], ports: int | str | Sequence[int | str]) -> list[str]:
    """Return `address:port` of each address, with the port at its place or the one port of all.

    Raises:
        ValueError: if there are more or fewer ports than addresses.
    """
    known = list(addresses)
    of_each = [ports] * len(known) if isinstance(ports, int | str) else ports
    return [endpoint(address, port) for address, port in zip(known, of_each, strict=True)]


def as_user(urls: str, own: Iterable[str], user: str) -> str:
    """Return the URLs of a broker, with `;` between them, with another user if they are among the site's own; else as they are."""
    return re.sub(r"://[^/@;]*@", f"://{user}@", urls) if urls in own else urls


def local_address(bind: Sequence[str]) -> str:
    """Return the address by which a service is reached from its own host, by the first address that it listens on.

    A leading minus, by which Redis marks an address as optional, and brackets are left out; of all addresses, the loopback's is taken.
    """
    address = bind[0].removeprefix("-").strip("[]")
    return {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1", "::*": "::1"}.get(address, address)  # noqa: S104


def compressed(address: str) -> str:
    """Return an IPv6 address in its shortest form (RFC 5952), by which equal ones are found; all else as it is."""
    try:
        return ipaddress.ip_address(address).compressed
    except ValueError:
        return address


class FilterModule:
    """What Ansible looks for in this file."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "in_url": in_url,
            "endpoint": endpoint,
            "endpoints": endpoints,
            "as_user": as_user,
            "local_address": local_address,
            "compressed": compressed,
        }
