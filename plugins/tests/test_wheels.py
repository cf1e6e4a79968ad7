"""Wheels for hosts that reach no package index: gathered by real uv and pip, of an index of our own."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from pathlib import Path

import pytest
from ansible.module_utils import requirements_file, wheels
from ansible.module_utils.requirements_file import BadRequirements

from filter.python_targets import python_targets

TARGETS = ["3.11.2-x86_64", "3.13.5-x86_64"]


class Index:
    """A package index (PEP 503) in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, version: str, *needs: str, tag: str = "py3-none-any") -> str:
        """Add a wheel; return its hash."""
        info, path = f"{name}-{version}.dist-info", self.folder / name / f"{name}-{version}-{tag}.whl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as packed:
            required = "".join(f"Requires-Dist: {one}\n" for one in needs)
            packed.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}")
            packed.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: {tag}\n")
            packed.writestr(f"{info}/RECORD", "")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with (path.parent / "index.html").open("a") as page:
            page.write(f'<a href="{path.name}#sha256={digest}">{path.name}</a>\n')
        return digest


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """An index with an application's needs, one of which has a wheel for each Python, and another is for one Python alone."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    found = Index(tmp_path / "index")
    found.add("queue", "5.5", "client>=8", "old ; python_full_version < '3.11.3'")
    for version in ("8.0", "8.1"):
        found.add("client", version)
    found.add("old", "1.0")
    for python in ("cp311-cp311", "cp313-cp313"):
        found.add("native", "2.0", tag=f"{python}-manylinux_2_17_x86_64")
    found.add("builder", "3.0")
    return found


def gather(index: Index, text: str, folder: Path, constraints: str = "", targets: list[str] = TARGETS) -> set[str]:
    lines = requirements_file.parse(text, "requirements.txt", folder)
    environment = {"PIP_INDEX_URL": f"file://{index.folder}"}
    return {path.name for path in wheels.gather(lines, ["builder"], constraints, targets, folder / "cache", environment).iterdir()}


def test_all_that_is_needed_is_gathered_for_each_python(index: Index, tmp_path: Path) -> None:
    assert gather(index, "queue==5.5\nnative==2.0\n", tmp_path) == {
        "builder-3.0-py3-none-any.whl",
        "client-8.1-py3-none-any.whl",
        "native-2.0-cp311-cp311-manylinux_2_17_x86_64.whl",
        "native-2.0-cp313-cp313-manylinux_2_17_x86_64.whl",
        # By the Python of the hosts, whatever Ansible runs with.
        "old-1.0-py3-none-any.whl",
        "queue-5.5-py3-none-any.whl",
    }
    assert "old-1.0-py3-none-any.whl" not in gather(index, "queue==5.5\nnative==2.0\n", tmp_path, targets=TARGETS[1:])


def test_our_versions_are_taken_unless_the_application_has_others(index: Index, tmp_path: Path) -> None:
    assert "client-8.0-py3-none-any.whl" in gather(index, "queue==5.5\n", tmp_path, constraints="client==8.0\n")
    assert "client-8.1-py3-none-any.whl" in gather(index, "client==8.1\n", tmp_path, "client==8.0\n")


def test_what_was_gathered_is_kept(index: Index, tmp_path: Path) -> None:
    first = gather(index, "queue==5.5\n", tmp_path)
    (index.folder / "queue/index.html").unlink()

    assert gather(index, "queue==5.5\n", tmp_path) == first
    with pytest.raises(BadRequirements, match="queue"):
        gather(index, "queue==5.5\nclient\n", tmp_path)
    assert [path.name for path in (tmp_path / "cache").iterdir() if not re.fullmatch(r"wheels-[0-9a-f]{12}", path.name)] == []


def test_requirements_with_hashes_are_gathered(index: Index, tmp_path: Path) -> None:
    digest = index.add("locked", "1.0")
    assert "locked-1.0-py3-none-any.whl" in gather(index, f"--require-hashes\nlocked==1.0 --hash=sha256:{digest}\n", tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("queue==5.6\n", r"celery_app_vendor\): [\s\S]*queue==5\.6"),
        ("native==2.0\n", r"celery_app_vendor\): [\s\S]*native"),
        ("./lib\n", r"requirements\.txt:1: \./source/lib is built from source, and so no wheel"),
    ],
)
def test_what_has_no_wheel_is_refused(index: Index, tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "lib").mkdir()
    with pytest.raises(BadRequirements, match=told):
        gather(index, text, tmp_path, targets=["3.12.1-x86_64"])


def test_logins_are_in_no_message(index: Index, tmp_path: Path) -> None:
    lines = requirements_file.parse("queue==5.5\n", "requirements.txt", tmp_path)
    environment = {"PIP_INDEX_URL": "http://robot:tok3n@127.0.0.1:9/simple", "UV_HTTP_RETRIES": "0"}
    with pytest.raises(BadRequirements) as refused:
        wheels.gather(lines, [], "", TARGETS, tmp_path / "cache", environment)
    assert "127.0.0.1:9" in str(refused.value)
    assert "tok3n" not in str(refused.value)


def test_the_pythons_of_hosts_are_what_their_facts_say_and_nothing_else() -> None:
    def host(architecture: object = "x86_64", **version: object) -> dict[str, object]:
        return {"ansible_facts": {"architecture": architecture, "python": {"version": {"major": 3, "minor": 13, "micro": 5} | version}}}

    odd = [host(minor="13 --index-url=x"), host(architecture="../x"), host(architecture=None), {}, {"ansible_facts": {}}]
    assert python_targets([host(), host(minor=11, micro=2), host(), *odd]) == ["3.11.2-x86_64", "3.13.5-x86_64"]
