"""The module text_files, run as Ansible runs it on a host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run(folder: Path, files: Any, check: bool = False, **options: Any) -> dict[str, Any]:
    """Return what the module answers."""
    arguments = {"folder": str(folder), "files": files, "_ansible_check_mode": check, "_ansible_remote_tmp": str(folder.parent), **options}
    module = REPOSITORY / "plugins/modules/text_files.py"
    code = (
        "import runpy, sys; from ansible.module_utils import basic; basic._ANSIBLE_ARGS = sys.stdin.buffer.read(); "
        f"basic._ANSIBLE_PROFILE = 'legacy'; runpy.run_path({str(module)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}), text=True, capture_output=True
    )
    assert done.stdout.strip(), done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_it_writes_what_differs_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new/pages"
    files = {"a.html": "{{ a }}\n", "b.json": '{"é": 1}\n'}
    assert run(folder, files, mode="0640")["changed"]
    assert texts(folder) == files
    assert (mode(folder), mode(folder / "a.html")) == (0o755, 0o640)
    assert not run(folder, files, mode="0640")["changed"]
    (folder / "b.json").write_text("x")
    inode = (folder / "a.html").stat().st_ino
    assert run(folder, files, mode="0640")["files"] == ["b.json"]
    assert texts(folder) == files
    assert (folder / "a.html").stat().st_ino == inode
    assert run(folder, files, mode="0644")["changed"]
    assert mode(folder / "a.html") == 0o644


def test_a_check_says_what_would_change_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    assert run(folder, {"a": "1"}, check=True, mode="0644")["changed"]
    assert not folder.exists()
    run(folder, {"a": "1", "old": "0"})
    answer = run(folder, {"a": "2"}, check=True, only=True)
    assert [(part["before_header"], part["before"], part["after"]) for part in answer["diff"]] == [
        (str(folder / "a"), "1", "2"),
        (str(folder / "old"), "0", ""),
    ]
    assert texts(folder) == {"a": "1", "old": "0"}
    assert not run(folder, {"a": "1"}, check=True)["changed"]


def test_other_files_go_only_if_that_is_asked_for_and_folders_never(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    (folder / "sub").mkdir(parents=True)
    (folder / "old").write_text("")
    (folder / "link").symlink_to("nowhere")
    run(folder, {"a": "1"})
    assert {path.name for path in folder.iterdir()} == {"a", "sub", "old", "link"}
    assert run(folder, {"a": "1"}, only=True)["changed"]
    assert {path.name for path in folder.iterdir()} == {"a", "sub"}


def test_a_link_in_place_of_a_file_is_replaced_not_followed(tmp_path: Path) -> None:
    folder, target = tmp_path / "pages", tmp_path / "target"
    folder.mkdir()
    target.write_text("1")
    (folder / "a").symlink_to(target)
    assert run(folder, {"a": "1"}, mode="0600")["changed"]
    assert not (folder / "a").is_symlink()
    assert target.read_text() == "1"


@pytest.mark.parametrize("files", [{"../a": ""}, {"a/b": ""}, {"": ""}, {"a": {"b": 1}}, {"..": ""}])
def test_a_name_that_leaves_the_folder_and_what_is_no_text_are_refused(tmp_path: Path, files: dict[str, Any]) -> None:
    answer = run(tmp_path / "pages", files)
    assert answer["failed"]
    assert "without folders" in answer["msg"]
    assert os.listdir(tmp_path) == []


def test_none_at_all_are_a_mistake(tmp_path: Path) -> None:
    """A pattern that finds nothing must not pass for a folder without files."""
    assert run(tmp_path / "pages", {}, only=True)["msg"] == "files must have at least one"


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "pages/a").mkdir(parents=True)
    assert run(tmp_path / "pages", {"a": ""})["msg"] == f"{tmp_path}/pages/a is a folder"
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file", {"a": ""})["msg"] == f"{tmp_path}/file is no folder"
