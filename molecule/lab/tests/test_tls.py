"""Hosts prove to each other who they are; their keys never leave them; certificates are renewed, replaced, and checked.

Comes last by its name: it leaves two hosts with an authority that the services of the others do not know.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import testinfra
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from helpers import REPOSITORY
from helpers.authority import Authority, Issued
from helpers.nodes import Node, wait_for
from helpers.targets import only_in_drills, only_in_test_all

testinfra_hosts = ["ansible://data1"]

FOLDER = "/etc/ssl/celery-platform"
CERTIFICATE, KEY, CA = (f"{FOLDER}/{name}" for name in ("host.crt", "host.key", "ca.crt"))
SITE = "/etc/ssl/site"
PORT = 4433


@pytest.fixture(scope="module")
def peer(node: Node) -> Node:
    """Return another host than the one under test."""
    return Node(testinfra.get_host("ansible://app1", ansible_inventory=str(node.inventory)), node.inventory)


def name_of(node: Node) -> str:
    return str(node.variables["inventory_hostname"])


def run(node: Node, *arguments: str) -> list[str]:
    """Run the role on all its hosts; return the tasks that changed something."""
    return list(node.converge("--tags=pki", "--limit=data1,app1", *arguments)["changed"])


def certificate_of(node: Node) -> x509.Certificate:
    return x509.load_pem_x509_certificate(node.host.file(CERTIFICATE).content)


def public_key(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def names_in(certificate: x509.Certificate) -> set[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}


def put(node: Node, files: dict[str, bytes]) -> None:
    """Write files that only root and the group ssl-cert can read."""
    node.python(
        f"""
import os, pathlib, shutil
for name, content in {files!r}.items():
    path = pathlib.Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o640)
    path.write_bytes(content)
    shutil.chown(path, "root", "ssl-cert")
"""
    )


def call(client: Node, address: str, name: str, certificate: str = CERTIFICATE, key: str = KEY) -> str:
    """Return what a server answers to a client that verifies it, or why they do not talk."""
    script = f"""
import socket, ssl, sys
context = ssl.create_default_context(cafile={CA!r})
if {certificate!r}:
    context.load_cert_chain({certificate!r}, {key!r})
try:
    with socket.create_connection(({address!r}, {PORT}), 10) as plain, context.wrap_socket(plain, server_hostname={name!r}) as session:
        session.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
        print(session.recv(100).decode().splitlines()[0])
except OSError as error:
    print(error)
