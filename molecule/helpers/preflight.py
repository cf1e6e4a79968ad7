"""A role's preflight run in this process, without a playbook: a test takes milliseconds, not seconds."""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.playbook.play_context import PlayContext
from ansible.playbook.task import Task
from ansible.plugins.loader import connection_loader, filter_loader, init_plugin_loader
from ansible.template import Templar, trust_as_template
from ansible.vars.hostvars import HostVars
from ansible.vars.manager import VariableManager

from action import check_settings
from helpers import REPOSITORY

FACTS = {"distribution": "Debian", "distribution_major_version": "13", "distribution_version": "13.1", "memtotal_mb": 1000}
FACTS |= {"virtualization_role": "guest", "virtualization_type": "podman", "default_ipv4": {}}
#: What a look at the host would find (roles/*/meta/rules.yml, `probes`).
PROBE = {"host": {"wrong_names": {}, "disks": [], "missing_packages": [], "paths": []}, "certificate": {"problems": {}}, "unmade": {}}
PROBE["rabbitmq"] = {"running": False, "installed": "", "candidate": "4.0.5", "nodes": [], "cookie_differs": False}

#: The least that a site must set.
SECRET = "nX7cY2pK9mQ4wL8vD3fG6hJ1"
MAIN = {
    "ansible_host": "127.0.0.1",
    "redis_requirepass": "{{ vault_redis_requirepass }}",
    "celery_app_name": "orders",
    "celery_app_source": str(REPOSITORY / "examples" / "orders"),
    "celery_app_application": "orders.app:app",
    "celery_app_redis_password": "{{ vault_celery_app_redis_password }}",
}
VAULT = {"vault_redis_requirepass": SECRET, "vault_celery_app_redis_password": SECRET[::-1]}
ONE_HOST = {"redis": ["one"], "celery_worker": ["one"], "celery_beat": ["one"]}

init_plugin_loader()
filter_loader.add_directory(str(REPOSITORY / "plugins" / "filter"))


@functools.cache
def of_roles(part: str) -> dict[str, Any]:
    """Return the `defaults` or the `vars` that roles have of each other."""
    found: dict[str, Any] = {}
    for path in sorted((REPOSITORY / "roles" / "site" / part / "main").iterdir()):
        found |= DataLoader().load_from_file(str(path), trusted_as_template=True) or {}
    return found


class Site:
    """An inventory in a folder, as its hosts see it."""

    def __init__(self, folder: Path, groups: Mapping[str, Sequence[str]], files: Mapping[str, dict[str, Any]]) -> None:
        hosts = {"all": {"children": {group: {"hosts": dict.fromkeys(names)} for group, names in groups.items()}}}
        for name, content in {"hosts.yml": hosts, **files}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(yaml.safe_dump(content))
        self.loader = DataLoader()
        self.inventory = InventoryManager(self.loader, sources=[str(folder)])
        self.manager = VariableManager(self.loader, self.inventory)
        self.hostvars = HostVars(self.inventory, self.manager, self.loader)

    def variables(self, host: str = "one", role: str = "celery_app") -> dict[str, Any]:
        """Return the variables that a role's tasks have on a host."""
        own = self.manager.get_vars(host=self.inventory.get_host(host))
        magic = {"role_path": str(REPOSITORY / "roles" / role), "hostvars": self.hostvars}
        magic |= {"ansible_play_hosts": list(self.inventory.hosts)}
        magic |= {"ansible_facts": FACTS | {"hostname": host, "fqdn": f"{host}.example"}}
        return of_roles("defaults") | own | of_roles("vars") | magic

    def value(self, expression: str, host: str = "one") -> Any:
        """Return what an expression over the variables of a host stands for."""
        return Templar(self.loader, variables=self.variables(host)).evaluate_expression(trust_as_template(expression))

    def render(self, template: str, host: str = "one") -> str:
        """Return a role's template (`celery_app/templates/celery.env.j2`) as the host gets it."""
        role = template.partition("/")[0]
        variables = self.variables(host, role) | {"ansible_managed": "Ansible managed"}
        text = (REPOSITORY / "roles" / template).read_text()
        folders = [str(REPOSITORY / "roles" / name / "templates") for name in (role, "common")]
        templar = Templar(self.loader, variables=variables).copy_with_new_env(searchpath=folders)
        return str(templar.template(trust_as_template(re.sub("{{ ansible_managed.*", "", text))))

    def judge(self, role: str = "celery_app", host: str = "one") -> list[str]:
        """Return the problems that a role's preflight finds on a host."""
        return self.judge_roles([role], host)

    def judge_hosts(self) -> list[str]:
        """Return the problems that the preflight of a run finds, on all hosts."""
        found = [self.judge_roles(self.value("site_roles", host), host) for host in self.inventory.hosts]
        return list(dict.fromkeys(itertools.chain(*found)))

    def judge_roles(self, roles: list[str], host: str) -> list[str]:
        """Return the problems that the preflight of several roles finds on a host."""
        variables = self.variables(host, roles[0]) | {"__common_probe": PROBE, "check_settings_collect": True}
        task = Task()
        task.args = {"roles": roles}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            templar = Templar(self.loader, variables=variables)
            action = check_settings.ActionModule(
                task, connection_loader.get("local", PlayContext()), PlayContext(), self.loader, templar, None
            )
        return list(action.run(task_vars=variables)["ansible_facts"]["settings_problems"])


def site(folder: Path, groups: dict[str, list[str]] | None = None, *, vault: dict[str, Any] | None = None, **main: Any) -> Site:
    """Return an inventory of one host, or of these groups, with these variables besides the least that it must set."""
    files = {"group_vars/all/main.yml": MAIN | main, "group_vars/all/vault.yml": VAULT if vault is None else vault}
    return Site(folder, groups or ONE_HOST, files)
