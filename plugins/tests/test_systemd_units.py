"""What services are restarted for, and what a revision consists of; on hosts: molecule/default/tests/test_revisions.py."""

from __future__ import annotations

import os
import shutil
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import systemd_units

from modules.celery_revision import contents_of, copy, identity

digest_of, replace_file, replace_link = systemd_units.digest_of, systemd_units.replace_file, systemd_units.replace_link


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder with a file, a folder with a file, and a link to a folder."""
    top = tmp_path / "next"
    (top / "credentials").mkdir(parents=True, mode=0o700)
    (top / "celery.env").write_text("A=1\n")
    (top / "credentials/password").write_text("secret")
    (top / "credentials/password").chmod(0o600)
    (tmp_path / "release").mkdir()
    (tmp_path / "release/code.py").write_text("")
    (top / "release").symlink_to(tmp_path / "release")
    return top


def test_a_digest_is_of_names_contents_and_targets(tree: Path, tmp_path: Path) -> None:
    seen = [digest_of([str(tree)])]
    (tree / "celery.env").write_text("A=2\n")
    seen.append(digest_of([str(tree)]))
    (tree / "celery.env").rename(tree / "other.env")
    seen.append(digest_of([str(tree)]))
    replace_link(str(tree / "release"), "/elsewhere")
    seen.append(digest_of([str(tree)]))
    seen.append(digest_of([str(tree), "/not/there"]))
    assert len(set(seen)) == len(seen)
    (tree / "__pycache__").mkdir()
    (tree / "__pycache__/code.pyc").write_text("")
    assert digest_of([str(tree)]) == seen[-2]
    # A link counts by its target: what is in a release does not change.
    replace_link(str(tree / "release"), str(tmp_path / "release"))
    before = digest_of([str(tree)])
    (tmp_path / "release/code.py").write_text("new")
    assert digest_of([str(tree)]) == before


def test_a_revision_has_what_belongs_to_it_and_is_copied_as_a_whole(tree: Path, tmp_path: Path) -> None:
    patterns = ["celery.env", "release", "credentials/password"]
    (tree / "credentials/stale").write_text("old secret")
    paths = list(contents_of(str(tree), patterns))
    assert sorted(paths) == sorted(patterns)
    target = tmp_path / "revisions/one"
    copy(str(tree), paths, str(target))
    assert sorted(contents_of(str(target), ["*"])) == sorted(patterns)
    assert identity(str(target), paths) == identity(str(tree), paths)
    assert (target / "credentials").stat().st_mode & 0o777 == 0o700
    assert (target / "credentials/password").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path / "revisions") == ["one"]
    (tree / "credentials/password").chmod(0o640)
    assert identity(str(target), paths) != identity(str(tree), paths)


def test_a_copy_can_be_read_by_nobody_else_while_it_is_made(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in a folder that others can enter gets its mode only when it is complete."""
    (tree / "secret.env").write_text("A=1")
    (tree / "secret.env").chmod(0o600)
    seen, copystat = {}, shutil.copystat

    def noted(source: str, target: str, **options: bool) -> None:
        seen[os.path.basename(target)] = os.stat(target).st_mode & 0o077
        copystat(source, target, **options)

    monkeypatch.setattr(shutil, "copystat", noted)
    copy(str(tree), ["celery.env", "credentials/password", "secret.env"], str(tmp_path / "one"))
    assert seen == {"celery.env": 0, "credentials": 0, "password": 0, "secret.env": 0}
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "one/celery.env").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "one/secret.env").stat().st_mode & 0o777 == 0o600


def test_a_file_or_link_is_replaced_in_one_step_or_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "folder/file")
    assert replace_file(path, "one")
    assert not replace_file(path, "one")
    assert replace_file(path, "two")
    assert Path(path).read_text() == "two"
    assert replace_link(path, "target")
    assert not replace_link(path, "target")
    assert os.readlink(path) == "target"
    # What an interrupted run has left beside it is in nobody's way.
    Path(f"{path}.new").write_text("half")
    assert replace_link(path, "other")
    assert os.listdir(tmp_path / "folder") == ["file"]


@pytest.fixture
def answering() -> Iterator[Callable[..., dict[str, Any]]]:
    """Return a function that lets a server answer each connection with some bytes; it returns what `ready` would say of it."""
    servers: list[socketserver.BaseServer] = []

    def answer(data: bytes, path: str | None = None, unix: Path | None = None) -> dict[str, Any]:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                if path:
                    self.request.recv(1000)
                self.request.sendall(data)

        kind = socketserver.ThreadingUnixStreamServer if unix else socketserver.ThreadingTCPServer
        server = kind(str(unix) if unix else ("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = None if unix else server.server_address[1]
        return {"host": "127.0.0.1", "port": port, "socket": unix and str(unix), "path": path, "timeout": 1}

    yield answer
    for server in servers:
        server.shutdown()
        server.server_close()


def test_what_answers_is_ready(answering: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    wrong = systemd_units.what_is_wrong
    assert wrong(answering(b"")) == ""
    assert wrong(answering(b"", unix=tmp_path / "socket")) == ""
    assert wrong(answering(b"HTTP/1.1 200 OK\r\n\r\n", path="/-/ready")) == ""
    assert wrong(answering(b"HTTP/1.1 503 Service Unavailable\r\n\r\n", path="/-/ready")) == (
        "/-/ready answers HTTP/1.1 503 Service Unavailable"
    )
    assert wrong(answering(b"", path="/-/ready")) == "/-/ready answers nothing"
    assert "refused" in wrong({"host": "127.0.0.1", "port": 1, "socket": None, "path": None})
    assert "No such file" in wrong({"host": "127.0.0.1", "port": None, "socket": str(tmp_path / "none"), "path": None})


def test_a_service_that_does_not_answer_fails_with_its_journal(answering: Callable[..., dict[str, Any]]) -> None:
    class Module:
        @staticmethod
        def run_command(command: list[str]) -> tuple[int, str, str]:
            return 0, f"the journal of {command[2]}", ""

    systemd = systemd_units.Systemd(Module)
    systemd.wait_until_ready("a.service", answering(b""))
    with pytest.raises(systemd_units.UnitError, match=r"(?s)not ready after 1 s: /x answers nothing.*the journal of a.service"):
        systemd.wait_until_ready("a.service", answering(b"", path="/x"))
