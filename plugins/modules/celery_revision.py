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
  - A host of the layout before applications had folders of their own is moved over when its first revision is activated. Its
    services finish their tasks; schedule, logs and state go along.
options:
  application:
    description: Name of the application, which its units and its folder carry. Needed unless I(state) is C(absent).
    type: str
  path:
    description: Folder that holds a folder for each application, in which are C(next), C(revisions) and C(current).
    type: path
    default: /etc/celery
  keep:
    description: For C(absent), names of the applications that stay.
    type: list
    elements: str
    default: []
  contents:
    description: For C(checked), names in C(next), with globs, that belong to the revision. What an earlier run left besides is removed.
    type: list
    elements: str
    default: ["*"]
  state:
    description: >-
      C(checked) runs I(check_command) if the wanted revision is another than the current one; C(active) makes it the current
      one; C(absent) stops the services of all applications but those of I(keep), and removes their units and all revisions.
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
  writable_paths:
    description: For C(active), folders that the services may write to. What is in them of the user of the earlier layout gets the new one.
    type: list
    elements: path
    default: []
  user:
    description: For C(active), the user that the services run as.
    type: str
  links:
    description: Links to what is in the current revision.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Where the link is.
        type: path
        required: true
      to:
        description: What it points to, a path in the current revision.
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
  description: What an earlier run had written for the wanted revision, and this one does not want. If C(absent), the applications.
  returned: when state is checked or absent
  type: list
done:
  description: What was done with units, by name.
  returned: when state is active
  type: dict
"""

import fnmatch
import glob
import os
import pwd
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.systemd_units import UNITS, Systemd, UnitError, digest, replace_link, result_of

#: What a release is linked by in a revision.
RELEASE = "release"
#: Folders of services beside /etc/celery, in which each application has its own.
STATE = ("/var/lib/celery", "/var/lib/celery-beat", "/var/log/celery")
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


def remove(*paths: str) -> None:
    """Remove files, links and folders with all that is in them, if they are there."""
    for path in paths:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)


def let_pass(folder: str) -> None:
    """Let all users through a folder in which several have one of their own, as systemd makes it."""
    os.chmod(folder, 0o755)  # noqa: S103


def linked_units(application: str) -> list[str]:
    """Return the names of all units of an application that systemd has; those of the earlier layout, if it is ''."""
    prefix = f"celery-{glob.escape(application)}-" if application else "celery-"
    return sorted(os.path.basename(path) for kind in ("worker@*", "beat") for path in glob.glob(f"{UNITS}/{prefix}{kind}.service"))


class Earlier:
    """The one application of a host's earlier layout, in which neither folders nor units had its name."""

    def __init__(self, top: str, systemd: Systemd) -> None:
        self._top = top
        self._systemd = systemd
        self._current = os.path.join(top, "current")

    def is_here(self) -> bool:
        """Tell whether this host still has it."""
        return os.path.islink(self._current)

    def move(self, application: str, user: str, releases: str, writable_paths: list[str]) -> None:
        """Stop its services, which finish their tasks, and give what they left to the application.

        A call after an interrupted one goes on.

        Args:
            application: name of the application.
            user: whom its services run as.
            releases: folder of its releases. The earlier one is removed if it is another one.
            writable_paths: folders in which files of the earlier user become the new one's.

        Raises:
            UnitError: if a service does not stop.
            OSError: if something cannot be moved.
        """
        units = linked_units("")
        # All at once: each waits for its own tasks.
        self._systemd("stop", *units)
        for unit in units:
            self._systemd.remove(unit)
        for folder in STATE:
            self._move_below(folder, application)
        self._give([*(os.path.join(folder, application) for folder in STATE), *writable_paths], user)
        if os.path.realpath(releases) != os.path.join(self._home(), "releases"):
            remove(os.path.join(self._home(), "releases"), os.path.join(self._home(), "current"))
        remove(f"{UNITS}/celery-.service.d", f"{UNITS}/celery-next-.service.d", "/etc/logrotate.d/celery")
        remove(*(os.path.join(self._top, name) for name in ("celery.env", "credentials", "next", "revisions", "current")))

    def let_pass(self) -> None:
        """Let users other than its own through the folder above its releases, in which applications have theirs now."""
        let_pass(self._home())

    def _home(self) -> str:
        """Return the folder of its releases' folder."""
        return os.path.dirname(os.path.dirname(os.path.realpath(os.path.join(self._current, RELEASE))))

    @staticmethod
    def _move_below(folder: str, application: str) -> None:
        """Move all that is in a folder into the application's folder in it."""
        names = os.listdir(folder) if os.path.isdir(folder) else []
        own = os.path.join(folder, application)
        # What is root's already was moved, or is the new layout's.
        if not names or os.stat(folder).st_uid == 0:
            return
        os.makedirs(own, mode=0o700, exist_ok=True)
        for name in names:
            if name != application:
                # What the application has written there since, in its check, stays its own.
                taken = os.path.lexists(os.path.join(own, name))
                os.rename(os.path.join(folder, name), os.path.join(own, f"{name}.earlier" if taken else name))
        let_pass(folder)
        os.chown(folder, 0, 0)

    def _give(self, paths: list[str], user: str) -> None:
        """Give what is the earlier user's in folders to the new one."""
        about = re.search(r"^User=(\S+)$", self._drop_in(), re.MULTILINE)
        if not about or about[1] == user:
            return
        old, new = pwd.getpwnam(about[1]), pwd.getpwnam(user)
        for top in paths:
            for folder, folders, files in os.walk(top):
                for path in (folder, *(os.path.join(folder, name) for name in folders + files)):
                    owner = os.lstat(path)
                    if owner.st_uid == old.pw_uid:
                        os.chown(path, new.pw_uid, new.pw_gid if owner.st_gid == old.pw_gid else -1, follow_symlinks=False)

    def _drop_in(self) -> str:
        path = os.path.join(self._current, "platform.conf")
        if not os.path.exists(path):
            return ""
        with open(path, encoding="utf-8") as file:
            return file.read()


