"""A stream of tasks with a ledger: what was acknowledged to the producer, against what ran."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import IO, Any

from helpers import REPOSITORY
from helpers.nodes import Node, wait_for
from helpers.targets import FULL

#: Where the stream's tasks wait, and the service that runs them.
QUEUE, WORKER = "critical", "celery-orders-worker@critical"
#: How often a broker is killed, and the workers of all hosts.
BROKERS_KILLED = 5 if FULL else 1
WORKERS_KILLED = 20 if FULL else 5
#: Seconds, the median of a machine that does nothing else; a single one may take longer, and CI has other work.
RECOVERY = 6 if FULL else 20

#: Sends tasks until its standard input ends; each line is one publish: id or error, time, seconds that it took. The last
#: line says which results there are, if they are asked for: none within a minute, or an error.
PRODUCER = """
import json, sys, threading, time
from celery_platform.worker import app
rate, with_results = float(sys.argv[1]), sys.argv[2] == "True"
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
number, results = 0, []
while not stop.is_set():
    number += 1
    begun = time.time()
    try:
        result = app.send_task("orders.tasks.send_email", (number,), ignore_result=not with_results)
        told = {"id": result.id}
        results.append(result)
    except Exception as error:
        told = {"error": repr(error)}
    print(json.dumps(told | {"time": begun, "took": time.time() - begun}), flush=True)
    stop.wait(max(0, begun + 1 / rate - time.time()))
end = time.monotonic() + 60
missing = results if with_results else []
while missing and time.monotonic() < end:
    missing = [result for result in missing if not result.ready()]
    time.sleep(0.5)
failed = [result.id for result in results if with_results and result not in missing and not result.successful()]
print(json.dumps({"missing": [result.id for result in missing], "failed": failed}))
"""


@dataclass
class Report:
    """What became of a stream of tasks."""

    #: Tasks that the broker acknowledged to the producer, and the errors of sending others.
    acknowledged: int
    refused: list[str]
    lost: list[str]
    duplicated: int
    #: Tasks without a result, and with an error as their result, if results were asked for.
    without_result: list[str]
    failed: list[str]
    #: Seconds: the longest publish, and the longest time in which no task ended.
    longest_publish: float
    longest_pause: float

    def __str__(self) -> str:
        return (
            f"acknowledged {self.acknowledged}, refused {len(self.refused)}, lost {len(self.lost)}, duplicated {self.duplicated}, "
            f"longest publish {self.longest_publish:.1f} s, longest pause {self.longest_pause:.1f} s"
            + "".join(f"\n    refused: {error}" for error in sorted(set(self.refused)))
        )


@dataclass
class Stream:
    """Tasks sent at a steady rate from a host, and run by workers on some.

    Args:
        producer: the host that sends.
        workers: the hosts whose logs tell what ran.
        rate: tasks per second.
        results: whether the producer also waits for each result.
        environment: settings that the producer has for itself, as NAME=value.
    """

    producer: Node
    workers: Sequence[Node]
    rate: int = 50
    results: bool = False
    environment: Sequence[str] = ()
    process: subprocess.Popen[str] = field(init=False)
    output: IO[str] = field(init=False)

    def __enter__(self) -> Stream:
        """Begin to send once the site is at rest, and wait until tasks run."""
        wait_for("a site at rest", lambda: not unrest(self.workers), seconds=180, every=1, why=lambda: unrest(self.workers))
        arguments = [PRODUCER, str(self.rate), str(self.results)]
        command = self.producer.ssh("celery-exec", "env", *self.environment, "python", "-c", *arguments)
        # A file takes what nobody reads yet, however long it goes on.
        self.output = tempfile.NamedTemporaryFile("a")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self.output, text=True)
        first = wait_for("the first task of the stream", lambda: self.told()[:1], seconds=60)[0]["id"]
        wait_for("the first task's end", lambda: first in self.ended(), seconds=60, every=0.5, why=lambda: unrest(self.workers))
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop sending."""
        self.process.kill()
        self.output.close()

    def told(self) -> list[dict[str, Any]]:
        """Return what the producer has printed so far, line by line."""
        with open(self.output.name) as lines:
            return [json.loads(line) for line in lines if line.endswith("\n")]

    def ended(self) -> dict[str, list[float]]:
        """Return when each task ended, as often as it did, by the workers' logs."""
        found: dict[str, list[float]] = {}
        for node in self.workers:
            lines = node.host.check_output(r"zgrep -hE '\] succeeded' /var/log/celery/orders/*.log* || true")
            for line in lines.splitlines():
                if id := re.search(r"([0-9a-f-]{36})\] succeeded", line):
                    found.setdefault(id[1], []).append(datetime.fromisoformat(line.split()[0]).timestamp())
        return found

    def goes_on(self) -> None:
        """Wait until a hundred more tasks have ended."""
        before = len(self.ended())
        wait_for("more tasks", lambda: len(self.ended()) >= before + 100, seconds=60, every=1)

    def stop(self) -> None:
        """Send no more."""
        if self.process.stdin:
            self.process.stdin.close()
            self.process.stdin = None

    def report(self, seconds: float = 60) -> Report:
        """Stop sending; return what became of the tasks, once all ran or so many seconds are over."""
        self.stop()
        self.process.wait(120)
        *sent, results = self.told()
        acknowledged = {entry["id"] for entry in sent if "id" in entry}
        end = time.monotonic() + seconds
        while (missing := acknowledged - (ended := self.ended()).keys()) and time.monotonic() < end:
            time.sleep(1)
        times = sorted(time for id in acknowledged & ended.keys() for time in ended[id])
        return Report(
            acknowledged=len(acknowledged),
            refused=[entry["error"] for entry in sent if "error" in entry],
            lost=sorted(missing),
            duplicated=sum(len(ended[id]) - 1 for id in acknowledged & ended.keys()),
            without_result=results["missing"],
            failed=results["failed"],
            longest_publish=max(entry["took"] for entry in sent),
            longest_pause=max(later - earlier for earlier, later in pairwise(times)),
        )


