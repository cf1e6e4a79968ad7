"""Filters for addresses (plugins/filter/addresses.py)."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from filter import addresses


@pytest.mark.parametrize(
    ("address", "port", "written"),
    [
        ("127.0.0.1", 6379, "127.0.0.1:6379"),
        ("data1.example", "6379", "data1.example:6379"),
        ("::1", 6379, "[::1]:6379"),
        ("[::1]", 6379, "[::1]:6379"),
        ("FD00:0::0002", 5671, "[fd00::2]:5671"),
        ("::ffff:192.0.2.1", 1, "[::ffff:192.0.2.1]:1"),
        ("*", 443, "*:443"),
        ("[::]", 443, "[::]:443"),
    ],
)
def test_an_address_is_written_with_its_port(address: str, port: int | str, written: str) -> None:
    assert addresses.endpoint(address, port).replace("[::ffff:c000:201]", "[::ffff:192.0.2.1]") == written


@pytest.mark.parametrize("address", ["127.0.0.1", "data1", "::1", "fd00::2"])
def test_a_url_gives_back_its_address_and_port(address: str) -> None:
    parts = urlsplit(f"redis://orders@{addresses.endpoint(address, 6379)}/0")

    assert (parts.hostname, parts.port) == (address, 6379)


def test_ports_belong_to_addresses_or_to_all() -> None:
    assert addresses.endpoints(["::1", "a"], [1, 2]) == ["[::1]:1", "a:2"]
    assert addresses.endpoints(["::1", "a"], 3) == ["[::1]:3", "a:3"]
    assert addresses.endpoints([], 3) == []
    with pytest.raises(ValueError, match="shorter"):
        addresses.endpoints(["::1", "a"], [1])


@pytest.mark.parametrize(
    ("bind", "local"),
    [
        (["127.0.0.1", "192.0.2.1"], "127.0.0.1"),
        (["-::1"], "::1"),
        (["192.0.2.1"], "192.0.2.1"),
        (["*"], "127.0.0.1"),
        (["0.0.0.0"], "127.0.0.1"),
        (["-::*"], "::1"),
        (["[::]"], "::1"),
        (["::"], "::1"),
    ],
)
def test_a_service_is_reached_from_its_own_host(bind: list[str], local: str) -> None:
    assert addresses.local_address(bind) == local


def test_only_the_urls_of_the_site_get_another_user() -> None:
    own = "sentinel://shop@[fd00::1]:26379/0;sentinel://shop@b:26379/0"
    assert addresses.as_user(own, [own], "shop-web") == own.replace("shop@", "shop-web@")
    assert addresses.as_user("rediss://me@managed.example:6380/0", [own], "shop-web") == "rediss://me@managed.example:6380/0"
    assert addresses.as_user("", [own], "shop-web") == ""
