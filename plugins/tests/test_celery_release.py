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
from packaging.requirements import Requirement

import celery_release

REPOSITORY = Path(__file__).resolve().parents[2]
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


def packed(source: Path, runtime: Path, requirements: str = REQUIREMENTS, exclude: tuple[str, ...] = ()) -> bytes:
    return celery_release.pack(celery_release.contents(source, requirements, runtime, (*celery_release.ALWAYS_EXCLUDED, *exclude)))


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
        "local.txt",
    ]
    assert text_of(archive, "app/shop/tasks.py") == "rate = 1\n"
    assert text_of(archive, "requirements.txt") == REQUIREMENTS
    assert text_of(archive, "constraints.txt") == "pydantic==2.14.3\n"
    assert text_of(archive, "local.txt") == "-c constraints.txt\n./runtime\n"


def test_a_wheel_is_packed_with_the_runtime(tmp_path: Path, runtime: Path) -> None:
    wheel = tmp_path / "shop-1.0-py3-none-any.whl"
    wheel.write_bytes(b"PK wheel")

    archive = packed(wheel, runtime)

    assert text_of(archive, "wheels/shop-1.0-py3-none-any.whl") == "PK wheel"
    assert text_of(archive, "local.txt") == "-c constraints.txt\n./runtime\n./wheels/shop-1.0-py3-none-any.whl\n"
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


# --- Requirements ---


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("\n# comment\n  # comment\nsix==1.0\n\nredis\n", ["six==1.0", "redis"]),
        ("six==1.0 # comment\n", ["six==1.0"]),
        ("six @ https://example.org/six.whl#sha256=abc\n", ["six @ https://example.org/six.whl#sha256=abc"]),
        ("six==1.0 \\\n    --hash=sha256:abc \\\n    --hash=sha256:def\nredis\n", ["six==1.0", "redis"]),
        ("six \\\n    ==1.0\n", ["six      ==1.0"]),
        ("--no-index\n-r more.txt\nsix\n", ["six"]),
    ],
)
def test_the_lines_that_are_requirements(text: str, lines: list[str]) -> None:
    assert list(celery_release.requirement_lines(text)) == lines


@pytest.mark.parametrize(
    "line",
    [
        "celery==5.7.0",
        "celery[redis] == 5.7.0  # the broker",
        "celery===5.7.0",
        "celery==5.7.0; python_version < '3.13'",
        "celery==5.7.0 --hash=sha256:abc",
        "celery==5.7.0 \\\n    --hash=sha256:abc \\\n    --hash=sha256:def",
        "shop @ https://example.org/shop-1.0-py3-none-any.whl#egg=shop",
        "shop @ git+https://example.org/shop@3f2a",
        "# celery",
        "--extra-index-url https://example.org/simple",
        "-r more.txt",
        "",
    ],
)
def test_a_pinned_requirement(line: str) -> None:
    assert celery_release.unpinned(f"redis==8.1.0\n{line}\n") == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("celery", "celery"),
        ("celery[redis]  # the newest", "celery[redis]"),
        ("celery>=5.7", "celery>=5.7"),
        ("celery~=5.7.0", "celery~=5.7.0"),
        ("celery==5.7.*", "celery==5.7.*"),
        ("celery>=5; python_version == '3.11'", "celery>=5; python_version == '3.11'"),
    ],
)
def test_a_requirement_without_exact_version(line: str, told: str) -> None:
    assert celery_release.unpinned(f"redis==8.1.0\n{line}\n") == [told]


@pytest.mark.parametrize("line", ["shop @ git+https://example.org/shop", "shop @ git+ssh://git@example.org/shop"])
def test_a_repository_without_version_is_not_pinned(line: str) -> None:
    assert celery_release.unpinned(line) == [line]


@pytest.mark.parametrize(
    ("requirement", "name"),
    [
        ("celery", "celery"),
        ("Celery[redis]==5.7.0", "celery"),
        ("typing_extensions>=4", "typing-extensions"),
        ("zope.interface ~= 7.0", "zope-interface"),
        ("a__b.-c!=1", "a-b-c"),
        ("Shop@https://example.org/shop.whl", "shop"),
        ("tomli;python_version<'3.11'", "tomli"),
    ],
)
def test_the_name_of_a_project(requirement: str, name: str) -> None:
    assert celery_release.project_name(requirement) == name


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
def test_what_the_application_pins_is_not_constrained(requirements: str, left: str) -> None:
    constraints = "# what hosts get\npydantic==2.14.3\ntyping_extensions==4.16.0\nredis==6.4.0  # newest\n"

    assert celery_release.constraints_for(requirements, constraints) == left


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
    arguments = {"source": source, "requirements": source / "requirements.txt", "runtime": runtime, "dest": tmp_path / "cache" / "releases"}
    arguments = {name: str(value) for name, value in arguments.items()} | {"exclude": ["*.md"]}

    checked = run_module(tmp_path, arguments, "--check")
    archive = Path(checked[1]["archive"])
    expected = packed(source, runtime, "celery==5.7.0\nredis>=6\n", ("*.md",))

    assert checked[0] == 0
    assert checked[1]["id"] == hashlib.sha256(expected).hexdigest()[:12]
    assert archive == tmp_path / "cache" / "releases" / f"{checked[1]['id']}.tar.gz"
    assert checked[1]["unpinned"] == ["redis>=6"]
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


def test_requirements_that_are_included_are_judged_too(tmp_path: Path) -> None:
    write = {
        "requirements.txt": "celery==5.7.0\n-r parts/base.txt\n",
        "parts/base.txt": "--requirement more.txt\n",
        "parts/more.txt": "redis\n",
    }
    (tmp_path / "parts").mkdir()
    for name, text in write.items():
        (tmp_path / name).write_text(text)

    assert celery_release.unpinned(celery_release.read_requirements(tmp_path / "requirements.txt")) == ["redis"]


def test_what_looks_at_the_broker_is_pinned_as_the_runtime_package_asks_for_it() -> None:
    text = (REPOSITORY / "roles/celery_monitor/files/environment/requirements.txt").read_text()
    pins = {celery_release.project_name(line): line.partition("==")[2] for line in celery_release.requirement_lines(text)}
    extra = tomllib.loads((REPOSITORY / "runtime/pyproject.toml").read_text())["project"]["optional-dependencies"]["monitor"]

    assert celery_release.unpinned(text) == []
    for wanted in map(Requirement, extra):
        assert wanted.specifier.contains(pins[celery_release.project_name(wanted.name)]), wanted
