"""Environment variables that a module hands on, some of which hold a login."""

from __future__ import annotations

from collections.abc import Mapping

from ansible.module_utils.basic import AnsibleModule

#: Shortest value that is hidden, in characters: a login is longer, and a word like 1 is a part of everything.
HIDDEN_LENGTH = 8


def hide_values(module: AnsibleModule, environment: Mapping[str, object]) -> None:
    """Keep the values out of the module's result; its option must be `no_log`, which keeps them out of the host's log."""
    module.no_log_values = {text for text in map(str, environment.values()) if len(text) >= HIDDEN_LENGTH}
