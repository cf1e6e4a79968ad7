"""Tests of the log: journal and file, text and JSON, the task of each line, and what no line may show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers.sites import Site, wait_for

PASSWORD = "s3cret/of+redis"

SHOP = """
import logging, os, time
from urllib.parse import quote
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.log import get_task_logger

app = Celery("shop")
library = logging.getLogger("some.library")
log = get_task_logger(__name__)
password = open(os.environ["CREDENTIALS_DIRECTORY"] + "/result_backend_password").read()

@app.task(name="pay", bind=True, max_retries=1)
def pay(self, card):
    library.warning("library line", extra={"order": 7, "task_id": "the caller's own"})
    log.info("paying %s with redis://:%s@host/0", password, quote(password, safe=""))
    log.info("one %s too few %s", 1)
    print("printed line")
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return "result-value"

@app.task(name="fail")
def fail(card):
    raise ValueError("no connection with amqp://me:" + "hidden@host/ and " + password)

def hang_here():
    while True:
        try:
            time.sleep(60)
        except SoftTimeLimitExceeded:
            pass

@app.task(name="hang")
def hang():
    hang_here()

@app.task(name="chatter")
def chatter(lines):
    for number in range(lines):
        log.info("line-%d-end", number)
        time.sleep(0.001)
"""


@pytest.fixture
def shop(site: Site, redis_url: str) -> Site:
    """Return a site with an application whose tasks log."""
    site.write(SHOP)
    site.set(broker_url=redis_url, soft_time_limit="1", time_limit="2")
    # Not the broker's: this Redis asks for no password.
    site.secret(result_backend_password=PASSWORD)
    return site


def of(lines: list[dict[str, Any]], text: str) -> dict[str, Any]:
    """Return the only line whose message has this text."""
    (line,) = [line for line in lines if text in line["message"]]
    return line


def test_json_in_a_pool_of_processes(shop: Site) -> None:
    shop.set(log_format="json", log_level="DEBUG")
    file = shop.folder / "file.log"
    with shop.worker(f"--logfile={file}"):
        producer = shop.producer()
        paid = producer.send_task("pay", ("card-4111",), root_id="root", parent_id="parent").id
        failed = producer.send_task("fail", ("card-4111",)).id
        producer.send_task("unknown", ("card-4111",))
        hung = producer.send_task("hang").id
        # The second attempt of `pay` has its turn after `hang`.
        wait_for("the end of all", lambda: f"pay[{paid}] succeeded" in file.read_text())

    text = file.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    # Celery itself writes what is no JSON: a warning for root before it sets up logging, and that it shuts down.
    assert Counter(line for line in shop.log().splitlines() if line.startswith("{")) == Counter(text.splitlines())
    assert "[config]" not in shop.log()

    first, second = [line for line in lines if line["message"] == "library line"]
    assert first["logger"] == "some.library"
    assert first["task_id"] == "the caller's own"
    assert first["order"] == 7
    assert (first["attempt"], second["attempt"]) == (1, 2)
    printed = next(line for line in lines if line["message"] == "printed line")
    expected = {"task_id": paid, "task_name": "pay", "queue": "default", "redelivered": False, "root_id": "root", "parent_id": "parent"}
    assert printed.items() >= expected.items()
    assert printed["timestamp"].endswith("Z")
    assert printed["process"] != "MainProcess"
    for message in (f"Task pay[{paid}] retry", f"Task pay[{paid}] succeeded"):
        assert of(lines, message).items() >= {"task_id": paid, "task_name": "pay"}.items()
    assert of(lines, f"Task fail[{failed}] received").items() >= {"task_id": failed, "task_name": "fail", "process": "MainProcess"}.items()
    exception = of(lines, f"Task fail[{failed}] raised")["exception"]
    assert exception["type"] == "ValueError"
    assert "in fail" in exception["traceback"]
    assert any("its arguments do not fit" in line["message"] for line in lines)

    for limit, level in (("Soft", "WARNING"), ("Hard", "ERROR")):
        stack = of(lines, f"{limit} time limit of hang[{hung}]")
        assert " in hang_here\n" in stack["message"]
        assert "celery/app/trace.py" not in stack["message"]
        assert stack.items() >= {"level": level, "task_id": hung, "queue": "default"}.items()
        assert of(lines, f"{limit} time limit (")["task_id"] == hung

    for hidden in (PASSWORD, "s3cret%2Fof%2Bredis", "me:hidden", "card-4111", "result-value"):
        assert hidden not in shop.log()
        assert hidden not in text


def test_text_in_a_pool_of_threads_with_arguments(shop: Site) -> None:
    shop.set(log_arguments="true")
    with shop.worker("--pool=threads"):
        paid = shop.producer().send_task("pay", ("card",)).id
        wait_for("the end of the task", lambda: "succeeded" in shop.log())

    (line,) = [line for line in shop.log().splitlines() if "printed line" in line and "#2" in line]
    time_, level, process, name, task, *_ = line.split(" ", 5)
    assert time_.endswith("Z")
    assert (level, process, name, task) == ("WARNING", "MainProcess", "celery.redirected", "[default/pay")
    assert f"[default/pay {paid} #2] printed line" in line
    assert "'result-value'" in shop.log()


def test_rotation_loses_no_line(shop: Site) -> None:
    shop.set(soft_time_limit="100", time_limit="200")
    file = shop.folder / "file.log"
    with shop.worker(f"--logfile={file}"):
        shop.producer().send_task("chatter", (1500,))
        for turn in range(3):
            wait_for("lines", lambda turn=turn: file.exists() and f"line-{turn * 400 + 100}-end" in file.read_text(), every=0.02)
            file.rename(shop.folder / f"file.log.{turn}")
            # What logrotate's `create` does.
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o640))
        wait_for("the end", lambda: "succeeded" in file.read_text())

    everywhere = "".join(path.read_text() for path in shop.folder.glob("file.log*"))
    for number in range(1500):
        assert everywhere.count(f"line-{number}-end") == 1
    assert all((shop.folder / f"file.log.{turn}").read_text() for turn in range(3))
    assert shop.log().count("-end\n") == 1500


def test_a_file_is_set_aside_when_it_is_too_large(shop: Site) -> None:
    shop.set(soft_time_limit="100", time_limit="200")
    shop.write(SHOP + "\nfrom celery_platform import logs\nlogs.LARGEST_FILE = 100_000\n")
    file, earlier = shop.folder / "file.log", shop.folder / "file.earlier.log"
    with shop.worker(f"--logfile={file}", "--concurrency=3"):
        for _ in range(3):
            shop.producer().send_task("chatter", (700,))
        wait_for("the end", lambda: shop.log().count("succeeded") == 3)
        assert len(shop.log()) > 200_000
        assert max(file.stat().st_size, earlier.stat().st_size) < 110_000
        # What is left is the end, without a gap.
        written = [line for line in shop.log().splitlines() if "-end" in line]
        kept = [line for line in (earlier.read_text() + file.read_text()).splitlines() if "-end" in line]
        assert sorted(kept) == sorted(written[-len(kept) :])
        assert len(kept) > 500
    assert {path.name for path in shop.folder.glob("file*")} == {"file.log", "file.earlier.log"}


def test_the_journal_gets_no_second_time(shop: Site) -> None:
    """Standard error is the journal where JOURNAL_STREAM names its device and inode (systemd.exec(5))."""
    file = shop.folder / "file.log"
    (shop.folder / "worker.log").touch()
    status = (shop.folder / "worker.log").stat()
    shop.environment["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
    with shop.worker(f"--logfile={file}"):
        pass
    ready = r"INFO MainProcess celery\.apps\.worker celery@\S+ ready\.$"
    assert re.search(rf"^{ready}", shop.log(), re.MULTILINE)
    assert re.search(rf"^\d{{4}}-\S+Z {ready}", file.read_text(), re.MULTILINE)
    shop.environment["JOURNAL_STREAM"] = f"{status.st_dev}:1"
    with shop.worker():
        pass
    assert re.search(rf"^\d{{4}}-\S+Z {ready}", shop.log(), re.MULTILINE)


def in_process(site: Site, code: str, **settings: str) -> str:
    """Return the standard error of code that runs with the service's application as `app`."""
    site.set(broker_url="memory://", **settings)
    program = "from celery_platform.worker import app\n" + code
    run = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | site.environment, cwd=site.folder, text=True, capture_output=True, check=True
    )
    return run.stderr


