#!/usr/bin/python
"""Ansible module `text_files`: the text files of one folder, in one run."""

from __future__ import annotations

DOCUMENTATION = r"""
module: text_files
short_description: Write the text files of a folder
description:
  - Creates the folder, and writes the files whose text differs. One run for all of them, where M(ansible.builtin.copy) has one
    or two for each.
options:
  folder: {description: The folder. Those above it are created if they do not exist., type: path, required: true}
  files: {description: "The files: text by name.", type: dict, required: true}
  directory_mode: {description: The folder's permissions., type: raw, default: "0755"}
  only: {description: "Remove the folder's other files; folders in it stay.", type: bool, default: false}
extends_documentation_fragment: [files]
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

#: No folders, hidden files or things that are not names.
NAME = r"[\w-][\w.-]*"


def text_of(path: Path) -> str | None:
    """Return the text of a file; None if there is none, or something else in its place."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() and not path.is_symlink() else None


def differences(folder: Path, files: dict[str, str], only: bool) -> dict[str, tuple[str | None, str | None]]:
    """Return text before and after by name, of the files to write and (after is None) to remove."""
    found = {name: (text_of(folder / name), text) for name, text in files.items()}
    if only and folder.is_dir():
        found |= {path.name: (text_of(path) or "", None) for path in folder.iterdir() if path.name not in files and not path.is_dir()}
    return {name: (before, after) for name, (before, after) in found.items() if before != after}


def write(module: AnsibleModule, path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=module.tmpdir, delete=False) as new:
        new.write(text)
    module.atomic_move(new.name, str(path))


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "folder": {"type": "path", "required": True},
            "files": {"type": "dict", "required": True},
            "only": {"type": "bool", "default": False},
            "directory_mode": {"type": "raw", "default": "0755"},
        },
        add_file_common_args=True,
        supports_check_mode=True,
    )
    folder, files = Path(module.params["folder"]), module.params["files"]
    if strange := [name for name, text in files.items() if not re.fullmatch(NAME, name) or not isinstance(text, str)]:
        module.fail_json(msg=f"files must have texts by name, without folders: {', '.join(map(repr, strange))}")
    if not files:
        module.fail_json(msg="files must have at least one")
    for name in ("", *files):
        if (folder / name).exists() and (folder / name).is_dir() != (name == ""):
            module.fail_json(msg=f"{folder / name} is {'no' if name == '' else 'a'} folder")

    differing = differences(folder, files, module.params["only"])
    changed = bool(differing) or not folder.exists()
    if not module.check_mode:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (_, after) in differing.items():
            (folder / name).unlink() if after is None else write(module, folder / name, after)

    def attributes(path: Path, mode: Any) -> bool:
        arguments = module.load_file_common_arguments(module.params | {"mode": mode}, path=str(path))
        return path.exists() and module.set_fs_attributes_if_different(arguments, changed=False)

    changed |= attributes(folder, module.params["directory_mode"])
    for name in files:
        changed |= attributes(folder / name, module.params["mode"])
    diff = [
        {"before_header": str(folder / name), "after_header": str(folder / name), "before": before or "", "after": after or ""}
        for name, (before, after) in sorted(differing.items())
    ]
    module.exit_json(changed=changed, diff=diff, files=sorted(differing))


if __name__ == "__main__":
    main()
