#!/usr/bin/python
"""Ansible module `probe_host`: what a check of settings must see from the host itself."""

from __future__ import annotations

DOCUMENTATION = r"""
module: probe_host
short_description: Look at disks, packages, paths, and at what names stand for on this host
description: Changes nothing.
options:
  disks:
    description: Folders, which need not exist yet, and how much free space each needs.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: The folder., type: path, required: true}
      needed_mb: {description: Free space in MiB., type: int, required: true}
  names: {description: "Names that must stand for an address that other hosts reach; addresses may be among them.", type: list,
    elements: str, default: []}
  packages: {description: Debian packages that are needed., type: list, elements: str, default: []}
  paths: {description: Paths that may exist., type: list, elements: path, default: []}
author: Celery Platform
"""

EXAMPLES = r"""
- name: Look at the host
  probe_host:
    disks: [{path: /var/lib/redis, needed_mb: 256}]
    packages: [redis-server]
"""

RETURN = r"""
disks:
  description: Of each folder also its mount, whether it can be written to, and free_mb.
  returned: always
  type: list
wrong_names:
  description: What is wrong with names, by name.
  returned: always
  type: dict
missing_packages:
  description: Those packages that are not installed.
  returned: always
  type: list
paths:
  description: Those paths that exist.
  returned: always
  type: list
"""

import ipaddress
import os
import re
import socket
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

#: dpkg's list of packages (dpkg(1)).
STATUS = Path("/var/lib/dpkg/status")


def wrong_name(name: str) -> str:
    """Say what is wrong with what a name stands for; '' if nothing is, or if it is an address."""
    try:
        ipaddress.ip_address(name)
        return ""
    except ValueError:
        pass
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except socket.gaierror:
        return f"{name} is unknown"
    loopback = sorted(address for address in found if ipaddress.ip_address(address.split("%")[0]).is_loopback)
    return f"{name} is {', '.join(loopback)}" if loopback else ""


def disk(path: str, needed_mb: int) -> dict[str, Any]:
    """Return what is known of the disk that a folder is, or would be, on."""
    folder = Path(path)
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    while not folder.is_mount():
        folder = folder.parent
    return {
        "path": path,
        "needed_mb": needed_mb,
        "mount": str(folder),
        "writable": not found.f_flag & os.ST_RDONLY,
        "free_mb": found.f_bavail * found.f_frsize // 1024**2,
    }


def installed(status: str) -> set[str]:
    """Return the names of the packages that are installed, of dpkg's list."""
    return set(re.findall(r"^Package: (\S+)\nStatus: \S+ \S+ installed$", status, re.MULTILINE))


def main() -> None:
    """Run the module."""
    suboptions = {"path": {"type": "path", "required": True}, "needed_mb": {"type": "int", "required": True}}
    module = AnsibleModule(
        argument_spec={
            "disks": {"type": "list", "elements": "dict", "default": [], "options": suboptions},
            "names": {"type": "list", "elements": "str", "default": []},
            "packages": {"type": "list", "elements": "str", "default": []},
            "paths": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    asked = module.params
    there = installed(STATUS.read_text(errors="replace")) if STATUS.exists() else set()
    module.exit_json(
        changed=False,
        disks=[disk(**entry) for entry in asked["disks"]],
        wrong_names={name: wrong for name in asked["names"] if (wrong := wrong_name(name))},
        missing_packages=[name for name in dict.fromkeys(asked["packages"]) if name not in there],
        paths=[path for path in dict.fromkeys(asked["paths"]) if os.path.lexists(path)],
    )


if __name__ == "__main__":
    main()
