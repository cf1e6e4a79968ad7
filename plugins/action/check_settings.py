"""Action plugin `check_settings`: judge a role's settings on the controller, before a host is touched.

It finds what argument specs cannot: names that no role knows, secrets that are missing, short,
default-looking or still encrypted, and whatever the role's own rules say. Each problem names the
variable, the file that sets it and what is allowed.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible.template import trust_as_template

ROLES = Path(__file__).resolve().parents[2] / "roles"

#: Shortest secret that is accepted, in characters. 24 letters and digits carry over 140 bits.
MIN_SECRET_LENGTH = 24
#: Words that mark a secret as an example that was never replaced.
EXAMPLE_WORDS = ("changeme", "change_me", "change-me", "password", "example", "secret", "default", "replace")
#: A variable or key with such a name holds a secret of ours.
SECRET_NAME = re.compile(r"(^|_)(password|requirepass|passphrase)$")
#: Releases of Debian that the tests run on.
SUPPORTED_DEBIAN = ("12", "13")
#: How alike a name must be to a known one to be taken for a typing error (difflib's ratio, 0 to 1).
LIKENESS = 0.85


@functools.cache
def role_options(role: str) -> dict[str, Any]:
    """Return the options of a role's `main` entry point, by name; empty if it has no argument specs."""
    path = ROLES / role / "meta" / "argument_specs.yml"
    if not path.exists():
        return {}
    options = yaml.safe_load(path.read_text())["argument_specs"]["main"].get("options", {})
    return dict(options)


@functools.cache
def all_options() -> frozenset[str]:
    """Return the names of the public variables of all roles."""
    return frozenset(name for role in ROLES.iterdir() for name in role_options(role.name))


def unknown_names(names: set[str]) -> Iterator[tuple[str, str]]:
    """Yield each name that looks like one of ours but is none, with the likeliest meant name or ''."""
    known = all_options()
    prefixes = tuple(f"{role.name}_" for role in ROLES.iterdir())
    for name in sorted(names - known):
        if name.startswith(("_", "ansible_", "vault_")):
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=LIKENESS)
        if close or name.startswith(prefixes):
            yield name, (close or difflib.get_close_matches(name, known, n=1) or [""])[0]


def secret_problem(value: Any) -> str:
    """Say what is wrong with a secret's value, without showing it; '' if nothing is."""
    if not isinstance(value, str) or not value:
        return "is empty"
    if "$ANSIBLE_VAULT" in value:
        return "is still encrypted"
    if len(value) < MIN_SECRET_LENGTH:
        return f"has {len(value)} characters"
    if any(word in value.lower() for word in EXAMPLE_WORDS) or len(set(value)) < 8:
        return "looks like an example"
    return ""


