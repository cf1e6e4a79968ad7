"""Callback plugin `progress`: a line for each part of a run, with its time and changes, instead of one for each task.

`make deploy` and its kind select it; ansible-playbook by itself prints what it always prints.
"""

from __future__ import annotations

DOCUMENTATION = r"""
name: progress
type: stdout
short_description: A line for each play, with its time and changes; failures and warnings in full
description:
  - On a terminal the running task is shown in place. What Ansible would print goes to the log (C(ANSIBLE_LOG_PATH)).
  - With C(-v), C(--check) or C(--diff) it prints what the default callback prints, to the screen too.
extends_documentation_fragment: [default_callback, result_format_callback]
options:
  parts:
    description: Whether to print a line for each play. Without, only what plays show, and failures.
    type: bool
    default: true
    env: [{name: CELERY_PLATFORM_PARTS}]
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ansible import constants as C
from ansible import context
from ansible.plugins.callback.default import CallbackModule as Default

#: Columns of a part's name.
NAME_WIDTH = 52
#: Seconds below which a part that changed nothing has no line.
SHORTEST_PART = 1
#: Priority (syslog's, negated) that Ansible gives to its errors and warnings.
ERROR, WARNING = -1, -2
#: Keys of a result that say what went wrong, besides `msg`.
DETAILS = ("stderr", "stdout", "module_stderr", "module_stdout", "reason")


def duration(seconds: float) -> str:
    """Return a time as it is read: `12 s`, `3 min 5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def failure_text(result: dict[str, Any]) -> str:
    """Return what a failed result says in full; of one under no_log only that it says nothing."""
    if "censored" in result:
        return str(result["censored"])
    failed = [item for item in result.get("results") or [] if item.get("failed")]
    if failed:
        texts = [f"{item.get('_ansible_item_label', item.get('item', ''))}: {failure_text(item)}" for item in failed]
        return "\n".join(texts)
    texts = [str(result["msg"]).strip()] if result.get("msg") else []
    for key in DETAILS:
        text = str(result.get(key) or "").strip()
        if text and not any(text in other for other in texts):
            texts.append(text)
    return "\n".join(texts) or "no message"


def indented(text: str) -> str:
    """Return a text with each line indented."""
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


class CallbackModule(Default):
    """Prints a line for each play. What the default callback prints is only logged."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "progress"

    def __init__(self) -> None:
        super().__init__()
        self._print = self._display.display
        self._live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._plain = False
        self._quiet = False
        self._shown = False
        self._failed = False
        self._part = ""
        self._started = time.monotonic()
        self._changed = 0
        self._did_something = False

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Choose between parts and what Ansible prints by itself."""
        self._plain = bool(self._display.verbosity or context.CLIARGS.get("check") or context.CLIARGS.get("diff"))
        if not self._plain:
            # All that Ansible prints comes by this method of the one Display, warnings of other processes, too.
            self._display.display = self._filter
        super().v2_playbook_on_start(playbook)

    def _filter(self, msg: str, *args: Any, **options: Any) -> None:
        """Let warnings and errors through to the screen, and all else to the log only."""
        level = options.get("caplevel")
        wanted = level == WARNING or (level == ERROR and not self._quiet)
        if wanted:
            self._clear()
        self._print(msg, *args, **options | ({} if wanted else {"log_only": True}))

    @contextmanager
    def _only_logged(self) -> Iterator[None]:
        """Log what the default callback says of a result that is shown in another form."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def _say(self, text: str, color: str | None = None) -> None:
        self._clear()
        self._print(text, color=color, screen_only=True)
        sys.stdout.flush()

    def _clear(self) -> None:
        if self._shown:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()
            self._shown = False

    def _show_running(self, task: str) -> None:
        """Show in place which task runs."""
        if self._live and not self._plain:
            width = shutil.get_terminal_size().columns - 1
            text = f"{self._part} · {task}" if self._part else task
            text = "".join(character if character.isprintable() else " " for character in text)
            sys.stdout.write("\r\x1b[K" + (text if len(text) <= width else text[: width - 1] + "…"))
            sys.stdout.flush()
            self._shown = True

    # --- Parts ---

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """End the part before, and begin one; the batches of a play are one part."""
        super().v2_playbook_on_play_start(play)
        if play.get_name().strip() != self._part:
            self._end_part()
            self._part = play.get_name().strip()

    def _end_part(self) -> None:
        seconds = time.monotonic() - self._started
        worth_a_line = self._did_something and (self._changed or self._failed or seconds >= SHORTEST_PART)
        if self._part and worth_a_line and not self._plain and self.get_option("parts"):
            changes = f"   {self._changed} changed" if self._changed else ""
            text = f"{self._part:<{NAME_WIDTH}} {duration(seconds):>12}{changes}"
            self._say(text if not self._failed else f"{text}   failed", C.COLOR_ERROR if self._failed else None)
        self._clear()
        self._started, self._changed, self._did_something = time.monotonic(), 0, False

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """End the last part; where something failed, name the log."""
        self._end_part()
        super().v2_playbook_on_stats(stats)
        if self._failed and not self._plain and C.DEFAULT_LOG_PATH:
            self._say(f"\nAll that Ansible said: {os.path.relpath(C.DEFAULT_LOG_PATH)}")

    # --- Tasks ---

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        """Show which task runs."""
        super().v2_playbook_on_task_start(task, is_conditional)
        self._show_running(task.get_name().strip())

    def v2_playbook_on_handler_task_start(self, task: Any) -> None:
        """Show which handler runs."""
        super().v2_playbook_on_handler_task_start(task)
        self._show_running(task.get_name().strip())

    def v2_runner_on_ok(self, result: Any) -> None:
        """Count changes, and show what a `debug` task says."""
        said = result.result.get("msg") if result.task.action in C._ACTION_DEBUG else None
        super().v2_runner_on_ok(result)
        self._did_something = True
        self._changed += bool(result.result.get("changed"))
        if said is not None and not self._plain:
            self._say(str(said))

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """Show host, task and message of a failure, unless it is ignored or a rescue deals with it."""
        text = failure_text(dict(result.result))
        with self._only_logged():
            super().v2_runner_on_failed(result, ignore_errors)
        if not ignore_errors and not _is_rescued(result.task):
            self._report(result, "failed", text)

    def v2_runner_item_on_failed(self, result: Any) -> None:
        """Log a failed item; it is shown with its task."""
        with self._only_logged():
            super().v2_runner_item_on_failed(result)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """Show a host that does not answer."""
        text = failure_text(dict(result.result))
        with self._only_logged():
            super().v2_runner_on_unreachable(result)
        if not result.task.ignore_unreachable:
            self._report(result, "no answer", text)

    def _report(self, result: Any, what: str, text: str) -> None:
        self._failed = self._did_something = True
        if not self._plain:
            self._say(f"\n{result.host.get_name()}: {what}: {result.task.get_name().strip()}\n{indented(text)}\n", C.COLOR_ERROR)


def _is_rescued(task: Any) -> bool:
    """Whether a block around the task has a rescue."""
    block = task._parent
    while block is not None:
        if getattr(block, "rescue", None):
            return True
        block = block._parent
    return False
