#!/usr/bin/python
"""Ansible module `celery_revision`: check and activate what an application's services run with, as a whole."""

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_revision
short_description: Check and activate a revision of a Celery application on a host
description:
  - A revision is all that the services of an application run with, which is the release of its code, settings, credentials,
    sandbox and units. Roles write the wanted one into the folder C(next); the one that runs is the link C(current).
  - To activate a revision, it is copied to C(revisions/<digest>), C(current) is pointed to it in one step, and services that
    were started with anything else are restarted one after the other. If one does not come up, C(current) is pointed back, and
    the services run as before.
options:
  path:
    description: Folder that holds C(next), C(revisions) and C(current).
    type: path
    default: /etc/celery
  contents:
    description: For C(checked), names in C(next), with globs, that belong to the revision. What an earlier run left besides is removed.
    type: list
    elements: str
    default: ["*"]
  state:
    description: >-
      C(checked) runs I(check_command) if the wanted revision is another than the current one; C(active) makes it the current
      one; C(absent) stops the services and removes the units and all revisions.
    type: str
    choices: [checked, active, absent]
    default: active
  check_command:
    description: Command that must succeed before the revision can be activated.
    type: list
    elements: str
    default: []
  releases:
    description: For C(active), the folder of all releases.
    type: path
  keep_releases:
    description: How many releases are kept besides those of kept revisions, the newest ones, to go back to.
    type: int
    default: 3
  links:
    description: Links to what is in the current revision. Where a file or folder of an earlier layout is, it is replaced.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Where the link is.
        type: path
        required: true
      to:
        description: What it points to, a path in I(path)/current.
        type: str
        required: true
author: Celery Platform
"""

RETURN = r"""
revision:
  description: Digest of the wanted revision.
  returned: when state is not absent
  type: str
new_release:
  description: Whether it has another release of the code than the current revision.
  returned: when state is not absent
  type: bool
removed:
  description: What an earlier run had written for the wanted revision, and this one does not want.
  returned: when state is checked
  type: list
done:
  description: What was done with units, by name.
  returned: when state is active
  type: dict
"""

import fnmatch
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.systemd_units import UNITS, Systemd, UnitError, digest, replace_link, result_of

#: What a release is linked by in a revision.
RELEASE = "release"
#: Names of units of an application, with globs.
OWN_UNITS = ("celery-worker@*.service", "celery-beat.service")
#: Lines of a failed check that are shown.
CHECK_LINES = 20
#: Seconds that a check may take.
CHECK_TIME = 300


def contents_of(folder: str, patterns: list[str]) -> Iterator[str]:
    """Yield the relative paths of the files and links below a folder that match a pattern, in a fixed order."""
    for top, folders, files in os.walk(folder):
        for name in sorted(files + [name for name in folders if os.path.islink(os.path.join(top, name))]):
            path = os.path.relpath(os.path.join(top, name), folder)
            if any(fnmatch.fnmatch(path, pattern) for pattern in patterns):
                yield path


def identity(folder: str, paths: list[str]) -> str:
    """Return a digest of files: their names, contents, modes and, of links, targets."""
    parts: list[str | bytes] = []
    for path in sorted(paths):
        full = os.path.join(folder, path)
        parts.append(path)
        if os.path.islink(full):
            parts.append(os.readlink(full))
        else:
            with open(full, "rb") as file:
                parts += [f"{os.fstat(file.fileno()).st_mode:o}", file.read()]
    return digest(*parts)


@contextmanager
def closed_to_others() -> Iterator[None]:
    """Create files and folders for root alone: a copy gets its mode only when it is complete."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def copy(source: str, paths: list[str], target: str) -> None:
    """Copy files of a folder to a new one that appears as a whole, with modes, owners and times.

    Raises:
        OSError: if they cannot be copied.
    """
    partial = f"{target}.new"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial, mode=0o755)
    with closed_to_others():
        for path in paths:
            folder = os.path.dirname(path)
            while folder and not os.path.isdir(os.path.join(partial, folder)):
                os.makedirs(os.path.join(partial, folder))
                shutil.copystat(os.path.join(source, folder), os.path.join(partial, folder))
            shutil.copy2(os.path.join(source, path), os.path.join(partial, path), follow_symlinks=False)
    os.sync()
    os.rename(partial, target)


