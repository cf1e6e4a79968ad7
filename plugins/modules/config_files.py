#!/usr/bin/python
"""Ansible module `config_files`: files, folders and links of a role, in one run."""

from __future__ import annotations

DOCUMENTATION = r"""
module: config_files
short_description: Write files, folders and links of a role in one run
description:
  - Renders templates on the controller, sends all of them in one module run, and replaces on the host what differs. Takes the
    place of loops of M(ansible.builtin.template), M(ansible.builtin.copy) and M(ansible.builtin.file), of which each costs a
    run for each file.
  - New contents are written beside the old ones, with owner and permissions, and validated; only if all of them are right, each
    takes the place of the old file in one step. An interrupted run leaves files that are old or new, never half.
  - Folders above a path are created if they do not exist, as root's, with 0755.
  - Contents are in no argument of a process, in no log and, where a file is C(secret), in no diff.
options:
  files:
    description: What is to be there, in this order.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: >-
          Absolute path. With O(files[].state=absent) it may have globs (C(*), C(?)); what the same run writes stays.
        type: path
        required: true
      template: {description: "A template of the role, which the file is rendered from.", type: str}
      source: {description: "A file of the role, or a folder of files, as it is.", type: str}
      content: {description: The file's text., type: str}
      contents: {description: "Texts by name, of the files in a folder.", type: dict}
      only: {description: "Remove other files of the folder; folders in it stay.", type: bool, default: false}
      target: {description: What a link points to., type: str}
      state:
        description: What it is; found by the other options if it is not given. What is C(absent) is removed, with all that is in it.
        type: str
        choices: [file, directory, link, absent]
      owner: {description: The owner's name., type: str, default: root}
      group: {description: The group's name., type: str, default: root}
      mode:
        description: Permissions in octal, in quotes. Unless given, C(0644) for files, C(0755) for folders.
        type: str
      directory_mode: {description: Permissions of the folder that C(contents) or C(source) fill., type: str, default: "0755"}
      secret: {description: Whether the content is kept out of diffs., type: bool, default: false}
      validate: {description: "Command that judges the new file, C(%s), before it takes its place.", type: str}
      vars: {description: Further variables of the template., type: dict}
      delimiters:
        description: >-
          What a template marks expressions, statements and comments with: C(curly) is {{ }}, {% %}, {# #}; C(angle) is << >>, <% %>,
          <# #>, for files in which curly brackets mean something themselves.
        type: str
        choices: [curly, angle]
        default: curly
      when: {description: Whether the entry counts., type: bool, default: true}
author: Celery Platform
"""

EXAMPLES = r"""
- name: Write the files of Redis
  config_files:
    files:
      - {path: /etc/redis/celery-platform.conf, template: celery-platform.conf.j2, group: redis, mode: "0640"}
      - {path: /etc/redis/users.acl, template: users.acl.j2, group: redis, mode: "0640", secret: true}
      - {path: /etc/prometheus/rules, contents: "{{ rules }}", only: true, validate: promtool check rules %s}
      - {path: /opt/app/current, target: releases/1}
      - {path: /etc/redis/old.conf, state: absent}
"""

RETURN = r"""
paths:
  description: What was done, or would be, by path; created, changed, permissions or removed.
  returned: always
  type: dict
"""

import base64
import glob
import grp
import json
import os
import pwd
import shlex
import shutil
import stat
import zlib
from typing import Any

from ansible.module_utils.basic import AnsibleModule


class Refused(Exception):
    """Something that a run cannot do; the message names the path."""


