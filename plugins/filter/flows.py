"""Filters for the firewall: who may reach which port of a host, as addresses."""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

#: In place of groups and networks: from anywhere.
EVERYWHERE = "everywhere"
KEYS = {"name", "port", "protocol", "from", "to"}
PROTOCOLS = ("tcp", "udp")
#: What a flow's name may hold; it becomes a comment in nft's language, which has no escape for quotes.
NAME = re.compile(r"[\w .:/-]{1,60}", re.ASCII)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class FlowError(Exception):
    """A flow cannot be understood; the message says what is wrong in it."""


@functools.cache
def addresses(name: str) -> tuple[Network, ...]:
    """Return the addresses of a host by its address or name, resolved on this machine.

    Raises FlowError if it has none.
    """
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise FlowError(f"the name {name} cannot be resolved on this machine ({error})") from error
    return tuple(ipaddress.ip_network(address.partition("%")[0]) for address in sorted(found))


def network(text: str) -> Network | None:
    """Return an address or a network in CIDR notation; None if the text is neither."""
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None


class Inventory:
    """The hosts of an inventory as seen from one of them."""

    def __init__(self, host: str, hostvars: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> None:
        self.host = host
        self.hostvars = hostvars
        self.groups = groups

    def hosts(self, name: str, known: Sequence[str]) -> Sequence[str]:
        """Return the hosts of a group, or the host of that name. A known group may be missing: then it has none."""
        if name in self.groups:
            return self.groups[name]
        if name in self.groups["all"]:
            return [name]
        if name in known:
            return []
        raise FlowError(f"{name} is no group and no host of the inventory")

    def networks(self, host: str) -> Iterator[Network]:
        """Yield the addresses that packets of another host come from.

        The inventory alone says so, never facts: a run that leaves hosts out must find the same.
        """
        variables = self.hostvars[host]
        for name in variables.get("firewall_addresses") or [variables.get("ansible_host") or host]:
            for found in [network(name)] if network(name) else addresses(name):
                if found.is_loopback:
                    raise FlowError(
                        f"{host} has the address {found.network_address}, which other hosts do not see; set its firewall_addresses"
                    )
                yield found

    def sources(self, names: Sequence[str], known: Sequence[str]) -> Iterator[Network]:
        """Yield where a flow may come from; its own host needs no rule and is left out."""
        for name in names:
            if literal := network(name):
                yield literal
            else:
                for host in self.hosts(name, known):
                    if host != self.host:
                        yield from self.networks(host)


def judged(flow: Any) -> dict[str, Any]:
    """Return a flow with all its keys; raise FlowError if it has others or bad values."""
    if not isinstance(flow, Mapping) or not {"name", "port", "from"} <= flow.keys() <= KEYS:
        raise FlowError(f"must have name, port and from, and may have protocol and to: {flow!r}")
    name, port = flow["name"], flow["port"]
    if not NAME.fullmatch(str(name)):
        raise FlowError(f"the name {name!r} must have 1 to 60 letters, digits, blanks and ._:/-")
    if not str(port).isdecimal() or not 1 <= int(port) <= 65535:
        raise FlowError(f"{name}: the port {port!r} must be a number from 1 to 65535")
    if (flow.get("protocol") or "tcp") not in PROTOCOLS:
        raise FlowError(f"{name}: the protocol {flow['protocol']!r} must be {' or '.join(PROTOCOLS)}")
    for key in ("from", "to"):
        if not isinstance(flow.get(key) or [], list):
            raise FlowError(f"{name}: {key} must be a list")
    return {
        "name": str(name),
        "port": int(port),
        "protocol": flow.get("protocol") or "tcp",
        "from": [str(item) for item in flow["from"] or []],
        "to": [str(item) for item in flow.get("to") or ["all"]],
    }


def resolved_flows(
    declared: Mapping[str, Sequence[Any]],
    host: str,
    hostvars: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, Sequence[str]],
    known: Sequence[str] = (),
) -> dict[str, list[Any]]:
    """Return the flows to a host, with addresses, and what is wrong with any flow.

    Args:
        declared: Flows by the variable that holds them.
        host: Name of the host that shall let them in.
        hostvars: Variables of all hosts: `firewall_addresses` and `ansible_host` are read.
        groups: Hosts of all groups.
        known: Groups that flows may name although the inventory lacks them.

    Returns:
        `flows`: dicts with name, protocol, port, everywhere, ipv4 and ipv6 (networks as nft writes them);
        `problems`: dicts with variable and text.
    """
    inventory = Inventory(host, hostvars, groups)
    flows: list[Any] = []
    problems: list[Any] = []
    for variable, entries in declared.items():
        for entry in entries:
            try:
                flow = judged(entry)
                hosts = [name for group in flow["to"] for name in inventory.hosts(group, known)]
                for name in flow["from"]:
                    if name != EVERYWHERE and not network(name):
                        inventory.hosts(name, known)
                if host not in hosts:
                    continue
                names = [name for name in flow["from"] if name != EVERYWHERE]
                found = list(inventory.sources(names, known))
            except FlowError as error:
                problems.append({"variable": variable, "text": str(error)})
                continue
            flows.append(
                {
                    "name": flow["name"],
                    "protocol": flow["protocol"],
                    "port": flow["port"],
                    "everywhere": EVERYWHERE in flow["from"],
                    "ipv4": collapsed(found, 4),
                    "ipv6": collapsed(found, 6),
                }
            )
    return {"flows": flows, "problems": problems}


def collapsed(networks: Sequence[Network], version: int) -> list[str]:
    """Return the networks of one IP version, none inside another, single addresses without prefix length."""
    chosen: list[Any] = [item for item in networks if item.version == version]
    return [str(item.network_address if item.num_addresses == 1 else item) for item in ipaddress.collapse_addresses(chosen)]


def admits(flow: Mapping[str, Any], address: str) -> bool:
    """Tell whether a resolved flow lets an address in."""
    return flow["everywhere"] or any(ipaddress.ip_address(address) in ipaddress.ip_network(item) for item in [*flow["ipv4"], *flow["ipv6"]])


class FilterModule:
    """What Ansible looks for in this file."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"resolved_flows": resolved_flows, "admits": admits}
