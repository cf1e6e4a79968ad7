"""Action plugin `create_environment`: copy an inventory of this project for an environment of one's own. Runs on the controller.

What belongs to the other environment alone is not copied: its secrets, its CA, its addresses, and the hosts of a lab.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

INVENTORIES = Path(__file__).resolve().parents[2] / "inventories"

#: A name of an environment: also part of a certificate authority's name, and typed often.
NAME = re.compile(r"[a-z][a-z0-9_-]{0,30}")
#: What can be copied, and what it is.
SOURCES = {"production": "the recommended site", "quickstart": "one host that does everything"}
#: What nobody but its owner knows, and must be looked at before the first run.
FILL_IN = {
    "ansible_user": "who Ansible logs in as",
    "ansible_host": "the host's address",
    "celery_app_name": "your application",
    "celery_app_source": "where it is",
    "celery_app_application": "what you give to `celery -A`",
    "celery_app_queues": "its queues",
    "celery_app_routes": "which task goes where",
    "celery_worker_list": "its workers",
    "monitoring_proxy_sources": "where people may look at it from",
}
#: Variables of every host, where the other inventory has none.
ALL_VARS = "all:\n  vars:\n    ansible_user: admin\n"


def hosts_file(text: str, name: str, source: str) -> str:
    """Return the text of hosts.yml for hosts of one's own: no lab, and addresses that are nobody's (RFC 5737)."""
    text = re.sub(r"(?m)(^    #.*\n)*^    lab:\n(^      .*\n)+", "", text)
    if source == "quickstart":
        text = re.sub(rf"\b{source}:", f"{name}1:", text).replace("all:\n", ALL_VARS, 1)
        text = text.replace(f"        {name}1:\n", f"        {name}1:\n          ansible_host:\n", 1)
    number = count(11)
    text = re.sub(r"(?m)^( +ansible_host:).*$", lambda match: f"{match[1]} 203.0.113.{next(number)}", text)
    return re.sub(r"(?m)\A(---\n# )Production\b", rf"\1{name}", text)


def places(folder: Path, top: Path) -> Iterator[str]:
    """Yield the file, line, name and meaning of each setting to fill in."""
    for path in (folder / "hosts.yml", folder / "group_vars/all/main.yml"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            name = line.strip().partition(":")[0]
            if name in FILL_IN:
                yield f"{path.relative_to(top)}:{number}: {name}, {FILL_IN[name]}"


class ActionModule(ActionBase):
    """Arguments: `name` of the new environment, and `source`, the one that it is a copy of."""

    _requires_connection = False
    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Create inventories/<name>."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        name, source = self._task.args["name"], self._task.args["source"]
        if not NAME.fullmatch(name):
            allowed = "up to 31 lower-case letters, digits, _ and -, beginning with a letter"
            raise AnsibleActionFail(f"ENV is {json.dumps(name)}; allowed: {allowed}")
        if source not in SOURCES:
            allowed = ", ".join(f"{known} ({what})" for known, what in SOURCES.items())
            raise AnsibleActionFail(f"FROM is {json.dumps(source)}; allowed: {allowed}")
        new, old = INVENTORIES / name, INVENTORIES / source
        if new.exists():
            raise AnsibleActionFail(f"There is an inventories/{name} already; it is left as it is. Choose another ENV")

        texts = {path: (old / path).read_text() for path in ("group_vars/all/main.yml", "group_vars/all/vault.yml.example")}
        # Hosts of one's own are not alone in their network, as a lab is.
        main = "group_vars/all/main.yml"
        texts[main] = texts[main].replace("# firewall_state: present\n", "firewall_state: present\n")
        texts["hosts.yml"] = hosts_file((old / "hosts.yml").read_text(), name, source)
        # All or nothing.
        partial = INVENTORIES / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        for path, text in texts.items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_text(text)
        partial.rename(new)
        return result | {"changed": True, "fill_in": list(places(new, INVENTORIES.parent))}