"""
    return client.python(script).strip()


@pytest.fixture
def serve() -> Iterator[Callable[[Node], None]]:
    """Return a function that starts a TLS server as services run: with no more rights than the group of the key."""
    started = []

    def start(node: Node) -> None:
        started.append(node)
        command = f"openssl s_server -accept {PORT} -www -quiet -cert {CERTIFICATE} -key {KEY} -CAfile {CA} -Verify 1 -verify_return_error"
        properties = "--property=DynamicUser=yes --property=SupplementaryGroups=ssl-cert"
        node.host.check_output(f"systemd-run --quiet --collect --unit=test-tls {properties} {command}")
        wait_for("the TLS server", lambda: node.host.socket(f"tcp://{PORT}").is_listening)

    yield start
    for node in started:
        node.host.run("systemctl stop test-tls.service")


def test_only_root_and_the_group_can_read_the_key(node: Node, peer: Node) -> None:
    for host in (node.host, peer.host):
        assert [(f.user, f.group, f.mode) for f in map(host.file, (KEY, CERTIFICATE, CA))] == [
            ("root", "ssl-cert", 0o640),
            ("root", "root", 0o644),
            ("root", "root", 0o644),
        ]


def test_the_certificate_holds_the_names_and_addresses_of_its_host(node: Node, peer: Node) -> None:
    for one in (node, peer):
        assert {name_of(one), "localhost", one.address, "127.0.0.1"} <= names_in(certificate_of(one))
    assert name_of(peer) not in names_in(certificate_of(node))
    assert peer.address not in names_in(certificate_of(node))


def test_hosts_talk_only_to_whom_the_authority_knows(node: Node, peer: Node, serve: Callable[[Node], None]) -> None:
    stranger = Authority().issue([name_of(peer), peer.address])
    for server, client in ((node, peer), (peer, node)):
        serve(server)
        put(client, {"/run/stranger.crt": stranger.certificate, "/run/stranger.key": stranger.key})
        assert call(client, server.address, name_of(server)) == "HTTP/1.0 200 ok"
        assert call(client, server.address, server.address) == "HTTP/1.0 200 ok"
        assert "not valid for" in call(client, server.address, name_of(client))
        assert "alert" in call(client, server.address, name_of(server), certificate="")
        assert "alert" in call(client, server.address, name_of(server), "/run/stranger.crt", "/run/stranger.key")
        client.host.check_output("rm /run/stranger.crt /run/stranger.key")


def test_a_certificate_is_renewed_when_it_is_due_and_its_key_is_kept(node: Node) -> None:
    old = certificate_of(node)
    left = (old.not_valid_after_utc - datetime.now(UTC)).days
    changed = run(node, f"--limit={name_of(node)}", "-e", f"pki_renew_days={left + 1}", "-e", f"pki_certificate_days={left + 3}")
    assert set(changed) == {
        "pki : Sign the certificate, if it is new, due, or not as it should be",
        "pki : Install the certificate",
    }
    new = certificate_of(node)
    assert new.not_valid_after_utc > old.not_valid_after_utc
    assert public_key(new) == public_key(old)

    # One that is as it should be is not even asked for.
    again = node.run_playbook("--tags=pki", f"--limit={name_of(node)}")
    assert again.returncode == 0, again.stdout
    assert "pki : Try the certificate that is there" in again.stdout
    assert "pki : Ask for a certificate" not in again.stdout


@only_in_test_all
def test_new_names_are_a_new_certificate_which_a_service_must_load(node: Node, serve: Callable[[Node], None]) -> None:
    def shown() -> Any:
        arguments = f"certificate={CERTIFICATE} key={KEY} ca={CA} service=127.0.0.1:{PORT}"
        return node.host.ansible("certificate_check", arguments, check=False)["shown"]

    old = certificate_of(node)
    assert shown() is None
    serve(node)
    assert shown() is True
    names = {"pki_names": ["broker.example.org"], "pki_addresses": ["192.0.2.7", "2001:db8::7"]}
    run(node, f"--limit={name_of(node)}", "-e", json.dumps(names))
    assert names_in(certificate_of(node)) == names_in(old) | {"broker.example.org", "192.0.2.7", "2001:db8::7"}
    assert shown() is False


@only_in_test_all
def test_a_host_gets_a_new_key_and_no_secret_is_seen_on_the_way(node: Node, peer: Node, serve: Callable[[Node], None]) -> None:
    """Look for keys and passphrase in the output, in command lines, and in the files that are left on the controller."""
    old, others = certificate_of(node), certificate_of(peer)
    secrets = [node.secrets["vault_pki_ca_passphrase"].encode()]
    authority_key = node.inventory / "pki/ca.key"
    secrets += [line for text in (node.host.file(KEY).content, authority_key.read_bytes()) for line in text.splitlines()[1:-1]]
    seen = set()
    command = [Path(sys.executable).with_name("ansible-playbook"), "-i", node.inventory, "site.yml", "--tags=pki", "-vvv", "--diff"]
    command += [f"--limit={name_of(node)}", "-e", "pki_replace=true"]
    play = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert play.stdout
    output = b""
    for line in play.stdout:
        output += line
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen |= {secret for secret in secrets if secret in process.read_bytes()}
            except OSError:
                continue
    assert play.wait() == 0, output.decode()
    secrets += node.host.file(KEY).content.splitlines()[1:-1]
    assert seen == set()
    assert b"pki : Make the host's key" in output
    assert [secret for secret in secrets if secret in output] == []

    assert public_key(certificate_of(node)) != public_key(old)
    assert "broker.example.org" not in names_in(certificate_of(node))
    assert certificate_of(peer) == others
    serve(node)
    assert call(peer, node.address, name_of(node)) == "HTTP/1.0 200 ok"

    assert authority_key.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert authority_key.stat().st_mode & 0o777 == 0o600
    elsewhere = {authority_key, node.inventory / "group_vars/all/vault.yml"}
    for top in (node.inventory, REPOSITORY / ".lab", Path.home() / ".ansible"):
        for path in top.rglob("*"):
            if path.is_file() and path not in elsewhere and path.stat().st_size < 1_000_000:
                assert not any(secret in path.read_bytes() for secret in secrets), path


@only_in_drills
def test_the_authority_is_replaced_while_hosts_keep_trusting_each_other(node: Node, peer: Node, serve: Callable[[Node], None]) -> None:
    def trusts(one: Node, other: Node) -> bool:
        put(one, {"/run/other.crt": other.host.file(CERTIFICATE).content})
        return bool(one.host.run(f"openssl verify -CAfile {CA} /run/other.crt").rc == 0)

    folder = node.inventory / "pki"
    if others := [path for path in folder.iterdir() if path.stem != "ca"]:
        # An earlier run of this test broke off.
        for path in others:
            path.unlink()
        run(node)
    first = certificate_of(node)
    run(node, "-e", "pki_next_ca=true")
    both = certificate_of(node)
    # A service that shows the newer certificate has also loaded the newer CAs.
    assert (both.issuer, both.serial_number != first.serial_number) == (first.issuer, True)
    assert node.host.file(CA).content.count(b"BEGIN CERTIFICATE") == 2

    (folder / "ca.crt").rename(folder / "old.crt")
    for name in ("crt", "key"):
        (folder / f"next.{name}").rename(folder / f"ca.{name}")
    run(node, f"--limit={name_of(node)}")
    assert certificate_of(node).issuer != first.issuer
    assert certificate_of(peer).issuer == first.issuer
    assert trusts(node, peer)
    assert trusts(peer, node)
    run(node)
    assert certificate_of(peer).issuer == certificate_of(node).issuer

    (folder / "old.crt").unlink()
    run(node)
    assert node.host.file(CA).content.count(b"BEGIN CERTIFICATE") == 1
    assert trusts(node, peer)


@only_in_drills
def test_a_service_that_still_has_another_authority_is_told_of(node: Node) -> None:
    output = node.run_playbook("--tags=redis", f"--limit={name_of(node)}")
    assert output.returncode == 2
    assert "on this host does not talk to it" in output.stdout
    assert "restart it on all hosts: systemctl restart" in output.stdout


@only_in_test_all
def test_another_run_and_a_check_find_nothing_to_do(node: Node) -> None:
    assert run(node) == []
    assert run(node, "--check", "--diff") == []


def test_a_host_that_calls_itself_as_another_gets_no_certificate_for_it(node: Node, peer: Node) -> None:
    before = certificate_of(node)
    node.host.check_output(f"hostname {name_of(peer)}")
    try:
        with pytest.raises(AssertionError, match="does not call itself"):
            run(node)
    finally:
        node.host.check_output(f"hostname {name_of(node)}")
    assert certificate_of(node) == before


# --- The site's own certificates ---

AUTHORITY = Authority()


def good(node: Node, **options: Any) -> Issued:
    """Return a certificate with all names that the host needs."""
    return AUTHORITY.issue([name_of(node), "rabbitmq.internal", node.address], **options)


def of_site(node: Node, issued: Issued, *arguments: str) -> list[str]:
    """Put certificates of the site's own on a host and run the role; return the tasks that changed something."""
    put(node, {f"{SITE}/host.crt": issued.certificate, f"{SITE}/host.key": issued.key, f"{SITE}/ca.crt": AUTHORITY.certificate})
    settings = {"pki_private_ca": False} | {
        f"pki_{name}_file": f"{SITE}/{file}" for name, file in {"ca": "ca.crt", "certificate": "host.crt", "key": "host.key"}.items()
    }
    return run(node, f"--limit={name_of(node)}", "-e", json.dumps(settings), *arguments)


