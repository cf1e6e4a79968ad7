#!/usr/bin/python
"""Ansible module `celery_release`: pack an application for its hosts, reproducibly. Runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_release
short_description: Pack a Celery application and the runtime package into one release archive
description:
  - Runs on the controller, with git. The same input gives the same archive, byte for byte, so that its
    hash can name the release.
  - Of folders, it packs what git would keep, whether they are in a repository or not. What a .gitignore names, and git does not
    track, stays here.
  - Of requirements files, all of pip's syntax is packed as it is meant, or refused with file and line.
options:
  source:
    description: Folder or wheel of the application.
    type: path
    required: true
  requirements:
    description:
      - Requirements file. Files that it includes (C(-r), C(-c)) are packed with it.
      - Or a lock file, C(uv.lock) or C(poetry.lock), which uv or Poetry on the controller exports as one.
    type: path
    required: true
  runtime:
    description: Folder of the runtime package.
    type: path
    required: true
  dest:
    description: Folder that the archive is written to.
    type: path
    required: true
  exclude:
    description: Names, with globs, of files and folders of I(source) that are left out.
    type: list
    elements: str
    default: []
  include:
    description: Names, with globs, of files of I(source) that are packed though a .gitignore, or this module, leaves them out.
    type: list
    elements: str
    default: []
  python_path:
    description: Folders of I(source) that modules are imported from, besides itself.
    type: list
    elements: str
    default: []
  extras:
    description: Extras of the project that its lock file is asked for.
    type: list
    elements: str
    default: []
  groups:
    description: Groups of dependencies that a lock file is asked for, besides those of the project itself.
    type: list
    elements: str
    default: []
  state_folders:
    description:
      - Folders of I(source) that the application writes to. In the release each is a link to one of the same name below I(state), and
        what the source has in it is not packed.
    type: list
    elements: str
    default: []
  state:
    description: Folder on the host that these links lead to.
    type: str
    default: ""
  vendor:
    description:
      - Versions of Python and machines of hosts that reach no package index (C(3.11.2-x86_64)). The wheels of all that is required are
        gathered here, and packed beside the release; they are no part of its name.
    type: list
    elements: str
    default: []
  environment:
    description: Environment variables of pip, which gathers wheels. Their values are in no result.
    type: dict
    default: {}
  install:
    description: Whether the host installs I(source) into the virtual environment. Not if it is no project that can be built.
    type: bool
    default: true
author: Celery Platform
"""

RETURN = r"""
id:
  description: First 12 hexadecimal digits of the SHA-256 of what is packed.
  returned: always
  type: str
archive:
  description: Path of the archive.
  returned: always
  type: str
unpinned:
  description: Requirements without an exact version, each with file and line.
  returned: always
  type: list
left_out:
  description: Files that an application may read, and that are not packed, for they usually hold secrets.
  returned: always
  type: list
"""

import contextlib
import fnmatch
import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ansible.module_utils import lock_file, wheels
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.private_environment import hide_values
from ansible.module_utils.requirements_file import (
    INDEX_OPTIONS,
    SOURCE,
    BadRequirements,
    Line,
    conflicts,
    logical_lines,
    project_name,
    read,
    unpinned,
)
from packaging.requirements import Requirement

#: Time of every packed file, in seconds since 1970: 1 January 2000. Wheels, being zip files, refuse times before 1980.
PACKED_TIME = 946_684_800

#: Files that usually hold secrets, and endings of those that are there to be copied.
DOTENV = (".env", ".env.*")
SAMPLES = (".example", ".sample", ".template", ".dist")
#: Options that are lists of texts.
LISTS = ("exclude", "include", "python_path", "extras", "groups", "vendor", "state_folders")
#: Never part of a release, unless asked for: version control, caches, environments, and those files.
ALWAYS_EXCLUDED = (
    ".git", ".hg", ".svn", "__pycache__", "*.pyc", ".venv", "venv", ".tox", ".nox", *DOTENV, ".mypy_cache",
    ".pytest_cache", ".ruff_cache", "node_modules", "*.egg-info",
)  # fmt: skip


