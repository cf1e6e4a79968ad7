"""What the tests of hosts, plugins and the runtime package share."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