def test_an_application_that_sets_up_logging_keeps_its_own(site: Site) -> None:
    site.secret(alert_webhook="https://chat.example/hidden")
    site.write(
        """
import logging
from celery import Celery, signals
app = Celery("shop")

class Line(logging.LogRecord):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.branch = "Leeds"

logging.setLogRecordFactory(Line)

@signals.setup_logging.connect
def own(**_):
    logging.basicConfig(format="own: %(branch)s %(task_name)s #%(attempt)s %(message)s", level="INFO")

@app.task(name="pay")
def pay():
    try:
        raise ValueError("no answer from https://chat.example/hidden")
    except ValueError:
        logging.getLogger("x").exception("not paid")
"""
    )
    log = in_process(site, "app.log.setup('INFO'); app.tasks['pay'].apply()")

    assert "own: Leeds pay #1 not paid\nTraceback" in log
    assert "ValueError: no answer from ********\n" in log


LINES = """
import logging
from celery.worker.consumer.consumer import UNKNOWN_TASK_ERROR
app.log.setup("DEBUG")
data = {"id": "1", "name": "pay", "runtime": 2, "return_value": "result-value", "args": "card-4111", "kwargs": "card-4111"}
logging.getLogger("celery.app.trace").info("succeeded in %(runtime)s: %(return_value)s %(args)s", data, extra={"data": data})
logging.getLogger("celery.worker.consumer.consumer").error(UNKNOWN_TASK_ERROR, "pay", "card-4111", "card-4111", "delivery")
logging.getLogger("celery.concurrency.base").debug("TaskPool: Apply %s (args:%s kwargs:%s)", "pay", "card-4111", "card-4111")
"""


