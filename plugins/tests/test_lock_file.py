"""Lock files, written and exported by real uv and Poetry, with packages of our own and no index."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ansible.module_utils import lock_file
from ansible.module_utils.requirements_file import BadRequirements, unpinned

from helpers.targets import only_in_test_all
from modules import celery_release

PROJECT = """
[project]
name = "shop"
version = "1.0"
requires-python = ">=3.11"
dependencies = ["queue==5.5", "client>=8"{more}]
[project.optional-dependencies]
worker = ["extra"]
[dependency-groups]
dev = ["tests"]
reports = ["charts"]
[[tool.uv.index]]
url = "../index"
default = true
"""


def wheel(index: Path, name: str, version: str) -> None:
    """Put a wheel into a package index (PEP 503), which says its hash."""
    info, path = f"{name}-{version}.dist-info", index / name / f"{name}-{version}-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        packed.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "index.html").write_text(f'<a href="{path.name}#sha256={digest}">{path.name}</a>')


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A project without a lock file, and an index with what it needs."""
    for name, version in {"queue": "5.5", "client": "8.1", "extra": "2.0", "tests": "1.0", "charts": "3.0"}.items():
        wheel(tmp_path / "index", name, version)
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT.format(more=""))
    return folder


def lock(folder: Path) -> None:
    subprocess.run([Path(sys.executable).with_name("uv"), "lock", "--quiet"], cwd=folder, check=True)


def test_a_lock_file_of_uv_is_read_as_requirements_with_hashes(source: Path) -> None:
    lock(source)
    before = {path: path.read_bytes() for path in source.iterdir()}

    lines = celery_release.required(source / "uv.lock", source)
    assert [(line.name, line.text.split()[0], "--hash=sha256:" in line.text) for line in lines] == [
        ("client", "client==8.1", True),
        ("queue", "queue==5.5", True),
    ]
    assert [line.origin for line in lines] == ["uv.lock:1", "uv.lock:3"]
    assert unpinned(lines) == []
    more = celery_release.required(source / "uv.lock", source, extras=["worker"], groups=["reports"])
    assert [line.name for line in more] == ["charts", "client", "extra", "queue"]
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_a_lock_file_with_a_folder_has_no_hashes(source: Path) -> None:
    (source / "lib").mkdir()
    (source / "lib/pyproject.toml").write_text('[project]\nname = "lib"\nversion = "1.0"\n')
    of_folder = '[tool.uv.sources]\nlib = {path = "lib"}\n'
    (source / "pyproject.toml").write_text(PROJECT.format(more=', "lib"') + of_folder)
    lock(source)

    lines = celery_release.required(source / "uv.lock", source)
    assert [line.text.split(" ;")[0] for line in lines] == ["./source/lib", "client==8.1", "queue==5.5"]


@pytest.mark.parametrize(
    ("extras", "told"),
    [([], "uv.lock: does not match its pyproject.toml: "), (["nothing"], "uv.lock: cannot be exported: ")],
)
def test_what_a_lock_file_does_not_have_is_refused(source: Path, extras: list[str], told: str) -> None:
    lock(source)
    if not extras:
        (source / "pyproject.toml").write_text(PROJECT.format(more=', "extra"'))

    with pytest.raises(BadRequirements, match=told) as refused:
        celery_release.required(source / "uv.lock", source, extras=extras)
    assert "nothing" in str(refused.value) or not extras


def test_one_that_cannot_be_compared_is_taken_as_it_is(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a Python that is not on the controller, and that uv could not get."""
    lock(source)
    for file in source.iterdir():
        file.write_text(file.read_text().replace('">=3.11"', '">=3.99"'))
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")

    told: list[str] = []
    lines = celery_release.required(source / "uv.lock", source, warn=told.append)
    assert [line.name for line in lines] == ["client", "queue"]
    assert [text.partition(":")[0] for text in told] == ["uv.lock could not be compared with its pyproject.toml"]
    assert "3.99" in told[0]


def test_without_its_tool_a_lock_file_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "poetry.lock").write_text("")
    monkeypatch.setenv("PATH", "/nonexistent")

    with pytest.raises(BadRequirements, match=r"poetry\.lock: poetry, which exports it, is not on the machine that Ansible runs on"):
        celery_release.required(source / "poetry.lock", source)


def test_another_lock_file_is_refused_and_one_that_is_there_is_named(source: Path) -> None:
    (source / "pdm.lock").write_text("")

    with pytest.raises(BadRequirements, match=r"pdm\.lock: allowed are uv\.lock and poetry\.lock"):
        celery_release.required(source / "pdm.lock", source)
    lock(source)
    with pytest.raises(BadRequirements, match=r"there is no \S+/requirements\.txt, but uv\.lock \(celery_app_requirements\)"):
        celery_release.required(source / "requirements.txt", source)


#: As Poetry writes it; that itself takes an index.
POETRY_LOCK = """
[[package]]
name = "{name}"
version = "{version}"
description = ""
optional = {optional}
python-versions = ">=3.11"
groups = ["main"]
{marker}
files = [{{file = "{name}-{version}-py3-none-any.whl", hash = "sha256:{hash}"}}]
"""
CONTENT_HASH = "import pathlib, poetry.factory; print(poetry.factory.Factory().create_poetry(pathlib.Path('.')).locker._get_content_hash())"


@only_in_test_all
def test_a_lock_file_of_poetry_is_read_as_requirements_with_hashes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "tools"], check=True)
    subprocess.run([tmp_path / "tools/bin/pip", "install", "--quiet", "poetry==2.5.1", "poetry-plugin-export==1.10.1"], check=True)
    monkeypatch.setenv("PATH", f"{tmp_path}/tools/bin", prepend=os.pathsep)
    content_hash = subprocess.run(
        [tmp_path / "tools/bin/python", "-c", CONTENT_HASH], cwd=source, check=True, capture_output=True, text=True
    ).stdout.strip()
    of_extra = {"optional": "true", "marker": 'markers = "extra == \\"worker\\""'}
    packages = [
        {"name": "queue", "version": "5.5"},
        {"name": "client", "version": "8.1"},
        {"name": "extra", "version": "2.0"} | of_extra,
    ]
    text = "".join(POETRY_LOCK.format(**({"optional": "false", "marker": "", "hash": "0" * 64} | one)) for one in packages)
    metadata = f'[metadata]\nlock-version = "2.1"\npython-versions = ">=3.11"\ncontent-hash = "{content_hash}"\n'
    (source / "poetry.lock").write_text(f'{text}\n[extras]\nworker = ["extra"]\n\n{metadata}')

    lines = lock_file.requirements(source / "poetry.lock", source)
    assert [(line.name, f"--hash=sha256:{'0' * 64}" in line.text) for line in lines] == [("client", True), ("queue", True)]
    assert unpinned(lines) == []
    assert [line.name for line in lock_file.requirements(source / "poetry.lock", source, ["worker"])] == ["client", "extra", "queue"]

    (source / "pyproject.toml").write_text(PROJECT.format(more=', "extra"'))
    with pytest.raises(BadRequirements, match=r"poetry\.lock: does not match its pyproject\.toml: .*poetry lock"):
        lock_file.requirements(source / "poetry.lock", source)
