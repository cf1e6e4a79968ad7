"""Wheels of all that a release needs, gathered on the controller for hosts that reach no package index."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ansible.module_utils.requirements_file import INDEX_OPTIONS, SOURCE, BadRequirements, Line, without_logins

#: The same of pip and of uv, which does not read pip's.
OF_UV = {
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
    "PIP_NO_INDEX": "UV_NO_INDEX",
}
#: The newest glibc that wheels may want (2.28, as uv takes it for Linux); Debian 12 has 2.36.
NEWEST_GLIBC, OLDEST_GLIBC = 28, 5
#: Lines of a tool's output that are told at most.
TOLD = 10


def gather(
    lines: Sequence[Line], more: Sequence[str], constraints: str, targets: Sequence[str], dest: Path, environment: Mapping[str, str]
) -> Path:
    """Return a folder with the wheels of requirements and of all that these need in turn.

    What it once gathered is kept, since the same lines stand for the same wheels.

    Args:
        lines: The application's requirements and constraints.
        more: Further requirements, and what builds packages from source.
        constraints: Versions that are wanted where the application leaves them open, as lines.
        targets: What the hosts have: version of Python and machine (`3.11.2-x86_64`).
        dest: Folder for such folders.
        environment: Environment variables of pip. Those that say where the index is are told to uv as well.

    Raises:
        BadRequirements: if one is no package of an index, has no wheel, or they do not go together.
        OSError: if the folder cannot be written.
    """
    if folders := [line for line in lines if line.address.startswith(SOURCE)]:
        raise BadRequirements(f"{folders[0].origin}: {folders[0].text} is built from source, and so no wheel (celery_app_vendor)")
    texts = {
        "wanted.txt": "".join(f"{text}\n" for text in (*(line.text for line in lines if _is_wanted(line)), *more)),
        "own.txt": "".join(f"{line.text}\n" for line in lines if line.is_constraint),
        "ours.txt": constraints,
    }
    key = hashlib.sha256(repr((sorted(texts.items()), sorted(targets))).encode()).hexdigest()[:12]
    folder = dest / f"wheels-{key}"
    if not folder.exists():
        dest.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=dest) as name:
            work = Path(name)
            for file, text in texts.items():
                (work / file).touch(0o600)
                (work / file).write_text(text)
            for target in sorted(set(targets)):
                _gather(work, *target.split("-"), {**os.environ, **environment})
            (work / "wheels").rename(folder)
    return folder


def _is_wanted(line: Line) -> bool:
    """Tell whether a line names a package, or an index."""
    return not line.is_constraint and (not line.options or set(line.options) <= set(INDEX_OPTIONS))


def _gather(work: Path, python: str, machine: str, environment: Mapping[str, str]) -> None:
    """Gather the wheels for one Python into the folder `wheels`."""
    environment = {**{OF_UV[name]: value for name, value in environment.items() if name in OF_UV}, **environment}
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}")
    if not uv:
        raise BadRequirements("uv, which finds out what belongs to them, is not on the machine that Ansible runs on (celery_app_vendor)")
    # pip would judge markers by the Python that it runs in.
    resolve = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--only-binary=:all:", f"--python-version={python}"]
    resolve += [f"--python-platform={machine}-unknown-linux-gnu", "--output-file=pins.txt", "wanted.txt", "--constraint=own.txt"]
    try:
        _run([*resolve, "--constraint=ours.txt"], work, environment)
    except BadRequirements:
        # What the application pins wins over what we would choose.
        _run(resolve, work, environment)
    major, minor, _ = python.split(".")
    platforms = [f"manylinux_2_{glibc}_{machine}" for glibc in range(NEWEST_GLIBC, OLDEST_GLIBC - 1, -1)]
    platforms += [f"manylinux{name}_{machine}" for name in ("2014", "2010", "1")]
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest=wheels", "-r", "pins.txt"]
    download += [f"--python-version={major}.{minor}", "--implementation=cp", *(f"--platform={name}" for name in platforms)]
    _run([*download, f"--abi=cp{major}{minor}", "--abi=abi3", "--abi=none"], work, environment)


def _run(command: Sequence[str], work: Path, environment: Mapping[str, str]) -> None:
    """Run a command.

    Raises:
        BadRequirements: if it fails.
    """
    completed = subprocess.run(  # noqa: S603
        command, cwd=work, env=environment, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
    if completed.returncode:
        told = [line for line in without_logins(completed.stderr).splitlines() if line.strip() and not re.match(r"\s*WARNING", line)]
        raise BadRequirements("wheels cannot be gathered (celery_app_vendor): " + "\n".join(told[-TOLD:]))
