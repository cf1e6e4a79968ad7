"""Action plugin `probe_roles`: look at a host as the rules of its roles demand, before it is changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase

ROLES = Path(__file__).resolve().parents[2] / "roles"


class ActionModule(ActionBase):
    """Arguments: `roles`, whose `probes` in meta/rules.yml are made.

    A probe has a `name`, a `module`, its `arguments` and optionally a condition, `when`. Those of one name and module are made in
    one run, with their lists joined. The result has what the modules answered, by the name; in `unmade`, by name, why one could
    not be made: its settings are wrong, which `check_settings` reports; and in `roles` whose probes these are.
    """

    TRANSFERS_FILES = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Make the probes of all roles."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        wanted: dict[str, tuple[str, dict[str, Any]]] = {}
        unmade: dict[str, str] = {}
        for role in self._task.args["roles"]:
            rules = self._loader.load_from_file(str(ROLES / role / "meta" / "rules.yml"), trusted_as_template=True)
            for probe in rules.get("probes", []):
                try:
                    if self._templar.evaluate_conditional(probe.get("when", True)):
                        arguments = self._templar.template(probe["arguments"])
                        _, joined = wanted.setdefault(probe["name"], (probe["module"], {}))
                        for name, value in arguments.items():
                            joined[name] = [*joined.get(name, []), *value] if isinstance(value, list) else value
                except AnsibleError as error:
                    unmade[probe["name"]] = str(error)
        for name, (module, arguments) in wanted.items():
            answer = self._execute_module(module, arguments, task_vars=task_vars)
            if answer.get("failed"):
                return result | dict(answer)
            result[name] = {key: value for key, value in answer.items() if key != "invocation"} if isinstance(answer, Mapping) else answer
        return result | {"changed": False, "unmade": unmade, "roles": list(self._task.args["roles"])}
