"""Encryption is switched on and its key is rotated while tasks run, by nothing but the inventory."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from celery_platform.serialization import generate_key
from helpers.nodes import Node, wait_for
from helpers.targets import only_in_test_all

testinfra_hosts = ["ansible://celery_worker"]

SECRET = "ward-7-patient-4711"
#: Sends tasks until it is told to stop, as a web application would that is restarted before each step of a rotation.
PRODUCER = f"""
import json, pathlib, time
path = pathlib.Path("/run/stop-producer")
sent = []
while not path.exists():
    sent.append(app.send_task("orders.tasks.batch_report", ("{SECRET}", len(sent))))
    time.sleep(0.05)
wrong = []
end = time.monotonic() + 60
for number, result in enumerate(sent):
    try:
        assert result.get(timeout=max(0.1, end - time.monotonic())) == {{"day": "{SECRET}", "total": sum(range(number))}}, result.result
    except Exception as error:
        wrong.append(repr(error))
print(json.dumps({{"sent": len(sent), "wrong": wrong}}))
"""


@pytest.fixture
def rotate(node: Node, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Return a function that converges with these keys while a producer sends tasks, none of which may fail."""

    def converge(*keys: str, under_load: bool = True) -> None:
        settings = {"celery_app_settings": {"encryption": "on"}, "celery_app_encryption_keys": keys}
        (tmp_path / "keys.json").write_text(json.dumps(settings))
        node.host.check_output("rm -f /run/stop-producer")
        with ThreadPoolExecutor() as pool:
            producer = pool.submit(node.celery_python, PRODUCER) if under_load else None
            try:
                node.converge("-e", f"@{tmp_path / 'keys.json'}")
            finally:
                node.host.check_output("touch /run/stop-producer")
            if producer:
                report = json.loads(producer.result())
                assert report["wrong"] == []
                assert report["sent"] > 100

    yield converge
    node.converge()


@only_in_test_all
def test_a_key_is_rotated_under_load_and_redis_holds_no_argument_in_plain_text(node: Node, rotate: Callable[..., None]) -> None:
    old, new = generate_key(), generate_key()
    rotate(old, under_load=False)
    rotate(old, new)
    rotate(new, old)
    rotate(new)

    # The log of all that was ever written, and a queue with messages in it.
    node.host.check_output("systemctl stop celery-orders-worker@batch")
    waiting = node.celery_python(f"print(app.send_task('orders.tasks.batch_report', ('{SECRET}', 1)).id)")
    stored = node.python(
        "import pathlib, sys; sys.stdout.reconfigure(errors='replace')\n"
        "for file in pathlib.Path('/var/lib/redis').rglob('*'):\n"
        "    if file.is_file(): print(file.read_bytes().decode('latin-1'))"
    )
    assert waiting in stored
    forms = [SECRET, *(base64.b64encode(b"." * shift + SECRET.encode()).decode()[4 if shift else 0 : -4] for shift in range(3))]
    assert [form for form in forms if form in stored] == []
    journal = node.host.check_output("journalctl --no-pager --output=cat --unit='celery-orders-worker@*'")
    logs = "".join(node.host.file(f"/var/log/celery/orders/{name}.log").content_string for name in ("batch", "critical", "default"))
    assert waiting not in logs
    assert SECRET not in journal + logs

    node.host.check_output("systemctl start celery-orders-worker@batch")
    wait_for("the task that waited", lambda: f"{waiting}] succeeded" in node.host.file("/var/log/celery/orders/batch.log").content_string)
