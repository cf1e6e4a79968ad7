"""Environment variables that a module hands on, some of which hold a login."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ansible.module_utils.basic import AnsibleModule

#: User and password of a URL.
LOGIN = re.compile(r"://[^/@\s]*@")
#: Names of variables whose value is secret, whatever it is.
SECRET = re.compile(r"pass|token|secret|key|auth|credential", re.IGNORECASE)


def hide_values(module: AnsibleModule, environment: Mapping[str, object]) -> None:
    """Keep what is secret out of the module's result: addresses with a login, and the values of variables that are named so.

    The module's option must be `no_log`, which keeps it out of the host's log; but it would hide every value wherever it stands, and a 1
    or a folder may be a part of anything.
    """
    module.no_log_values = {str(value) for name, value in environment.items() if LOGIN.search(str(value)) or SECRET.search(name)}
