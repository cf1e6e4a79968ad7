"""Vars plugin `inventory_files`: group_vars and host_vars, where a file that cannot be read is reported by name and line."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.vars import host_group_vars

DOCUMENTATION = r"""
name: inventory_files
short_description: Load group_vars and host_vars
description:
  - As ansible.builtin.host_group_vars (ansible.cfg names this one in its place), which keeps of an error only its first line.
requirements: [enabled in configuration]
options:
  stage:
    ini: [{key: stage, section: vars_host_group_vars}]
    env: [{name: ANSIBLE_VARS_PLUGIN_STAGE}]
  _valid_extensions:
    default: [.yml, .yaml, .json]
    description: Extensions of the files that are read.
    ini: [{key: yaml_valid_extensions, section: defaults}]
    env: [{name: ANSIBLE_YAML_FILENAME_EXT}]
    type: list
    elements: string
extends_documentation_fragment: [vars_plugin_staging]
"""


class VarsModule(host_group_vars.VarsModule):
    """Loads variables of hosts and groups."""

    def get_vars(self, loader: Any, path: str, entities: Any, cache: bool = True) -> dict[str, Any]:
        """Return the variables of hosts or groups.

        Raises:
            AnsibleError: if a file cannot be read, with the file, and the line if it is no YAML.
        """
        try:
            return dict(super().get_vars(loader, path, entities, cache))
        except AnsibleError as error:
            if isinstance(error.__context__, AnsibleError):
                raise error.__context__ from None
            raise
