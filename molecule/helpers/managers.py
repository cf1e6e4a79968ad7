"""What systemd would be to a service under test."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path


class Manager:
    """What systemd would be: it hears what a service says, by a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.heard: list[tuple[float, str]] = []
        self.address = str(folder / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.address)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            self.heard.append((time.monotonic(), self.socket.recv(1000).decode()))

    def last(self, line: str) -> float:
        """Return when a line that begins so was last heard; 0 if never."""
        return max((when for when, message in self.heard if any(one.startswith(line) for one in message.splitlines())), default=0.0)

    def silent(self) -> float:
        """Return for how many seconds there has been no sign of life."""
        return time.monotonic() - self.last("WATCHDOG=1")