class Site:
    """The revisions of an application on this host."""

    def __init__(self, module: AnsibleModule, systemd: Systemd) -> None:
        self._module = module
        self._systemd = systemd
        self._top = module.params["path"]
        self._current = os.path.join(self._top, "current")
        self._next = os.path.join(self._top, "next")
        self._paths = list(contents_of(self._next, module.params["contents"]))
        #: What an earlier run wrote, and this one does not want.
        self.stale = sorted(set(contents_of(self._next, ["*"])) - set(self._paths)) if module.params["state"] == "checked" else []
        for path in [] if module.check_mode else self.stale:
            os.unlink(os.path.join(self._next, path))
        self.wanted = identity(self._next, self._paths)

    def folder(self, revision: str) -> str:
        """Return the folder of a revision."""
        return os.path.join(self._top, "revisions", revision)

    def running(self) -> str:
        """Return the current revision; '' if there is none."""
        return os.path.basename(os.readlink(self._current)) if os.path.islink(self._current) else ""

    def new_release(self) -> bool:
        """Tell whether the wanted revision has another release than the current one."""
        return os.path.realpath(os.path.join(self._next, RELEASE)) != os.path.realpath(os.path.join(self._current, RELEASE))

    def units(self, revision: str) -> list[str]:
        """Return the names of the units of a revision: workers before beat, which sends to them."""
        folder = os.path.join(self.folder(revision), "units")
        names = os.listdir(folder) if revision and os.path.isdir(folder) else []
        return sorted(names, key=lambda name: (name == "celery-beat.service", name))

    def linked_units(self) -> list[str]:
        """Return the names of all units of the application that systemd has."""
        return sorted(
            os.path.basename(path) for path in glob.glob(f"{UNITS}/celery-worker@*.service") + glob.glob(f"{UNITS}/celery-beat.service")
        )

    def check(self) -> None:
        """Run the check of the wanted revision.

        Raises:
            UnitError: if it fails, with the end of what it printed.
        """
        command = self._module.params["check_command"]
        if not command or self.wanted == self.running():
            return
        code, out, error = self._module.run_command(["timeout", str(CHECK_TIME), *command])
        if code:
            lines = (out + error).strip().splitlines()[-CHECK_LINES:]
            raise UnitError("The application does not start with its settings; nothing was changed in what runs.\n" + "\n".join(lines))

    def adopt(self) -> None:
        """Make a revision of a host's earlier layout, in which files stood where there are links now."""
        if self.running() or not os.path.isfile(f"{self._top}/celery.env"):
            return
        folder = self.folder("earlier")
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(f"{folder}/units", mode=0o755)
        shutil.copy2(f"{self._top}/celery.env", folder)
        with closed_to_others():
            shutil.copytree(f"{self._top}/credentials", f"{folder}/credentials")
        shutil.copy2(f"{UNITS}/celery-.service.d/platform.conf", folder)
        for unit in self.linked_units():
            shutil.copy2(f"{UNITS}/{unit}", f"{folder}/units")
        release = next(link["path"] for link in self._module.params["links"] if link["to"] == RELEASE)
        os.symlink(os.path.realpath(release), f"{folder}/{RELEASE}")
        replace_link(self._current, "revisions/earlier")

    def link(self) -> None:
        """Point the names by which all is known outside to the current revision."""
        for link in self._module.params["links"]:
            path = link["path"]
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            replace_link(path, os.path.join(self._current, link["to"]))

    def switch(self, revision: str) -> dict[str, str]:
        """Make a revision the current one, and let all services run with it; return what was done, by unit.

        Raises:
            UnitError: if a unit does not come up.
        """
        units = self.units(revision)
        gone = [unit for unit in self.linked_units() if unit not in units]
        for unit in gone:
            # It is stopped last, by which time others take its tasks, and as its own file wants it.
            for path in sorted(glob.glob(f"{self.folder('*')}/units/{glob.escape(unit)}")):
                replace_link(f"{UNITS}/{unit}", path)
        replace_link(self._current, f"revisions/{revision}")
        self.link()
        for unit in units:
            replace_link(f"{UNITS}/{unit}", f"{self._current}/units/{unit}")
            # As `systemctl enable` does it, which follows links to the end and so would name this one revision.
            replace_link(f"{UNITS}/multi-user.target.wants/{unit}", f"{UNITS}/{unit}")
        self._systemd("daemon-reload")
        shared = self._shared(revision)
        done = {unit: self._systemd.bring(unit, shared) for unit in units}
        done |= {unit: "removed" for unit in gone if self._systemd.remove(unit)}
        return {unit: what for unit, what in done.items() if what}

    def activate(self) -> dict[str, str]:
        """Make the wanted revision the current one; if it does not run, the services run as before.

        Raises:
            UnitError: if a unit does not come up.
        """
        before = self.running()
        if self.wanted != before and not os.path.isdir(self.folder(self.wanted)):
            copy(self._next, self._paths, self.folder(self.wanted))
        try:
            done = self.switch(self.wanted)
        except UnitError as error:
            if not before or before == self.wanted:
                raise
            try:
                self.switch(before)
            except UnitError as second:
                raise UnitError(
                    f"The new revision does not run, nor does the earlier one, which is the current one again.\n{second}"
                ) from error
            raise UnitError(f"The new revision does not run; the earlier one runs again.\n{error}") from error
        if self.wanted != before:
            self._prune({self.wanted, before})
        return done

    def would_do(self) -> dict[str, str]:
        """Return what activating the wanted revision would do with units."""
        running = self.running()
        if not running:
            return {}
        shared = self._shared(running)
        done = {unit: self._systemd.bring(unit, shared, check=True) for unit in self.units(running)}
        return {unit: what for unit, what in done.items() if what}

    def _prune(self, keep: set[str]) -> None:
        """Remove the revisions that are not to be kept, since they hold secrets, and releases that nobody will go back to."""
        top = os.path.join(self._top, "revisions")
        for name in set(os.listdir(top)) - keep:
            shutil.rmtree(os.path.join(top, name), ignore_errors=True)
        releases = self._module.params["releases"]
        if releases:
            used = {os.path.realpath(path) for path in glob.glob(f"{top}/*/{RELEASE}")}
            others = {path for path in glob.glob(f"{os.path.realpath(releases)}/*") if os.path.isdir(path)} - used
            for path in sorted(others, key=os.path.getmtime, reverse=True)[self._module.params["keep_releases"] :]:
                shutil.rmtree(path, ignore_errors=True)

    def remove(self, check: bool) -> bool:
        """Stop all services and remove units, revisions and links; False if nothing was there."""
        present = bool(self.linked_units() or self.running())
        if present and not check:
            for unit in self.linked_units():
                self._systemd.remove(unit)
            for path in [*(link["path"] for link in self._module.params["links"]), self._current]:
                if os.path.islink(path):
                    os.unlink(path)
            shutil.rmtree(os.path.join(self._top, "revisions"), ignore_errors=True)
            shutil.rmtree(self._next, ignore_errors=True)
        return present

    def _shared(self, revision: str) -> str:
        """Return a digest of what all services of a revision share: all but their units."""
        folder = self.folder(revision)
        return identity(folder, [path for path in contents_of(folder, ["*"]) if not path.startswith("units/")])