@pytest.mark.parametrize("shown", [False, True])
def test_lines_of_celery_show_values_only_if_told(site: Site, shown: bool) -> None:
    site.write("from celery import Celery\napp = Celery('shop')\n")

    log = in_process(site, LINES, log_format="json", log_level="DEBUG", log_arguments=str(shown).lower())

    succeeded, unknown, apply = [json.loads(line) for line in log.splitlines() if "celery." in line]
    assert succeeded.items() >= {"task_id": "1", "task_name": "pay"}.items()
    assert ("data" in succeeded) is shown
    assert "of type pay" in unknown["message"]
    assert unknown["message"].endswith("delivery\n")
    assert "Apply pay" in apply["message"]
    assert log.count("card-4111") == (7 if shown else 0)
    assert log.count("result-value") == (2 if shown else 0)


HANDLERS = """
import logging
from celery import Celery, signals
app = Celery("shop")

class Own(logging.Handler):
    def emit(self, record):
        data = record.data
        with open("seen", "a") as file:
            file.write(f"{record.name} {data['name']} {data['args']} {record.args['kwargs']}\\n")
        raise RuntimeError("away")

class Filter(logging.Filter):
    def filter(self, record):
        raise AttributeError("left")

@signals.after_setup_logger.connect
def set_up(**_):
    for name in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).addHandler(Own())
    logging.getLogger("celery.worker.consumer.consumer").addFilter(Filter())

@app.task(name="pay")
def pay(card, file):
    logging.getLogger("x").warning("a file of the name %s", file)
"""


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_handler_of_the_application_finds_all_of_a_record_and_its_errors_fail_no_task(site: Site, redis_url: str, pool: str) -> None:
    site.write(HANDLERS)
    site.set(broker_url=redis_url)
    file = site.folder / "file.log"
    with site.worker(f"--pool={pool}", f"--logfile={file}"):
        producer = site.producer()
        paid = producer.send_task("pay", ("card-4111", "\udcff.txt")).id
        producer.send_task("unknown")
        wait_for("the end of both", lambda: "succeeded" in file.read_text() and "unknown-task" in file.read_text())
    assert (site.folder / "seen").read_text().splitlines() == [
        f"celery.{of} pay ******** ********" for of in ("worker.strategy", "app.trace")
    ]
    # The handlers behind it got the line all the same.
    assert f"Task pay[{paid}] received" in file.read_text()
    assert r"a file of the name \udcff.txt" in file.read_text()
    assert "the handler failed on a line of celery.app.trace: RuntimeError in " in site.log()
    assert "the filter failed on a line of celery.worker.consumer.consumer: AttributeError in " in site.log()
    assert f"[{paid}] of queue" not in file.read_text()


def test_a_file_that_cannot_be_opened_again_fails_no_task(site: Site) -> None:
    site.write("from celery import Celery\napp = Celery('shop')\n")
    code = """
import logging, os, sys
app.log.setup("INFO", logfile="logs/a.log")
os.rename("logs", "gone")
logging.getLogger("celery.task").info("a line %s", "with a value")
print("alive", file=sys.__stderr__)
"""
    (site.folder / "logs").mkdir()

    log = in_process(site, code)

    assert "a line with a value\n" in log
    assert "a line of celery.task is lost: FileNotFoundError\nalive\n" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(("level", "shown"), [(None, False), ("DEBUG", True)])
def test_the_level_is_celerys_unless_it_is_set(site: Site, level: str | None, shown: bool) -> None:
    site.write("from celery import Celery\napp = Celery('shop')\n")
    code = "import logging; app.log.setup('INFO'); logging.getLogger('x').debug('a detail'); logging.getLogger('x').info('a fact')"

    log = in_process(site, code, **({"log_level": level} if level else {}))

    assert ("a detail" in log) is shown
    assert log.count("a fact\n") == 1


def test_beat_logs_the_same_way(site: Site, redis_url: str) -> None:
    schedule = {"e": {"task": "pay", "schedule": 1, "args": ["card-4111"]}}
    site.write(f"from celery import Celery\napp = Celery('shop')\napp.conf.beat_schedule = {schedule}\n")
    site.set(broker_url=redis_url, log_format="json", log_level="DEBUG")
    program = Path(sys.executable).with_name("celery")
    command = [program, "-A", "celery_platform.worker:app", "--quiet", "beat", "--logfile=beat.log"]
    file = site.folder / "beat.log"
    with subprocess.Popen(command, env=os.environ | site.environment, cwd=site.folder, stderr=subprocess.PIPE, text=True) as beat:
        wait_for("a task sent", lambda: file.exists() and "Sending due task" in file.read_text())
        beat.terminate()
        _, journal = beat.communicate(timeout=20)

    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert journal.splitlines() == file.read_text().splitlines()
    assert of(lines, "Sending due task e (pay)")["logger"] == "celery.beat"
    assert "card-4111" not in journal
    assert "Current schedule" in journal
    assert time.gmtime().tm_year == int(lines[0]["timestamp"][:4])
