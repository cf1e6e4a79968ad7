"""Compares the tasks per second of an application through the package with the same application on bare Celery.

    python runtime/benchmarks/throughput.py [--tasks N] [--pairs N]

Both have the same settings, broker (a Redis of its own on the loopback address), result backend and pool. They take
turns, as what else the machine does changes with time; each turn gives a ratio, and the median of them is what counts.
A rate is taken from the time between the first tenth of the results and the last one, so starting does not count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("src", "tests")]
from sites import free_port, wait_for  # type: ignore[import-not-found]  # noqa: E402

SHOP = """
from celery import Celery

app = Celery("shop")

@app.task
def nothing(number):
    return number
"""
#: All settings, but none of the package's parts.
BARE = """
from celery_platform import configuration
from celery_platform.settings import load_settings
from shop import app

configuration.apply(app, load_settings())
"""
APPLICATIONS = {"bare": "bare:app", "package": "celery_platform.worker:app"}
#: As the package gives them to its workers (limits.py).
LIMITS = ["--soft-time-limit=600", "--time-limit=900"]


@contextmanager
def redis_server(folder: Path) -> Iterator[int]:
    """Run Redis; give its port."""
    port = free_port()
    command = [
        "redis-server",
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
        "--appendonly",
        "yes",
        "--logfile",
        str(folder / "log"),
    ]
    with subprocess.Popen(command) as server:
        try:
            wait_for("Redis", lambda: subprocess.run(["redis-cli", "-p", str(port), "ping"], capture_output=True).stdout == b"PONG\n")
            yield port
        finally:
            server.terminate()


def rate(application: str, tasks: int, port: int, environment: dict[str, str], folder: Path) -> float:
    """Return the tasks per second of one worker with two processes."""
    results = redis.Redis(port=port, db=1)
    results.flushall()
    python = Path(sys.executable)
    send = f"from {application.split(':')[0]} import app\nfor n in range({tasks}): app.send_task('shop.nothing', (n,))"
    subprocess.run([python, "-c", send], env=environment, cwd=folder, check=True)
    options = ["--loglevel=INFO", "--concurrency=2", "--queues=default", "--without-mingle", *LIMITS]
    with (folder / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [python.with_name("celery"), "-A", application, "worker", *options], env=environment, cwd=folder, stdout=log, stderr=log
        )
    try:
        begun = wait_for("a tenth of the results", lambda: (done := results.dbsize()) >= tasks // 10 and (done, time.monotonic()), 60, 0.01)
        ended = wait_for("all results", lambda: results.dbsize() >= tasks and time.monotonic(), 300, 0.01)
    finally:
        worker.terminate()
        worker.wait()
    return float((tasks - begun[0]) / (ended - begun[1]))


def main() -> None:
    """Print the rate of each turn, and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=4000)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, redis_server(Path(name)) as port:
        folder = Path(name)
        (folder / "shop.py").write_text(SHOP)
        (folder / "bare.py").write_text(BARE)
        environment = os.environ | {
            "PYTHONPATH": f"{folder}:{Path(__file__).parents[1] / 'src'}",
            "CELERY_PLATFORM_APPLICATION": "shop:app",
            "CELERY_PLATFORM_BROKER_URL": f"redis://127.0.0.1:{port}",
            "CELERY_PLATFORM_RESULT_BACKEND": f"redis://127.0.0.1:{port}/1",
            "CELERY_PLATFORM_PREFETCH_MULTIPLIER": "4",
        }
        ratios = []
        print("bare/s   package/s   ratio")
        for turn in range(arguments.pairs):
            order = list(APPLICATIONS) if turn % 2 == 0 else list(reversed(APPLICATIONS))
            rates = {name: rate(APPLICATIONS[name], arguments.tasks, port, environment, folder) for name in order}
            ratios.append(rates["package"] / rates["bare"])
            print(f"{rates['bare']:6.0f}   {rates['package']:9.0f}   {ratios[-1]:.3f}", flush=True)
        print(f"median ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
