"""Which of the Makefile's targets runs a test: `make test`, unless it is marked with one of these."""

from __future__ import annotations

import os

import pytest

#: `make drills` repeats what chance has a part in, and has the time for all of it.
FULL = "DRILLS" in os.environ
only_in_drills = pytest.mark.skipif(not FULL, reason="part of `make drills`")
#: `make test-all` leaves nothing else out.
ALL = FULL or "TEST_ALL" in os.environ
#: What takes minutes and is shown by a shorter test as well, or is seldom touched.
only_in_test_all = pytest.mark.skipif(not ALL, reason="part of `make test-all`")
