"""Send tasks to all queues and show their results: `celery-exec python -m orders.demo`."""

from __future__ import annotations

import sys
import time

from celery.result import AsyncResult
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from celery_platform.worker import app  # noqa: F401 - gives the tasks' application its settings
from orders import tasks

TASKS_PER_QUEUE = 20
SECONDS_TO_WAIT = 60


def main() -> int:
    """Return 0 if every task gave the result it should."""
    console = Console()
    started = time.monotonic()
    sent: dict[str, list[AsyncResult]] = {"critical": [], "default": [], "batch": []}
    for number in range(TASKS_PER_QUEUE // 2):
        sent["critical"].append(tasks.send_email.delay(number))
        sent["critical"].append(tasks.process_payment.delay(number, cents=100 * number))
        sent["default"].append(tasks.update_stock.delay(f"article {number}", -1))
        sent["default"].append(tasks.update_stock.delay(f"article {number}", 5))
        sent["batch"].append(tasks.batch_report.delay("2026-11-20", rows=number))
        sent["batch"].append(tasks.batch_import.delay(0.2))

    first_result = None
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bars = {queue: progress.add_task(queue, total=len(results)) for queue, results in sent.items()}
        while time.monotonic() - started < SECONDS_TO_WAIT:
            done = {queue: sum(result.ready() for result in results) for queue, results in sent.items()}
            for queue, bar in bars.items():
                progress.update(bar, completed=done[queue])
            if first_result is None and any(done.values()):
                first_result = time.monotonic() - started
            if all(done[queue] == len(results) for queue, results in sent.items()):
                break
            time.sleep(0.1)

    table = Table("queue", "sent", "succeeded", "failed", "a result")
    lost = 0
    for queue, results in sent.items():
        succeeded = [result for result in results if result.successful()]
        failed = [result for result in results if result.failed()]
        lost += len(results) - len(succeeded)
        example = str(succeeded[0].result) if succeeded else "none"
        table.add_row(queue, str(len(results)), str(len(succeeded)), str(len(failed)), example)
    console.print(table)
    if lost:
        console.print(f"[red]{lost} tasks have no result after {SECONDS_TO_WAIT} s.[/red] Look at: journalctl -u 'celery-orders-worker@*'")
        return 1
    console.print(f"First result after {first_result:.1f} s, all {sum(map(len, sent.values()))} after {time.monotonic() - started:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
