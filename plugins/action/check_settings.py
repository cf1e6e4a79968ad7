"""Action plugin `check_settings`: judge a role's settings on the controller, before a host is touched.

It finds what argument specs cannot: names that no role knows, secrets that are missing, short,
default-looking or still encrypted, what the runtime package will say of its settings, and whatever the role's own rules
say. Each problem names the variable, the file that sets it and what is allowed.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib.machinery
import json
import re
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import yaml
from ansible import constants
from ansible.errors import AnsibleError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from ansible.template import trust_as_template
from ansible.utils.vars import load_extra_vars

ROLES = Path(__file__).resolve().parents[2] / "roles"
#: The one module of the runtime package that needs nothing but Python.
RUNTIME_SETTINGS = ROLES.parent / "runtime" / "src" / "celery_platform" / "settings.py"

#: Shortest secret that is accepted, in characters. 24 letters and digits carry over 140 bits.
MIN_SECRET_LENGTH = 24
#: Words that mark a secret as an example that was never replaced.
EXAMPLE_WORDS = ("changeme", "change_me", "change-me", "password", "example", "secret", "default", "replace")
#: A variable or key with such a name holds a secret of ours.
SECRET_NAME = re.compile(r"(^|_)(password|requirepass|passphrase|cookie)$")
#: Variables with secrets that others have chosen, such as a provider, and that are as long as they are. Those of our own brokers are
#: judged by the names that they have there.
OF_OTHERS = {"celery_app_broker_password", "celery_app_result_backend_password", "celery_monitor_broker_password"}
#: The application's own, which have rules of their own, and may hold anything.
OF_APPLICATION = {"celery_app_credentials", "celery_app_secret_environment"}
#: No configuration file holds these as they are: control characters, and Unicode's separators of lines and paragraphs.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
#: Settings that may hold some: what becomes a file of its own, is rendered as JSON, is a line of another language, or has a rule.
MAY_HOLD_CONTROL = {
    "celery_app_credentials",
    "celery_app_deploy_commands",
    "celery_app_environment",
    "celery_app_secret_environment",
    "celery_flower_options",
    "firewall_extra_rules",
}
#: Names of earlier versions, and what has taken their place.
MOVED = {"celery_app_allow_jit": "celery_app_sandbox_allow: [jit]"}
#: Names of hosts, which become labels, file names and parts of patterns.
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
#: Stands for a value that cannot be told yet.
UNKNOWN = object()
#: Releases of Debian that the tests run on.
SUPPORTED_DEBIAN = ("12", "13")
#: How alike a name must be to a known one to be taken for a typing error (difflib's ratio, 0 to 1).
LIKENESS = 0.9


@functools.cache
def role_options(role: str) -> dict[str, Any]:
    """Return the options of a role's entry point, by name; empty if it has no argument specs."""
    path = ROLES / role / "meta" / "argument_specs.yml"
    if not path.exists():
        return {}
    specs = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["argument_specs"]
    return dict(next(iter(specs.values())).get("options", {}))


@functools.cache
def all_options() -> frozenset[str]:
    """Return the names of the public variables of all roles."""
    return frozenset(name for role in ROLES.iterdir() for name in role_options(role.name))


@functools.cache
def runtime() -> ModuleType:
    """Return the runtime package's module `settings`."""
    name = "celery_platform_settings"
    loader = importlib.machinery.SourceFileLoader(name, str(RUNTIME_SETTINGS))
    # dataclasses and typing look here for the names in annotations.
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = str(RUNTIME_SETTINGS)
    loader.exec_module(module)
    return module


