#!/usr/bin/python
"""Ansible module `probe_host`: what a check of settings must see from the host itself."""

from __future__ import annotations

DOCUMENTATION = r"""
module: probe_host
short_description: Look at a folder's disk, and at what names stand for on this host
description: Changes nothing.
options:
  directory: {description: A folder, which need not exist yet., type: path}
  names: {description: "Names that must stand for an address that other hosts reach; addresses may be among them.", type: list,
    elements: str, default: []}
"""

import ipaddress
import os
import socket
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule


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


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={"directory": {"type": "path"}, "names": {"type": "list", "elements": "str", "default": []}},
        supports_check_mode=True,
    )
    result = {"wrong_names": [wrong for name in module.params["names"] if (wrong := wrong_name(name))]}
    if module.params["directory"]:
        folder = Path(module.params["directory"])
        while not folder.exists():
            folder = folder.parent
        disk = os.statvfs(folder)
        while not folder.is_mount():
            folder = folder.parent
        result |= {
            "mount": str(folder),
            "writable": not disk.f_flag & os.ST_RDONLY,
            "free_mb": disk.f_bavail * disk.f_frsize // 1024**2,
        }
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
