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
options:
  source:
    description: Folder or wheel of the application.
    type: path
    required: true
  requirements:
    description: Requirements file. Files that it includes (C(-r)) are written into it.
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
  description: Requirements without an exact version.
  returned: always
  type: list
"""

import contextlib
import fnmatch
import gzip
import hashlib
import io
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

#: Time of every packed file, in seconds since 1970: 1 January 2000. Wheels, being zip files, refuse times before 1980.
PACKED_TIME = 946_684_800

#: Never part of a release: version control, caches, environments, and files that usually hold secrets.
ALWAYS_EXCLUDED = (
    ".git", ".hg", ".svn", "__pycache__", "*.pyc", ".venv", "venv", ".tox", ".nox", ".env", ".env.*", ".mypy_cache",
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


def requirement_lines(text: str) -> Iterator[str]:
    """Yield the requirements of a requirements file, without comments, options and hashes."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.split(r"(?:^|\s)#", line)[0].split(" --")[0].strip()
        if line and not line.startswith("-"):
            yield line


def read_requirements(path: Path) -> str:
    """Return a requirements file with the files that it includes in their places.

    Raises:
        OSError: if one of them cannot be read.
    """

    def included(match: re.Match[str]) -> str:
        return read_requirements(path.parent / match[1])

    return re.sub(r"^\s*(?:-r|--requirement)[ =]?\s*(\S+).*$", included, path.read_text(), flags=re.MULTILINE)


def project_name(requirement: str) -> str:
    """Return the normalized project name of a requirement (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[=<>!~;@(]", requirement, maxsplit=1)[0]).lower()


def unpinned(requirements: str) -> list[str]:
    """Return the requirements that may resolve to another version tomorrow.

    A repository is pinned by a version after its path (`…/shop@v1`), any other address by being one file's.
    """
    pinned = re.compile(r"==[^*]+$|^git\+[^/]+://[^/]*/.+@[^@:]+$|^(?!git\+)\w+://")
    return [line for line in requirement_lines(requirements) if not pinned.search(line.split(";")[0].split(" @ ")[-1].strip())]


def constraints_for(requirements: str, constraints: str) -> str:
    """Return the constraints without the projects that the application pins itself: its choice wins."""
    own = {project_name(line) for line in requirement_lines(requirements)}
    return "".join(f"{line}\n" for line in requirement_lines(constraints) if project_name(line) not in own)


def contents(source: Path, requirements: str, runtime: Path, exclude: tuple[str, ...]) -> Iterator[tuple[str, Path | bytes]]:
    """Yield the name and content of everything in a release."""
    local = ["-c constraints.txt", "./runtime"]
    if source.is_dir():
        for path in files_of(source, exclude):
            yield f"app/{path.relative_to(source)}", path
    else:
        yield "app/.keep", b""
        yield f"wheels/{source.name}", source
        local.append(f"./wheels/{source.name}")
    for path in files_of(runtime, (*ALWAYS_EXCLUDED, "tests")):
        yield f"runtime/{path.relative_to(runtime)}", path
    yield "requirements.txt", requirements.encode()
    yield "constraints.txt", constraints_for(requirements, (runtime / "constraints.txt").read_text()).encode()
    yield "local.txt", "\n".join([*local, ""]).encode()


def pack(entries: Iterator[tuple[str, Path | bytes]]) -> bytes:
    """Return a tar archive that depends on nothing but names, contents, links and the executable bit."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.mode = 0o644
            info.mtime = PACKED_TIME
            if isinstance(content, Path) and content.is_symlink():
                info.type, info.linkname = tarfile.SYMTYPE, str(content.readlink())
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
    module = AnsibleModule(
        argument_spec={
            "source": {"type": "path", "required": True},
            "requirements": {"type": "path", "required": True},
            "runtime": {"type": "path", "required": True},
            "dest": {"type": "path", "required": True},
            "exclude": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    source, requirements, runtime, dest = (Path(module.params[name]) for name in ("source", "requirements", "runtime", "dest"))
    if not source.exists():
        module.fail_json(msg=f"cannot pack the application: there is no {source}")
    try:
        text = read_requirements(requirements)
        packed = pack(contents(source, text, runtime, (*ALWAYS_EXCLUDED, *module.params["exclude"])))
    except OSError as error:
        module.fail_json(msg=f"cannot pack the application: {error}")

    release = hashlib.sha256(packed).hexdigest()[:12]
    archive = dest / f"{release}.tar.gz"
    # A cache on the controller, so written in check mode too: the check can then look at the release.
    if not archive.exists():
        dest.mkdir(parents=True, exist_ok=True)
        partial = archive.with_suffix(".partial")
        # The application's code is for its owner only, here too.
        partial.touch(mode=0o600)
        partial.write_bytes(gzip.compress(packed, mtime=0))
        partial.rename(archive)
    module.exit_json(changed=False, id=release, archive=str(archive), unpinned=unpinned(text))


if __name__ == "__main__":
    main()
