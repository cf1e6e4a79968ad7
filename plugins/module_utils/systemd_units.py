"""Bring systemd units into their state, judging what runs by what it was started with, not by what this run has changed.

Each unit gets a drop-in that, whenever its service starts, leaves a mark in /run: a digest of the unit's files and of all that
the service reads at its start. A run that was interrupted before it restarted a service is thus seen by the next one, and so is
a service that systemd itself restarted meanwhile.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from ansible.module_utils.basic import AnsibleModule

#: Where an administrator's units and drop-ins are (systemd.unit(5)).
UNITS = "/etc/systemd/system"
#: Name of the drop-in that leaves the mark.
DROP_IN = "zz-fingerprint.conf"
#: Names of all drop-ins that roles of this project write.
DROP_INS = ("celery-platform.conf", "celery-monitor.conf", DROP_IN)
#: Lines of a unit's journal that are shown if it does not start.
JOURNAL_LINES = 12
#: Hexadecimal digits of a digest that are kept; 64 bits tell apart what one host ever had.
DIGITS = 16

PROPERTIES = ("ActiveState", "DropInPaths", "FragmentPath", "LoadState", "SubState", "UnitFileState")


class UnitError(Exception):
    """A unit does not come into its state; the message holds the end of its journal."""


def digest(*parts: str | bytes) -> str:
    """Return a short digest of texts, in which each counts by itself: ("ab", "c") is not ("a", "bc")."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(b"%d:%s" % (len(data), data))
    return total.hexdigest()[:DIGITS]


def digest_of(paths: list[str]) -> str:
    """Return a digest of paths: of files the contents, of folders all that is in them, of links the target; none need exist.

    What Python compiles for itself does not count.
    """
    parts: list[str | bytes] = []
    for path in paths:
        parts.append(path)
        if os.path.islink(path):
            parts.append(os.readlink(path))
        if os.path.isdir(path) and not os.path.islink(path):
            parts.append(digest_of([os.path.join(path, name) for name in sorted(os.listdir(path)) if name != "__pycache__"]))
        elif os.path.isfile(path):
            with open(path, "rb") as file:
                parts.append(file.read())
    return digest(*parts)


