"""Compare the transport `atomic` with kombu's own: `python runtime/benchmarks/redis_transport.py [--kills 40]`.

It starts its own servers on the loopback address, and takes about three minutes; --kills adds about six seconds for each.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from celery import Celery
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(FOLDER / "src"), str(FOLDER / "tests")]

from sentinels import Servers  # noqa: E402
from sites import Site, wait_for  # noqa: E402

from celery_platform import redis_transport  # noqa: E402

SHOP = """
import os, time
from celery import Celery

app = Celery("shop")

@app.task(name="nothing")
def nothing():
    pass

@app.task(name="note")
def note(text):
    with open("ran", "a") as file:
        file.write(f"{text}\\n")

@app.task(name="delay")
def delay(sent):
    note(time.time() - sent)

@app.task(name="work")
def work(id):
    time.sleep(0.005)
    note(id)
"""
TRANSPORTS = ("atomic", "kombu")
TASKS, PAIRS = 3000, 3
LATENCIES, PAUSE = 200, 0.05
TASKS_PER_KILL = 200

console = Console()


class Bench:
    """A site on a Redis of its own, with a producer for each transport."""

    def __init__(self, folder: Path, servers: Servers, replica: bool = False) -> None:
        self.port = servers.redis()
        if replica:
            servers.redis(replica_of=self.port)
        self.server = servers.client(self.port)
        self.folder = folder

    def site(self, transport: str, **settings: str) -> Site:
        """Return an empty site on an empty Redis."""
        self.server.flushall()
        site = Site(Path(tempfile.mkdtemp(dir=self.folder)))
        site.write(SHOP)
        site.set(broker_url=f"redis://127.0.0.1:{self.port}/0", redis_transport=transport, queues='["default"]', **settings)
        return site

    def producer(self, site: Site, transport: str, **options: float) -> Celery:
        """Return a producer; with Celery's own settings it would use the transport of this process's URLs."""
        app = site.producer()
        module = redis_transport.__name__ if transport == "atomic" else "kombu.transport.redis"
        app.conf.broker_transport = f"{module}:Transport"
        app.conf.broker_transport_options |= options
        return app


def ran(site: Site) -> list[str]:
    """Return what the tasks noted."""
    path = site.folder / "ran"
    return path.read_text().split() if path.exists() else []


def throughput(bench: Bench, transport: str) -> tuple[float, float]:
    """Return tasks published, and run by a worker with two processes, in a second."""
    site = bench.site(transport)
    app = bench.producer(site, transport)
    app.send_task("nothing")
    start = time.monotonic()
    for _ in range(TASKS):
        app.send_task("nothing")
    published = TASKS / (time.monotonic() - start)

    def left() -> int:
        return int(bench.server.llen("default") + bench.server.hlen("unacked"))

    with site.worker("--concurrency=2"):
        first = left()
        start = time.monotonic()
        wait_for("all tasks", lambda: left() == 0, seconds=120, every=0.01)
        return published, first / (time.monotonic() - start)


def latency(bench: Bench, producer: str, worker: str) -> tuple[float, float]:
    """Return milliseconds from a publish to the run of its task by an idle worker: median, and the 99th of a hundred."""
    site = bench.site(worker)
    app = bench.producer(site, producer)
    with site.worker("--concurrency=2"):
        app.send_task("nothing")
        for _ in range(LATENCIES):
            time.sleep(PAUSE)
            app.send_task("delay", (time.time(),))
        wait_for("all tasks", lambda: len(ran(site)) == LATENCIES)
    delays = [float(text) * 1000 for text in ran(site)]
    return statistics.median(delays), statistics.quantiles(delays, n=100)[98]


def idle_cpu(bench: Bench, transport: str, seconds: float = 10) -> float:
    """Return the share of one processor that an idle worker's main process takes, in percent."""

    def used(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    with bench.site(transport).worker("--concurrency=2") as worker:
        time.sleep(2)
        before = used(worker.pid)
        time.sleep(seconds)
        return (used(worker.pid) - before) / seconds * 100


def confirmed(bench: Bench, replicas: int) -> float:
    """Return milliseconds that a publish takes with so many replicas to confirm it; the median."""
    site = bench.site("atomic")
    app = bench.producer(site, "atomic", confirm_replicas=replicas)
    app.send_task("nothing")
    times = []
    for _ in range(1000):
        start = time.monotonic()
        app.send_task("nothing")
        times.append(time.monotonic() - start)
    return statistics.median(times) * 1000


def killed(bench: Bench, transport: str, kills: int) -> tuple[int, int, int]:
    """Kill a busy worker so many times; return tasks sent, lost, and runs beyond one for each."""
    limits = {"soft_time_limit": "1", "time_limit": "3", "visibility_timeout": "4", "max_runs": "1000", "prefetch_multiplier": "4"}
    site = bench.site(transport, **limits)
    app, sent = bench.producer(site, transport), []
    for kill in range(kills):
        for number in range(TASKS_PER_KILL):
            sent.append(f"{kill}-{number}")
            app.send_task("work", (sent[-1],))
        with site.worker("--concurrency=4") as worker:
            enough = len(ran(site)) + random.randint(20, TASKS_PER_KILL - 50)
            wait_for("some tasks", lambda enough=enough: len(ran(site)) >= enough, every=0.005)
            worker.kill()
            worker.wait()
    with site.worker("--concurrency=4"):
        # Lists and records are empty: nothing is left that could still come.
        wait_for("an empty broker", lambda: not bench.server.llen("default") + bench.server.hlen("unacked"), seconds=120)
        time.sleep(1)
    runs = Counter(ran(site))
    return len(sent), len(set(sent) - set(runs)), runs.total() - len(runs)


def show(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(table)


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="kill a busy worker of each transport so many times")
    parser.add_argument("--only-kills", action="store_true", help="nothing else")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Servers(folder) as servers:
            if not arguments.only_kills:
                compare(Bench(folder, servers))
                replicated = Bench(folder, servers, replica=True)
                rows = [(replicas, confirmed(replicated, replicas)) for replicas in (0, 1)]
                show("A publish, with one replica on the same machine", ("confirm_replicas", "median ms"), rows)
            if arguments.kills:
                bench = Bench(folder, servers)
                rows = [(transport, arguments.kills, *killed(bench, transport, arguments.kills)) for transport in TRANSPORTS]
                show("A busy worker, killed by SIGKILL", ("transport", "kills", "tasks", "lost", "duplicated"), rows)


def compare(bench: Bench) -> None:
    """Print throughput, latency and idle load of both transports."""
    runs = {transport: [] for transport in TRANSPORTS}
    for pair in range(PAIRS):
        for transport in TRANSPORTS if pair % 2 else reversed(TRANSPORTS):
            runs[transport].append(throughput(bench, transport))
    rows = [(transport, *map(statistics.median, zip(*runs[transport], strict=True))) for transport in TRANSPORTS]
    ratio: Callable[[int], float] = lambda column: statistics.median(  # noqa: E731
        ours[column] / kombus[column] for ours, kombus in zip(runs["atomic"], runs["kombu"], strict=True)
    )
    rows.append(("ratio", f"{ratio(0):.2f}", f"{ratio(1):.2f}"))
    show(f"{TASKS} tasks, two processes, median of {PAIRS} pairs", ("transport", "published/s", "run/s"), rows)
    rows = [(producer, worker, *latency(bench, producer, worker)) for producer in TRANSPORTS for worker in TRANSPORTS]
    show("From publish to run, idle worker", ("producer", "worker", "p50 ms", "p99 ms"), rows)
    show("An idle worker's main process", ("transport", "CPU %"), [(transport, idle_cpu(bench, transport)) for transport in TRANSPORTS])


if __name__ == "__main__":
    main()
