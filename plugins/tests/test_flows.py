"""Tests of the filters that turn flows into addresses."""

from __future__ import annotations

from typing import Any

import pytest

from filter.flows import admits, resolved_flows

GROUPS = {"all": ["data1", "data2", "app1", "named"], "data": ["data1", "data2"], "app": ["app1"], "named": ["named"], "empty": []}
HOSTVARS: dict[str, dict[str, Any]] = {
    "data1": {"ansible_host": "192.0.2.1"},
    "data2": {"ansible_host": "192.0.2.2", "firewall_addresses": ["10.0.0.2", "2001:db8::2"]},
    "app1": {"ansible_host": "192.0.2.9"},
    "named": {"ansible_host": "localhost"},
}


def resolve(*flows: Any, host: str = "data1") -> dict[str, list[Any]]:
    """Resolve flows for a host of the inventory above."""
    return resolved_flows({"x_flows": flows}, host, HOSTVARS, GROUPS, known=["monitoring"])


def flow(**keys: Any) -> dict[str, Any]:
    """Return a good flow with some keys changed."""
    return {"name": "redis", "port": 6379, "from": ["data"], **keys}


def test_groups_hosts_and_networks_become_addresses_of_both_kinds() -> None:
    assert resolve(flow(**{"from": ["data", "app1", "198.51.100.0/24", "2001:db8:1::/48", "monitoring", "empty"]})) == {
        "problems": [],
        "flows": [
            {
                "name": "redis",
                "protocol": "tcp",
                "port": 6379,
                "everywhere": False,
                "ipv4": ["10.0.0.2", "192.0.2.9", "198.51.100.0/24"],
                "ipv6": ["2001:db8::2", "2001:db8:1::/48"],
            }
        ],
    }


def test_what_lies_inside_another_network_is_not_repeated() -> None:
    # nft refuses a set whose intervals overlap.
    sources = ["192.0.2.0/25", "app1", "192.0.2.128/25", "192.0.2.9"]
    assert resolve(flow(**{"from": sources}))["flows"][0]["ipv4"] == ["192.0.2.0/24"]


def test_a_flow_concerns_only_the_hosts_that_it_goes_to() -> None:
    assert resolve(flow(to=["app"]))["flows"] == []
    assert resolve(flow(to=["data1"]))["flows"] != []
    assert resolve(flow(to=["monitoring"]))["flows"] == []


def test_a_flow_from_the_host_itself_needs_no_address() -> None:
    assert resolve(flow(**{"from": ["named"]}), host="named") == {
        "problems": [],
        "flows": [{"name": "redis", "protocol": "tcp", "port": 6379, "everywhere": False, "ipv4": [], "ipv6": []}],
    }


def test_a_flow_from_no_one_lets_no_one_in() -> None:
    nobody = resolve(flow(**{"from": []}))["flows"][0]
    assert (nobody["everywhere"], nobody["ipv4"], nobody["ipv6"]) == (False, [], [])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (flow(**{"from": ["daat"]}), "daat is no group and no host"),
        (flow(to=["daat"]), "daat is no group and no host"),
        (flow(**{"from": ["192.0.2.1/24"]}), "192.0.2.1/24 is no group and no host"),
        (flow(**{"from": "data"}), "from must be a list"),
        (flow(**{"from": ["named"]}), "named has the address"),
        (flow(port=0), "port 0 must be a number from 1 to 65535"),
        (flow(port=65536), "port 65536 must be"),
        (flow(port="http"), "port 'http' must be"),
        (flow(protocol="icmp"), "protocol 'icmp' must be tcp or udp"),
        (flow(name='a" drop #'), "must have 1 to 60 letters"),
        (flow(ports=[1]), "must have name, port and from"),
        ({"name": "x", "port": 1}, "must have name, port and from"),
        ("6379", "must have name, port and from"),
    ],
)
def test_what_is_wrong_with_a_flow_is_said_with_its_variable(bad: Any, says: str) -> None:
    found = resolve(bad, flow())
    assert [problem["variable"] for problem in found["problems"]] == ["x_flows"]
    assert says in found["problems"][0]["text"]
    assert len(found["flows"]) == 1


def test_a_name_that_does_not_resolve_is_a_problem() -> None:
    hostvars = {**HOSTVARS, "app1": {"ansible_host": "no-such-host.invalid"}}
    found = resolved_flows({"x_flows": [flow(**{"from": ["app"]})]}, "data1", hostvars, GROUPS)
    assert "no-such-host.invalid cannot be resolved" in found["problems"][0]["text"]


@pytest.mark.parametrize(
    ("sources", "address", "let_in"),
    [
        (["everywhere"], "203.0.113.1", True),
        (["app1"], "192.0.2.9", True),
        (["app1"], "192.0.2.8", False),
        (["192.0.2.0/24"], "192.0.2.8", True),
        (["192.0.2.0/24"], "2001:db8::1", False),
        (["fe80::/10"], "fe80::1%eth0", True),
    ],
)
def test_whether_an_address_is_let_in(sources: list[str], address: str, let_in: bool) -> None:
    assert admits(resolve(flow(**{"from": sources}))["flows"][0], address) is let_in
