"""A site's pages as people see them: in Chromium, without a window."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from helpers.nodes import wait_for


class Browser:
    """Chromium, which trusts one authority and has been told the operator's password."""

    def __init__(self, home: Path, address: str, authority: Path, password: str) -> None:
        """Start it.

        Args:
            home: An empty folder for its settings.
            address: Of the proxy.
            authority: File with the certificate that the proxy's own is signed with.
            password: Of `operator`.
        """
        database = home / ".pki/nssdb"
        database.mkdir(parents=True)
        for command in (["-N", "--empty-password"], ["-A", "-n", "site", "-t", "C,,", "-i", str(authority)]):
            subprocess.run(["certutil", "-d", f"sql:{database}", *command], check=True)
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", f"--user-data-dir={home}/profile"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService("/usr/bin/chromedriver", env=os.environ | {"HOME": str(home)})
        self.driver = webdriver.Chrome(options, service)
        self.address = f"https://{address}"
        self.driver.get(f"https://operator:{password}@{address}/icon.svg")
        self.faults()

    def close(self) -> None:
        """End it."""
        self.driver.quit()

    def open(self, path: str) -> None:
        """Open a page, as by its address."""
        self.driver.get("about:blank")
        self.driver.get(self.address + path)

    def resize(self, width: int) -> None:
        """Give the window a width in pixels, as a screen or a phone has it."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        )

    def allow_clipboard(self) -> None:
        """Let pages read the clipboard, which a test compares with."""
        permission = {"origin": self.address, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        self.driver.execute_cdp_cmd("Browser.grantPermissions", permission)

    def find(self, selector: str) -> list[WebElement]:
        """Return what a CSS selector finds."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def shows(self, selector: str, text: str = "", seconds: float = 15) -> WebElement:
        """Wait until an element that the selector finds is seen, and has this text in it; return it."""

        def seen() -> WebElement | None:
            # A page that refreshes itself may replace an element while it is looked at.
            with suppress(StaleElementReferenceException):
                return next((found for found in self.find(selector) if found.is_displayed() and text in found.text), None)
            return None

        found: WebElement = wait_for(f"{selector} with {text!r}", seen, seconds=seconds)
        return found

    def script(self, script: str) -> Any:
        """Return what a script in the page returns."""
        return self.driver.execute_script(script)

    def faults(self) -> list[str]:
        """Return, and forget, what went wrong: messages in the console, refused or failed requests, broken promises of pages."""
        found = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            told = event["params"]
            if event["method"] == "Network.loadingFailed" and not told.get("canceled"):
                found.append(f"{told.get('type')} failed: {told['errorText']} {told.get('blockedReason', '')}")
            if event["method"] == "Network.responseReceived" and told["response"]["status"] >= 400:
                found.append(f"{told['response']['status']} {told['response']['url']}")
        return found
