#!/usr/bin/python
"""Ansible module `celery_build`: build the virtual environment of a release on its host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: celery_build
short_description: Build a release that celery_release packed, with its virtual environment
description:
  - Unpacks the archive, and installs what the application requires and the runtime package in one resolution of pip, in which
    the application's pins are law. Where these have hashes, they are installed first by their own file, and nothing of it is
    replaced by what comes after.
  - Where wheels were packed with it (C(vendor/)), it needs no package index, and asks none.
  - Then asks C(pip check), and compares what is installed with the pins. Whatever does not fit is an error, and leaves no
    folder. What is complete has a file C(.complete).
options:
  path:
    description: Folder of the release. A virtual environment cannot be moved, so it is built where it stays.
    type: path
    required: true
  archive:
    description: The archive, on this host. It is removed.
    type: path
    required: true
  group:
    description: Group of the folder.
    type: str
    default: root
  mode:
    description: Mode of the folder.
    type: str
    default: "0750"
  python:
    description: The Python that the virtual environment is made of, on this host.
    type: str
    default: python3
  packages:
    description:
      - Debian packages that are there while it is built. Those that the host did not have, and what came with them, are removed then;
        if this is killed, by the next build beside it.
    type: list
    elements: str
    default: []
  environment:
    description: Environment variables of pip and of what it starts. Their values are in no result.
    type: dict
    default: {}
  note:
    description: What is written into C(.complete).
    type: str
    default: ""
  link:
    description:
      - Link that is to lead to the release's virtual environment. Releases beside it are removed then, but the latest of them, which
        services run until they are restarted. Without it, another module chooses what runs.
    type: path
author: Celery Platform
"""

RETURN = r"""
path:
  description: The folder.
  returned: always
  type: str
"""

import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import tarfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.private_environment import hide_values

try:
    from ansible.module_utils.requirements_file import SOURCE, project_name, without_logins
    from packaging.requirements import InvalidRequirement, Requirement

    MISSING = None
except ImportError:
    MISSING = traceback.format_exc()

#: Prints which Python an environment has, and what is installed in it.
INSTALLED = """
import json, platform
from importlib.metadata import distributions
print(json.dumps([platform.python_version(), {d.metadata["Name"]: d.version for d in distributions()}]))
"""
#: Files with secrets in their lines (addresses of indexes and repositories).
PRIVATE = ("requirements.txt", "constraints.txt", "indexes.txt")
#: Lines of pip's output that are told at most.
TOLD = 15
#: Of pip: the project that it begins with, by name or by the archive of its source.
BEGUN = re.compile(r"^(?:Collecting |Processing \S*/)([A-Za-z0-9][\w.-]*?)(?=[=<>~!\[; ]|-\d|$)", re.MULTILINE)
#: Of `apt-get --simulate`: a package that is not there yet.
NEW_PACKAGE = re.compile(r"^Inst (\S+) \(", re.MULTILINE)


#: A project's name at the begin of a requirement.
NAME = re.compile(r"[\w.-]+")


class BuildError(Exception):
    """A release that cannot be built as the application wants it."""


class Conflict(BuildError):
    """What is required does not go together."""


