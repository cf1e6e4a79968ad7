"""Tests of the module `celery_release`: its functions, and the module as Ansible runs it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.requirements_file import project_name, read, unpinned
from packaging.requirements import Requirement

from helpers import REPOSITORY
from modules import celery_release

REQUIREMENTS = "celery==5.7.0\nredis==8.1.0\n"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "shop", {"requirements.txt": REQUIREMENTS, "shop/__init__.py": "", "shop/tasks.py": "rate = 1\n"})


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    return write(
        tmp_path / "runtime",
        {
            "pyproject.toml": "[project]\n",
            "constraints.txt": "# what hosts get\nredis==6.4.0\npydantic==2.14.3\n",
            "src/celery_platform/__init__.py": "",
            "tests/test_settings.py": "",
        },
    )


def packed(source: Path, runtime: Path, requirements: str = REQUIREMENTS, exclude: tuple[str, ...] = (), **options: Any) -> bytes:
    lines = read(write(source.parent / "pinned", {"requirements.txt": requirements}) / "requirements.txt", source.parent / "pinned")
    files = celery_release.chosen_files(source, exclude, options.pop("include", ())) if source.is_dir() else []
    return celery_release.pack(celery_release.contents(source, lines, runtime, files, **options))


def opened(archive: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: member for member in tar.getmembers()}


def text_of(archive: bytes, name: str) -> str:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(name)
        assert file is not None
        return file.read().decode()


# --- What a release holds ---


def test_a_folder_is_packed_with_the_runtime(source: Path, runtime: Path) -> None:
    archive = packed(source, runtime)

    assert list(opened(archive)) == [
        "app/requirements.txt",
        "app/shop/__init__.py",
        "app/shop/tasks.py",
        "runtime/constraints.txt",
        "runtime/pyproject.toml",
        "runtime/src/celery_platform/__init__.py",
        "requirements.txt",
        "constraints.txt",
        "indexes.txt",
        "runtime-constraints.txt",
        "release.json",
    ]
    assert text_of(archive, "app/shop/tasks.py") == "rate = 1\n"
    assert text_of(archive, "requirements.txt") == "celery==5.7.0  # requirements.txt:1\nredis==8.1.0  # requirements.txt:2\n"
    assert text_of(archive, "runtime-constraints.txt") == "pydantic==2.14.3\n"
    assert json.loads(text_of(archive, "release.json")) == {"python_path": [], "install": False}


def test_a_folder_that_the_application_writes_to_is_a_link(source: Path, runtime: Path) -> None:
    write(source, {"logs/.gitkeep": "", "logs/old.log": "x", "web/media/logo.png": "x", "logs2/x": ""})
    archive = opened(packed(source, runtime, state_folders=["logs", "web/media/"], state="/var/lib/celery/shop/app"))

    found = {name: one.linkname for name, one in archive.items() if name.startswith(("app/logs", "app/web"))}
    assert found == {"app/logs": "/var/lib/celery/shop/app/logs", "app/web/media": "/var/lib/celery/shop/app/web/media", "app/logs2/x": ""}


def test_a_wheel_is_packed_with_the_runtime(tmp_path: Path, runtime: Path) -> None:
    wheel = tmp_path / "shop-1.0-py3-none-any.whl"
    wheel.write_bytes(b"PK wheel")

    archive = packed(wheel, runtime)

    assert text_of(archive, "wheels/shop-1.0-py3-none-any.whl") == "PK wheel"
    assert [name for name in opened(archive) if name.startswith("app/")] == ["app/.keep"]


@pytest.mark.parametrize(
    "name",
    [".git/config", "shop/__pycache__/tasks.pyc", "old.pyc", ".env", ".venv/bin/python", "venv/x", "shop.egg-info/PKG-INFO", ".tox/x"],
)
def test_what_is_never_part_of_a_release(source: Path, runtime: Path, name: str) -> None:
    before = packed(source, runtime)
    write(source, {name: "x"})

    assert packed(source, runtime) == before


@pytest.mark.parametrize(
    ("pattern", "left_out"),
    [
        ("tests", ["app/shop/tests/deep/test_a.py", "app/tests/test_b.py"]),
        ("test_*.py", ["app/shop/tests/deep/test_a.py", "app/tests/test_b.py"]),
        ("deep", ["app/shop/tests/deep/test_a.py"]),
        ("*.md", ["app/README.md"]),
        ("nothing", []),
    ],
)
def test_names_that_are_excluded(source: Path, runtime: Path, pattern: str, left_out: list[str]) -> None:
    write(source, {"shop/tests/deep/test_a.py": "", "tests/test_b.py": "", "README.md": ""})

    assert sorted(set(opened(packed(source, runtime))) - set(opened(packed(source, runtime, exclude=(pattern,))))) == left_out


def test_the_executable_bit_and_links_are_kept(source: Path, runtime: Path) -> None:
    write(source, {"run.sh": "#!/bin/sh\n", "data/a": ""})
    (source / "run.sh").chmod(0o700)
    (source / "data" / "a").chmod(0o600)
    (source / "to_file").symlink_to("shop/tasks.py")
    (source / "to_folder").symlink_to("data")
    (source / "to_nothing").symlink_to("no/such/file")

    members = opened(packed(source, runtime))

    assert members["app/run.sh"].mode == 0o755
    assert members["app/data/a"].mode == 0o644
    links = {name: member.linkname for name, member in members.items() if member.issym()}
    assert links == {"app/to_file": "shop/tasks.py", "app/to_folder": "data", "app/to_nothing": "no/such/file"}
    assert "app/to_folder/a" not in members


# --- What git would keep ---


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "init", "--quiet")
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--message", "x")


IGNORED = {
    ".gitignore": "*.sql\n/build/\n!keep.sql\n",
    "dump.sql": "x",
    "build/a": "x",
    "shop/.gitignore": "local.py\n",
    "shop/local.py": "x",
}
KEPT = {"keep.sql": "x", "notes.txt": "x", "shop/new.py": "x"}


@pytest.mark.parametrize("where", ["repository", "folder of a repository", "no repository", "ignored folder of a repository"])
def test_what_a_gitignore_names_is_not_deployed(tmp_path: Path, source: Path, runtime: Path, where: str) -> None:
    if where == "repository":
        commit(source)
    elif where != "no repository":
        commit(tmp_path)
    if where == "ignored folder of a repository":
        git(tmp_path, "rm", "--quiet", "-r", "--cached", "shop")
        write(tmp_path, {".gitignore": "/shop/\n"})
    before = set(opened(packed(source, runtime)))
    write(source, IGNORED | KEPT)

    assert set(opened(packed(source, runtime))) - before == {f"app/{name}" for name in (*KEPT, ".gitignore", "shop/.gitignore")}


def test_what_git_tracks_is_deployed_though_it_is_ignored_but_no_secrets(source: Path, runtime: Path) -> None:
    write(source, IGNORED | {".env": "PASSWORD=x", "shop/gone.py": "x"})
    commit(source)
    (source / "shop/gone.py").unlink()

    names = set(opened(packed(source, runtime)))

    assert {"app/dump.sql", "app/build/a", "app/shop/local.py"} < names
    assert not names & {"app/.env", "app/shop/gone.py"}


def test_a_repository_and_a_copy_of_it_are_the_same_release(tmp_path: Path, source: Path, runtime: Path) -> None:
    write(source, {".gitignore": "*.sql\n", "run.sh": "x", "shop-a/b": "", "shop.py": "", "shop/é.txt": ""})
    before = packed(source, runtime)
    commit(source)
    assert packed(source, runtime) == before

    git(tmp_path, "clone", "--quiet", str(source), "clone")
    assert packed(tmp_path / "clone", runtime) == before


@pytest.mark.parametrize("variable", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"])
def test_a_deployment_from_a_hook_packs_its_own_source(
    tmp_path: Path, source: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    commit(source)
    before = packed(source, runtime)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))

    assert packed(source, runtime) == before


def test_submodules_and_repositories_inside_are_part_of_it(tmp_path: Path, source: Path, runtime: Path) -> None:
    commit(write(tmp_path / "lib", {"lib.py": "x", ".gitignore": "*.log\n"}))
    commit(source)
    git(source, "submodule", "--quiet", "add", str(tmp_path / "lib"), "vendor/lib")
    commit(source)
    commit(write(source / "inner", {"inner.py": "x"}))
    write(source, {"vendor/lib/a.log": "x", "vendor/lib/new.py": "x"})

    names = set(opened(packed(source, runtime)))

    assert {"app/vendor/lib/lib.py", "app/vendor/lib/new.py", "app/inner/inner.py"} < names
    assert not [name for name in names if name.endswith((".log", ".git")) or ".git/" in name]

    git(tmp_path, "clone", "--quiet", str(source), "clone")
    with pytest.raises(OSError, match="submodule update --init"):
        packed(tmp_path / "clone", runtime)
    assert "app/shop/tasks.py" in opened(packed(tmp_path / "clone", runtime, exclude=("vendor",)))


def test_a_tracked_folder_that_became_a_link_is_a_link(tmp_path: Path, source: Path, runtime: Path) -> None:
    write(source, {"data/a": "x", "real/a": "y"})
    commit(source)
    (source / "data/a").unlink()
    (source / "data").rmdir()
    (source / "data").symlink_to("real")

    members = opened(packed(source, runtime))

    assert members["app/data"].issym()
    assert "app/data/a" not in members


def test_a_program_that_a_repository_names_is_not_run(tmp_path: Path, source: Path, runtime: Path) -> None:
    commit(source)
    write(tmp_path, {"monitor": f"#!/bin/sh\ntouch {tmp_path}/ran\n"})
    (tmp_path / "monitor").chmod(0o755)
    git(source, "config", "core.fsmonitor", str(tmp_path / "monitor"))
    subprocess.run(["git", "-C", source, "ls-files", "--others"], check=True, capture_output=True)
    ran = (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink(missing_ok=True)
    packed(source, runtime)

    assert ran, "git itself runs it"
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_repository_of_another_user(source: Path, runtime: Path) -> None:
    write(source, {".gitignore": "*.sql\n", "dump.sql": "x"})
    commit(source)
    git(source, "rm", "--quiet", "--cached", "dump.sql")
    for path in (source, *source.rglob("*")):
        os.lchown(path, 65534, 65534)

    assert "app/dump.sql" not in opened(packed(source, runtime))


# --- The same input is the same release ---


def test_times_rights_of_others_and_order_of_creation_do_not_matter(tmp_path: Path, source: Path, runtime: Path) -> None:
    copy = write(tmp_path / "copy", {"shop/tasks.py": "rate = 1\n", "shop/__init__.py": "", "requirements.txt": REQUIREMENTS})
    os.utime(copy / "shop" / "tasks.py", (1, 1))
    (copy / "shop" / "tasks.py").chmod(0o600)

    assert packed(copy, runtime) == packed(source, runtime)


def test_times_are_ones_that_a_wheel_can_hold(source: Path, runtime: Path) -> None:
    assert {member.mtime for member in opened(packed(source, runtime)).values()} == {946_684_800}


def change_code(source: Path, runtime: Path) -> None:
    (source / "shop" / "tasks.py").write_text("rate = 2\n")


def change_executable_bit(source: Path, runtime: Path) -> None:
    (source / "shop" / "tasks.py").chmod(0o755)


def rename_file(source: Path, runtime: Path) -> None:
    (source / "shop" / "tasks.py").rename(source / "shop" / "jobs.py")


def change_runtime(source: Path, runtime: Path) -> None:
    (runtime / "src" / "celery_platform" / "__init__.py").write_text("x = 1\n")


def change_constraints(source: Path, runtime: Path) -> None:
    (runtime / "constraints.txt").write_text("pydantic==2.14.4\n")


@pytest.mark.parametrize("change", [change_code, change_executable_bit, rename_file, change_runtime, change_constraints])
def test_a_change_makes_another_release(source: Path, runtime: Path, change: Callable[[Path, Path], None]) -> None:
    before = packed(source, runtime)
    change(source, runtime)

    assert packed(source, runtime) != before


def test_other_requirements_make_another_release(source: Path, runtime: Path) -> None:
    assert packed(source, runtime, "celery==5.7.1\n") != packed(source, runtime)


def test_the_tests_of_the_runtime_do_not_make_another_release(source: Path, runtime: Path) -> None:
    before = packed(source, runtime)
    (runtime / "tests" / "test_settings.py").write_text("x = 1\n")

    assert packed(source, runtime) == before


# --- What the host is told ---


@pytest.mark.parametrize(
    ("pyproject", "install", "installed"),
    [
        ('[build-system]\nrequires = ["hatchling"]\n', True, True),
        ('[build-system]\nrequires = ["hatchling"]\n', False, False),
        ("[tool.ruff]\nline-length = 140\n", True, False),
    ],
)
def test_a_folder_that_says_how_it_is_built_is_installed(
    source: Path, runtime: Path, pyproject: str, install: bool, installed: bool
) -> None:
    write(source, {"pyproject.toml": pyproject})

    manifest = json.loads(text_of(packed(source, runtime, install=install, python_path=["src"]), "release.json"))

    assert manifest == {"python_path": ["src"], "install": installed}


def test_environment_files_are_named_and_can_be_asked_for(source: Path, runtime: Path) -> None:
    write(source, {".env": "A=1", ".env.example": "", "shop/.env.prod": "", "venv/.env": "", ".gitignore": ".env\n/build/\n"})
    write(source, {"build/page.html": "x", "build/page.map": "x"})

    assert celery_release.environment_files(source, celery_release.chosen_files(source)) == [".env", "shop/.env.prod"]

    include = (".env", "build/*.html")
    asked = set(opened(packed(source, runtime, include=include))) - set(opened(packed(source, runtime)))
    assert asked == {"app/.env", "app/build/page.html"}
    assert celery_release.environment_files(source, celery_release.chosen_files(source, (), include)) == ["shop/.env.prod"]


@pytest.mark.parametrize(
    ("requirements", "left"),
    [
        ("", "pydantic==2.14.3\ntyping_extensions==4.16.0\nredis==6.4.0\n"),
        ("redis==8.1.0\n", "pydantic==2.14.3\ntyping_extensions==4.16.0\n"),
        ("Typing.Extensions==4.0\n", "pydantic==2.14.3\nredis==6.4.0\n"),
        ("Pydantic[email]==2.0 --hash=sha256:abc\n", "typing_extensions==4.16.0\nredis==6.4.0\n"),
        ("pydantic-settings==2.0\nredis-py-cluster==1\n", "pydantic==2.14.3\ntyping_extensions==4.16.0\nredis==6.4.0\n"),
    ],
)
def test_what_the_application_pins_is_not_constrained(tmp_path: Path, requirements: str, left: str) -> None:
    constraints = "# what hosts get\npydantic==2.14.3\ntyping_extensions==4.16.0\nredis==6.4.0  # newest\n"
    write(tmp_path, {"requirements.txt": requirements})

    assert celery_release.constraints_for(read(tmp_path / "requirements.txt", tmp_path), constraints) == left


# --- The module, as Ansible runs it ---


def run_module(tmp_path: Path, arguments: dict[str, Any], *options: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the module's result."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    environment |= {"ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "HOME": str(tmp_path)}
    environment |= {"ANSIBLE_CALLBACK_RESULT_FORMAT": "json"}
    completed = subprocess.run(
        [
            *(Path(sys.executable).parent / "ansible", "localhost", "-i", "localhost,", "-c", "local"),
            *("-e", f"ansible_python_interpreter={sys.executable}", "-m", "celery_release", "-a", json.dumps(arguments), *options),
        ],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "=> {" in completed.stdout, completed.stdout + completed.stderr
    return completed.returncode, json.loads(completed.stdout.partition("=> ")[2])


def test_the_module_writes_the_archive_and_says_what_it_is(tmp_path: Path, source: Path, runtime: Path) -> None:
    (source / "requirements.txt").write_text("celery==5.7.0\nredis>=6\n")
    (source / "notes.md").write_text("x")
    (source / ".env").write_text("PASSWORD=x")
    arguments = {"source": source, "requirements": source / "requirements.txt", "runtime": runtime, "dest": tmp_path / "cache" / "releases"}
    arguments = {name: str(value) for name, value in arguments.items()} | {"exclude": ["*.md"]}

    checked = run_module(tmp_path, arguments, "--check")
    archive = Path(checked[1]["archive"])
    expected = packed(source, runtime, "celery==5.7.0\nredis>=6\n", ("*.md",))

    assert checked[0] == 0
    assert checked[1]["id"] == hashlib.sha256(expected).hexdigest()[:12]
    assert archive == tmp_path / "cache" / "releases" / f"{checked[1]['id']}.tar.gz"
    assert checked[1]["unpinned"] == ["redis>=6 (requirements.txt:2)"]
    assert checked[1]["left_out"] == [".env"]
    assert checked[1]["changed"] is False
    # Also a check can look at it.
    with tarfile.open(archive) as tar:
        assert tar.getnames() == list(opened(expected))
    assert list(archive.parent.iterdir()) == [archive]
    assert archive.stat().st_mode & 0o777 == 0o600

    first = archive.read_bytes()
    archive.unlink()
    assert run_module(tmp_path, arguments) == checked
    assert archive.read_bytes() == first


@pytest.mark.parametrize(
    ("argument", "value", "told"),
    [("requirements", "/no/such/pinned.txt", "/no/such/pinned.txt"), ("runtime", "/no/such/runtime", "/no/such/runtime")],
)
def test_the_module_says_what_is_missing(tmp_path: Path, source: Path, runtime: Path, argument: str, value: str, told: str) -> None:
    arguments = {"source": source, "requirements": source / "requirements.txt", "runtime": runtime, "dest": tmp_path / "cache"}

    code, result = run_module(tmp_path, {name: str(item) for name, item in arguments.items()} | {argument: value})

    assert code != 0
    assert result["msg"].startswith("cannot pack the application")
    assert told in result["msg"]
    assert not (tmp_path / "cache").exists()


def test_the_module_says_that_the_source_is_missing(tmp_path: Path, runtime: Path) -> None:
    arguments = {"source": "/no/such/source", "requirements": "requirements.txt", "runtime": str(runtime), "dest": str(tmp_path / "cache")}

    code, result = run_module(tmp_path, arguments)

    assert code != 0
    assert "/no/such/source" in result["msg"]


@pytest.mark.parametrize(
    ("requirements", "told"),
    [
        ("redis==8.1.0\nCelery==5.3.0\n", "Celery==5.3.0 (requirements.txt:2), but it takes celery<5.8,>=5.4"),
        ("celery==5.7.0\n-c https://robot:tok3n@example.org/c.txt\n", "requirements.txt:2: an address"),
        ("celery==5.7.0\n./lib\n", "requirements.txt:2: nothing of "),
    ],
)
def test_what_cannot_be_deployed_is_refused_before_any_host_is_asked(
    tmp_path: Path, source: Path, runtime: Path, requirements: str, told: str
) -> None:
    write(source, {"requirements.txt": requirements, "lib/setup.py": "", ".gitignore": "/lib/\n"})
    write(runtime, {"pyproject.toml": '[project]\ndependencies = ["celery>=5.4,<5.8"]\n'})
    arguments = {"source": source, "requirements": source / "requirements.txt", "runtime": runtime, "dest": tmp_path / "cache"}

    code, result = run_module(tmp_path, {name: str(item) for name, item in arguments.items()})

    assert code != 0
    assert told in result["msg"]
    assert "tok3n" not in result["msg"]


def test_what_looks_at_the_broker_is_pinned_as_the_runtime_package_asks_for_it() -> None:
    folder = REPOSITORY / "roles/celery_monitor/files/environment"
    lines = read(folder / "requirements.txt", folder)
    pins = {line.name: next(iter(line.requirement.specifier)).version for line in lines if line.requirement}
    extra = tomllib.loads((REPOSITORY / "runtime/pyproject.toml").read_text())["project"]["optional-dependencies"]["monitor"]

    assert unpinned(lines) == []
    for wanted in map(Requirement, extra):
        assert wanted.specifier.contains(pins[project_name(wanted.name)]), wanted