def unrest(workers: Sequence[Node]) -> list[str]:
    """Return what keeps hosts from running a stream's tasks at once, such as an earlier test's fault; empty if nothing does."""
    found = []
    for node in workers:
        shown = node.show(WORKER, "ActiveState", "StatusText")
        if shown["ActiveState"] != "active" or not shown["StatusText"].startswith("Consuming"):
            found.append(f"{WORKER} on {node.address} is {shown['ActiveState']}: {shown['StatusText']}")
    told = workers[0].host.run("celery-exec celery-platform queues --json")
    if told.rc:
        return [*found, told.stderr]
    queue = next(queue for queue in json.loads(told.stdout)["queues"] if queue["name"] == QUEUE)
    if queue["waiting"] or not queue["consumers"]:
        found.append(f"{queue['waiting']} tasks wait for {queue['consumers']} consumers")
    return found


def drill(name: str, workers: Sequence[Node], fault: Callable[[], None], well: Callable[[], None]) -> Report:
    """Let something happen under a stream of tasks; return what became of them, once all is well again.

    Args:
        name: what the table of all drills calls it.
        workers: hosts; the first one sends, too.
        fault: does it.
        well: returns when all is well.
    """
    well()
    with Stream(workers[0], workers) as stream:
        time.sleep(2)
        fault()
        well()
        stream.goes_on()
        report = stream.report()
    with (REPOSITORY / ".lab/drills.txt").open("a") as table:
        table.write(f"{name}: {report}\n")
    assert report.acknowledged > 200, report.refused
    return report


def kill_workers(workers: Sequence[Node]) -> None:
    """Kill the workers of all hosts several times, main process and children."""
    for _ in range(WORKERS_KILLED):
        for node in workers:
            node.host.check_output(f"systemctl kill --signal=KILL {WORKER}")
        time.sleep(4)


@contextmanager
def cut_off(node: Node, others: Sequence[Node]) -> Iterator[None]:
    """Let nothing through between a host and others."""
    addresses = ", ".join(other.address for other in others)
    chains = [
        f"chain {hook} {{ type filter hook {hook} priority -200; ip {end} {{ {addresses} }} drop; }}"
        for hook, end in (("input", "saddr"), ("output", "daddr"))
    ]
    node.host.check_output("nft %s", f"table inet drill {{ {'; '.join(chains)}; }}")
    try:
        yield
    finally:
        node.host.check_output("nft delete table inet drill")
