"""What `make` shows of a run: Ansible itself runs playbooks with the callback plugin, into a pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from callback.progress import duration
from helpers import REPOSITORY

PLAYS = """
- name: Prepare the host
  hosts: localhost
  gather_facts: false
  tasks:
    - {name: Change something, command: "true"}
    - {name: Wait a little, command: sleep 1, changed_when: false}
- name: Do nothing at all
  hosts: localhost
  gather_facts: false
  tasks:
    - {name: Is skipped, command: "true", when: false}
- name: Set up what nobody has
  hosts: ~^nobody$
  gather_facts: false
- name: Say something
  hosts: localhost
  gather_facts: false
  tasks:
    - {name: Say, debug: {msg: "said aloud"}}
    - {name: Is rescued, block: [{name: Fails, command: "false"}], rescue: [{name: Rescue, command: "true"}]}
    - {name: Is ignored, fail: {msg: "no matter"}, ignore_errors: true}
"""


class Run:
    """A playbook that was run: its exit code, what was shown, and the log."""

    def __init__(self, folder: Path, plays: str, *arguments: str, terminal: bool = False, **environment: str) -> None:
        playbook, log = folder / "play.yml", folder / "ansible.log"
        playbook.write_text(plays)
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "-c", "local", str(playbook), *arguments]
        variables = {
            "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
            "ANSIBLE_STDOUT_CALLBACK": "progress",
            "ANSIBLE_HOST_PATTERN_MISMATCH": "ignore",
            "ANSIBLE_LOG_PATH": str(log),
            "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
            "TERM": "xterm",
        }
        env = os.environ | variables | environment
        self.shown, self.code = _on_a_terminal(command, env) if terminal else _piped(command, env)
        self.log = log.read_text() if log.exists() else ""


def _piped(command: list[str], env: dict[str, str]) -> tuple[str, int]:
    run = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=REPOSITORY)
    return run.stdout, run.returncode


def _on_a_terminal(command: list[str], env: dict[str, str]) -> tuple[str, int]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=theirs, cwd=REPOSITORY, close_fds=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        shown += block
    os.close(ours)
    return shown.decode(), process.wait()


def test_each_part_that_did_something_is_a_line_and_all_else_is_in_the_log(tmp_path: Path) -> None:
    run = Run(tmp_path, PLAYS)
    lines = run.shown.splitlines()
    assert run.code == 0, run.shown
    assert re.fullmatch(r"Prepare the host +\d+ s   1 changed", lines[0])
    assert lines[1] == "said aloud"
    assert re.fullmatch(r"Say something +\d+ s   1 changed", lines[2]), run.shown
    assert len(lines) == 3
    assert "\x1b" not in run.shown
    for logged in ("TASK [Change something]", "TASK [Wait a little]", "changed: [localhost]", "Set up what nobody has", "no matter"):
        assert logged in run.log


def test_on_a_terminal_the_running_task_is_shown_in_place(tmp_path: Path) -> None:
    run = Run(tmp_path, PLAYS, terminal=True)
    assert run.code == 0, run.shown
    assert "\r\x1b[KPrepare the host · Wait a little" in run.shown
    # What stays once all that was shown in place is gone.
    left = [line.split("\x1b[K")[-1].strip() for line in run.shown.replace("\r\n", "\n").split("\n")]
    assert [line for line in left if line and " s " not in line] == ["said aloud"]
    assert all("·" not in line for line in left)


def failing(task: str) -> str:
    """Return a playbook in which a task fails."""
    return f"- name: Break something\n  hosts: localhost\n  gather_facts: false\n  tasks:\n    - name: Break it\n      {task}\n"


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (r'fail: {msg: "first line\n\n  second line"}', ["    first line\n\n      second line\n"]),
        ("shell: echo what was printed; echo the reason >&2; exit 3", ["non-zero return code", "the reason", "what was printed"]),
        ("shell: 'echo {{ item }} is away >&2; exit 1'\n      loop: [one, two]", ["one: non-zero", "one is away", "two: non-zero"]),
    ],
)
def test_a_failure_names_host_task_message_and_the_log(tmp_path: Path, task: str, expected: list[str]) -> None:
    run = Run(tmp_path, failing(task))
    assert run.code == 2, run.shown
    assert run.shown.count("localhost: failed: Break it\n") == 1
    for text in expected:
        assert text in run.shown
    assert re.search(r"Break something +\d+ s   failed", run.shown)
    assert f"All that Ansible said: {os.path.relpath(tmp_path / 'ansible.log', REPOSITORY)}" in run.shown


def test_warnings_are_shown_and_secrets_are_not(tmp_path: Path) -> None:
    warn = "debug: {msg: \"{{ lookup('file', '/nowhere', errors='warn') }}\"}\n    - name: Hide it\n      "
    plays = failing(warn + "command: \"false {{ lookup('env', 'SECRET') }}\"\n      no_log: true")
    run = Run(tmp_path, plays, SECRET="t0p-secret")
    assert run.code == 2
    assert "[WARNING]: " in run.shown
    assert "/nowhere" in run.shown
    assert "localhost: failed: Hide it" in run.shown
    assert "no_log" in run.shown
    assert "t0p-secret" not in run.shown + run.log


def test_a_host_without_an_answer_is_named(tmp_path: Path) -> None:
    play = "- name: Reach it\n  hosts: all\n  gather_facts: false\n  tasks: [{name: Ask, ping: {}}]\n"
    run = Run(tmp_path, play, "-i", "away,", "-e", "ansible_host=127.0.0.1 ansible_port=1 ansible_connection=ssh")
    assert run.code == 4
    assert "away: no answer: Ask\n" in run.shown
    assert "Connection refused" in run.shown


@pytest.mark.parametrize("argument", ["-v", "--diff"])
def test_asked_for_more_it_shows_what_ansible_shows(tmp_path: Path, argument: str) -> None:
    run = Run(tmp_path, PLAYS, argument)
    assert "TASK [Change something]" in run.shown
    assert "PLAY RECAP" in run.shown


def test_without_parts_only_what_plays_say_is_shown(tmp_path: Path) -> None:
    assert Run(tmp_path, PLAYS, CELERY_PLATFORM_PARTS="no").shown == "said aloud\n"


def test_durations_are_written_as_they_are_read() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.4, 59.6, 185)] == ["0 s", "59 s", "1 min 0 s", "3 min 5 s"]
