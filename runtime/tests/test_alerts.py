"""Tests of the alerts: what is told, how it is gathered, and that no webhook can hold up a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import redis

from celery_platform import alerts, logs
from celery_platform.settings import BadSettings, SecretStr, Settings, load_settings
from helpers.sites import Site, wait_for

SHOP = """
import os, signal, time
from celery import Celery

app = Celery("shop")
password = "pa55word"

@app.task(name="pay")
def pay(card):
    raise ValueError("refused by redis://me:" + password + "@host <!channel>\\nsecond line")

@app.task(name="die")
def die():
    os.kill(os.getpid(), signal.SIGKILL)

@app.task(name="again", bind=True, max_retries=1)
def again(self):
    if self.request.retries == 0:
        raise self.retry(countdown=0)

@app.task(name="hang")
def hang():
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass
"""


class Webhook:
    """An HTTP server on the loopback address: it keeps the texts it gets, and answers `status`, or does not for a while."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.status = 200
        self.silent = self.dripping = 0
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(webhook.silent)
                for _ in range(webhook.dripping):
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n" if _ == 0 else b"X-Drop: 1\r\n")
                    time.sleep(0.5)
                webhook.texts.append(json.loads(body)["text"])
                self.send_response(webhook.status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/hidden"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def all(self) -> str:
        return "\n".join(self.texts)


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    webhook = Webhook()
    yield webhook
    webhook.server.shutdown()
    webhook.server.server_close()


@pytest.fixture
def shop(site: Site, redis_url: str, webhook: Webhook) -> Site:
    """Return a site with an application whose tasks fail, and a webhook."""
    site.write(SHOP)
    site.set(broker_url=redis_url, soft_time_limit="1", time_limit="2", alert_interval="1", alert_timeout="1")
    site.secret(alert_webhook=webhook.url)
    return site


def test_a_worker_tells_what_goes_wrong(shop: Site, webhook: Webhook, redis_url: str) -> None:
    with shop.worker("--hostname=one@host") as worker:
        producer = shop.producer()
        ids = [producer.send_task("pay", ("card-4111",)).id for _ in range(50)]
        producer.send_task("again")
        hung = producer.send_task("hang").id
        producer.send_task("unknown", ("card-4111",))
        wait_for("the hard limit", lambda: "TimeLimitExceeded" in webhook.all())
        wait_for("a new child", lambda: "again[" in shop.log() and "succeeded" in shop.log())
        # Its process is ended by the limit, the next one by us.
        (child,) = wait_for("a child", lambda: Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split())
        os.kill(int(child), signal.SIGKILL)
        wait_for("its death", lambda: "died" in webhook.all())
        redis.Redis.from_url(redis_url).client_kill_filter(_type="normal", skipme=True)
        wait_for("the connection", lambda: "again" in webhook.all())
    worker.wait()

    told = webhook.all()
    failed = [line for line in told.splitlines() if "pay failed" in line]
    assert sum(int(line.split()[1]) for line in failed) == 50
    assert len(failed) <= 3
    assert "pay failed with ValueError: refused by redis://me:********@host &lt;!channel&gt; (queue default, host " in failed[0]
    assert "attempt 1)" in failed[0]
    assert f"[{', '.join(ids[:3])}, …]" in failed[0]
    assert told.count("hang failed with TimeLimitExceeded") == 1
    assert told.count(hung) == 1
    assert "unknown is unknown here" in told
    assert told.count("A process of the pool died: signal 9 (SIGKILL) (it ran no task)") == 1
    assert told.count("The connection to the broker is lost") == told.count("lost: ConnectionError") == 1
    assert told.endswith("• Stopped in order (warm shutdown on SIGTERM)")
    assert all(text.startswith("*one@host*\n") for text in webhook.texts)
    for hidden in ("card-4111", "pa55word", "second line", "Retry"):
        assert hidden not in told


def test_the_task_of_a_lost_process_is_named(shop: Site, webhook: Webhook) -> None:
    with shop.worker():
        task = shop.producer().send_task("die").id
        wait_for(
            "its deaths", lambda: webhook.all().count("A process of the pool died") and "die failed with WorkerLostError" in webhook.all()
        )
    assert f"A process of the pool died: signal 9 (SIGKILL) (it ran die) [{task}" in webhook.all()
    assert "no task" not in webhook.all()


@pytest.mark.parametrize("how", ["silent", "dripping"])
def test_a_hanging_webhook_holds_up_neither_tasks_nor_the_end(shop: Site, webhook: Webhook, how: str) -> None:
    setattr(webhook, how, 60)
    with shop.worker("--pool=threads") as worker:
        producer = shop.producer()
        producer.send_task("pay", (1,))
        time.sleep(1.2)
        start = time.monotonic()
        for _ in range(50):
            producer.send_task("pay", (1,))
        wait_for("50 failures", lambda: shop.log().count("raised unexpected") == 51, every=0.02)
        took = time.monotonic() - start
        worker.terminate()
        stop = time.monotonic()
        worker.wait(20)
        stopped = time.monotonic() - stop

    # Without a webhook, both take under half a second on an idle machine; each wait for it would add one second.
    assert took < 5
    assert stopped < 1 + 3
    assert shop.log().count("Alerts cannot be posted (TimeoutError)") == (how == "silent")


def test_beat_tells_that_it_stops(shop: Site, webhook: Webhook) -> None:
    program = Path(sys.executable).with_name("celery")
    command = [program, "-A", "celery_platform.worker:app", "beat", "--loglevel=INFO"]
    with subprocess.Popen(command, env=os.environ | shop.environment, cwd=shop.folder, stderr=subprocess.PIPE, text=True) as beat:
        assert beat.stderr is not None
        assert any("beat: Starting" in line for line in beat.stderr)
        time.sleep(0.3)
        beat.terminate()
        beat.communicate(timeout=20)

    (text,) = webhook.texts
    assert text.startswith("*beat@")
    assert text.endswith("• Stopped by itself")


@pytest.fixture
def make(webhook: Webhook) -> Callable[..., alerts.Alerts]:
    """Return a function that makes alerts without a worker; the test posts them."""

    def make(**settings: int) -> alerts.Alerts:
        chosen = Settings(application="a", broker_url="memory://", alert_webhook=SecretStr(webhook.url), **settings)
        return alerts.Alerts(chosen, SecretStr(webhook.url), logs.masker(chosen))

    return make


@pytest.mark.parametrize("status", [500, 302])
def test_an_error_of_the_webhook_is_told_once_and_loses_nothing(
    make: Callable[..., alerts.Alerts], webhook: Webhook, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    told = make()
    webhook.status = status
    for _ in range(3):
        told.tell("a failed")
        told._post()
    assert len(webhook.texts) == 3
    webhook.status, webhook.texts[:] = 200, []
    told._post()
    told._post()

    assert [text.splitlines()[1:] for text in webhook.texts] == [["• 3 times a failed"]]
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        f"Alerts cannot be posted (HTTP {status})",
        "Alerts are posted again",
    ]
    assert "hidden" not in caplog.text


def test_more_messages_than_the_rate_become_one(
    make: Callable[..., alerts.Alerts], webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = make(alert_rate=2)
    for number in range(5):
        told.tell(f"{number} failed")
        told._post()
    assert len(webhook.texts) == 2
    later = time.monotonic() + 3601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    told._post()
    told._post()

    assert len(webhook.texts) == 3
    assert webhook.texts[2].endswith("\n• 3 suppressed: more than 2 messages an hour")


def test_the_queue_is_bounded(make: Callable[..., alerts.Alerts], webhook: Webhook) -> None:
    told = make()
    for number in range(1500):
        told.tell(f"{number} failed")
    told._post()

    (text,) = webhook.texts
    assert "• 500 failed\n" in text
    assert "499 failed" not in text
    assert "\n• 980 times Other alerts\n" in text
    assert text.endswith("\n• 500 dropped: more than 1000 at once")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/hidden", "hidden"])
def test_only_http(environment: Callable[..., None], url: str) -> None:
    environment(secrets={"alert_webhook": url})
    with pytest.raises(BadSettings, match=r"CELERY_PLATFORM_ALERT_WEBHOOK is \*+; allowed: a URL, http:// or https://") as error:
        load_settings()
    assert url not in str(error.value)
