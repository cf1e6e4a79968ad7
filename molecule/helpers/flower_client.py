"""Flower as people reach it: through the proxy."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
from pathlib import Path
from typing import Any

from helpers.nodes import Node, wait_for


class Flower:
    """Flower on a host, and the proxy in front of it."""

    def __init__(self, node: Node, authority: Path) -> None:
        self.node = node
        self.authority = authority
        self.password = node.secrets["vault_monitoring_proxy_password"]

    def ask(self, path: str, method: str = "GET", password: str = "") -> tuple[int, str]:
        """Return the status and the text of a page, asked for with the operator's password or another."""
        login = base64.b64encode(f"operator:{password or self.password}".encode()).decode()
        context = ssl.create_default_context(cafile=str(self.authority))
        connection = http.client.HTTPSConnection(self.node.address, context=context, timeout=20)
        try:
            connection.request(method, path, headers={"Authorization": f"Basic {login}"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()

    def page(self, path: str) -> str:
        """Return a page that must be there."""
        status, text = self.ask(path)
        assert status == 200, (path, status, text)
        return text

    def state(self, task: str) -> str:
        """Return the state of a task, '' if Flower has not seen it."""
        status, text = self.ask(f"/flower/api/task/info/{task}")
        return str(json.loads(text)["state"]) if status == 200 else ""

    def workers(self) -> dict[str, Any]:
        """Return what Flower knows of all workers, asking them anew."""
        return dict(json.loads(self.page("/flower/api/workers?refresh=true")))

    def sees(self, application: Node, seconds: float = 60) -> str:
        """Run tasks until Flower shows that one succeeded; return its id. It shows none that ran while it saw no events."""
        sent: list[str] = []

        def seen() -> str:
            sent.append(application.celery_python("print(app.send_task('orders.tasks.send_email', (4711,)).id)"))
            return next((task for task in sent if self.state(task) == "SUCCESS"), "")

        return str(wait_for("a task in Flower", seen, seconds=seconds, every=1))

    def certificate(self) -> str:
        """Return the certificate that the proxy shows, in PEM format."""
        return ssl.get_server_certificate((self.node.address, 443), ca_certs=str(self.authority))
