"""Pages of the monitoring of one host, as its operators see them: through its proxy, asked from the host itself."""

from __future__ import annotations

import base64
import json

from helpers.nodes import Node


def ask(node: Node, *paths: str, password: str | None = None) -> dict[str, tuple[int, str]]:
    """Return status and text of pages, asked for on the host itself."""
    login = {} if password is None else {"Authorization": "Basic " + base64.b64encode(f"operator:{password}".encode()).decode()}
    script = f"""
import http.client, json
found = dict()
for path in {paths!r}:
    connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=20)
    connection.request("GET", path, headers={login!r})
    answer = connection.getresponse()
    found[path] = answer.status, answer.read().decode(errors="replace")
print(json.dumps(found))
"""
    return {path: tuple(answer) for path, answer in json.loads(node.python(script)).items()}


def page(node: Node, path: str) -> str:
    """Return a page that must be there."""
    status, text = ask(node, path, password=node.secrets["vault_monitoring_proxy_password"])[path]
    assert status == 200, text
    return text