def git(folder: Path, *arguments: str | Path) -> list[str]:
    """Return what a git command prints about a folder, split at its NUL characters.

    Raises:
        OSError: if there is no git, or it fails.
    """
    # Called from a hook, git would have named another repository in these. The folder may be another user's; no program that
    # its settings name is run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    command: list[str | Path] = ["git", "-C", folder, "-c", "safe.directory=*", "-c", "core.fsmonitor=false", *arguments]
    completed = subprocess.run(command, env=environment, capture_output=True, check=False)  # noqa: S603
    if completed.returncode:
        raise OSError(f"git in {folder}: {os.fsdecode(completed.stderr).strip()}")
    return [name for name in os.fsdecode(completed.stdout).split("\0") if name]


def names_of(folder: Path) -> set[str]:
    """Return the names, relative to a folder, of what git would keep of it; a repository in it has a `/` at its end.

    That is all that is tracked, and all else that no .gitignore names. In a folder that is in no repository, or that the
    repository around it ignores as a whole, only the folder's own .gitignore files count.

    Raises:
        OSError: if there is no git, or it fails.
    """
    others = ("ls-files", "-z", "--others", "--exclude-standard")
    try:
        # Without a work tree around it, git fails.
        top, _, prefix = git(folder, "rev-parse", "--show-toplevel", "--show-prefix")[0].rstrip("\n").partition("\n")
    except OSError as error:
        if "not a git repository" not in str(error) and "must be run in a work tree" not in str(error):
            raise
        top = prefix = ""
    if prefix:
        with contextlib.suppress(OSError):
            git(Path(top), "check-ignore", "--quiet", "--", prefix.rstrip("/"))
            top = ""
    if not top:
        with tempfile.TemporaryDirectory() as empty:
            git(folder, "init", "--quiet", "--bare", empty)
            return set(git(folder, f"--git-dir={empty}", "--work-tree=.", *others))
    tracked = [entry.partition("\t") for entry in git(folder, "ls-files", "-z", "--stage")]
    return {f"{name}/" if mode.startswith("160000") else name for mode, _, name in tracked} | set(git(folder, *others))


def files_of(folder: Path, exclude: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files and links of a folder that git would keep, in a fixed order, without what is excluded.

    Raises:
        FileNotFoundError: if the folder does not exist.
        OSError: if git cannot tell what is in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    for name in sorted(names_of(folder), key=lambda name: name.split("/")):
        path, parts = folder / name, Path(name).parts
        if any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in exclude):
            continue
        # Tracked, but replaced by a link to elsewhere.
        if any(parent.is_symlink() for parent in list(path.parents)[: len(parts) - 1]):
            continue
        if not name.endswith("/"):
            if path.is_file() or path.is_symlink():
                yield path
        elif (path / ".git").exists():
            yield from files_of(path, exclude)
        elif path.exists():
            raise OSError(f"the submodule {path} is not checked out: git -C {folder} submodule update --init --recursive")


