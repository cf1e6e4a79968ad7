"""A Redis with replicas, and with Sentinels over TLS, on the loopback address; each server is a process of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from helpers.sites import free_port, wait_for

MASTER = "mymaster"
PASSWORD = "secret"


class Servers:
    """Redis servers on an address, killed at the end of the block. With `tls`, they and their Sentinels speak nothing else."""

    def __init__(self, folder: Path, tls: bool = False, address: str = "127.0.0.1") -> None:
        self.folder = folder
        self.tls = tls
        self.address = address
        self.ca = folder / "ca.crt"
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.passwords: dict[int, str] = {}
        if tls:
            self._make_certificates()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for server in self.running.values():
            server.kill()
            server.wait()

    def redis(self, replica_of: int | None = None, port: int = 0, **settings: str) -> int:
        """Start a Redis; return its port. An earlier port starts it again, with the configuration that it then had."""
        port, again = port or free_port(), bool(port)
        if not again:
            lines = [*self._listen(port), "save ''", "repl-diskless-sync-delay 0", "repl-ping-replica-period 1"]
            if self.tls:
                lines += ["tls-replication yes", f"requirepass {PASSWORD}", f"masterauth {PASSWORD}"]
            if replica_of:
                lines.append(f"replicaof {self.address} {replica_of}")
            lines += [f"{name.replace('_', '-')} {value}" for name, value in settings.items()]
            if "requirepass" in settings:
                self.passwords[port] = settings["requirepass"]
            self._write(port, lines)
        self._start(port)
        if replica_of:
            wait_for("a replica", lambda: self._confirms(replica_of))
        return port

    def sentinel(self, master: int, down_after: int = 1000, password: str = "", master_password: str = "") -> int:
        """Start a Sentinel that watches a master (milliseconds until it counts as down); return its port."""
        port = free_port()
        passwords = []
        if password:
            self.passwords[port] = password
            passwords = [f"requirepass {password}", f"sentinel auth-pass {MASTER} {master_password}"]
        options = {"down-after-milliseconds": down_after, "failover-timeout": 5000}
        lines = [*self._listen(port), f"sentinel monitor {MASTER} {self.address} {master} 2", *passwords]
        if self.tls:
            lines += [f"sentinel auth-pass {MASTER} {PASSWORD}", "tls-replication yes"]
        self._write(port, lines + [f"sentinel {name} {MASTER} {value}" for name, value in options.items()])
        self._start(port, "--sentinel")
        return port

    def client(self, port: int) -> redis.Redis:
        """Return a client for a server or a Sentinel."""
        options: dict[str, Any] = {"ssl": True, "ssl_ca_certs": str(self.ca)} if self.tls else {}
        password = self.passwords.get(port) or (PASSWORD if self.tls and port not in self._sentinels() else None)
        return redis.Redis(host=self.address, port=port, password=password, **options)

    def kill(self, port: int) -> None:
        """Kill a server at once."""
        server = self.running.pop(port)
        server.kill()
        server.wait()

    def _sentinels(self) -> list[int]:
        return [port for port, server in self.running.items() if "--sentinel" in server.args]  # type: ignore[operator]

    def _write(self, port: int, lines: list[str]) -> None:
        (self.folder / f"{port}.conf").write_text("\n".join([*lines, f"dir {self.folder}", f"dbfilename {port}.rdb"]) + "\n")

    def _listen(self, port: int) -> list[str]:
        if not self.tls:
            return [f"bind {self.address}", f"port {port}"]
        files = {"ca-cert": "ca.crt", "cert": "server.crt", "key": "server.key"}
        return [f"bind {self.address}", "port 0", f"tls-port {port}", "tls-auth-clients no"] + [
            f"tls-{name}-file {self.folder / file}" for name, file in files.items()
        ]

    def _start(self, port: int, *arguments: str) -> None:
        with (self.folder / f"{port}.log").open("ab") as log:
            command = ["redis-server", str(self.folder / f"{port}.conf"), *arguments]
            self.running[port] = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(f"a server on port {port}", lambda: self._answers(port))

    def _confirms(self, master: int) -> bool:
        client = self.client(master)
        client.set("something", 1, px=1)
        return bool(client.wait(1, 1000))

    def _answers(self, port: int) -> bool:
        try:
            return bool(self.client(port).ping())
        except (redis.exceptions.ConnectionError, redis.exceptions.ResponseError):
            return False

    def _make_certificates(self) -> None:
        def openssl(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=self.folder)

        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
        openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=test CA")
        issuer = ["-CA", "ca.crt", "-CAkey", "ca.key", "-addext", f"subjectAltName=IP:{self.address}"]
        openssl("req", "-x509", *key, *issuer, "-keyout", "server.key", "-out", "server.crt", "-days", "2", "-subj", "/CN=server")