def state(node: Node) -> str:
    return str(node.host.check_output("find /etc/ssl /etc/group /var/lib/dpkg/status -type f -printf '%p %m %T@ %C@\\n' | grep -v " + SITE))


def test_certificates_of_the_site_are_only_checked(node: Node) -> None:
    before = state(node)
    assert of_site(node, good(node)) == []
    assert state(node) == before


@pytest.mark.parametrize(
    ("issue", "message"),
    [
        pytest.param(lambda node: good(node, days=-1), "pki_certificate_file .*certificate has expired.*File: .*Allowed: ", id="expired"),
        pytest.param(
            lambda node: AUTHORITY.issue(["data9", "rabbitmq.internal", node.address]),
            "pki_certificate_file .*host.crt lacks data1.*File: .*Allowed: .*data1",
            id="another name",
            marks=only_in_test_all,
        ),
        # What clients of Redis call the host.
        pytest.param(
            lambda node: AUTHORITY.issue([name_of(node), "rabbitmq.internal"]),
            r"pki_certificate_file .*host.crt lacks 10\..*File: .*Allowed: .*data1",
            id="no address",
            marks=only_in_test_all,
        ),
        pytest.param(
            lambda node: Issued(good(node).certificate, good(node).key),
            "pki_key_file .*is not the key of",
            id="another key",
            marks=only_in_test_all,
        ),
        pytest.param(
            lambda node: Authority("Another").issue([name_of(node), "rabbitmq.internal", node.address]),
            "pki_certificate_file .*unable to get local issuer",
            id="another authority",
        ),
    ],
)
def test_a_bad_certificate_of_the_site_stops_the_run(node: Node, issue: Callable[[Node], Issued], message: str) -> None:
    before = state(node)
    with pytest.raises(AssertionError, match=f"(?s)nothing was changed on any host.*{message}"):
        of_site(node, issue(node))
    assert state(node) == before


# --- Mistakes with the private authority ---


def test_the_wrong_passphrase_stops_the_run(node: Node) -> None:
    with pytest.raises(AssertionError, match=r"nothing was changed on any host.*pki_ca_passphrase .*Wrong passphrase"):
        run(node, "-e", "pki_ca_passphrase=nX7cY2pK9mQ4wL8vD3fG6hJ1")


@only_in_test_all
def test_a_lost_key_of_the_authority_stops_the_run(node: Node, tmp_path: Path) -> None:
    shutil.copy(node.inventory / "pki/ca.crt", tmp_path)
    with pytest.raises(AssertionError, match=r"nothing was changed on any host.*pki_ca_directory .*ca\.crt, but no ca\.key"):
        run(node, "-e", f"pki_ca_directory={tmp_path}")
