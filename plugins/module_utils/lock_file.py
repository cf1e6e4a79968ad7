"""Lock files of uv and Poetry: read as requirements with hashes, as the tool that wrote one exports it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ansible.module_utils.requirements_file import BadRequirements, Line, parse, without_logins


@dataclass(frozen=True)
class Tool:
    """The program that writes a kind of lock files, and its arguments."""

    program: str
    #: What fails if the lock file does not match its project, and what prints the requirements.
    check: tuple[str, ...]
    export: tuple[str, ...]
    extra: str
    group: str
    without_hashes: str


TOOLS = {
    "uv.lock": Tool(
        program="uv",
        check=("lock", "--check"),
        # Of the lock file as it is; no line of a package index, which would be said once more for the host.
        export=("export", "--frozen", "--no-default-groups", "--no-emit-project", "--no-header", "--no-annotate"),
        extra="--extra",
        group="--group",
        without_hashes="--no-hashes",
    ),
    "poetry.lock": Tool(
        program="poetry",
        check=("check", "--lock"),
        export=("export", "--format=requirements.txt", "--without-urls"),
        extra="--extras",
        group="--with",
        without_hashes="--without-hashes",
    ),
}


#: Exit code of both if a lock file does not match its project; with another one, uv could not compare them: it needs a Python that the
#: project takes for that, and none may be here.
MISMATCH = 1


def requirements(
    path: Path, top: Path, extras: Sequence[str] = (), groups: Sequence[str] = (), warn: Callable[[str], None] = print
) -> list[Line]:
    """Return what a lock file holds, for production, as lines of a requirements file.

    They have hashes, unless one of them is a folder or a repository, of which pip can check none.

    Args:
        path: The lock file (`uv.lock`, `poetry.lock`), beside its pyproject.toml.
        top: The application's source.
        extras: Extras of the project that are wanted, too.
        groups: Groups of dependencies that are wanted, too.
        warn: Is told if it could not be compared with its project.

    Raises:
        BadRequirements: if it does not match its project, or cannot be exported.
    """
    tool = TOOLS[path.name]
    checked = _run(tool, tool.check, path)
    if checked.returncode == MISMATCH:
        raise BadRequirements(f"{path.name}: does not match its pyproject.toml: {_told(checked)}")
    if checked.returncode:
        warn(f"{path.name} could not be compared with its pyproject.toml: {_told(checked)}")
    export = (*tool.export, *(f"{tool.extra}={name}" for name in extras), *(f"{tool.group}={name}" for name in groups))
    lines = parse(_exported(tool, export, path), path.name, top)
    if any(line.address or (line.requirement and line.requirement.url) for line in lines):
        lines = parse(_exported(tool, (*export, tool.without_hashes), path), path.name, top)
    return lines


def _exported(tool: Tool, arguments: tuple[str, ...], path: Path) -> str:
    """Return what the tool exports.

    Raises:
        BadRequirements: if it fails.
    """
    exported = _run(tool, arguments, path)
    if exported.returncode:
        raise BadRequirements(f"{path.name}: cannot be exported: {_told(exported)}")
    return exported.stdout


def _told(completed: subprocess.CompletedProcess[str]) -> str:
    """Return the end of what a tool says, on one line, without logins."""
    return " ".join(without_logins(completed.stderr or completed.stdout).split("\n")[-5:]).strip()


def _run(tool: Tool, arguments: tuple[str, ...], path: Path) -> subprocess.CompletedProcess[str]:
    """Run the tool beside the lock file.

    Raises:
        BadRequirements: if there is no such tool.
    """
    beside = Path(sys.executable).parent
    program = shutil.which(tool.program, path=f"{beside}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    if not program:
        raise BadRequirements(f"{path.name}: {tool.program}, which exports it, is not on the machine that Ansible runs on")
    # Set for Ansible's own environment, it would name that one.
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(  # noqa: S603
        [program, *arguments], cwd=path.parent, env=environment, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
