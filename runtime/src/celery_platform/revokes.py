"""Keeps what is revoked, so that a revoked task that waits does not run after a restart of its worker.

Celery knows revokes in the memory of its workers. One that starts asks the others (mingle), but the only one, or all when
a release is deployed, forget them; `--statedb` is written at a clean end only, without stamps. Here each worker adds them
to a file of its own in its state directory at once, before it answers, and reads them when it starts: also after SIGKILL.
A worker without a state directory (STATE_DIRECTORY, systemd.exec(5)) forgets them. A revoke that is sent while no worker
runs reaches nobody.

Owns two patches of celery/worker/control.py (5.7.0): `_revoke` and the command `revoke_by_stamped_headers`. They can go
when Celery writes what it keeps at once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from celery import Celery, signals
from celery.worker import control, state
from kombu.utils.functional import maybe_list

from celery_platform.settings import Settings

logger = logging.getLogger(__name__)


#: Characters of a revoke that is kept. Ids of tasks have 255 at most, as the AMQP property correlation_id (a short string) has.
LONGEST = 512


class Revokes:
    """A file with a revoke a line, in JSON: the id of a task, or a header and the stamp in it, `["order", "7"]`.

    It has at most twice as many lines as a worker remembers revokes (REVOKES_MAX), each of LONGEST characters.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.added = 0

    def load(self) -> list[Any]:
        """Return what is revoked, the oldest first, and leave in the file no more than a worker remembers (REVOKES_MAX).

        Raises:
            OSError: if the file cannot be read or written.
        """
        if not self.path.exists():
            return []
        lines = list(dict.fromkeys(line for line in self.path.read_text(errors="replace").splitlines() if _entry(line)))
        lines = lines[-state.REVOKES_MAX :]
        temporary = self.path.with_name(f"{self.path.name}.new")
        temporary.write_text("".join(f"{line}\n" for line in lines))
        temporary.replace(self.path)
        return [_entry(line) for line in lines]

    def keep(self, entries: Iterable[Any]) -> None:
        """Add revokes to the file, and see that they are on the disk; those that are too long are left out.

        Raises:
            OSError: if that fails.
        """
        lines = [line for line in map(json.dumps, entries) if len(line) <= LONGEST]
        with self.path.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.added += len(lines)
        if self.added > state.REVOKES_MAX:
            self.load()
            self.added = 0


def _entry(line: str) -> Any:
    """Return the revoke in a line, or None if there is none in it: a file may be cut where a host was switched off."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    fits = isinstance(entry, str) or (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str))
    return entry if fits else None


def install(app: Celery, settings: Settings) -> None:
    """Let the worker of this process keep its revokes."""
    folder = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if folder:
        signals.worker_init.connect(lambda sender, **_: begin(Path(folder, f"revoked-{quote(sender.hostname, safe='@')}")), weak=False)


def begin(path: Path) -> None:
    """Read what was revoked before, and keep in the same file what is revoked from now on."""
    revokes = Revokes(path)
    try:
        known = revokes.load()
    except OSError as error:
        logger.error("Revokes from before are not known, and those tasks run: %s", error)
        known = []
    state.revoked.update([entry for entry in known if isinstance(entry, str)])
    for header, stamp in (entry for entry in known if not isinstance(entry, str)):
        state.revoked_stamps.setdefault(header, []).append(stamp)

    def keep(entries: list[Any]) -> None:
        try:
            revokes.keep(entries)
        except OSError as error:
            logger.error("Revokes are forgotten when this worker ends: %s", error)

    revoke, by_headers = control._revoke, control.Panel.data["revoke_by_stamped_headers"]

    def keep_and_revoke(worker: Any, task_ids: set[str], *arguments: Any, **options: Any) -> Any:
        keep([str(id) for id in task_ids])
        return revoke(worker, task_ids, *arguments, **options)

    def keep_and_revoke_by_headers(worker: Any, headers: Any, *arguments: Any, **options: Any) -> Any:
        # The command line gives a list.
        pairs = headers if isinstance(headers, Mapping) else dict(header.split("=")[:2] for header in headers)
        keep([[header, stamp] for header, stamps in pairs.items() for stamp in maybe_list(stamps)])
        return by_headers(worker, headers, *arguments, **options)

    control._revoke = keep_and_revoke
    control.Panel.data["revoke_by_stamped_headers"] = keep_and_revoke_by_headers