def work(module: AnsibleModule) -> dict[str, Any]:
    """Do what the module is asked for and return its result.

    Raises:
        UnitError: if the check fails or a unit does not come into its state.
        OSError: if a file cannot be written.
    """
    site = Site(module, Systemd(module))
    state = module.params["state"]
    if state == "absent":
        return {"changed": site.remove(module.check_mode)}
    result = {"revision": site.wanted, "new_release": site.new_release()}
    if state == "checked":
        if not module.check_mode:
            site.check()
        return {"changed": bool(site.stale), "removed": site.stale, **result}
    if module.check_mode:
        done = site.would_do()
        return {"changed": site.wanted != site.running() or bool(done), "done": done, **result}
    site.adopt()
    changed = site.wanted != site.running()
    done = site.activate()
    return {"changed": changed or bool(done), "done": done, **result}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "default": "/etc/celery"},
            "contents": {"type": "list", "elements": "str", "default": ["*"]},
            "state": {"type": "str", "choices": ["checked", "active", "absent"], "default": "active"},
            "check_command": {"type": "list", "elements": "str", "default": []},
            "releases": {"type": "path"},
            "keep_releases": {"type": "int", "default": 3},
            "links": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {"path": {"type": "path", "required": True}, "to": {"type": "str", "required": True}},
            },
        },
        supports_check_mode=True,
    )
    result_of(module, lambda: work(module))


if __name__ == "__main__":
    main()
