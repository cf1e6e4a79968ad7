"""Tests of the module `certificate_check`, with real certificates and a real server."""

from __future__ import annotations

import os
import re
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from helpers.authority import Authority, Issued
from modules.certificate_check import check, describe, shows

NAMES = ["data1", "localhost", "192.0.2.1"]
AUTHORITY = Authority()
GOOD = AUTHORITY.issue(NAMES, days=30)


class Files:
    """The three files of a host, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.certificate, self.key, self.ca = (folder / name for name in ("host.crt", "host.key", "ca.crt"))
        self.write(GOOD)
        self.ca.write_bytes(AUTHORITY.certificate)

    def write(self, issued: Issued) -> None:
        """Put a certificate and its key in place."""
        self.certificate.write_bytes(issued.certificate)
        self.key.touch(mode=0o600)
        self.key.write_bytes(issued.key)

    def check(self, names: list[str] | None = None, group: str | None = None) -> tuple[dict[str, str], int | None]:
        """Return what the module says of them."""
        return check(self.certificate, self.key, self.ca, NAMES if names is None else names, group)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_a_good_certificate_passes(files: Files) -> None:
    assert files.check() == ({}, 30)


def test_one_of_several_trusted_authorities_is_enough(files: Files) -> None:
    files.ca.write_bytes(Authority("Another").certificate + AUTHORITY.certificate)

    assert files.check() == ({}, 30)


def test_names_and_addresses_that_are_missing_are_told(files: Files) -> None:
    problems, days_left = files.check(["data1", "data2", "192.0.2.2"])

    assert problems == {"certificate": f"{files.certificate} lacks data2, 192.0.2.2"}
    assert days_left == 30


@pytest.mark.parametrize(
    ("issued", "why"),
    [
        pytest.param(AUTHORITY.issue(NAMES, days=-1), "certificate has expired", id="expired"),
        pytest.param(
            Authority().issue(NAMES), "certificate verify failed|unable to get|signature failure", id="another authority of that name"
        ),
        pytest.param(Authority("Another").issue(NAMES), "unable to get local issuer certificate", id="another authority"),
        pytest.param(
            AUTHORITY.issue(NAMES, usages=[ExtendedKeyUsageOID.SERVER_AUTH]),
            "un(suitable|supported) certificate purpose",
            id="servers only",
        ),
        pytest.param(
            AUTHORITY.issue(NAMES, usages=[ExtendedKeyUsageOID.CLIENT_AUTH]),
            "un(suitable|supported) certificate purpose",
            id="clients only",
        ),
    ],
)
def test_a_certificate_that_a_peer_would_refuse_is_told(files: Files, issued: Issued, why: str) -> None:
    files.write(issued)
    problems, days_left = files.check()

    assert set(problems) == {"certificate"}
    assert re.search(f"is refused: ({why})", problems["certificate"])
    assert days_left is None


def test_a_key_of_another_certificate_is_told(files: Files) -> None:
    files.key.write_bytes(AUTHORITY.issue(NAMES).key)

    assert files.check() == ({"key": f"{files.key} is not the key of {files.certificate}"}, None)


@pytest.mark.parametrize("name", ["ca", "certificate", "key"])
def test_a_missing_file_is_told(files: Files, name: str) -> None:
    path: Path = getattr(files, name)
    path.unlink()

    assert files.check() == ({name: f"{path} does not exist on the host"}, None)


@pytest.mark.parametrize("name", ["ca", "certificate", "key"])
def test_a_file_that_holds_something_else_is_told(files: Files, name: str) -> None:
    getattr(files, name).write_text("-----BEGIN NOTHING-----\n")
    problems, days_left = files.check()

    assert list(problems) == ["ca" if name == "ca" else "certificate"]
    assert days_left is None


def test_a_key_that_everyone_can_read_is_told(files: Files) -> None:
    files.key.chmod(0o644)

    assert files.check() == ({"key": f"{files.key} is open to everyone on the host"}, 30)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try what another group can read")
def test_a_key_that_the_group_cannot_read_is_told(files: Files) -> None:
    for folder in list(files.key.parents)[:-2]:
        folder.chmod(0o755)
    os.chown(files.key, 0, 0)
    files.key.chmod(0o640)
    assert files.check(group="daemon") == ({"key": f"{files.key} cannot be read by the group daemon"}, 30)

    os.chown(files.key, 0, 1)
    assert files.check(group="daemon") == ({}, 30)

    files.key.parent.chmod(0o700)
    assert files.check(group="daemon") == ({"key": f"{files.key} cannot be read by the group daemon"}, 30)


def test_a_group_that_does_not_exist_is_told(files: Files) -> None:
    problems, _ = files.check(group="no-such-group")

    assert problems == {"key": "cannot be given to the group no-such-group, which the host does not have"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_whose_the_key_is_is_told(files: Files) -> None:
    os.chown(files.key, 1, 4242)
    files.key.chmod(0o4640)
    assert describe(files.key) == {"owner": "daemon", "group": "4242", "mode": "4640"}

    files.key.unlink()
    assert describe(files.key) is None


class Server(TCPServer):
    """A TLS server that demands a certificate, as Redis does."""

    def __init__(self, files: Files) -> None:
        super().__init__(("127.0.0.1", 0), BaseRequestHandler)
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files.ca)
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.load_cert_chain(files.certificate, files.key)
        self.address = f"127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[ssl.SSLSocket, object]:
        """Take a connection and greet it."""
        connection, address = super().get_request()
        return self.context.wrap_socket(connection, server_side=True), address


@pytest.fixture
def server(files: Files) -> Iterator[Server]:
    with Server(files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_service_shows_the_certificate_until_there_is_a_new_one(files: Files, server: Server) -> None:
    assert shows(server.address, files.certificate, files.key) is True

    files.write(AUTHORITY.issue(NAMES))
    assert shows(server.address, files.certificate, files.key) is False

    server.context.load_cert_chain(files.certificate, files.key)
    assert shows(server.address, files.certificate, files.key) is True


def test_the_certificate_of_a_chain_is_its_first(files: Files, server: Server) -> None:
    files.certificate.write_bytes(b"A comment\n" + GOOD.certificate + AUTHORITY.certificate)

    assert shows(server.address, files.certificate, files.key) is True


def test_nobody_shows_anything(files: Files, server: Server) -> None:
    server.server_close()

    assert shows(server.address, files.certificate, files.key) is None