def finished(command: list[str], environment: Mapping[str, str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command without input to its end, in a folder; return its exit code and what it printed."""
    return subprocess.run(  # noqa: S603
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        check=False,
    )


class Release:
    """A release that is being built in its folder."""

    def __init__(self, path: Path, python: str, environment: Mapping[str, str]) -> None:
        self.path = path
        self.python = python
        self.environment = {**os.environ, **environment} | {"LC_ALL": "C.UTF-8", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        # Set by whoever started this: it would name another one.
        for name in ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "PIP_USER", "PIP_TARGET", "PIP_PREFIX"):
            self.environment.pop(name, None)
        self.warnings: list[str] = []
        self.vendor = path / "vendor"

    def build(self, archive: Path) -> None:
        """Build it.

        Raises:
            BuildError: if it cannot be built, or is not what the application wants.
            OSError: if it cannot be unpacked.
        """
        with tarfile.open(archive) as packed:
            # Its links may lead anywhere, as those of the application do.
            packed.extractall(self.path, **({"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}))  # noqa: S202
        for name in PRIVATE:
            (self.path / name).chmod(0o600)
        if self.vendor.exists():
            # What was gathered where there is an index. There is none here, whatever this host's pip is told.
            self.environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.vendor)}
        manifest = json.loads((self.path / "release.json").read_text())
        # What builds a package writes beside its source.
        shutil.copytree(self.path / "app", self.path / SOURCE, symlinks=True)
        self.run([self.python, "-m", "venv", "venv"])
        self.install()
        if manifest["install"]:
            try:
                self.pip("install", "--no-deps", "-r", "indexes.txt", SOURCE)
            except BuildError as error:
                told = "the application's folder has a pyproject.toml, and cannot be installed (celery_app_install: false leaves it so)"
                raise BuildError(f"{told}: {error}") from error
        shutil.rmtree(self.path / SOURCE)
        shutil.rmtree(self.vendor, ignore_errors=True)
        self.compare()
        python, _ = self.installed()
        major, minor, _ = python.split(".", 2)
        folders = [str(self.path / "app" / folder) for folder in manifest["python_path"]]
        site = self.path / f"venv/lib/python{major}.{minor}/site-packages"
        (site / "application.pth").write_text("".join(f"{folder}\n" for folder in folders))

    def install(self) -> None:
        """Install the application's requirements and the runtime package.

        Raises:
            BuildError: if they do not fit together, or pip cannot get one.
        """
        ours = ["./runtime", *(f"./{path.relative_to(self.path)}" for path in sorted(self.path.glob("wheels/*.whl")))]
        own = ["-r", "requirements.txt", "-c", "constraints.txt"]
        text = (self.path / "requirements.txt").read_text()
        if re.search(r"(^|\s)--(hash|require-hashes|no-index)\b", text, re.MULTILINE):
            # In one resolution, they would hold for ours as well.
            self.pip("install", *own)
            _, versions = self.installed()
            pinned = "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))
            (self.path / "installed.txt").write_text(pinned)
            own = ["-r", "indexes.txt", "-c", "installed.txt"]
        try:
            self.pip("install", *own, "-c", "runtime-constraints.txt", *ours)
        except Conflict:
            # What the application pins wins over what we would choose.
            self.pip("install", *own, *ours)
            self.warnings.append(
                "What the application pins does not go together with the versions that the runtime package is tested with "
                "(runtime/constraints.txt), so pip chose others"
            )

    def compare(self) -> None:
        """Ask whether what is installed fits together, and is what the application pins.

        Raises:
            BuildError: if not.
        """
        try:
            self.pip("check")
        except BuildError as error:
            raise BuildError(f"what is installed does not fit together (pip check): {error}") from error
        python, versions = self.installed()
        found = {project_name(name): version for name, version in versions.items()}
        wrong = []
        for text, origin in self.lines():
            try:
                wanted = Requirement(re.split(r"\s--", text)[0])
            except InvalidRequirement:
                continue
            if wanted.marker and not wanted.marker.evaluate({"python_version": python.rpartition(".")[0], "python_full_version": python}):
                continue
            version = found.get(project_name(wanted.name))
            if version and not wanted.specifier.contains(version, prereleases=True):
                wrong.append(f"{wanted.name}{wanted.specifier} ({origin}), installed is {version}")
        if wrong:
            raise BuildError(f"another version is installed than the application asks for: {'; '.join(wrong)}")

    def installed(self) -> tuple[str, dict[str, str]]:
        """Return the version of Python and those of all that is installed, by name."""
        python, versions = json.loads(self.run(["venv/bin/python", "-I", "-c", INSTALLED]))
        return python, versions

    def lines(self) -> list[tuple[str, str]]:
        """Return the application's requirements and constraints, each with its file and line."""
        text = "".join((self.path / name).read_text() for name in ("requirements.txt", "constraints.txt"))
        return [(one[0], one[2]) for line in text.splitlines() if (one := line.rpartition("  # "))[1]]

    def pip(self, *arguments: str) -> None:
        """Run pip in the environment.

        Raises:
            Conflict: if what is wanted does not go together.
            BuildError: if it fails for another reason.
        """
        self.run(["venv/bin/pip", *arguments])

    def run(self, command: list[str]) -> str:
        """Run a command in the folder, and return what it prints.

        Raises:
            Conflict: if it is pip, and what is wanted does not go together.
            BuildError: if it fails for another reason.
        """
        # A path of ours, unless it is absolute.
        program = str(self.path / command[0]) if "/" in command[0] else command[0]
        completed = finished([program, *command[1:]], self.environment, self.path)
        if completed.returncode:
            output = without_logins(completed.stdout + completed.stderr)
            if "ResolutionImpossible" in output or "conflicting dependencies" in output:
                raise Conflict(self.conflict(output))
            raise BuildError(self.explained(output))
        return completed.stdout

    def origin(self, wanted: str) -> str:
        """Return file and line of a requirement in parentheses, with a space before; nothing if it is none of the application's."""
        try:
            name = project_name(Requirement(wanted).name)
        except InvalidRequirement:
            return ""
        for text, origin in self.lines():
            if project_name(re.split(r"[\s\[=<>!~;@(]", text, maxsplit=1)[0]) == name:
                return f" ({origin})"
        return ""

    def conflict(self, output: str) -> str:
        """Return what does not go together: pip's own lines, with file and line of what the application asks for."""
        block = re.search(r"The conflict is caused by:\n(.*?)(?:\n\n|$)", output, re.DOTALL)
        told = []
        for line in (block[1] if block else output).splitlines()[: TOLD if block else None]:
            asked = re.search(r"The user requested (?:\(constraint\) )?(.+)", line)
            told.append(f"{line.strip()}{self.origin(asked[1]) if asked else ''}")
        return "the requirements do not go together: " + "; ".join(told[-TOLD:])

    def explained(self, output: str) -> str:
        """Return why pip failed, and what to do where a package has nothing for this host's Python."""
        lines = [
            re.sub(r" \(from versions: .*\)$", "", line) for line in output.splitlines() if not line.startswith(("WARNING", "  WARNING"))
        ]
        lines = [line for line in lines if line.strip() and "Ignored the following" not in line]
        version = self.run([self.python, "-c", "import platform; print(platform.python_version())"]).strip()
        python = f"Python {version} ({platform.machine()})"
        missing = re.search(r"No matching distribution found for (\S+)", output)
        other = re.search(r"Package '?([^'\s]+)'? requires a different Python", output)
        failed = re.search(r"Failed (?:building wheel for|to build(?: installable wheels for)?) (?:some .* \()?'?([\w.-]+)", output)
        stopped = re.search(r"Getting requirements to build wheel|Preparing metadata|metadata-generation-failed", output)
        tail = "\n".join(lines[-TOLD:])
        if missing or other:
            wanted = (missing or other)[1]  # type: ignore[index]
            return (
                f"no release of {wanted}{self.origin(wanted)} can be installed with this host's {python}. Choose a version that has a "
                f"wheel for it, or another version for this Python alone: {NAME.match(wanted)[0]}==…; python_version == "  # type: ignore[index]
                f"'{version.rpartition('.')[0]}'. pip says:\n{tail}"
            )
        if failed or ("subprocess-exited-with-error" in output and stopped):
            # The one that pip began with last, where it does not say which.
            wanted = failed[1] if failed else (BEGUN.findall(output) or [""])[-1]
            return (
                f"a package has no wheel for this host's {python}, and cannot be built from source: {wanted}{self.origin(wanted)}. Choose "
                f"a version that has a wheel for it, or name what its build needs in celery_app_build_packages. pip says:\n{tail}"
            )
        return f"pip fails:\n{tail}"


def apt(*arguments: str) -> str:
    """Run apt-get, and return what it prints.

    Raises:
        BuildError: if it fails.
    """
    command = ["apt-get", "--quiet", "--yes", "-o", "DPkg::Lock::Timeout=120", *arguments]
    completed = finished(command, os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"})
    if completed.returncode:
        tail = "\n".join((completed.stdout + completed.stderr).strip().splitlines()[-TOLD:])
        raise BuildError(f"what its build needs cannot be installed or removed (celery_app_build_packages): {tail}")
    return completed.stdout


@contextlib.contextmanager
def installed_packages(names: Sequence[str], record: Path) -> Iterator[None]:
    """Have Debian packages while a release is built.

    Args:
        names: of the packages.
        record: a file that names those that are to be removed, however this ends.

    Raises:
        BuildError: if they cannot be installed or removed.
    """
    if names:
        install = ("install", "--no-install-recommends", *names)
        try:
            new = NEW_PACKAGE.findall(apt("--simulate", *install))
        except BuildError:
            apt("update")
            new = NEW_PACKAGE.findall(apt("--simulate", *install))
        with record.open("a") as file:
            file.writelines(f"{name}\n" for name in new)
        apt(*install)
    try:
        yield
    finally:
        if record.exists():
            if new := record.read_text().split():
                apt("purge", *new)
            record.unlink()


def build(path: Path, archive: Path, *, packages: Sequence[str] = (), **options: Any) -> list[str]:
    """Build a release, unless another process just has, and return what should be known of it.

    Args:
        path: its folder.
        archive: what it is built from. It is removed.
        packages: Debian packages that are there meanwhile.
        options: of the module: `python`, `environment`, `group`, `mode` and `note`.

    Raises:
        BuildError: if it cannot be built, or is not what the application wants. Its folder is gone then.
        OSError: if it cannot be written.
    """
    os.umask(0o022)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A run whose controller was killed may go on here.
    with (path.parent / ".building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if (path / ".complete").exists():
                return []
            with installed_packages(packages, path.parent / ".build-packages"):
                return _build(path, archive, **options)
        finally:
            archive.unlink(missing_ok=True)


def _build(path: Path, archive: Path, *, python: str, environment: Mapping[str, str], group: str, mode: str, note: str) -> list[str]:
    # What an earlier run left that was killed.
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    release = Release(path, python, environment)
    try:
        release.build(archive)
        if os.getuid() == 0:
            shutil.chown(path, "root", group)
        (path / ".complete").write_text(f"{without_logins(note)}\n")
        path.chmod(int(mode, 8))
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return release.warnings


def choose(path: Path, link: Path, check: bool) -> bool:
    """Let a link lead to a release's environment, and remove the releases beside it but the latest; tell whether anything was to do.

    Args:
        path: folder of the release.
        link: the link; it is relative, and replaced in one step.
        check: only find what would be done.

    Raises:
        OSError: if the link cannot be written, or a folder not removed.
    """
    target = os.path.relpath(path / "venv", link.parent)
    others = [folder for folder in path.parent.glob("[!.]*/") if folder != path and not folder.is_symlink()]
    stale = sorted(others, key=lambda folder: folder.stat().st_mtime)[:-1]
    differs = not link.is_symlink() or os.readlink(link) != target
    if not check:
        if differs:
            new = link.with_name(f".{link.name}.new")
            new.unlink(missing_ok=True)
            new.symlink_to(target)
            new.replace(link)
        for folder in stale:
            shutil.rmtree(folder)
    return differs or bool(stale)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "archive": {"type": "path", "required": True},
            "group": {"type": "str", "default": "root"},
            "mode": {"type": "str", "default": "0750"},
            "note": {"type": "str", "default": "", "no_log": False},
            "python": {"type": "str", "default": "python3"},
            "packages": {"type": "list", "elements": "str", "default": []},
            "environment": {"type": "dict", "default": {}, "no_log": True},
            "link": {"type": "path"},
        },
        supports_check_mode=True,
    )
    if MISSING:
        module.fail_json(msg=missing_required_lib("packaging"), exception=MISSING)
    hide_values(module, module.params["environment"])
    path, link = Path(module.params["path"]), module.params["link"]
    changed = not (path / ".complete").exists()
    try:
        if changed and not module.check_mode:
            options = {name: module.params[name] for name in ("packages", "python", "environment", "group", "mode", "note")}
            for warning in build(path, Path(module.params["archive"]), **options):
                module.warn(warning)
        if link:
            changed |= choose(path, Path(link), module.check_mode)
    except (BuildError, OSError, tarfile.TarError) as error:
        module.fail_json(msg=f"cannot build the release, and nothing was switched: {error}")
    module.exit_json(changed=changed, path=str(path))


if __name__ == "__main__":
    main()
