"""Tests of what systemd is told, with a real socket in its place."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import signals

from celery_platform import systemd


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Listen as a service manager does."""
    address = str(tmp_path / "notify@1") if request.param == "path" else f"@celery-platform-test-{tmp_path}"
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + address[1:] if address.startswith("@") else address)
        listening.settimeout(5)
        yield listening


@pytest.fixture
def nobody_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    for signal in (signals.worker_ready, signals.beat_init, signals.worker_shutting_down):
        monkeypatch.setattr(signal, "receivers", [])


def test_a_state_is_sent(manager: socket.socket) -> None:
    systemd.notify("READY=1\nSTATUS=Gr\u00fc\u00dfe")

    assert manager.recv(1000).decode() == "READY=1\nSTATUS=Gr\u00fc\u00dfe"


@pytest.mark.parametrize("address", [None, ""])
def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)

    systemd.notify("READY=1")


@pytest.mark.usefixtures("nobody_connected")
@pytest.mark.parametrize(
    ("signal", "state"),
    [(signals.worker_ready, "READY=1"), (signals.beat_init, "READY=1"), (signals.worker_shutting_down, "STOPPING=1")],
)
def test_what_celery_says_is_passed_on_once(manager: socket.socket, signal: signals.Signal, state: str) -> None:
    systemd.connect()
    systemd.connect()

    signal.send(sender=None, sig="SIGTERM", how="Warm", exitcode=0)

    assert state in manager.recv(1000).decode().splitlines()
    manager.settimeout(0.05)
    with pytest.raises(TimeoutError):
        manager.recv(1000)
