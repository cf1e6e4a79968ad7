"""A stream of tasks with a ledger: what was acknowledged to the producer, against what ran."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import IO, Any

from nodes import Node, wait_for

#: Sends tasks until its standard input ends; each line is one publish: id or error, time, seconds that it took.
PRODUCER = """
import json, sys, threading, time
from celery_platform.worker import app
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
number = 0
while not stop.is_set():
    number += 1
    begun = time.time()
    try:
        told = {"id": app.send_task("orders.tasks.send_email", (number,), ignore_result=True).id}
    except Exception as error:
        told = {"error": repr(error)}
    print(json.dumps(told | {"time": begun, "took": time.time() - begun}), flush=True)
    stop.wait(max(0, begun + 1 / %d - time.time()))
"""


@dataclass
class Report:
    """What became of a stream of tasks."""

    #: Tasks that the broker acknowledged to the producer, and how often sending one was an error.
    acknowledged: int
    refused: int
    lost: list[str]
    duplicated: int
    #: Seconds: the longest publish, and the longest time in which no task ended.
    longest_publish: float
    longest_pause: float

    def __str__(self) -> str:
        return (
            f"acknowledged {self.acknowledged}, refused {self.refused}, lost {len(self.lost)}, duplicated {self.duplicated}, "
            f"longest publish {self.longest_publish:.1f} s, longest pause {self.longest_pause:.1f} s"
        )


@dataclass
class Stream:
    """Tasks sent at a steady rate from a host, and run by workers on some.

    Args:
        producer: the host that sends.
        workers: the hosts whose logs tell what ran.
        rate: tasks per second.
    """

    producer: Node
    workers: Sequence[Node]
    rate: int = 50
    process: subprocess.Popen[str] = field(init=False)
    output: IO[str] = field(init=False)

    def __enter__(self) -> Stream:
        """Begin to send, and wait until tasks run."""
        command = self.producer.ssh("celery-exec", "python", "-c", PRODUCER % self.rate)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.output = self.process.stdout
        first = json.loads(self.output.readline())["id"]
        wait_for("the first task of the stream", lambda: first in self.ended())
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop sending."""
        self.process.kill()

    def ended(self) -> dict[str, list[float]]:
        """Return when each task ended, as often as it did, by the workers' logs."""
        found: dict[str, list[float]] = {}
        for node in self.workers:
            lines = node.host.check_output(r"zgrep -hE '\] succeeded' /var/log/celery/*.log* || true")
            for line in lines.splitlines():
                if id := re.search(r"([0-9a-f-]{36})\] succeeded", line):
                    found.setdefault(id[1], []).append(datetime.fromisoformat(line.split()[0]).timestamp())
        return found

    def report(self, seconds: float = 60) -> Report:
        """Stop sending; return what became of the tasks, once all ran or so many seconds are over."""
        rest, _ = self.process.communicate(timeout=120)
        sent = [json.loads(line) for line in rest.splitlines()]
        acknowledged = {entry["id"] for entry in sent if "id" in entry}
        end = time.monotonic() + seconds
        while (missing := acknowledged - (ended := self.ended()).keys()) and time.monotonic() < end:
            time.sleep(1)
        times = sorted(time for id in acknowledged & ended.keys() for time in ended[id])
        return Report(
            acknowledged=len(acknowledged),
            refused=sum("error" in entry for entry in sent),
            lost=sorted(missing),
            duplicated=sum(len(ended[id]) - 1 for id in acknowledged & ended.keys()),
            longest_publish=max(entry["took"] for entry in sent),
            longest_pause=max(later - earlier for earlier, later in pairwise(times)),
        )
