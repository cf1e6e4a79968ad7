"""Time a run that changes nothing on a converged lab, beside a play that only gathers facts; print both as a table.

    make bench-converge

Seconds are of the wall and of the controller's CPU, medians of three runs, taken turn by turn so that both see the same machine. Steps
are tasks that a host had a result of, those that were left out aside.
"""

from __future__ import annotations

import collections
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RUNS = 3
FACTS = "- {hosts: all, gather_facts: true}\n"


def run(inventory: str, playbook: str) -> tuple[float, float, dict[str, object]]:
    """Run a playbook; return its seconds of wall and of CPU on the controller, and what Ansible tells of it.

    Raises:
        SystemExit: if it fails, or changes something.
    """
    environment = os.environ | {"ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json", "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg")}
    command = [Path(sys.executable).with_name("ansible-playbook"), "-i", inventory, playbook]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    completed = subprocess.run(command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wall, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if completed.returncode:
        sys.exit(completed.stdout + completed.stderr)
    told = json.loads(completed.stdout)
    if any(stats["changed"] for stats in told["stats"].values()):
        sys.exit("This lab has not converged: run site.yml first.")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, told


def steps(told: dict[str, object]) -> collections.Counter[str]:
    """Return the number of results by role; those of plays themselves by ''."""
    found: collections.Counter[str] = collections.Counter()
    for play in told["plays"]:
        for task in play["tasks"]:
            role = task["task"]["name"].partition(" : ")
            done = sum(not outcome.get("skipped") for outcome in task["hosts"].values())
            found[role[0] if role[1] else ""] += done
    return found


def main() -> None:
    """Measure the inventory that the command line names."""
    inventory = sys.argv[1]
    times: dict[str, list[tuple[float, float]]] = {"facts": [], "site": []}
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as facts:
        facts.write(FACTS)
        facts.flush()
        for _ in range(RUNS):
            for name, playbook in (("facts", facts.name), ("site", "site.yml")):
                *seconds, told = run(inventory, playbook)
                times[name].append(tuple(seconds))
    hosts = len(told["stats"])
    medians = {name: [statistics.median(column) for column in zip(*seconds, strict=True)] for name, seconds in times.items()}
    print(f"{hosts} hosts, medians of {RUNS} runs | wall | CPU of the controller")
    print("---|---|---")
    for name, label in (("facts", "gather facts"), ("site", "site.yml, nothing to change")):
        print(f"{label} | {medians[name][0]:.1f} s | {medians[name][1]:.1f} s")
    print(f"ratio | {medians['site'][0] / medians['facts'][0]:.1f} | {medians['site'][1] / medians['facts'][1]:.1f}")
    counted = steps(told)
    print(f"\nrole | steps on all hosts ({counted.total()}, {counted.total() / hosts:.1f} per host)\n---|---")
    for role, number in counted.most_common():
        print(f"{role or '(plays)'} | {number}")


if __name__ == "__main__":
    main()
