"""The Redis hosts and Sentinels of a site, as the tests of the lab see them from outside."""

from __future__ import annotations

import functools
import json
import socket
import ssl
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis
import testinfra
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from helpers.authority import Issued, pem
from helpers.nodes import Node, wait_for

REDIS, SENTINEL = 6379, 26379
MASTER = "celery"
#: Users of Redis and Sentinel, and the variable of each one's password; in the vault it has the same name.
PASSWORDS = {"orders": "celery_app_redis_password", "monitoring": "celery_monitor_redis_password"}
PASSWORDS |= {name: f"redis_{name}_password" for name in ("replication", "sentinel", "exporter", "operator")}


class Cluster:
    """All data hosts of an inventory, and a client of them that has a certificate of the site's CA."""

    def __init__(self, inventory: Path, folder: Path) -> None:
        self.nodes = {name: self.host(inventory, name) for name in ("data1", "data2", "data3")}
        self.workers = [self.host(inventory, name) for name in ("app1", "app2")]
        self.application = self.workers[0]
        self.secrets = self.application.secrets
        self.folder = folder
        self.authority = inventory / "pki" / "ca.crt"
        self.certificate = self.save("client", self._issue(inventory))

    @staticmethod
    def host(inventory: Path, name: str) -> Node:
        """Return a host of the inventory."""
        return Node(testinfra.get_host(f"ansible://{name}", ansible_inventory=str(inventory)), inventory)

    def save(self, name: str, issued: Issued) -> tuple[Path, Path]:
        """Write a certificate and its key; return their files."""
        files = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        for file, content in zip(files, issued, strict=True):
            file.write_bytes(content)
        return files

    def _issue(self, inventory: Path) -> Issued:
        """Sign a client's certificate, as an operator would for a host that this project does not manage."""
        authority = x509.load_pem_x509_certificate(self.authority.read_bytes())
        passphrase = self.secrets["vault_pki_ca_passphrase"].encode()
        signer = serialization.load_pem_private_key((inventory / "pki" / "ca.key").read_bytes(), passphrase)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
        builder = x509.CertificateBuilder(authority.subject, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(authority.not_valid_before_utc).not_valid_after(authority.not_valid_after_utc)
        return Issued(builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), pem(key))

    def renew_certificates(self, *roles: str) -> None:
        """Let the playbook renew the certificates of all hosts, with services of these roles that show them."""
        file = next(iter(self.nodes.values())).host.file("/etc/ssl/celery-platform/host.crt")
        left = (x509.load_pem_x509_certificate(file.content).not_valid_after_utc - datetime.now(UTC)).days
        days = {"pki_renew_days": left + 1, "pki_certificate_days": left + 3}
        self.application.converge(f"--tags={','.join(('pki', *roles))}", "-e", json.dumps(days))

    def client(self, name: str, port: int = REDIS, user: str = "default", password: str | None = None) -> redis.Redis:
        """Return a client of a host's Redis or Sentinel, over TLS with a certificate; it checks the host's name."""
        return redis.Redis(
            self.nodes[name].address,
            port,
            username=user,
            password=password or self.secrets["vault_redis_requirepass"],
            ssl=True,
            ssl_ca_certs=str(self.authority),
            ssl_certfile=str(self.certificate[0]),
            ssl_keyfile=str(self.certificate[1]),
            ssl_check_hostname=True,
            socket_timeout=5,
            decode_responses=True,
        )

    def say(self, name: str, port: int, *lines: str, tls: bool = True, certificate: tuple[Path, Path] | None = None) -> list[str]:
        """Return what a server answers to lines, as they stand on the wire; '' where it hangs up."""
        connection: socket.socket = socket.create_connection((self.nodes[name].address, port), timeout=5)
        try:
            if tls:
                context = ssl.create_default_context(cafile=str(self.authority))
                if certificate:
                    context.load_cert_chain(*certificate)
                connection = context.wrap_socket(connection, server_hostname=self.nodes[name].address)
            connection.sendall("".join(f"{line}\r\n" for line in lines).encode())
            replies = connection.makefile()
            return [replies.readline().rstrip() for _ in lines]
        except (ssl.SSLError, ConnectionError):
            return [""] * len(lines)
        finally:
            connection.close()

    def master(self) -> str:
        """Return the host that all Sentinels that answer call the master, once they agree and it says so itself."""
        names = {node.address: name for name, node in self.nodes.items()}

        def agreed() -> str:
            said = set()
            for name in self.nodes:
                try:
                    said.add(self.client(name, SENTINEL).execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", MASTER)[0])
                except redis.ConnectionError:
                    continue
            name = names[said.pop()] if len(said) == 1 else ""
            try:
                return name if name and self.client(name).role()[0] == "master" else ""
            except redis.ConnectionError:
                return ""

        return str(wait_for("Sentinels that agree on a master", agreed, seconds=60))

    def replicas_follow(self, count: int = 2) -> None:
        """Wait until the master has so many replicas that are in touch."""
        wait_for(
            f"{count} replicas",
            lambda: [r["state"] for r in self._replicas()] == ["online"] * count,
            seconds=90,
        )

    def _replicas(self) -> list[dict[str, Any]]:
        try:
            state = self.client(self.master()).info("replication")
        except redis.ConnectionError:
            return []
        return [value for name, value in state.items() if name.startswith("slave") and isinstance(value, dict)]

    def refusals(self) -> list[tuple[str, int, dict[str, Any]]]:
        """Return what the ACL logs of all servers hold."""
        return [
            (name, port, entry)
            for name in self.nodes
            for port in (REDIS, SENTINEL)
            for entry in self.client(name, port).execute_command("ACL LOG")
        ]

    def forget_refusals(self) -> None:
        """Empty the ACL logs of all servers."""
        for name in self.nodes:
            for port in (REDIS, SENTINEL):
                self.client(name, port).execute_command("ACL LOG RESET")

    @functools.cached_property
    def containers(self) -> dict[str, str]:
        """Return the container of each host."""
        listed = subprocess.run(["podman", "ps", "--all", "--format", "json"], check=True, capture_output=True, text=True).stdout
        inventory = str(self.application.inventory)
        found = [c["Names"][0] for c in json.loads(listed) if (c["Labels"] or {}).get("celery-lab") == inventory]
        return {name.rsplit("-", 1)[1]: name for name in found}
