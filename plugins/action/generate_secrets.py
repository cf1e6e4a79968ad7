"""Action plugin `generate_secrets`: write random values for the secrets that an inventory lacks. Runs on the controller.

An encrypted vault.yml stays encrypted, under its vault ID. What it holds already stays as it is.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import string
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible import constants
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.parsing.vault import VaultLib, is_encrypted, parse_vaulttext_envelope
from ansible.plugins.action import ActionBase

#: Length of a secret in characters. 40 letters and digits carry 238 bits.
LENGTH = 40
CHARACTERS = string.ascii_letters + string.digits


class _Loader(yaml.SafeLoader):
    """Reads tags such as `!vault` as plain values: only names are of interest."""


_Loader.add_multi_constructor("!", lambda loader, tag, node: node.value)


def read(text: str) -> dict[str, Any]:
    """Return the variables of a YAML file, without decrypting any.

    Raises:
        ValueError: if it is not one mapping.
    """
    try:
        found = yaml.load(text, Loader=_Loader) or {}  # noqa: S506
    except yaml.YAMLError as error:
        # The error's own text may quote a secret.
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else "?"
        raise ValueError(f"is not YAML (line {line})") from None
    if not isinstance(found, dict):
        raise ValueError("is not a list of variables")
    return found


def random_secret() -> str:
    """Return a new random secret."""
    return "".join(secrets.choice(CHARACTERS) for _ in range(LENGTH))


def filled(text: str, values: Mapping[str, Any]) -> str:
    """Return the text of a YAML file with a value for each name: on its line `name:`, or in a line at the end.

    Raises:
        ValueError: if the file is written in a way that lines cannot be added to (`{a: 1}`, or a `...` at its end).
    """
    before = read(text)
    for name, value in values.items():
        line = f"{name}: {value if yaml.safe_load(str(value)) == value else json.dumps(value)}"
        # A comment on the line stays.
        bare = re.compile(rf"^{re.escape(name)}:[ \t]*?(?=$|[ \t]*#)", re.MULTILINE)
        text, found = bare.subn(line.replace("\\", "\\\\"), text, count=1)
        if not found:
            text = text if text.endswith("\n") or not text else f"{text}\n"
            text = f"{text}{line}\n"
    try:
        after = read(text)
    except ValueError:
        after = {}
    if after != before | values:
        raise ValueError(f"is not written as lines `name: value`; add these yourself: {', '.join(values)}")
    return text


def replace(path: Path, content: bytes) -> None:
    """Replace a file's content at once: a crash leaves the old content or the new. A new file is for its owner only.

    Raises:
        OSError: if it cannot be written.
    """
    path = path.resolve()
    # Ansible reads no hidden file as variables.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if path.exists():
                status = path.stat()
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
                os.fchmod(file.fileno(), status.st_mode & 0o7777)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class ActionModule(ActionBase):
    """Argument: `inventory`, the folder of an inventory with group_vars/all/vault.yml.example.

    Names of it that neither vault.yml nor another file of the inventory sets are added to vault.yml: with the example's value,
    or a random one where it has none. A new vault.yml begins as a copy of the example, and is encrypted if a vault password was
    given.
    """

    _requires_connection = False
    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Add the secrets that are missing."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        folder = Path(self._task.args["inventory"])
        vault, example = folder / "group_vars/all/vault.yml", folder / "group_vars/all/vault.yml.example"
        if not example.is_file():
            return result | {"changed": False, "missing": [], "encrypted": False, "vault": str(vault)}

        library = VaultLib(self._loader._vault.secrets)
        text = example.read_text()
        wanted = self._read(example, text)
        encrypt: dict[str, Any] | None = None
        if vault.exists():
            content = vault.read_bytes()
            if is_encrypted(content):
                content, encrypt = self._decrypt(library, vault, content)
            text = content.decode()
        elif library.secrets:
            encrypt = self._secret_for_new_file(library.secrets)

        present = self._read(vault, text)
        elsewhere = self._names_elsewhere(library, folder, vault)
        missing = [name for name in wanted if present.get(name) is None and name not in elsewhere]
        if missing and not self._task.check_mode:
            values = {name: random_secret() if wanted[name] is None else wanted[name] for name in missing}
            try:
                content = filled(text, values).encode()
            except ValueError as error:
                raise AnsibleActionFail(f"{vault} {error}") from None
            replace(vault, library.encrypt(content, **encrypt) if encrypt else content)
        return result | {"changed": bool(missing), "missing": missing, "encrypted": encrypt is not None, "vault": str(vault)}

    @staticmethod
    def _read(path: Path, text: str) -> dict[str, Any]:
        try:
            return read(text)
        except ValueError as error:
            raise AnsibleActionFail(f"{path} {error}") from None

    def _decrypt(self, library: VaultLib, path: Path, content: bytes) -> tuple[bytes, dict[str, Any]]:
        """Return the plain text of an encrypted file, and what encrypts it again as it was."""
        label = parse_vaulttext_envelope(content)[3]
        label = None if label == constants.DEFAULT_VAULT_IDENTITY else label
        named = f"--vault-id {label}@" if label else "--vault-password-file "
        how = f'give its password with ARGS=--ask-vault-pass or ARGS="{named}FILE"'
        if not library.secrets:
            raise AnsibleActionFail(f"{path} is encrypted{f' with the vault ID {label}' if label else ''}: {how}. Nothing was changed.")
        try:
            plain, _, secret = library.decrypt_and_get_vault_id(content)
        except AnsibleError:
            raise AnsibleActionFail(f"No vault password that was given opens {path}: {how}. Nothing was changed.") from None
        return bytes(plain), {"secret": secret, "vault_id": label}

    @staticmethod
    def _secret_for_new_file(given: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return what encrypts a new file: the only password, or the one that Ansible's settings name."""
        identity = constants.config.get_config_value("DEFAULT_VAULT_ENCRYPT_IDENTITY")
        chosen = [(label, secret) for label, secret in given if identity in (None, label)]
        if len(chosen) != 1:
            labels = ", ".join(label for label, _ in given)
            raise AnsibleActionFail(f"Name the vault ID that encrypts a new file, of {labels}, in ANSIBLE_VAULT_ENCRYPT_IDENTITY.")
        label, secret = chosen[0]
        return {"secret": secret, "vault_id": None if label == constants.DEFAULT_VAULT_IDENTITY else label}

    def _names_elsewhere(self, library: VaultLib, folder: Path, vault: Path) -> set[str]:
        """Return the names that other files of the inventory set."""
        names: set[str] = set()
        for path in sorted(path for part in ("group_vars", "host_vars") for path in (folder / part).rglob("*")):
            if path.suffix not in (".yml", ".yaml", ".json", "") or path.name.startswith(".") or not path.is_file() or path == vault:
                continue
            content = path.read_bytes()
            if is_encrypted(content):
                content, _ = self._decrypt(library, path, content)
            found: Mapping[str, Any] = self._read(path, content.decode())
            names |= set(found)
        return names
