"""Each page behind the proxy does in a browser what it is for, without an error there: Chromium, from Debian's packages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import testinfra
from selenium.webdriver.common.keys import Keys

from helpers import REPOSITORY
from helpers.browser import Browser
from helpers.nodes import Node, wait_for

testinfra_hosts = ["ansible://ops1"]

#: Pages that only have to be there, by a text in them: those that the start page links to, and others.
LINKED = {
    "/prometheus/graph": "Enable query history",
    "/prometheus/alerts": "CeleryBrokerDown",
    "/prometheus/targets": "UP",
    "/flower/broker": "://",
}
OTHERS = {
    "/prometheus/": "Enable query history",
    "/prometheus/graph?g0.expr=up&g0.tab=1": "blackbox",
    "/prometheus/rules": "CeleryBrokerDown",
    "/prometheus/config": "scrape_configs",
    "/prometheus/flags": "web.user-assets",
    "/prometheus/status": "Build Information",
    "/prometheus/service-discovery": "blackbox",
}
DASHBOARDS = [f"/prometheus/user/dashboards/#{name}" for name in ("overview", "workers", "brokers")]


@pytest.fixture(scope="module")
def running(node: Node, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Return a browser that has given the operator's password once."""
    authority = Path(request.config.getoption("ansible_inventory")) / "pki/ca.crt"
    browser = Browser(tmp_path_factory.mktemp("browser"), node.address, authority, node.secrets["vault_monitoring_proxy_password"])
    yield browser
    browser.close()


@pytest.fixture
def browser(running: Browser) -> Iterator[Browser]:
    """Return the browser; whatever went wrong in it during a test fails the test."""
    yield running
    assert running.faults() == []


@pytest.fixture(scope="module")
def worker_host(node: Node) -> Node:
    """Return a host with workers."""
    name = node.variables["groups"]["celery_worker"][0]
    return Node(testinfra.get_host(f"ansible://{name}", ansible_inventory=str(node.inventory)), node.inventory)


@pytest.mark.parametrize(("path", "text"), (LINKED | OTHERS).items())
def test_a_page_is_there(browser: Browser, path: str, text: str) -> None:
    browser.open(path)
    browser.shows("body", text)


def test_the_start_page_shows_the_state_and_links_to_pages_that_other_tests_open(browser: Browser) -> None:
    browser.open("/")
    browser.shows("#state p", "up, as of")
    links = {str(link.get_attribute("href")).removeprefix(browser.address) for link in browser.find(".cards a")}
    assert links == {"/prometheus/user/runbooks/", *LINKED, *DASHBOARDS, "/flower/", "/flower/tasks"}


@pytest.mark.parametrize("path", ["/", "/prometheus/user/runbooks/RedisDown.html", "/prometheus/user/dashboards/#overview"])
def test_nothing_is_cut_off_on_a_phone(browser: Browser, path: str) -> None:
    browser.resize(360)
    try:
        browser.open(path)
        browser.shows("#state, h1")
        assert browser.script("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.resize(1200)


def test_alerts_are_on_the_start_page_can_be_silenced_and_lead_to_their_runbooks(browser: Browser, node: Node) -> None:
    """Alertmanager's own address shows it, too: notifications link to that."""
    alert = {
        "labels": {"alertname": "RedisDown", "severity": "ticket", "instance": "<img src=x onerror=alert(1)>"},
        "annotations": {
            "summary": "<img src=x onerror=alert(1)>",
            "runbook_url": f"{browser.address}/prometheus/user/runbooks/RedisDown.html",
        },
    }
    script = """
import sys, urllib.request
address = "http://127.0.0.1:9093/alertmanager/api/v2/alerts"
urllib.request.urlopen(urllib.request.Request(address, sys.argv[1].encode(), {"Content-Type": "application/json"}), timeout=5)
"""
    node.python(script, json.dumps([alert]))
    try:
        button = "#state button[aria-label$=': RedisDown']"
        browser.open("/alertmanager/#/alerts")
        browser.shows("#state li", "<img src=x onerror=alert(1)>")
        assert "firing" in browser.shows("#state h2").text
        assert browser.find("#state.page, #state.ticket")
        browser.shows(button, "Silence for 4 hours").click()
        browser.shows("#state li", "silenced")
        silences = "amtool --alertmanager.url=http://127.0.0.1:9093/alertmanager/ silence query -q alertname=RedisDown 2>/dev/null"
        assert len(node.host.check_output(silences).split()) == 1
        browser.shows(button, "End the silence").click()
        browser.shows(button, "Silence for 4 hours")
        assert node.host.check_output(silences) == ""
        browser.shows("#state li a", "RedisDown").click()
        browser.shows("h1", "RedisDown")
    finally:
        node.python(script, json.dumps([alert | {"endsAt": "2026-01-01T00:00:00Z"}]))


def test_runbooks_can_be_walked_through_by_keyboard_and_copied_from(browser: Browser) -> None:
    browser.open("/prometheus/user/runbooks/")
    assert len(browser.find(".runbooks a")) == len(list((REPOSITORY / "docs/runbooks").glob("*.md"))) - 1
    browser.shows(".runbooks a", "HostServiceFailing").send_keys(Keys.ENTER)
    browser.shows("h1", "HostServiceFailing")
    browser.shows("main a", "CeleryQueueStalled").click()
    browser.shows("h1", "CeleryQueueStalled")
    browser.allow_clipboard()
    browser.shows("main .copy").click()
    browser.shows("main .copy", "Copied")
    code = browser.script("return document.querySelector('.copy').previousElementSibling.textContent")
    assert browser.script("return navigator.clipboard.readText()") == code
    browser.shows("nav a", "Runbooks").click()
    browser.shows("h1", "Runbooks")
    # What alerts of earlier releases linked to.
    browser.open("/prometheus/user/runbooks/RedisDown.md")
    browser.shows("h1", "RedisDown")


@pytest.mark.parametrize("path", DASHBOARDS)
def test_a_dashboard_is_drawn(browser: Browser, path: str) -> None:
    browser.open(path)
    browser.shows("#state", "as of")
    drawn = json.loads(browser.script("return document.body.dataset.drawn"))
    assert drawn["panels"] >= 8
    assert drawn["wrong"] == []
    browser.shows("section canvas")


def test_flower_shows_what_happens_without_a_reload(browser: Browser, worker_host: Node) -> None:
    """The counts of a queue's workers rise in a page that stays open. Then: a worker's page, the tasks and a task's page."""
    browser.open("/flower/")
    browser.script("window.unchanged = true")

    def rows() -> list[str]:
        script = "return [...document.querySelectorAll('#workers-table tbody tr')].map((row) => row.textContent)"
        return [row for row in browser.script(script) if "celery@critical." in row]

    before = wait_for("the workers", rows)
    task = worker_host.celery_python("print(app.send_task('orders.tasks.send_email', (4711,), queue='critical').id)")
    wait_for("a change in the workers' rows", lambda: rows() != before, seconds=20, every=0.5)
    assert browser.script("return window.unchanged") is True

    browser.open(browser.script("return document.querySelector('#workers-table tbody a[href*=\"/worker/\"]').getAttribute('href')"))
    browser.shows("h1, h2, h3", "celery@")
    browser.open(f"/flower/task/{task}")
    browser.shows("body", "orders.tasks.send_email")
    browser.open("/flower/tasks")
    browser.shows("table", "orders.tasks.send_email")