class Site:
    """The revisions of an application on this host."""

    def __init__(self, module: AnsibleModule, systemd: Systemd) -> None:
        self._module = module
        self._systemd = systemd
        self.application = module.params["application"]
        self.earlier = Earlier(module.params["path"], systemd)
        self._top = os.path.join(module.params["path"], self.application)
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
        return sorted(names, key=lambda name: (name.endswith("-beat.service"), name))

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

    def link(self) -> None:
        """Point the names by which all is known outside to the current revision."""
        for link in self._module.params["links"]:
            replace_link(link["path"], os.path.join(self._current, link["to"]))

    def switch(self, revision: str) -> dict[str, str]:
        """Make a revision the current one, and let all services run with it; return what was done, by unit.

        Raises:
            UnitError: if a unit does not come up.
        """
        units = self.units(revision)
        gone = [unit for unit in linked_units(self.application) if unit not in units]
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
        if os.path.isdir(releases):
            used = {os.path.realpath(path) for path in glob.glob(f"{top}/*/{RELEASE}")}
            others = {path for path in glob.glob(f"{os.path.realpath(releases)}/*") if os.path.isdir(path)} - used
            for path in sorted(others, key=os.path.getmtime, reverse=True)[self._module.params["keep_releases"] :]:
                shutil.rmtree(path, ignore_errors=True)

    def _shared(self, revision: str) -> str:
        """Return a digest of what all services of a revision share: all but their units."""
        folder = self.folder(revision)
        return identity(folder, [path for path in contents_of(folder, ["*"]) if not path.startswith("units/")])


def remove_others(top: str, keep: list[str], systemd: Systemd, check: bool) -> list[str]:
    """Stop and remove all applications of this host but some; return their names. Their state and their logs stay.

    Raises:
        UnitError: if a unit does not stop.
        OSError: if something cannot be removed.
    """
    names = [os.path.basename(os.path.dirname(path)) for path in sorted(glob.glob(f"{top}/*/revisions"))]
    gone = [name for name in names if name not in keep]
    for name in [] if check else gone:
        for unit in linked_units(name):
            systemd.remove(unit)
        release = os.path.realpath(os.path.join(top, name, "current", RELEASE))
        remove(
            os.path.join(os.path.dirname(os.path.dirname(release)), "current"),
            *(f"{UNITS}/celery-{name}-{part}.service.d" for part in ("", "next-")),
            f"/etc/logrotate.d/celery-{name}",
            os.path.join(top, name),
        )
    return gone


def work(module: AnsibleModule) -> dict[str, Any]:
    """Do what the module is asked for and return its result.

    Raises:
        UnitError: if the check fails or a unit does not come into its state.
        OSError: if a file cannot be written.
    """
    systemd = Systemd(module)
    state = module.params["state"]
    if state == "absent":
        gone = remove_others(module.params["path"], module.params["keep"], systemd, module.check_mode)
        return {"changed": bool(gone), "removed": gone}
    site = Site(module, systemd)
    result = {"revision": site.wanted, "new_release": site.new_release()}
    if state == "checked":
        if not module.check_mode:
            if site.earlier.is_here():
                site.earlier.let_pass()
            site.check()
        return {"changed": bool(site.stale), "removed": site.stale, **result}
    earlier = site.earlier.is_here()
    if module.check_mode:
        done = site.would_do()
        return {"changed": earlier or site.wanted != site.running() or bool(done), "done": done, **result}
    if earlier:
        site.earlier.move(*(module.params[name] for name in ("application", "user", "releases", "writable_paths")))
    changed = earlier or site.wanted != site.running()
    done = site.activate()
    return {"changed": changed or bool(done), "done": done, **result}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "application": {"type": "str"},
            "path": {"type": "path", "default": "/etc/celery"},
            "keep": {"type": "list", "elements": "str", "default": []},
            "contents": {"type": "list", "elements": "str", "default": ["*"]},
            "state": {"type": "str", "choices": ["checked", "active", "absent"], "default": "active"},
            "check_command": {"type": "list", "elements": "str", "default": []},
            "releases": {"type": "path"},
            "keep_releases": {"type": "int", "default": 3},
            "user": {"type": "str"},
            "writable_paths": {"type": "list", "elements": "path", "default": []},
            "links": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {"path": {"type": "path", "required": True}, "to": {"type": "str", "required": True}},
            },
        },
        required_if=[("state", "checked", ["application"]), ("state", "active", ["application", "releases", "user"])],
        supports_check_mode=True,
    )
    result_of(module, lambda: work(module))


if __name__ == "__main__":
    main()
