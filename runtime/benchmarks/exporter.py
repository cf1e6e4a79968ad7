"""Measures what the exporter costs while a site runs 1,000 tasks a second in 100 queues.

    python runtime/benchmarks/exporter.py [--rate N] [--queues N] [--seconds N]

Events go through a Redis of its own as services send them: each sender's one by one, those of busy workers 24 at a time
(celery.events.dispatcher). Tasks wait for 10 seconds, so that many of them are remembered.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import deque
from pathlib import Path

import redis

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("src", "tests")]
from celery import Celery  # noqa: E402
from sites import free_port, wait_for  # type: ignore[import-not-found]  # noqa: E402

#: Seconds that a task waits.
WAIT = 10


def sample(text: str, name: str) -> float:
    """Return the value of a metric without labels."""
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name + " "))


def main() -> None:
    """Print the exporter's share of one core, its memory, and how long a scrape takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=int, default=1000)
    parser.add_argument("--queues", type=int, default=100)
    parser.add_argument("--seconds", type=int, default=40)
    arguments = parser.parse_args()
    port, listen = free_port(), free_port()
    queues = [f"queue{number}" for number in range(arguments.queues)]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
        "CELERY_PLATFORM_APPLICATION": "celery_platform.monitor:bare",
        "CELERY_PLATFORM_BROKER_URL": f"redis://127.0.0.1:{port}/0",
        "CELERY_PLATFORM_DEFAULT_QUEUE": queues[0],
        "CELERY_PLATFORM_QUEUES": str(queues).replace("'", '"'),
    }
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder], stdout=subprocess.DEVNULL
        )
        command = [sys.executable, "-m", "celery_platform.cli", "exporter", f"--listen=127.0.0.1:{listen}"]
        exporter = subprocess.Popen(command, env=environment)
        try:
            client = redis.Redis(port=port)
            wait_for("the exporter", lambda: client.pubsub_numpat() if client.ping() else 0)
            measure(arguments, port, f"http://127.0.0.1:{listen}/metrics", queues)
        finally:
            for process in (exporter, server):
                process.terminate()
                process.wait()


def measure(arguments: argparse.Namespace, port: int, url: str, queues: list[str]) -> None:
    """Send events at the rate, scrape every second, and print."""
    app = Celery("benchmark", broker=f"redis://127.0.0.1:{port}/0")
    waiting: deque[tuple[str, str, float]] = deque()
    scrapes, texts, number, late = [], [], 0, 0.0

    def scrape() -> None:
        begun = time.perf_counter()
        with urllib.request.urlopen(url, timeout=10) as answer:
            texts.append(answer.read().decode())
        scrapes.append(time.perf_counter() - begun)

    with app.connection_for_write() as connection:
        sender = app.events.Dispatcher(connection, hostname="web@here")
        worker = app.events.Dispatcher(connection, hostname="worker@here", buffer_group=["task"])
        begun = time.monotonic()
        beaten = 0
        while (now := time.monotonic() - begun) < WAIT + arguments.seconds:
            if now > beaten:
                worker.send("worker-heartbeat", active=8)
                if now > WAIT:
                    scrape()
                beaten += 1
            if number > now * arguments.rate:
                time.sleep(0.001)
                continue
            late = max(late, now - number / arguments.rate)
            id, name, queue = f"{number:032x}-{'0' * 3}", f"shop.tasks.task{number % 50}", queues[number % len(queues)]
            sender.send("task-sent", uuid=id, name=name, queue=queue, args="()", kwargs="{}", retries=0, eta=None, routing_key=queue)
            waiting.append((id, name, now))
            number += 1
            while waiting[0][2] < now - WAIT:
                id, name, _ = waiting.popleft()
                queue = queues[int(id.partition("-")[0], 16) % len(queues)]
                worker.send("task-received", uuid=id, name=name, args="()", kwargs="{}", retries=0)
                worker.send("task-started", uuid=id, name=name, queue=queue)
                worker.send("task-succeeded", uuid=id, name=name, queue=queue, result="None", runtime=0.1)
    (first, last), span = (texts[0], texts[-1]), len(texts) - 1
    cpu, events = (sample(last, name) - sample(first, name) for name in ("process_cpu_seconds_total", "celery_exporter_events_total"))
    memory = [round(sample(text, "process_resident_memory_bytes") / 2**20) for text in (first, last)]
    print(f"{events / span:.0f} events/s of {number / now:.0f} tasks/s (the sender at most {late:.1f} s late)")
    print(f"CPU {100 * cpu / span:.0f} % of one core, with a scrape each second")
    print(f"memory {memory[0]} MiB, at the end {memory[1]} MiB")
    print(f"scrape median {1000 * statistics.median(scrapes):.0f} ms, longest {1000 * max(scrapes):.0f} ms, {len(last) // 1024} KiB")


if __name__ == "__main__":
    main()