def expanded(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries with what is there in place of globs that are to be absent."""
    written = {entry["path"] for entry in entries if entry["state"] != "absent"}
    found = []
    for entry in entries:
        if entry["state"] == "absent" and glob.has_magic(entry["path"]):
            found += [entry | {"path": path} for path in sorted(set(glob.glob(entry["path"])) - written)]
        else:
            found.append(entry)
    return found


class Changes:
    """What has to be changed on this host: prepared first, then done."""

    def __init__(self, module: AnsibleModule) -> None:
        self._module = module
        self._check: bool = module.check_mode
        self.paths: dict[str, str] = {}
        self.diff: list[dict[str, str]] = []
        #: Partial files, and the paths whose place they take.
        self._partial: dict[str, str] = {}

    def prepare(self, entry: dict[str, Any]) -> None:
        """Find what has to be done for an entry, and write and validate its new file.

        Raises:
            Refused: if something else is in its place, or the new file is not valid.
            OSError: if it cannot be written.
        """
        path, state = entry["path"], entry["state"]
        present = os.path.lexists(path)
        if state != "absent" and present and os.path.isdir(path) and not os.path.islink(path) and state != "directory":
            raise Refused(f"{path} is a folder")
        if state == "absent":
            if present:
                self.paths[path] = "removed"
        elif state == "link":
            before = os.readlink(path) if os.path.islink(path) else None
            if before != entry["target"]:
                self.paths[path] = "changed" if present else "created"
                self._tell(entry, before or "", entry["target"])
        elif state == "directory":
            if present and not os.path.isdir(path):
                raise Refused(f"{path} is no folder")
            if not present:
                self.paths[path] = "created"
                if not self._check:
                    # Now, since what is prepared next may be in it.
                    self._make_parents(path)
                    os.mkdir(path, 0o700)
                    self._set_attributes(entry, path)
            if entry["only"] and present:
                for name in sorted(os.listdir(path)):
                    other = os.path.join(path, name)
                    if name not in entry["names"] and (os.path.islink(other) or not os.path.isdir(other)):
                        self.paths[other] = "removed"
        else:
            self._prepare_file(entry, present)

    def _prepare_file(self, entry: dict[str, Any], present: bool) -> None:
        path, content = entry["path"], entry["content"].encode()
        folder, name = os.path.split(path)
        # Whoever reads all of a folder (logrotate, cron, systemd) skips such a name, if a run is interrupted.
        partial = os.path.join(folder, f".{name}.dpkg-new")
        if os.path.lexists(partial) and not self._check:
            os.unlink(partial)
        regular = present and stat.S_ISREG(os.lstat(path).st_mode)
        before = b""
        if regular:
            with open(path, "rb") as file:
                before = file.read()
            if before == content:
                return
        self.paths[path] = "changed" if present else "created"
        self._tell(entry, before.decode(errors="replace"), entry["content"])
        if self._check:
            return
        self._make_parents(path)
        self._partial[partial] = path
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._set_attributes(entry, partial)
        self._module.set_context_if_different(partial, self._module.selinux_default_context(path), changed=False)
        if entry["validate"]:
            command = [partial if word == "%s" else word for word in shlex.split(entry["validate"])]
            code, out, error = self._module.run_command(command)
            if code:
                raise Refused(f"{path} would not be valid, so no file was changed.\n{(out + error).strip().replace(partial, path)}")

    def apply(self, entry: dict[str, Any]) -> None:
        """Do for an entry what `prepare` has found, and set its owner and permissions.

        Raises:
            OSError: if it cannot be done.
        """
        path, state = entry["path"], entry["state"]
        found = self.paths.get(path)
        if state == "absent":
            if found and not self._check:
                shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
            return
        if not self._check:
            if state == "link" and found:
                self._make_parents(path)
                partial = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.dpkg-new")
                if os.path.lexists(partial):
                    os.unlink(partial)
                os.symlink(entry["target"], partial)
                os.rename(partial, path)
            elif state == "directory":
                for name in os.listdir(path) if entry["only"] else ():
                    if self.paths.get(other := os.path.join(path, name)) == "removed":
                        os.unlink(other)
            elif found:
                partial = next(partial for partial, of in self._partial.items() if of == path)
                os.rename(partial, path)
                del self._partial[partial]
        if state != "link" and os.path.lexists(path) and self._set_attributes(entry, path):
            self.paths.setdefault(path, "permissions")

    def _set_attributes(self, entry: dict[str, Any], path: str) -> bool:
        """Set owner, group and permissions of a path; True if they were different."""
        try:
            wanted = (pwd.getpwnam(entry["owner"]).pw_uid, grp.getgrnam(entry["group"]).gr_gid, int(entry["mode"], 8))
        except KeyError as error:
            if self._check:
                # A package that is not there yet will bring them.
                return True
            raise Refused(f"{entry['path']}: {error.args[0]}") from error
        there = os.lstat(path)
        if (there.st_uid, there.st_gid, stat.S_IMODE(there.st_mode)) == wanted:
            return False
        if not self._check:
            # A new owner must not read what the old permissions would let him.
            os.chmod(path, 0o700 if stat.S_ISDIR(there.st_mode) else 0o600)
            os.chown(path, *wanted[:2])
            os.chmod(path, wanted[2])
        return True

    def _make_parents(self, path: str) -> None:
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            self._make_parents(folder)
            os.mkdir(folder, 0o755)
            os.chmod(folder, 0o755)  # noqa: S103 Debian's own mode for folders, whatever the umask

    def _tell(self, entry: dict[str, Any], before: str, after: str) -> None:
        if not entry["secret"]:
            self.diff.append({"before_header": entry["path"], "after_header": entry["path"], "before": before, "after": after})

    def clean_up(self) -> None:
        """Remove partial files that did not take their place."""
        for partial in self._partial:
            if os.path.lexists(partial):
                os.unlink(partial)


def main() -> None:
    """Run the module."""
    # All in one, which is neither logged nor shown: contents are secrets, and each by itself would be struck out of what is shown.
    module = AnsibleModule(argument_spec={"payload": {"type": "str", "required": True, "no_log": True}}, supports_check_mode=True)
    entries = expanded(json.loads(zlib.decompress(base64.b64decode(module.params["payload"]))))
    changes = Changes(module)
    try:
        for entry in entries:
            changes.prepare(entry)
        for entry in entries:
            changes.apply(entry)
    except (Refused, OSError) as error:
        module.fail_json(msg=str(error), paths={} if isinstance(error, Refused) else changes.paths)
    finally:
        changes.clean_up()
    module.exit_json(changed=bool(changes.paths), paths=changes.paths, diff=changes.diff)


if __name__ == "__main__":
    main()