def secrets_in(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the path and value of each secret in a variable, however deep it lies in lists and dicts."""
    if SECRET_NAME.search(name.rsplit(".", 1)[-1]):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from secrets_in(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for item in value:
            label = item.get("name", "") if isinstance(item, Mapping) else ""
            yield from secrets_in(f"{name}[{label}]", item)


def defining_file(variable: str, inventory: Path, host: str) -> str:
    """Return the inventory file that sets a variable, or the one where it would be looked for.

    Files of the host win over those of its groups, as they do in Ansible.
    """
    pattern = re.compile(rf"^\s*(?:- )?{re.escape(variable)}\s*:", re.MULTILINE)
    folder = inventory if inventory.is_dir() else inventory.parent
    files = [f for f in sorted(folder.rglob("*.y*ml")) if "host_vars" not in f.parts or host in str(f)]
    files.sort(key=lambda f: "host_vars" not in f.parts)
    for file in files:
        if pattern.search(file.read_text(errors="replace")):
            return shown(file)
    name = "vault.yml" if variable.startswith("vault_") or SECRET_NAME.search(variable) else "main.yml"
    return shown(folder / "group_vars" / "all" / name)


def shown(path: Path) -> str:
    """Return a path as a reader types it: relative to the current folder where it lies below that."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


class ActionModule(ActionBase):
    """Arguments: `role`, and `rules`, a list of {variable, that, allowed}.

    `that` is a condition over the variables, judged only if the role's argument specs hold.
    With the variable `check_settings_collect` true (as playbooks/preflight.yml sets it) problems are
    added to the fact `settings_problems`, for one common message; otherwise they fail the task.
    """

    _requires_connection = False
    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Judge the settings of this host for one role."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        self._vars = task_vars or {}
        role = self._task.args["role"]
        if not role_options(role):
            raise AnsibleError(f"check_settings: no argument specs for a role {role!r} in {ROLES}")

        problems = list(self._problems(role, self._task.args.get("rules") or []))
        if not self._vars.get("check_settings_collect", False):
            return result | ({"failed": True, "msg": "\n\n".join(problems)} if problems else {})
        earlier = self._vars["ansible_facts"].get("settings_problems", [])
        return result | {"ansible_facts": {"settings_problems": [*earlier, *problems]}}

    def _problems(self, role: str, rules: list[dict[str, str]]) -> Iterator[str]:
        facts = self._vars["ansible_facts"]
        if facts["distribution"] != "Debian" or facts["distribution_major_version"] not in SUPPORTED_DEBIAN:
            system = f"{facts['distribution']} {facts['distribution_version']}"
            yield self._problem(self._vars["inventory_hostname"], f"runs {system}", f"hosts with Debian {' or '.join(SUPPORTED_DEBIAN)}")

        for name, meant in unknown_names(self._inventory_names()):
            yield self._problem(name, "is not a variable of this project", f"{meant}, perhaps" if meant else "see the roles' READMEs")

        values: dict[str, Any] = {}
        broken = False
        for name, option in role_options(role).items():
            if name not in self._vars:
                if option.get("required"):
                    broken = True
                    yield self._problem(name, "is not set", self._allowed(option, name))
                continue
            try:
                values[name] = self._templar.template(self._vars[name])
            except AnsibleError as error:
                broken = True
                missing = re.search(r"'(\w+)' is undefined", str(error))
                if missing and missing[1] != name:
                    yield self._problem(missing[1], "is not set", self._allowed(option, missing[1]))
                else:
                    yield self._problem(name, "cannot be read", f"a value that Ansible can decrypt and template ({error})")

        spec = {name: {k: v for k, v in option.items() if k != "required"} for name, option in role_options(role).items()}
        for message in ArgumentSpecValidator(spec).validate(values).error_messages:
            broken = True
            name = next((n for n in sorted(values, key=len, reverse=True) if n in message), role)
            yield self._problem(name, f"does not fit: {message}", self._allowed(spec.get(name, {}), name))

        for variable, value in values.items():
            for path, secret in secrets_in(variable, value):
                if wrong := secret_problem(secret):
                    name = self._referred(variable)
                    yield self._problem(name if path == variable else path, wrong, self._allowed({}, "password"), name)

        if not broken:
            for rule in rules:
                if not self._templar.evaluate_conditional(rule["that"]):
                    is_now = self._templar.template(trust_as_template("is {{ " + rule["variable"] + " | to_json }}"))
                    yield self._problem(rule["variable"], "is wrong" if len(is_now) > 200 else is_now, rule["allowed"])

    def _inventory_names(self) -> set[str]:
        """Return the names that the inventory sets for this host, and those given with -e."""
        return {str(name) for name in self._vars["hostvars"].raw_get(self._vars["inventory_hostname"])}

    def _referred(self, variable: str) -> str:
        """Return the vault variable that a variable is nothing but a reference to, or its own name."""
        match = re.fullmatch(r"\{\{\s*(\w+)\s*\}\}", str(self._vars.get(variable)).strip())
        return match[1] if match else variable

    @staticmethod
    def _allowed(option: dict[str, Any], name: str) -> str:
        if SECRET_NAME.search(name):
            return f"at least {MIN_SECRET_LENGTH} characters, and no example; `make secrets` writes good ones"
        if "choices" in option:
            return "one of " + ", ".join(str(choice) for choice in option["choices"])
        description = option.get("description", "see the role's README")
        return " ".join(description) if isinstance(description, list) else str(description)

    def _problem(self, name: str, what: str, allowed: str, look_for: str = "") -> str:
        file = defining_file(look_for or name, Path(self._vars["inventory_dir"]), self._vars["inventory_hostname"])
        return f"{name} {what}.\n    File: {file}\n    Allowed: {allowed}"
