"""The pages behind the proxy: what its Content-Security-Policy lets Flower run, and the runbooks as HTML."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import flower.urls
import pytest
import yaml
from celery import Celery
from flower.app import Flower
from flower.options import default_options
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.testing import bind_unused_port

from filter.runbooks import RunbookError, runbook_pages
from helpers import REPOSITORY

PROXY = REPOSITORY / "roles/monitoring_proxy"
RUNBOOKS = REPOSITORY / "docs/runbooks"
TEMPLATE = (REPOSITORY / "roles/prometheus/files/runbook.html.j2").read_text()


class Page(HTMLParser):
    """What the tests ask of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.handlers: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self._inline = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self._inline = tag == "script" and "src" not in found
        self.handlers += [name for name in found if name.startswith("on")]
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        if self._inline:
            self.scripts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inline = False


# --- Flower ---


def workers_page(auto_refresh: bool) -> Page:
    """Return the page of workers of the Flower that hosts get, as it serves it."""

    async def read() -> bytes:
        default_options.auto_refresh = auto_refresh
        application = Flower(
            capp=Celery(broker="memory://localhost", set_as_current=False),
            options=default_options,
            handlers=flower.urls.handlers,
            **flower.urls.settings,
        )
        listening, port = bind_unused_port()
        server = HTTPServer(application)
        server.add_sockets([listening])
        try:
            return (await AsyncHTTPClient().fetch(f"http://127.0.0.1:{port}/workers")).body
        finally:
            server.stop()

    return Page(IOLoop().run_sync(read).decode())


def test_the_policy_lets_run_what_flower_has_in_its_pages_and_nothing_else() -> None:
    """Fails when another version of Flower has other scripts, and shows what must be in the list then."""
    allowed = yaml.safe_load((PROXY / "vars/main.yml").read_text())["__monitoring_proxy_flower_scripts"]
    scripts = [script for auto_refresh in (True, False) for script in workers_page(auto_refresh).scripts]
    assert allowed == ["sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]


def test_no_other_page_of_flower_has_scripts_in_it() -> None:
    templates = {file.name: Page(file.read_text()) for file in Path(flower.__file__).with_name("templates").glob("*.html")}
    assert templates.keys() >= {"base.html", "workers.html", "worker.html", "tasks.html", "task.html", "broker.html"}
    assert [name for name, page in templates.items() if page.scripts] == ["workers.html"]
    assert [name for name, page in templates.items() if page.handlers] == []


def test_flower_here_is_the_one_that_hosts_get() -> None:
    (pinned,) = re.findall(r"flower==([\d.]+)", (REPOSITORY / "runtime/pyproject.toml").read_text())
    assert flower.__version__ == pinned


# --- Runbooks ---


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {name: Page(text) for name, text in runbook_pages(str(RUNBOOKS), TEMPLATE, "lab").items()}


def test_each_runbook_is_a_page_that_the_index_links_to(pages: dict[str, Page]) -> None:
    assert pages.keys() == {"index.html"} | {f"{path.stem}.html" for path in RUNBOOKS.glob("*.md") if path.stem != "README"}
    assert pages.keys() <= {*pages["index.html"].links, "index.html"}


def test_links_between_runbooks_lead_somewhere(pages: dict[str, Page]) -> None:
    elsewhere = {"/", "./", "/icon.svg", "/style.css", "runbook.js"}
    for name, page in pages.items():
        assert {link for link in page.links if not link.startswith(("#", "https://"))} <= pages.keys() | elsewhere, name
    assert {"CeleryQueueStalled.html", "HostMemoryLow.html"} <= set(pages["HostServiceFailing.html"].links)


def test_runbooks_link_to_those_that_they_name() -> None:
    names = "|".join(path.stem for path in RUNBOOKS.glob("*.md") if path.stem not in ("README", "Watchdog"))
    for path in RUNBOOKS.glob("*.md"):
        text = re.sub(r"\[\w+\]\(\w+\.md\)|`[^`]+`", "", path.read_text())
        assert set(re.findall(rf"\b(?:{names})\b", text)) <= {path.stem}, path


def test_pages_can_be_read_by_all(pages: dict[str, Page]) -> None:
    """A language, one heading of the first order, which those of the second follow, and the text as the page's main part."""
    for name, page in pages.items():
        headings = [tag for tag in page.tags if tag in ("h1", "h2", "h3")]
        assert headings[0] == "h1", name
        assert headings.count("h1") == page.tags.count("main") == 1, name
        assert page.scripts == page.handlers == [], name


def one(folder: Path, text: str, **others: str) -> str:
    """Return the page of a runbook that is written for the test."""
    for name, source in {"README": "# Runbooks\n", "RedisDown": text, **others}.items():
        (folder / f"{name}.md").write_text(source)
    return runbook_pages(str(folder), TEMPLATE, "<site>")["RedisDown.html"]


def test_html_in_a_runbook_is_text(tmp_path: Path) -> None:
    text = one(tmp_path, "# A <b>\n\nSeverity: page. <script>alert(1)</script>.\n\n<img src=x onerror=alert(2)> [x](javascript:alert(3))\n")
    page = Page(text)
    assert not {"b", "img"} & set(page.tags)
    assert page.scripts == page.handlers == []
    assert not [link for link in page.links if "javascript" in link]
    assert "A &lt;b&gt;" in text
    assert "&lt;site&gt;" in text


def test_links_to_runbooks_are_links_to_pages_and_keep_their_heading(tmp_path: Path) -> None:
    text = one(tmp_path, "# A\n\n[x](Other.md#do) [y](Other.md)\n", Other="# Other\n")
    links = [link for link in Page(text).links if "Other" in link]
    assert links == ["Other.html#do", "Other.html"]


def test_code_stays_as_it_is(tmp_path: Path) -> None:
    text = one(tmp_path, "# A\n\n```\na  <b> && c\n```\n\nOr `x   | {{ y }}`.\n")
    assert "<pre><code>a  &lt;b&gt; &amp;&amp; c\n</code></pre>" in text
    assert "<code>x   | {{ y }}</code>" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Severity: page.\n", r"RedisDown\.md does not begin with a title"),
        ("# A\n\n[x](Gone.md)\n", r"links to Gone\.md, which does not exist"),
    ],
)
def test_a_runbook_that_cannot_be_rendered_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RunbookError, match=message):
        one(tmp_path, text)


def test_a_folder_without_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunbookError, match=r"has no README\.md"):
        runbook_pages(str(tmp_path), TEMPLATE, "lab")
