"""Action plugin `check_settings`: judge a role's settings on the controller, before a host is touched.

It finds what argument specs cannot: names that no role knows, secrets that are missing, short,
default-looking or still encrypted, and whatever the role's own rules say. Each problem names the
variable, the file that sets it and what is allowed.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible.template import trust_as_template
from ansible.utils.vars import load_extra_vars

ROLES = Path(__file__).resolve().parents[2] / "roles"

#: Shortest secret that is accepted, in characters. 24 letters and digits carry over 140 bits.
MIN_SECRET_LENGTH = 24
#: Words that mark a secret as an example that was never replaced.
EXAMPLE_WORDS = ("changeme", "change_me", "change-me", "password", "example", "secret", "default", "replace")
#: A variable or key with such a name holds a secret of ours.
SECRET_NAME = re.compile(r"(^|_)(password|requirepass|passphrase|cookie)$")
#: Releases of Debian that the tests run on.
SUPPORTED_DEBIAN = ("12", "13")
#: How alike a name must be to a known one to be taken for a typing error (difflib's ratio, 0 to 1).
LIKENESS = 0.9


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
    if value is None or value == "":
        return "is empty"
    if not isinstance(value, str):
        return "is no text (put it in quotes)"
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


def defining_file(variable: str, inventory: Path, host: str, groups: Sequence[str] = ()) -> str:
    """Return the inventory file that sets a variable for a host, or the one where it would be looked for.

    As in Ansible, files of the host win over those of its groups, and those over `all`.
    """
    pattern = re.compile(rf"^[^#\n]*?(?<![\w.-]){re.escape(variable)}\s*[:=]", re.MULTILINE)
    folder = inventory if inventory.is_dir() else inventory.parent
    places = [("host_vars", host), *(("group_vars", group) for group in groups), ("group_vars", "all"), ()]
    for place in places:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            parts = file.relative_to(folder).parts
            here = (parts[0], parts[1].split(".")[0] if len(parts) == 2 else parts[1]) if len(parts) > 1 else ()
            if here == place and pattern.search(file.read_text(errors="replace")):
                return shown(file)
    name = "vault.yml" if variable.startswith("vault_") or SECRET_NAME.search(variable) else "main.yml"
    return shown(folder / "group_vars" / "all" / name)


def without_none(value: Any) -> Any:
    """Return a value without the None that argument specs put where an option was left out."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def shown(path: Path) -> str:
    """Return a path as a reader types it: relative to the current folder where it lies below that."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


class ActionModule(ActionBase):
    """Arguments: `role`, and `rules`, a list of dicts with these keys.

    - `variable`: the setting that is judged.
    - `that`: a condition over the role's variables, judged only if its argument specs hold.
    - `allowed`: what is allowed, in words.
    - `found` (optional): an expression for what is wrong. Numbers, words and yes or no are shown without it; lists
      and dicts never are, since they may hold secrets.
    - `file` (optional): the file to edit, if it is not the one that sets the variable; or "none, ", and what it is.

    With the variable `check_settings_collect` true (as playbooks/preflight.yml sets it) problems are
    added to the fact `settings_problems`, for one common message; otherwise they fail the task.
    Variables that match a glob in the variable `check_settings_ignore` belong to others, whatever they begin with.
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

        problems = list(dict.fromkeys(self._problems(role, self._task.args.get("rules") or [])))
        if not self._vars.get("check_settings_collect", False):
            return result | ({"failed": True, "msg": "\n\n".join(problems)} if problems else {})
        earlier = self._vars["ansible_facts"].get("settings_problems", [])
        return result | {"ansible_facts": {"settings_problems": [*earlier, *problems]}}

    def _problems(self, role: str, rules: list[dict[str, str]]) -> Iterator[str]:
        yield from self._problems_of_host()
        options = role_options(role)
        values: dict[str, Any] = {}
        wrong: list[str] = []
        for name, option in options.items():
            if name in self._vars:
                try:
                    values[name] = self._templar.template(self._vars[name])
                except AnsibleError as error:
                    wrong.append(self._unreadable(name, error))
            elif option.get("required"):
                wrong.append(self._problem(name, "is not set", self._allowed(name)))
            if isinstance(values.get(name), str) and option["type"] == "list":
                wrong.append(self._problem(name, "is text, not a list", self._allowed(name)))
                del values[name]

        # What is missing was reported above, with the file that should set it.
        optional = {name: {**option, "required": False} for name, option in options.items()}
        checked = ArgumentSpecValidator(optional).validate(values)
        for message in checked.error_messages:
            name = next((name for name in sorted(values, key=len, reverse=True) if name in message), "")
            wrong.append(self._problem(name or role, f"does not fit: {message}", self._allowed(name)))

        yield from wrong
        for variable, value in values.items():
            for path, secret in secrets_in(variable, value):
                if problem := secret_problem(secret):
                    name = self._origin(secret)
                    yield self._problem(name or path, problem, self._allowed("password"), name or variable)
        if not wrong:
            yield from self._broken_rules(rules, without_none(checked.validated_parameters))

    def _problems_of_host(self) -> Iterator[str]:
        """Yield what is wrong whatever the role: the host's system, and names that no role knows."""
        facts = self._vars["ansible_facts"]
        known = "distribution" in facts  # not before a lab's hosts are there
        if known and (facts["distribution"] != "Debian" or facts["distribution_major_version"] not in SUPPORTED_DEBIAN):
            what = f"runs {facts['distribution']} {facts['distribution_version']}"
            allowed = f"hosts with Debian {' or '.join(SUPPORTED_DEBIAN)}"
            yield self._problem(self._vars["inventory_hostname"], what, allowed, file="hosts.yml")

        ignored = self._vars.get("check_settings_ignore", [])
        for name, meant in unknown_names(self._inventory_names() - {"check_settings_ignore"}):
            if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored):
                perhaps = f"{meant}, perhaps; " if meant else ""
                allowed = f"{perhaps}see the roles' READMEs, or name a variable of your own in check_settings_ignore"
                yield self._problem(name, "is not a variable of this project", allowed)

    def _broken_rules(self, rules: list[dict[str, str]], values: dict[str, Any]) -> Iterator[str]:
        # Rules see values as the argument specs convert them: "2" as a number.
        templar = self._templar.copy_with_new_env(available_variables=self._vars | values)
        for rule in rules:
            name = rule["variable"]
            try:
                if templar.evaluate_conditional(rule["that"]):
                    continue
                found = templar.template(trust_as_template("{{ " + rule.get("found", name) + " }}"))
            except AnsibleError as error:
                yield self._problem(name, f"cannot be judged: {error}", rule["allowed"], file=rule.get("file", ""))
                continue
            what = f"has {json.dumps(found)}"
            if "found" not in rule:
                shown_plainly = isinstance(found, bool | int | float | str) and not SECRET_NAME.search(name)
                what = f"is {json.dumps(found)}" if shown_plainly else "is wrong"
            yield self._problem(name, what, rule["allowed"], file=rule.get("file", ""))

    def _unreadable(self, name: str, error: AnsibleError) -> str:
        """Return the problem of a variable that cannot be templated, laid on the variable at the bottom of it."""
        if missing := re.search(r"'(\w+)' is undefined", str(error)):
            return self._problem(missing[1], "is not set", self._allowed(missing[1]))
        for reference in re.findall(r"\w+", str(self._raw(name))):
            if reference != name and reference in self._vars:
                try:
                    self._templar.template(self._vars[reference])
                except AnsibleError as cause:
                    return self._unreadable(reference, cause)
        return self._problem(name, "cannot be read", f"a value that Ansible can decrypt and template ({error})")

    def _raw(self, name: str) -> Any:
        """Return a variable before templating; '' where even that needs a vault password that is not there."""
        try:
            return str(self._vars[name])
        except AnsibleError:
            return ""

    def _origin(self, secret: Any) -> str:
        """Return the variable of the inventory that holds just this text; '' if none does."""
        if not isinstance(secret, str) or not secret:
            return ""
        return next((name for name in sorted(self._inventory_names(), reverse=True) if self._raw(name) == secret), "")

    def _inventory_names(self) -> set[str]:
        """Return the names that the inventory sets for this host, and those given with -e."""
        return {str(name) for name in self._vars["hostvars"].raw_get(self._vars["inventory_hostname"])}

    @staticmethod
    def _allowed(name: str) -> str:
        """Return what a variable may hold: of a secret the rules above, of others what the argument specs say."""
        if SECRET_NAME.search(name):
            return f"at least {MIN_SECRET_LENGTH} characters, and no example; `make secrets` writes good ones"
        option = next((role_options(role.name)[name] for role in ROLES.iterdir() if name in role_options(role.name)), {})
        if "choices" in option:
            return "one of " + ", ".join(str(choice) for choice in option["choices"])
        return str(option.get("description", "see the roles' READMEs"))

    def _problem(self, name: str, what: str, allowed: str, set_by: str = "", file: str = "") -> str:
        """Return one problem as the operator reads it."""
        inventory = Path(self._vars["inventory_dir"])
        if (set_by or name) in load_extra_vars(self._loader):
            file = "none, it is set on the command line (-e)"
        elif file:
            file = file if file.startswith("none, ") else shown(inventory / file)
        else:
            file = defining_file(set_by or name, inventory, self._vars["inventory_hostname"], self._vars["group_names"])
        return f"{name} {what}.\n    File: {file}\n    Allowed: {allowed}"
