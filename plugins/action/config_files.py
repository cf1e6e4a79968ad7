"""Action plugin `config_files`: render the files of a role, for the module of the same name to write."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.template import trust_as_template

#: Templates that those of any role may include.
SHARED_TEMPLATES = Path(__file__).resolve().parents[2] / "roles/common/templates"
#: Delimiters of a template for files in which curly brackets have a meaning of their own, as Jinja names them.
ANGLE = {
    "variable_start_string": "<<",
    "variable_end_string": ">>",
    "block_start_string": "<%",
    "block_end_string": "%>",
    "comment_start_string": "<#",
    "comment_end_string": "#>",
}
#: What an entry takes its content from; one at most.
SOURCES = ("template", "source", "content", "contents", "target")
#: Permissions in octal. A number would be read as YAML reads it: 0644 is 420.
MODE = re.compile("[0-7]{3,4}")

#: What ansible.builtin.template gives its templates to say so.
MANAGED = {"ansible_managed": "Ansible managed"}

#: Options of an entry, with their defaults.
OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("path", *SOURCES, "state", "mode", "validate")),
    **dict.fromkeys(("owner", "group"), "root"),
    **dict.fromkeys(("only", "secret"), False),
    "when": True,
    "directory_mode": "0755",
    "vars": {},
    "delimiters": "curly",
}


class ActionModule(ActionBase):
    """Run `config_files`."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_diff = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Render all files and send them in one module run.

        Raises:
            AnsibleActionFail: if an entry is not as the documentation says, or a template cannot be rendered.
        """
        super().run(tmp, task_vars)
        self._variables = task_vars or {}
        entries = [self._checked(entry) for entry in self._task.args.get("files") or []]
        unknown = set(self._task.args) - {"files"}
        if unknown or not entries:
            raise AnsibleActionFail(f"config_files takes files, at least one, and not {', '.join(sorted(unknown)) or 'none'}")
        wanted = [one for entry in entries if entry["when"] for one in self._expanded(entry)]
        paths = [one["path"] for one in wanted]
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            raise AnsibleActionFail(f"config_files: more than one entry for {', '.join(twice)}")
        payload = json.dumps(wanted)
        packed = base64.b64encode(zlib.compress(payload.encode("utf-8", "surrogateescape"))).decode()
        return dict(self._execute_module("config_files", {"payload": packed}, task_vars=task_vars))

    def _checked(self, given: Any) -> dict[str, Any]:
        """Return an entry with its defaults.

        Raises:
            AnsibleActionFail: if it is not as the documentation says.
        """
        path = given.get("path") if isinstance(given, dict) else None
        if not isinstance(path, str) or not path.startswith("/"):
            raise AnsibleActionFail("config_files: each of the files needs an absolute path")
        if unknown := set(given) - set(OPTIONS):
            raise AnsibleActionFail(f"config_files: {path} has {', '.join(sorted(unknown))}, which is unknown")
        entry = OPTIONS | given
        if wrong := [name for name in ("only", "secret", "when") if not isinstance(entry[name], bool)]:
            raise AnsibleActionFail(f"config_files: {', '.join(wrong)} of {path} must be true or false")
        sources = [name for name in SOURCES if entry[name] is not None]
        if entry["state"] is None and sources:
            filled = entry["contents"] is not None or (entry["source"] and Path(self._find_needle("files", entry["source"])).is_dir())
            entry["state"] = "directory" if filled else "link" if entry["target"] else "file"
        allowed = {"directory": ("contents", "source"), "link": ("target",), "absent": (), "file": ("template", "source", "content")}
        if entry["state"] not in allowed or len(sources) > 1 or set(sources) - set(allowed[entry["state"]]):
            raise AnsibleActionFail(f"config_files: {path} needs one of {', '.join(SOURCES)}, or a state that goes with it")
        if entry["state"] in ("file", "link") and not sources:
            raise AnsibleActionFail(f"config_files: {path} has no content")
        for name in ("mode", "directory_mode"):
            if entry[name] is not None and not (isinstance(entry[name], str) and MODE.fullmatch(entry[name])):
                raise AnsibleActionFail(f'config_files: {name} of {path} must be octal digits in quotes, such as "0640"')
        return entry

    def _expanded(self, entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield what an entry stands for, as the module takes it: a folder of files is the folder and each of them."""
        common = {name: entry[name] for name in ("path", "state", "owner", "group", "target", "only", "secret", "validate")}
        mode = entry["mode"] or "0644"
        if entry["state"] != "directory":
            if entry["state"] == "file":
                common["content"] = self._content(entry)
            yield common | {"mode": mode}
            return
        texts = self._texts(entry)
        filled = entry["contents"] is not None or entry["source"] is not None
        folder_mode = entry["directory_mode"] if filled else entry["mode"] or entry["directory_mode"]
        yield common | {"mode": folder_mode, "names": list(texts)}
        for name, text in texts.items():
            if "/" in name or name in ("", ".", ".."):
                raise AnsibleActionFail(f"config_files: {entry['path']} cannot have a file with the name {name!r}")
            yield common | {"path": f"{entry['path'].rstrip('/')}/{name}", "state": "file", "content": text, "mode": mode}

    def _texts(self, entry: dict[str, Any]) -> dict[str, str]:
        """Return the files of a folder: texts by name."""
        if entry["source"] is not None:
            folder = Path(self._find_needle("files", entry["source"]))
            return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir()) if path.is_file()}
        return {name: str(text) for name, text in (entry["contents"] or {}).items()}

    def _content(self, entry: dict[str, Any]) -> str:
        """Return the text of a file.

        Raises:
            AnsibleActionFail: if its template cannot be rendered.
        """
        if entry["content"] is not None:
            return str(entry["content"])
        if entry["source"] is not None:
            return Path(self._find_needle("files", entry["source"])).read_text(encoding="utf-8")
        found = Path(self._find_needle("templates", entry["template"]))
        # As ansible.builtin.template looks for what a template includes.
        bases = [str(found.parent), *self._variables.get("ansible_search_path", [])]
        paths = [*(folder for base in bases for folder in (f"{base}/templates", base)), str(SHARED_TEMPLATES)]
        templar = self._templar.copy_with_new_env(searchpath=paths, available_variables={**MANAGED, **self._variables, **entry["vars"]})
        overrides = {"trim_blocks": True} | (ANGLE if entry["delimiters"] == "angle" else {})
        text = trust_as_template(self._loader.get_text_file_contents(str(found)))
        try:
            rendered = templar.template(text, escape_backslashes=False, overrides=overrides)
        except Exception as error:
            raise AnsibleActionFail(f"{entry['template']}, for {entry['path']}: {error}") from error
        # Ansible has none for no text at all.
        return "" if rendered is None else str(rendered)
