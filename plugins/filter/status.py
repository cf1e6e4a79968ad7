"""Filter for playbooks/operations/status.yml: what hosts and broker told, as a table, and what of it is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

ROW = "{:<14} {:<34} {:<10} {}"
QUEUE_ROW = "{:<34} {:>8} {:>10}  {}"


def queue_rows(result: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the rows of the queues and what is wrong with them, from the result of `celery-platform queues --json`."""
    try:
        told = json.loads(result.get("stdout") or "")
    except ValueError:
        lines = str(result.get("stderr") or result.get("msg") or "no answer").strip().splitlines()
        return [], [f"the queues cannot be read: {''.join(c for c in lines[-1] if c.isprintable())}"]
    rows, wrong = [QUEUE_ROW.format("QUEUE", "WAITING", "CONSUMERS", "").rstrip()], []
    for queue in told["queues"]:
        stalled = queue["waiting"] and not queue["consumers"]
        rows.append(QUEUE_ROW.format(queue["name"], queue["waiting"], queue["consumers"], "NO CONSUMER" if stalled else "").rstrip())
        if stalled:
            wrong.append(f"queue {queue['name']} has {queue['waiting']} tasks and no consumer")
    hint = "celery-exec celery-platform dead-letters list" if told["dead_letters"] else ""
    rows.append(QUEUE_ROW.format("dead letters", told["dead_letters"], "", hint).rstrip())
    return rows, wrong


def site_status(hostvars: Mapping[str, Mapping[str, Any]], hosts: Sequence[str], answering: Sequence[str]) -> dict[str, Any]:
    """Return the table of a site's services, certificates and queues (`table`), and what is wrong (`problems`), in words.

    Args:
        hostvars: of each host, with what the playbook registered.
        hosts: all hosts that were asked.
        answering: those that answered.
    """
    rows, problems = [ROW.format("HOST", "SERVICE", "STATE", "WHAT")], []

    def add(host: str, name: str, state: str, what: str, wrong: bool) -> None:
        rows.append(ROW.format(host, name, state.upper() if wrong else state, what).rstrip())
        if wrong:
            problems.append(f"{name} on {host} is {state}" if name else f"{host} does not answer")

    queues: list[str] = []
    for host in hosts:
        if host not in answering:
            add(host, "", "no answer", "", True)
            continue
        told = hostvars[host]
        for service in told["__status_services"]["services"]:
            add(host, service["name"], service["state"], service["what"], service["wrong"])
        certificate = told.get("__pki_certificate") or {}
        if certificate.get("days_left") is not None:
            refused = "; ".join(certificate["problems"].values())
            add(host, "certificate", "refused" if refused else "valid", refused or f"{certificate['days_left']} days left", bool(refused))
        elif certificate.get("problems"):
            add(host, "certificate", "refused", "; ".join(certificate["problems"].values()), True)
        if "rc" in (told.get("__status_queues") or {}) or (told.get("__status_queues") or {}).get("failed"):
            queues, wrong = queue_rows(told["__status_queues"])
            problems += wrong
    return {"table": "\n".join([*rows, *([""] if queues else []), *queues]), "problems": problems}


class FilterModule:
    """Names the filters for Ansible."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {"site_status": site_status}
