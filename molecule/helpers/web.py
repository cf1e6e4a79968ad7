"""Web servers of the site's own on a host, which nobody adapted to the deployment (examples/web), and requests to them."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

from helpers import REPOSITORY
from helpers.nodes import Node, wait_for

EXAMPLES = REPOSITORY / "examples"
#: How each is started, and its port.
SERVERS = {
    "django": ("gunicorn --preload --workers=2 --bind=127.0.0.1:8001 django_shop:application", 8001),
    "flask": ("gunicorn --preload --workers=2 --threads=4 --bind=127.0.0.1:8002 flask_shop:create_app()", 8002),
    "fastapi": ("uvicorn --workers=2 --host=127.0.0.1 --port=8003 fastapi_shop:app", 8003),
}
UNITS = [f"web-{name}.service" for name in SERVERS]
UNIT = """
[Service]
User=www-data
WorkingDirectory=/srv/web
ExecStart=/srv/web/venv/bin/{command}
[Install]
WantedBy=multi-user.target
"""

#: Seconds that no request may take: what the examples wait for a result, and to send.
LONGEST = 30

#: Asks each server at a steady rate, whether or not earlier requests were answered, until its standard input ends. Each line is one
#: request: when, how long it took in seconds, and what went wrong with it.
REQUESTS = """
import json, sys, threading, time, urllib.error, urllib.request
ports, rate = json.loads(sys.argv[1]), float(sys.argv[2])
stop, lock = threading.Event(), threading.Lock()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()

def ask(name, number):
    begun, error = time.time(), ""
    try:
        answer = json.load(urllib.request.urlopen(f"http://127.0.0.1:{ports[name]}/order/lamp{number}", timeout=120))
        if answer["answer"] != f"lamp{number}: -1":
            error = f"another's answer: {answer}"
    except urllib.error.HTTPError as failed:
        error = f"status {failed.code}"
    except OSError as failed:
        error = repr(failed)
    with lock:
        print(json.dumps({"server": name, "time": begun, "took": time.time() - begun, "error": error}), flush=True)

number, asking = 0, []
while not stop.is_set():
    number += 1
    asking += [threading.Thread(target=ask, args=(name, number)) for name in ports]
    for thread in asking[-len(ports):]:
        thread.start()
    stop.wait(1 / rate)
for thread in asking:
    thread.join()
"""


def install(node: Node) -> None:
    """Install and start the web servers, as their owner does."""
    for file in (EXAMPLES / "web").glob("*.py"):
        node.write(f"/srv/web/{file.name}", file.read_text())
    node.write("/srv/requirements/library/requirements.txt", (EXAMPLES / "library/requirements.txt").read_text())
    node.write("/srv/requirements/web/requirements.txt", (EXAMPLES / "web/requirements.txt").read_text())
    node.host.check_output(
        "cd /srv/web && python3 -m venv venv && venv/bin/pip install --quiet -r /srv/requirements/web/requirements.txt 2>&1"
    )
    for name, (command, _) in SERVERS.items():
        node.write(f"/etc/systemd/system/web-{name}.service", UNIT.format(command=command))
        # Those that listen before they have settings answer with an error.
        node.host.check_output(f"systemctl daemon-reload && systemctl enable --now web-{name}")


def processes(node: Node) -> dict[str, str]:
    """Return the main process of each server."""
    return {name: node.show(f"web-{name}", "MainPID")["MainPID"] for name in SERVERS}


@dataclass
class Requests:
    """Requests to all servers of a host at a steady rate, each of which sends a task and waits for its result.

    Args:
        node: the host of the servers, which asks them, too.
        rate: requests per second and server.
    """

    node: Node
    rate: float = 5
    process: subprocess.Popen[str] = field(init=False)
    output: IO[str] = field(init=False)

    def __enter__(self) -> Requests:
        """Begin to ask."""
        ports = json.dumps({name: port for name, (_, port) in SERVERS.items()})
        # A file takes what nobody reads yet, however long it goes on.
        self.output = tempfile.NamedTemporaryFile("a")
        command = self.node.ssh("python3", "-c", REQUESTS, ports, str(self.rate))
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self.output, text=True)
        return self

    def __exit__(self, *_: Any) -> None:
        """Ask no more."""
        self.process.kill()
        self.output.close()

    def told(self) -> list[dict[str, Any]]:
        """Return what became of the requests that are over, by the time that they began."""
        with open(self.output.name) as lines:
            return sorted((json.loads(line) for line in lines if line.endswith("\n")), key=lambda request: request["time"])

    def end(self) -> list[dict[str, Any]]:
        """Ask no more; return what became of all requests."""
        self.process.communicate("", timeout=180)
        return self.told()


def send_through(name: str, node: Node, fault: Callable[[], None], well: Callable[[], None]) -> None:
    """Let something happen while web servers send tasks and read their results; they serve before and after it, and do not end.

    Args:
        name: what the table of all drills calls it.
        node: the host of the web servers.
        fault: does it.
        well: returns when all is well.
    """
    before = processes(node)
    with Requests(node) as requests:
        wait_for("answers of all servers", lambda: {one["server"] for one in requests.told() if not one["error"]} == set(SERVERS))
        ready = time.time()
        time.sleep(5)
        begun = time.time()
        fault()
        well()
        over = time.time()
        time.sleep(10)
        told = [one for one in requests.end() if one["time"] > ready]
    with (REPOSITORY / ".lab/drills.txt").open("a") as table:
        table.write(summary(name, told))
    assert [one for one in told if one["error"] and not (one["time"] + one["took"] > begun and one["time"] < over)] == []
    assert max(one["took"] for one in told) < LONGEST, summary(name, told)
    assert processes(node) == before


def summary(name: str, requests: list[dict[str, Any]]) -> str:
    """Return a line for each server: how many requests there were, how many failed and why, and the longest one."""
    lines = []
    for server in SERVERS:
        own = [request for request in requests if request["server"] == server]
        failed = [request["error"] for request in own if request["error"]]
        why = "".join(f"; {failed.count(error)} times {error}" for error in sorted(set(failed)))
        longest = max(request["took"] for request in own)
        lines.append(f"{name}, {server}: {len(own)} requests, {len(failed)} failed, the longest took {longest:.1f} s{why}")
    return "\n".join(lines) + "\n"
