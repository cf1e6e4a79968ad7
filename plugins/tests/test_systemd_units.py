"""What services are restarted for, and what a revision consists of; on hosts: molecule/quickstart/tests/test_revisions.py."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

# As Ansible gives it to modules, from module_utils.
NAME = "ansible.module_utils.systemd_units"
spec = importlib.util.spec_from_file_location(NAME, Path(__file__).parents[1] / "module_utils/systemd_units.py")
assert spec is not None
assert spec.loader is not None
systemd_units = importlib.util.module_from_spec(spec)
sys.modules[NAME] = systemd_units
spec.loader.exec_module(systemd_units)
from celery_revision import contents_of, copy, identity  # noqa: E402

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
