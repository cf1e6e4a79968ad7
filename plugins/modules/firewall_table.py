#!/usr/bin/python
"""Ansible module `firewall_table`: try a table of nftables for a while, then keep it. Runs on the host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: firewall_table
short_description: Replace one table of nftables, with a way back
description:
  - C(tried) replaces the table in the kernel, if it is not as it should be, and first sets a timer of systemd that
    brings the former one back. C(kept) stops that timer and writes the file that is loaded at boot. Between the two
    the caller shows that he still reaches the host; if he cannot, or dies, or the host reboots, the former rules
    are back.
  - Each replacement is one transaction of the kernel; other tables are not touched.
options:
  table:
    description: Family and name of the table, as C(inet name).
    type: str
    required: true
  path:
    description: File that is loaded at boot.
    type: path
    required: true
  content:
    description: Its content, which deletes the table and makes it anew. Required unless I(state=absent).
    type: str
  state:
    description: What to do.
    type: str
    choices: [tried, kept, absent]
    required: true
  rollback_seconds:
    description: Seconds after which tried rules are taken back.
    type: int
    default: 60
author: Celery Platform
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

#: The way back: a timer and a service of systemd, of this name.
ROLLBACK = "nftables-celery-rollback"
#: What the service loads. Gone after a reboot, as the timer is: then the kept rules were loaded.
FORMER = Path("/run/nftables-celery.nft")


class FirewallError(Exception):
    """The rules could not be loaded or kept; the message says why and what holds now."""


def run(*command: str, text: str | None = None) -> str:
    """Return what a command prints; raise FirewallError with its own message if it fails."""
    done = subprocess.run(command, input=text, text=True, capture_output=True)  # noqa: S603
    if done.returncode:
        raise FirewallError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def emptied(table: str) -> str:
    """Return commands after which the table does not exist, whether it did or not."""
    return f"add table {table}\ndelete table {table}\n"


def live(table: str, counters: bool = False) -> str:
    """Return the table as the kernel has it, with or without what its counters hold; '' if there is none."""
    if table not in [line.removeprefix("table ") for line in run("nft", "list", "tables").splitlines()]:
        return ""
    return run("nft", *([] if counters else ["--stateless"]), "list", "table", *table.split())


def listed(table: str, content: str) -> str:
    """Return the table as the kernel would list it once loaded, tried in an empty network namespace.

    Raises FirewallError, with nft's own message, if the kernel does not take it.
    """
    script = 'nft -f - && exec nft --stateless list table "$@"'
    return run("unshare", "--net", "sh", "-c", script, "sh", *table.split(), text=content)


def stop_timer() -> bool:
    """Stop the timer; tell whether it still ran."""
    ran = subprocess.run(["systemctl", "is-active", "--quiet", f"{ROLLBACK}.timer"]).returncode == 0  # noqa: S603, S607
    if ran:
        run("systemctl", "stop", f"{ROLLBACK}.timer")
    return ran


def roll_back() -> None:
    """Bring the former rules back now, if the timer still runs."""
    if stop_timer():
        run("nft", "-f", str(FORMER))


def try_rules(table: str, content: str, seconds: int) -> None:
    """Load the rules after setting the timer that takes them back; raise FirewallError if either fails."""
    # What a run left that died here a moment ago must not become the former rules.
    roll_back()
    FORMER.touch(mode=0o600)
    FORMER.write_text(emptied(table) + live(table, counters=True))
    run("nft", "--check", "-f", str(FORMER))
    timer = [f"--on-active={seconds}", "--timer-property=AccuracySec=100ms", "--timer-property=RemainAfterElapse=no"]
    nft = shutil.which("nft") or "nft"
    run("systemd-run", "--quiet", "--collect", f"--unit={ROLLBACK}", "--service-type=oneshot", *timer, nft, "-f", str(FORMER))
    try:
        run("nft", "-f", "-", text=content)
    except FirewallError:
        roll_back()
        raise


def keep_rules(table: str, content: str, path: Path) -> None:
    """Stop the timer and write the file for the next boot; raise FirewallError if the rules are gone already."""
    stop_timer()
    if live(table) != listed(table, content):
        raise FirewallError("The new rules were taken back before they could be kept: the former ones hold.")
    path.parent.mkdir(mode=0o755, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)
    FORMER.unlink(missing_ok=True)


def main() -> None:
    """Bring the table into the wanted state."""
    module = AnsibleModule(
        argument_spec={
            "table": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            "content": {"type": "str"},
            "state": {"type": "str", "choices": ["tried", "kept", "absent"], "required": True},
            "rollback_seconds": {"type": "int", "default": 60},
        },
        required_if=[("state", "tried", ["content"]), ("state", "kept", ["content"])],
        supports_check_mode=True,
    )
    table, content, state = (module.params[name] for name in ("table", "content", "state"))
    path = Path(module.params["path"])
    saved = path.read_text() if path.exists() else ""
    installed = shutil.which("nft") is not None
    try:
        if state == "absent":
            present = installed and live(table) != ""
            if not module.check_mode:
                stop_timer()
                if present:
                    run("nft", "-f", "-", text=emptied(table))
                for file in (path, FORMER):
                    file.unlink(missing_ok=True)
            module.exit_json(changed=present or saved != "", diff={"before": saved, "after": ""})
        if not installed and module.check_mode:
            module.exit_json(changed=True, diff={"before": "", "after": content})
        if state == "kept":
            if not module.check_mode:
                keep_rules(table, content, path)
            module.exit_json(changed=saved != content)
        now, wanted = live(table), listed(table, content)
        if now == wanted and saved == content:
            module.exit_json(changed=False)
        if not module.check_mode:
            try_rules(table, content, module.params["rollback_seconds"])
        # Where the file is right, the difference is what someone did to the rules by hand.
        before, after = (saved, content) if saved != content else (now, wanted)
        module.exit_json(changed=True, diff={"before": before, "after": after})
    except FirewallError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