def names_in(value: Any) -> set[str]:
    """Return the variables that a value's templates name, also in lists and dicts, and as attributes of other hosts."""
    if isinstance(value, Mapping):
        return set().union(*map(names_in, value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(names_in, value))
    if not isinstance(value, str) or not re.search("{[{%]", value):
        return set()
    try:
        nodes = list(jinja2.Environment(autoescape=True).parse(value).find_all((jinja2.nodes.Name, jinja2.nodes.Const)))
    except jinja2.TemplateSyntaxError:
        return set()
    attributes = {node.value for node in nodes if isinstance(node, jinja2.nodes.Const) and isinstance(node.value, str)}
    return {node.name for node in nodes if isinstance(node, jinja2.nodes.Name)} | attributes & all_options()


#: What a value is not, by the type that Ansible's argument specs could not convert it to.
NOT_OF_TYPE = {
    "int": "no whole number",
    "float": "no number",
    "bool": "neither true nor false",
    "list": "no list",
    "dict": "no mapping",
    "str": "no text",
    "path": "no path",
}


def in_words(message: str) -> tuple[str, str]:
    """Return what an error message of Ansible's argument specs says of the variable that it is about, and what is allowed or ''."""
    deep = " found in" in message
    if wrong := re.search(r"(?:argument|option) '(\w+)'.* is of type .* unable to convert to (\w+)", message):
        kind = NOT_OF_TYPE.get(wrong[2], f"no {wrong[2]}")
        return (f"has {wrong[1]}, which is {kind}" if deep else f"is {kind}"), ""
    if wrong := re.match(r"value of (\w+) must be one (?:or more )?of: (.*?)[,.] [gG]ot(?: no match for)?: (.*?)( found in|$)", message):
        return (f"has {wrong[1]} {wrong[3]}" if deep else f"is {wrong[3]}"), f"one of {wrong[2]}"
    if wrong := re.match(r"missing required arguments: (.*?)( found in|$)", message):
        return f"has an entry without {wrong[1]}", ""
    if wrong := re.match(r"([\w.]+?)\.([\w, .]+)\. Supported parameters include: (.*?)\.?$", message):
        return f"has {wrong[2].replace(f'{wrong[1]}.', '')}, which is unknown", f"{wrong[3]}"
    return f"does not fit: {message}", ""


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


def secret_problem(value: Any, ours: bool = True) -> str:
    """Say what is wrong with a secret's value, without showing it; '' if nothing is. `ours` are those that `make secrets` could write."""
    if value is None or value == "":
        return "is empty"
    if not isinstance(value, str):
        return "is no text (put it in quotes)"
    if "$ANSIBLE_VAULT" in value:
        return "is still encrypted"
    if CONTROL.search(value):
        return "holds a line break or another control character"
    if not ours:
        return ""
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


def holds_control(name: str, value: Any) -> bool:
    """Tell whether a variable or key, or what lies in it, holds a control character; secrets aside, which are judged one by one."""
    if isinstance(value, Mapping):
        return any(CONTROL.search(str(key)) or holds_control(str(key), item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return any(holds_control(name, item) for item in value)
    return isinstance(value, str) and not SECRET_NAME.search(name) and bool(CONTROL.search(value))


def defining_file(variable: str, inventory: Path, host: str, groups: Sequence[str] = ()) -> str:
    """Return the inventory file that sets a variable for a host, or the one where it would be looked for.

    As in Ansible, files of the host win over those of its groups, and those over `all`.
    """
    pattern = re.compile(rf"^[^#\n]*?(?<![\w.-]){re.escape(variable)}\s*[:=]", re.MULTILINE)
    folder = inventory if inventory.is_dir() else inventory.parent
    known = [*constants.YAML_FILENAME_EXTENSIONS, ""]
    places = [("host_vars", host), *(("group_vars", group) for group in groups), ("group_vars", "all"), ()]
    for place in places:
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in known):
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
    """Arguments: `roles`, which are judged one after the other by their meta/rules.yml; or one role, and `rules` in place of its own.

    That file has `rules`, `warnings`, `probes` (for the action `probe_roles`, whose result is the variable `__common_probe`), and of
    a service of the runtime package `runtime_settings` and `runtime_secrets`.

    `runtime_settings` names variables that hold settings of the runtime package by name, the last one winning, and
    `runtime_secrets` one that holds its credentials. Each value is the role's variable that its template names first.

    `rules` is a list of dicts with these keys:

    - `variable`: the setting that is judged.
    - `that`: a condition over the role's variables, judged unless it depends on one that is missing or does not fit.
    - `allowed`: what is allowed, in words.
    - `found` (optional): an expression for what is wrong. Numbers, words and yes or no are shown without it; lists
      and dicts never are, since they may hold secrets.
    - `file` (optional): the file to edit, if it is not the one that sets the variable; or "none, ", and what it is.

    `warnings` have a condition, `that`, and a `text` for the operator if it does not hold.

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
        self._names: dict[str, set[str]] = {}
        roles = self._task.args["roles"]
        if unknown := [role for role in roles if not (ROLES / role / "meta" / "rules.yml").exists()]:
            raise AnsibleError(f"check_settings: {', '.join(unknown)} have no meta/rules.yml in {ROLES}")

        # Variables that are reported as missing or of the wrong type: what depends on them cannot be judged.
        self._unfit: set[str] = set()
        # Those that break a rule: what the runtime package is given of them (a port in a URL) is wrong for no reason of its own.
        self._wrong: set[str] = set()
        self._warnings: list[str] = []
        self._probe = self._vars.get("__common_probe", {})
        problems = list(dict.fromkeys([*self._problems_of_host(), *(text for role in roles for text in self._problems(role))]))
        if not problems:
            problems = [self._problem(name, f"cannot be judged: {error}", "") for name, error in self._probe.get("unmade", {}).items()]
        if self._warnings:
            result["warnings"] = self._warnings
        if not self._vars.get("check_settings_collect", False):
            return result | ({"failed": True, "msg": "\n\n".join(problems)} if problems else {})
        return result | {"ansible_facts": {"settings_problems": problems}}

    def _problems(self, role: str) -> Iterator[str]:
        options = role_options(role)
        self._rules = self._loader.load_from_file(str(ROLES / role / "meta" / "rules.yml"), trusted_as_template=True)
        if "rules" in self._task.args:
            self._rules = {"rules": self._task.args["rules"]}
        values: dict[str, Any] = {}
        for name, option in options.items():
            if name in self._vars:
                try:
                    values[name] = self._templar.template(self._vars[name])
                except AnsibleError as error:
                    self._unfit.add(name)
                    yield self._unreadable(name, error)
            elif option.get("required"):
                self._unfit.add(name)
                yield self._problem(name, "is not set", self._allowed(name))
            if isinstance(values.get(name), str) and option["type"] == "list":
                self._unfit.add(name)
                yield self._problem(name, "is text, not a list", self._allowed(name))
                del values[name]

        # What is missing was reported above, with the file that should set it.
        optional = {name: {**option, "required": False} for name, option in options.items()}
        runtime_layers, unknown = self._rules.get("runtime_settings", []), set()
        checked = ArgumentSpecValidator(optional).validate(values)
        for message in checked.error_messages:
            name = next((name for name in sorted(values, key=len, reverse=True) if name in message), "")
            told = message.partition("Supported parameters")[0]
            if settings := {key for key in values[name] if re.search(rf"\b{key}\b", told)} if name in runtime_layers else set():
                unknown |= settings
            else:
                self._unfit.add(name)
            what, allowed = in_words(message)
            yield self._problem(name or role, what, allowed or self._allowed(name))

        for name in [name for name, value in values.items() if name not in MAY_HOLD_CONTROL and holds_control(name, value)]:
            self._unfit.add(name)
            yield self._problem(name, "holds a line break or another control character", "text of one line")

        for variable, value in values.items():
            for path, secret in secrets_in(variable, value) if variable not in OF_APPLICATION else ():
                if problem := secret_problem(secret, ours=variable not in OF_OTHERS):
                    name = self._origin(secret)
                    allowed = self._allowed("password" if variable not in OF_OTHERS else variable)
                    yield self._problem(name or path, problem, allowed, name or variable)
        yield from self._runtime_problems({name: value for name, value in values.items() if name not in self._unfit}, unknown)
        yield from self._broken_rules(without_none(checked.validated_parameters))

    def _runtime_problems(self, values: dict[str, Any], unknown: set[str]) -> Iterator[str]:
        """Yield what the runtime package would refuse, said of the role's variables.

        `values` are those of the role's options that are known, and `unknown` the settings that cannot be judged.
        """
        layers = [*self._rules.get("runtime_settings", []), *filter(None, [self._rules.get("runtime_secrets")])]
        if not layers:
            return
        templar = self._templar.copy_with_new_env(available_variables=self._vars | values)
        variables: dict[str, str] = {}
        texts: dict[str, str] = {}
        for layer in layers:
            entries = values.get(layer, {}) if layer in all_options() else self._vars[layer]
            if not isinstance(entries, Mapping):
                entries = yield from self._evaluated(templar, layer, entries)
            for name, raw in {} if entries is UNKNOWN else entries.items():
                of_template = next((word for word in re.findall(r"\w+", str(raw)) if word in all_options()), "")
                variables[name] = f"{layer}.{name}" if layer in all_options() else of_template or variables.get(name, "")
                value = yield from self._evaluated(templar, variables[name] or layer, raw)
                texts.pop(name, None)
                if value is UNKNOWN:
                    unknown.add(name)
                elif value is not None:
                    texts[name] = value if isinstance(value, str) else json.dumps(value)
        texts = {name: text for name, text in texts.items() if name not in unknown}
        fields = runtime().FIELDS
        secrets = {name: texts.pop(name) for name in list(texts) if name in fields and runtime().is_secret(name)}
        environment = {f"{runtime().PREFIX}{name.upper()}": text for name, text in texts.items()}
        others = next((layer for layer in layers if layer in all_options()), "")
        for text in runtime().planned_problems(environment, secrets, unknown):
            setting = re.match(rf"{runtime().PREFIX}([A-Z_]+)", text)
            made_of = variables.get(setting[1].lower(), "").partition(".")[0] if setting else ""
            if self._depends_on_none(self._wrong, made_of):
                yield self._as_problem(text, variables, others)

    def _evaluated(self, templar: Any, name: str, raw: Any) -> Generator[str, None, Any]:
        """Return what a template stands for, or UNKNOWN if it depends on what is missing or does not fit; yield what is missing."""
        if not self._fits(*names_in(raw)):
            return UNKNOWN
        try:
            return templar.template(raw)
        except AnsibleError as error:
            yield self._missing(error) or self._unreadable(name, error)
            return UNKNOWN

    def _as_problem(self, text: str, variables: Mapping[str, str], others: str) -> str:
        """Return a text of the runtime package as a problem of the role's variables, which it knows by settings.

        `others` is the variable that would hold the settings that are not among these.
        """

        def variable(setting: str) -> str:
            return variables.get(setting.lower()) or (f"{others}.{setting.lower()}" if others else setting.lower())

        def ours(words: str) -> str:
            words = re.sub(rf"{runtime().PREFIX}([A-Z_]+)", lambda found: variable(found[1]), words)
            return re.sub(r"\ba credential (\w+)", lambda found: variable(found[1]), words)

        form = rf"{runtime().PREFIX}([A-Z_]+)(\S*) (.*?)(?:; allowed: (.*))?"
        subject, path, what, allowed = re.fullmatch(form, text, re.DOTALL).groups()
        name = variable(subject)
        return self._problem(name + path, ours(what), ours(allowed or self._allowed(name)), name.partition(".")[0])

    def _problems_of_host(self) -> Iterator[str]:
        """Yield what is wrong whatever the role: the host's system, and names that no role knows."""
        facts = self._vars["ansible_facts"]
        known = "distribution" in facts  # not before a lab's hosts are there
        if known and (facts["distribution"] != "Debian" or facts["distribution_major_version"] not in SUPPORTED_DEBIAN):
            what = f"runs {facts['distribution']} {facts['distribution_version']}"
            allowed = f"hosts with Debian {' or '.join(SUPPORTED_DEBIAN)}"
            yield self._problem(self._vars["inventory_hostname"], what, allowed, file="hosts.yml")

        if not HOST_NAME.fullmatch(name := self._vars["inventory_hostname"]):
            yield self._problem(name, "is a host's name", "names of letters, digits, . _ and -", file="hosts.yml")

        for disk in self._probe.get("host", {}).get("disks", []):
            if not disk["writable"] or disk["free_mb"] < disk["needed_mb"]:
                what = f"has {disk['free_mb']} MB free" if disk["writable"] else "is on a read-only disk"
                allowed = f"a folder on a writable disk with at least {disk['needed_mb']} MB free"
                yield self._problem(disk["path"], what, allowed, file=f"none, it is {disk['mount']} of {self._vars['inventory_hostname']}")

        ignored = self._vars.get("check_settings_ignore", [])
        for name, meant in unknown_names(self._inventory_names() - {"check_settings_ignore"}):
            if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored):
                perhaps = f"{meant}, perhaps; " if meant else ""
                allowed = f"{perhaps}see the roles' READMEs, or name a variable of your own in check_settings_ignore"
                if name in MOVED:
                    allowed = f"{MOVED[name]}, which has taken its place"
                if name.endswith("_group"):
                    allowed = "nothing: the names of groups are fixed (inventories/*/hosts.yml)"
                yield self._problem(name, "is not a variable of this project", allowed)

    def _broken_rules(self, values: dict[str, Any]) -> Iterator[str]:
        # Rules see values as the argument specs convert them: "2" as a number.
        templar = self._templar.copy_with_new_env(available_variables=self._vars | values)

        def text(rule: Mapping[str, Any], key: str) -> str:
            return str(templar.template(rule.get(key, "")))

        for warning in self._rules.get("warnings", []):
            if self._fits(*names_in(f"{{{{ {warning['that']} }}}}")) and not templar.evaluate_conditional(warning["that"]):
                self._warnings.append(text(warning, "text"))
        for rule in self._rules.get("rules", []):
            name = rule["variable"]
            used = names_in(f"{{{{ {rule['that']} }}}}")
            if not self._fits(*used):
                continue
            try:
                name = text(rule, "variable")
                if templar.evaluate_conditional(rule["that"]):
                    continue
                found = templar.template(trust_as_template("{{ " + rule.get("found", name) + " }}"))
            except AnsibleError as error:
                # Not before the host has been looked at, which its other problems, or its absence, may be the reason for.
                if not self._unprobed() or self._depends_on_none({"__common_probe", "ansible_facts"}, *used):
                    problem = self._problem(name, f"cannot be judged: {error}", rule["allowed"], file=rule.get("file", ""))
                    yield self._missing(error) or problem
                continue
            what = f"has {json.dumps(found)}"
            if "found" not in rule:
                shown_plainly = isinstance(found, bool | int | float | str) and not SECRET_NAME.search(name)
                if shown_plainly:
                    self._wrong.add(name)
                what = "is empty" if found in ("", [], {}) else f"is {json.dumps(found)}" if shown_plainly else "is wrong"
            yield self._problem(name, what, text(rule, "allowed"), file=text(rule, "file"))

    def _unprobed(self) -> bool:
        """Tell whether the host was not looked at as the rules demand."""
        return bool(self._vars.get("check_settings_without_hosts") or "unmade" not in self._probe or self._probe["unmade"])

    def _fits(self, *names: str) -> bool:
        """Tell whether none of these variables is missing or of the wrong type, nor what their templates name, however deep."""
        return self._depends_on_none(self._unfit, *names)

    def _depends_on_none(self, variables: set[str], *names: str) -> bool:
        """Tell whether none of these names is one of the variables, nor what their templates name, however deep."""
        seen: set[str] = set()
        waiting = set(names)
        while waiting:
            if waiting & variables:
                return False
            seen |= waiting
            waiting = {name for known in waiting for name in self._names_of(known)} - seen
        return True

    def _names_of(self, variable: str) -> set[str]:
        # Facts and Ansible's own variables are no templates, and large.
        if variable in ("groups", "hostvars", "vars") or variable.startswith("ansible_"):
            return set()
        if variable not in self._names:
            self._names[variable] = names_in(self._vars.get(variable))
        return self._names[variable]

    def _missing(self, error: AnsibleError, name: str = "") -> str:
        """Return the problem of a public variable that an error calls undefined; '' if it is about something else."""
        missing = re.search(r"'([a-z]\w*)' is undefined", str(error))
        if not missing:
            return ""
        # Of a variable of the vault, what the setting that it is for may hold.
        return self._problem(missing[1], "is not set", self._allowed(missing[1] if SECRET_NAME.search(missing[1]) else name or missing[1]))

    def _unreadable(self, name: str, error: AnsibleError) -> str:
        """Return the problem of a variable that cannot be templated, laid on the variable at the bottom of it."""
        if missing := self._missing(error, name):
            return missing
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
        if SECRET_NAME.search(name) and name not in OF_OTHERS:
            return f"at least {MIN_SECRET_LENGTH} characters, on one line, and no example; `make secrets` writes good ones"
        option = next((role_options(role.name)[name] for role in ROLES.iterdir() if name in role_options(role.name)), {})
        if name.startswith("vault_"):
            return "a secret; `make secrets` writes random ones"
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