def included(folder: Path, include: tuple[str, ...], exclude: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files of a folder that are asked for by name, or by their path in it; not from what is excluded."""
    for parent, folders, files in os.walk(folder) if include else ():
        folders[:] = [name for name in folders if not any(fnmatch.fnmatch(name, pattern) for pattern in exclude)]
        for path in (Path(parent, name) for name in files):
            if any(fnmatch.fnmatch(path.name, one) or fnmatch.fnmatch(str(path.relative_to(folder)), one) for one in include):
                yield path


def environment_files(folder: Path, packed: Iterable[Path]) -> list[str]:
    """Return the .env files beside what is packed that are not; samples of them are of no use where it runs."""
    packed = set(packed)
    folders = {folder} | {parent for path in packed for parent in path.parents if parent.is_relative_to(folder)}
    found = {path for one in folders for pattern in DOTENV for path in one.glob(pattern) if path.is_file()}
    return sorted(str(path.relative_to(folder)) for path in found - packed if path.suffix not in SAMPLES)


def chosen_files(source: Path, exclude: tuple[str, ...] = (), include: tuple[str, ...] = ()) -> list[Path]:
    """Return the files and links of an application that are deployed, in a fixed order.

    Raises:
        OSError: if git cannot tell what is in it.
    """
    files = set(files_of(source, (*ALWAYS_EXCLUDED, *exclude))) | set(included(source, include, (*ALWAYS_EXCLUDED, *exclude)))
    return sorted(files, key=lambda path: path.parts)


def required(
    path: Path, source: Path, extras: Iterable[str] = (), groups: Iterable[str] = (), warn: Callable[[str], None] = print
) -> list[Line]:
    """Return the lines of a requirements file, or what a lock file is exported as; `warn` is told of what should be known.

    Raises:
        BadRequirements: if it cannot be deployed.
        OSError: if it cannot be read.
    """
    if not path.exists() and (others := [name for name in (*lock_file.TOOLS, "pdm.lock") if (path.parent / name).exists()]):
        raise BadRequirements(f"there is no {path}, but {others[0]} (celery_app_requirements)")
    if path.name in lock_file.TOOLS:
        return lock_file.requirements(path, source, list(extras), list(groups), warn)
    if path.suffix == ".lock":
        raise BadRequirements(f"{path.name}: allowed are {' and '.join(lock_file.TOOLS)}; export any other as requirements.txt")
    return read(path, source)


def constraints_for(lines: list[Line], constraints: str) -> str:
    """Return the constraints without the projects that the application chooses itself."""
    own = {line.name for line in lines}
    kept = [text for _, text in logical_lines(constraints) if project_name(Requirement(text).name) not in own]
    return "".join(f"{text}\n" for text in kept)


def builders(source: Path) -> list[str] | None:
    """Return what a folder is built by, or None if it does not say so (PEP 518): then its pyproject.toml is the settings of tools."""
    file = source / "pyproject.toml"
    build = tomllib.loads(file.read_text()).get("build-system") if file.is_file() else None
    return None if build is None else list(build.get("requires", ["setuptools"]))


class Link(str):
    """Where a link leads, in place of a file's content."""

    __slots__ = ()


Content = Path | bytes | Link


def contents(
    source: Path,
    lines: list[Line],
    runtime: Path,
    files: list[Path],
    *,
    python_path: Iterable[str] = (),
    install: bool = True,
    state_folders: Iterable[str] = (),
    state: str = "",
) -> Iterator[tuple[str, Content]]:
    """Yield the name and content of everything in a release."""
    if source.is_dir():
        kept = [source / folder for folder in state_folders]
        for path in files:
            if not any(path.is_relative_to(folder) for folder in kept):
                yield f"app/{path.relative_to(source)}", path
        for folder in kept:
            inside = folder.relative_to(source)
            yield f"app/{inside}", Link(f"{state}/{inside}")
    else:
        yield "app/.keep", b""
        yield f"wheels/{source.name}", source
    for path in files_of(runtime, (*ALWAYS_EXCLUDED, "tests")):
        yield f"runtime/{path.relative_to(runtime)}", path

    def text(kept: Iterable[Line]) -> bytes:
        return "".join(f"{line.text}  # {line.origin}\n" for line in kept).encode()

    yield "requirements.txt", text(line for line in lines if not line.is_constraint)
    yield "constraints.txt", text(line for line in lines if line.is_constraint)
    yield "indexes.txt", text(line for line in lines if line.options and set(line.options) <= set(INDEX_OPTIONS))
    yield "runtime-constraints.txt", constraints_for(lines, (runtime / "constraints.txt").read_text()).encode()
    required = any(line.address == SOURCE for line in lines)
    project = source.is_dir() and builders(source) is not None
    manifest = {"python_path": list(python_path), "install": install and not required and project}
    yield "release.json", json.dumps(manifest).encode()


def pack(entries: Iterable[tuple[str, Content]]) -> bytes:
    """Return a tar archive that depends on nothing but names, contents, links and the executable bit."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.mode = 0o644
            info.mtime = PACKED_TIME
            if isinstance(content, Path) and content.is_symlink():
                content = Link(content.readlink())
            if isinstance(content, Link):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
                continue
            if isinstance(content, Path):
                info.mode = 0o755 if content.stat().st_mode & 0o100 else 0o644
                content = content.read_bytes()
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def main() -> None:
    """Run the module."""
    lists = {name: {"type": "list", "elements": "str", "default": []} for name in LISTS}
    paths = {name: {"type": "path", "required": True} for name in ("source", "requirements", "runtime", "dest")}
    more = {"install": {"type": "bool", "default": True}, "state": {"type": "str", "default": ""}}
    more |= {"environment": {"type": "dict", "default": {}, "no_log": True}}
    module = AnsibleModule(argument_spec=paths | lists | more, supports_check_mode=True)
    hide_values(module, module.params["environment"])
    source, requirements, runtime, dest = (Path(os.path.abspath(module.params[name])) for name in paths)
    exclude, include, python_path, extras, groups, targets, state_folders = (tuple(module.params[name]) for name in LISTS)
    if not source.exists():
        module.fail_json(msg=f"cannot pack the application: there is no {source}")
    try:
        lines = required(requirements, source, extras, groups, module.warn)
        files = chosen_files(source, exclude, include) if source.is_dir() else []
        places = [(folder, "python_path") for folder in python_path]
        places += [(line.address.removeprefix(SOURCE).strip("/"), line.origin) for line in lines if line.address.startswith(SOURCE)]
        for folder, origin in places:
            if not any(path.is_relative_to(source / folder) for path in files):
                module.fail_json(msg=f"cannot pack the application: {origin}: nothing of {source / folder} would be deployed")
        needs = tomllib.loads((runtime / "pyproject.toml").read_text())["project"].get("dependencies", [])
        if found := conflicts(lines, needs):
            told = "; ".join(found)
            module.fail_json(msg=f"the runtime package does not work with what the application pins: {told} (runtime/pyproject.toml)")
        vendor: list[tuple[str, Path]] = []
        if targets:
            built_by = [*(builders(runtime) or []), *((builders(source) or []) if source.is_dir() and module.params["install"] else [])]
            constraints = constraints_for(lines, (runtime / "constraints.txt").read_text())
            folder = wheels.gather(lines, [*needs, *built_by], constraints, targets, dest, module.params["environment"])
            vendor = [(f"vendor/{path.name}", path) for path in sorted(folder.iterdir())]
            # Where packages are is no question any more.
            lines = [line for line in lines if not set(line.options) & set(INDEX_OPTIONS)]
        options = {"python_path": python_path, "state_folders": state_folders, "state": module.params["state"]}
        entries = list(contents(source, lines, runtime, files, install=module.params["install"], **options))
        release = hashlib.sha256(pack(entries)).hexdigest()[:12]
    except (BadRequirements, OSError, tomllib.TOMLDecodeError) as error:
        module.fail_json(msg=f"cannot pack the application: {error}")

    archive = dest / (f"{release}-{folder.name}.tar.gz" if vendor else f"{release}.tar.gz")
    # A cache on the controller, so written in check mode too: the check can then look at the release.
    if not archive.exists():
        dest.mkdir(parents=True, exist_ok=True)
        partial = archive.with_suffix(".partial")
        # The application's code is for its owner only, here too.
        partial.touch(mode=0o600)
        partial.write_bytes(gzip.compress(pack([*entries, *vendor]), mtime=0))
        partial.rename(archive)
    left_out = environment_files(source, files) if source.is_dir() else []
    if left_out:
        module.warn(
            f"Not deployed, since such files usually hold secrets: {', '.join(left_out)}, of {source}. What the application reads there "
            "belongs into celery_app_environment and celery_app_credentials; celery_app_include deploys a file as it is"
        )
    module.exit_json(changed=False, id=release, archive=str(archive), unpinned=unpinned(lines), left_out=left_out)


if __name__ == "__main__":
    main()