def what_is_wrong(ready: dict[str, Any]) -> str:
    """Return why a service does not answer as the option `ready` of the module `systemd_units` says; '' if it does."""
    try:
        with socket.socket(socket.AF_UNIX) if ready["socket"] else socket.create_connection((ready["host"], ready["port"]), 5) as there:
            there.settimeout(5)
            if ready["socket"]:
                there.connect(ready["socket"])
            if not ready["path"]:
                return ""
            there.sendall(f"GET {ready['path']} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            status = there.makefile("rb").readline(256).decode("latin-1").strip()
            return "" if status.split()[1:2] == ["200"] else f"{ready['path']} answers {status or 'nothing'}"
    except OSError as error:
        return str(error)


def kind_of(unit: str) -> str:
    """Return the name of the section of a unit's own kind: Service for a.service."""
    return unit.rpartition(".")[2].capitalize()


def replace_file(path: str, content: str, mode: int = 0o644) -> bool:
    """Write a file so that a reader finds the old or the new one; False if nothing had to be changed.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        with open(path) as file:
            if file.read() == content:
                return False
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    partial = f"{path}.new"
    with open(partial, "w") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)
    return True


def replace_link(path: str, target: str) -> bool:
    """Point a symbolic link elsewhere in one step, also where a file was; False if nothing had to be changed.

    Raises:
        OSError: if it cannot be written, as where a folder is.
    """
    if os.path.islink(path) and os.readlink(path) == target:
        return False
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    partial = f"{path}.new"
    if os.path.lexists(partial):
        os.unlink(partial)
    os.symlink(target, partial)
    os.rename(partial, path)
    return True


class Systemd:
    """The systemd of this host."""

    def __init__(self, module: AnsibleModule, units: str = UNITS, run: str = "/run") -> None:
        self._module = module
        self._units = units
        self._run = run

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Run systemctl and return its exit status and output."""
        code, out, error = self._module.run_command(["systemctl", *arguments])
        return code, out + error

    def show(self, unit: str) -> dict[str, str]:
        """Return the properties of a unit that this module looks at."""
        _, out = self("show", unit, "--property=" + ",".join(PROPERTIES))
        return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)

    def mark(self, unit: str, fingerprint: str, reloaded: str = "") -> str:
        """Return the mark of a service that was started, and last reloaded, with all that is wanted now."""
        state = self.show(unit)
        paths = [state["FragmentPath"], *state["DropInPaths"].split()]
        own = [path for path in paths if path and os.path.basename(path) != DROP_IN]
        return f"{digest(fingerprint, digest_of(own))}.{digest(reloaded)}"

    def mark_of_running(self, unit: str) -> str:
        """Return the mark of the service that runs; '' if it has left none."""
        try:
            return os.readlink(self._mark_path(unit))
        except OSError:
            return ""

    def bring(self, unit: str, fingerprint: str, reloaded: str = "", check: bool = False, kept: bool = False) -> str:
        """Enable a unit, and start, restart or reload its service if that is needed.

        systemd must have read its files: systemd 252 does not tell that it has missed a new folder of drop-ins.

        Args:
            unit: its name, with its type.
            fingerprint: digest of what its service reads at its start, besides the files of the unit.
            reloaded: digest of what its service reads again when it is reloaded.
            check: only find what would be done.
            kept: neither enable nor start it.

        Returns:
            What was done: started, restarted, reloaded, enabled, or '' for nothing.

        Raises:
            UnitError: if it does not come up.
        """
        wanted = self.mark(unit, fingerprint, reloaded)
        command = f"ExecStartPost=-+/bin/ln -sfT {wanted} {self._mark_path('%n')}"
        text = f"# Written by Ansible. Tells the next run what this was started with.\n[{kind_of(unit)}]\n{command}\n"
        if not check and replace_file(f"{self._units}/{unit}.d/{DROP_IN}", text):
            self("daemon-reload")
        state = self.show(unit)
        running = self.mark_of_running(unit)
        if state["ActiveState"] not in ("active", "reloading") or state["SubState"] == "auto-restart":
            done = "" if kept else "started"
        elif running == wanted:
            done = ""
        elif running.split(".")[0] == wanted.split(".")[0]:
            done = "reloaded"
        else:
            done = "restarted"
        enabled = not kept and state["UnitFileState"] in ("disabled", "linked", "")
        if check:
            return done or ("enabled" if enabled else "")
        if enabled:
            self.enable(unit)
        if done == "reloaded":
            self._do("reload", unit)
            replace_link(self._mark_path(unit), wanted)
        elif done:
            # One that was stopped by its own failures starts anew, too.
            self("reset-failed", unit)
            if kind_of(unit) == "Socket" and done == "restarted":
                # systemd refuses to restart a socket while its service runs.
                self._do("stop", unit.replace(".socket", ".service"))
            self._do("restart", unit)
        return done or ("enabled" if enabled else "")

    def enable(self, unit: str) -> None:
        """Let a unit start at boot.

        Raises:
            UnitError: if systemd refuses to.
        """
        self._do("enable", unit)

    def stop(self, unit: str, check: bool = False) -> bool:
        """Stop a unit and keep it from starting at boot; False if neither was needed.

        Raises:
            UnitError: if it does not stop.
        """
        state = self.show(unit)
        runs = state["ActiveState"] not in ("inactive", "failed")
        enabled = state["UnitFileState"] == "enabled"
        if runs and not check:
            self._do("stop", unit)
        if enabled and not check:
            # Of a unit that is a link, its own link is removed, too.
            self._do("disable", unit)
        return runs or enabled

    def remove(self, unit: str, check: bool = False) -> bool:
        """Stop a unit that is ours, or a package's with drop-ins of ours, and remove these files; False if there are none.

        Raises:
            UnitError: if it does not stop.
        """
        folder = f"{self._units}/{unit}.d"
        present = [path for path in (f"{self._units}/{unit}", *(f"{folder}/{name}" for name in DROP_INS)) if os.path.lexists(path)]
        if not present or check:
            return bool(present)
        self.stop(unit)
        for path in present:
            if os.path.lexists(path):
                os.unlink(path)
        if os.path.isdir(folder) and not os.listdir(folder):
            os.rmdir(folder)
        if os.path.lexists(self._mark_path(unit)):
            os.unlink(self._mark_path(unit))
        self("reset-failed", unit)
        self("daemon-reload")
        return True

    def wait_until_ready(self, unit: str, ready: dict[str, Any]) -> None:
        """Wait until what a unit's service is for answers.

        Args:
            unit: its name.
            ready: as the option of the module `systemd_units`; timeout in seconds.

        Raises:
            UnitError: if it does not answer in time.
        """
        end = time.monotonic() + ready["timeout"]
        while wrong := what_is_wrong(ready):
            if time.monotonic() > end:
                raise UnitError(f"{unit} is not ready after {ready['timeout']} s: {wrong}\nThe end of its journal:\n{self.journal(unit)}")
            time.sleep(0.2)

    def journal(self, unit: str) -> str:
        """Return the end of a unit's journal."""
        command = ["journalctl", "--unit", unit, "--lines", str(JOURNAL_LINES), "--output=cat", "--no-pager"]
        return str(self._module.run_command(command)[1])

    def _mark_path(self, unit: str) -> str:
        return f"{self._run}/{unit}.fingerprint"

    def _do(self, verb: str, unit: str) -> None:
        code, out = self(verb, unit)
        if code:
            raise UnitError(f"systemctl {verb} {unit}: {out.strip()}\nThe end of its journal:\n{self.journal(unit)}")


def result_of(module: AnsibleModule, work: Callable[[], dict[str, Any]]) -> None:
    """Do the work of a module and end it; what goes wrong with a unit or a file is its message."""
    try:
        module.exit_json(**work())
    except (UnitError, OSError) as error:
        module.fail_json(msg=str(error))
