"""Requirements files of pip: read as pip reads them, with file and line of what cannot be deployed."""

from __future__ import annotations

import codecs
import locale
import optparse
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ansible.module_utils.private_environment import LOGIN
from packaging.requirements import InvalidRequirement, Requirement

#: pip's own (pip/_internal/req/req_file.py): what a comment is, and which names in braces are variables of the environment.
COMMENT = re.compile(r"(^|\s+)#.*$")
VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")
#: What a file may begin with, and what it is encoded in then (pip/_internal/utils/encoding.py).
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
)
CODING = re.compile(rb"coding[:=]\s*([-\w.]+)")
#: A repository at a version (…/shop@v1), or one file of any other address.
PINNED_URL = re.compile(r"^(?:git|hg|svn|bzr)\+[^/]+://[^/]*/.+@[^@:]+$|^(?!(?:git|hg|svn|bzr)\+)\w+://")
VERSION_CONTROL = ("git+", "hg+", "svn+", "bzr+")
#: Options that say where packages are.
INDEX_OPTIONS = ("index_url", "extra_index_url", "find_links", "trusted_host")
#: In a release, the application's source as packages are built from it.
SOURCE = "./source"


class BadRequirements(Exception):
    """A requirements file that cannot be deployed: file, line and reason."""


@dataclass(frozen=True)
class Line:
    """A line of a requirements file, as a release has it."""

    text: str
    #: Where it is from: file and line.
    origin: str
    is_constraint: bool = False
    #: None: an option, or a folder or file of the application's source.
    requirement: Requirement | None = None
    #: What pip installs without a name: a path in the release, or an address.
    address: str = ""
    #: The option's names, as `extra_index_url`.
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The normalized name of the project (PEP 503); empty if it is known only after a build."""
        return project_name(self.requirement.name) if self.requirement else ""

    @property
    def is_pinned(self) -> bool:
        """Whether it is the same version tomorrow."""
        if self.requirement and not self.requirement.url:
            return any(one.operator == "===" or (one.operator == "==" and "*" not in one.version) for one in self.requirement.specifier)
        address = (self.requirement.url if self.requirement else self.address) or ""
        return address.startswith("./") or bool(PINNED_URL.search(address.partition("#")[0]))


class _Options(optparse.OptionParser):
    def __init__(self) -> None:
        super().__init__(add_help_option=False)
        for names in (("-i", "--index-url", "--pypi-url"), ("-c", "--constraint"), ("-r", "--requirement"), ("-e", "--editable")):
            self.add_option(*names, action="append", dest=names[1].strip("-").replace("-", "_"))
        for names in (("--extra-index-url",), ("-f", "--find-links"), ("--no-binary",), ("--only-binary",), ("--trusted-host",)):
            self.add_option(*names, action="append", dest=names[-1].strip("-").replace("-", "_"))
        for names in (("--use-feature",), ("--global-option",), ("--hash",), ("-C", "--config-settings", "--config-setting")):
            self.add_option(*names, action="append", dest=names[min(1, len(names) - 1)].strip("-").replace("-", "_"))
        for name in ("--no-index", "--prefer-binary", "--require-hashes", "--pre"):
            self.add_option(name, action="store_true", dest=name.strip("-").replace("-", "_"))

    def error(self, msg: str) -> NoReturn:
        raise ValueError(msg)


OPTIONS = _Options()
#: Those that may stand behind a requirement.
OF_A_REQUIREMENT = {"global_option", "hash", "config_settings"}


def project_name(name: str) -> str:
    """Return the normalized name of a project (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def without_logins(text: str) -> str:
    """Return a text without the users and passwords of the URLs in it. `git@`, which is no secret, stays."""
    return LOGIN.sub(lambda match: match[0] if match[0] == "://git@" else "://", text)


def decoded(content: bytes) -> str:
    """Return the text of a requirements file: by its byte order mark, by a coding in its first two lines, else UTF-8.

    Raises:
        ValueError: if it is not encoded so.
    """
    for mark, encoding in MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding)
    for line in content.split(b"\n")[:2]:
        if line.startswith(b"#") and (match := CODING.search(line)):
            try:
                return content.decode(match[1].decode())
            except LookupError as error:
                raise ValueError(str(error)) from error
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode(locale.getpreferredencoding(False))


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that says something: joined where it ends in a backslash, without comments."""
    first, parts = 0, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        comment = COMMENT.match(line)
        first = first or number
        if line.endswith("\\") and not comment:
            parts.append(line.strip("\\"))
            continue
        parts.append(f" {line}" if comment else line)
        if whole := COMMENT.sub("", "".join(parts)).strip():
            yield first, whole
        first, parts = 0, []
    if whole := COMMENT.sub("", "".join(parts)).strip():
        yield first, whole


def read(path: Path, top: Path) -> list[Line]:
    """Return all lines of a requirements file and of those that it includes, with what a host would not have replaced.

    Args:
        path: The file.
        top: The application's source. Folders and files in it may be required; pip is taken to be run there. Of a wheel's,
            the file itself: origins are relative to its folder then.

    Raises:
        BadRequirements: if a line cannot be deployed.
        OSError: if a file cannot be read.
    """
    return list(_read(Path(os.path.normpath(path)), top, False, ()))


def parse(text: str, name: str, top: Path) -> list[Line]:
    """Return all lines of a requirements file that is nowhere but in this text; `name` is what it is called, and `top` as for `read`.

    Raises:
        BadRequirements: if a line cannot be deployed.
        OSError: if a file that it includes cannot be read.
    """
    return list(_parsed(text, name, top / name, top, False, ()))


def _read(path: Path, top: Path, is_constraint: bool, within: tuple[Path, ...]) -> Iterator[Line]:
    shown = os.path.relpath(path, top if top.is_dir() else top.parent)
    if path in within:
        raise BadRequirements(f"{shown}: includes itself")
    try:
        text = decoded(path.read_bytes())
    except ValueError as error:
        raise BadRequirements(f"{shown}: {error}") from error
    yield from _parsed(text, shown, path, top, is_constraint, within)


def _parsed(text: str, shown: str, path: Path, top: Path, is_constraint: bool, within: tuple[Path, ...]) -> Iterator[Line]:
    for number, line in logical_lines(text):
        origin = f"{shown}:{number}"
        try:
            parsed, include = _line(line, origin, top, is_constraint)
        except ValueError as error:
            raise BadRequirements(f"{origin}: {without_logins(str(error))}") from error
        if parsed:
            yield parsed
        if include:
            name, as_constraint = include
            included = Path(os.path.normpath(path.parent / name))
            if not included.is_file():
                raise BadRequirements(f"{origin}: there is no file {included}")
            yield from _read(included, top, as_constraint, (*within, path))


def _line(line: str, origin: str, top: Path, is_constraint: bool) -> tuple[Line | None, tuple[str, bool] | None]:
    """Return what a line says, or the file that it includes and whether that holds constraints."""
    for name in VARIABLE.findall(line):
        if not os.environ.get(name):
            raise ValueError(f"the variable {name} is not set where Ansible runs")
    line = VARIABLE.sub(lambda match: os.environ[match[1]], line)
    words = line.split(" ")
    cut = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    wanted, rest = " ".join(words[:cut]).strip(), " ".join(words[cut:])
    found, surplus = OPTIONS.parse_args(shlex.split(rest))
    options = {name: value for name, value in vars(found).items() if value}
    if surplus:
        raise ValueError(f"not understood: {' '.join(surplus)}")
    if wanted or "editable" in options:
        names = options.keys() - OF_A_REQUIREMENT - (set() if wanted else {"editable"})
        if names:
            raise ValueError(f"an option that belongs on a line of its own: {line}")
        if len(options.get("editable", [])) > 1:
            raise ValueError("more than one -e on a line")
        if is_constraint and "editable" in options:
            raise ValueError("a constraint cannot be editable (-e)")
        # Of use only where somebody edits it.
        wanted = wanted or options["editable"][0]
        hashes = rest if cut < len(words) and "editable" not in options else ""
        return _required(wanted, hashes, origin, top, is_constraint), None
    if include := options.get("requirement", []) + options.get("constraint", []):
        if len(include) > 1 or len(options) > 1:
            raise ValueError("more than one file on a line")
        if re.match(r"\w+://", include[0]):
            raise ValueError(f"an address, which is not fetched ({include[0]}); allowed: a file in the source")
        return None, (include[0].removeprefix("file:"), "constraint" in options)
    for place in options.get("find_links", []):
        if not re.match(r"(https?|file)://|/", place):
            text = f"--find-links {_in_release(place, top)}"
            if len(options) > 1 or len(options["find_links"]) > 1:
                raise ValueError("a path that belongs on a line of its own")
            return Line(text, origin, is_constraint, options=("find_links",)), None
    return Line(line, origin, is_constraint, options=tuple(options)), None


def _required(wanted: str, rest: str, origin: str, top: Path, is_constraint: bool) -> Line:
    def line(text: str, **more: str) -> Line:
        return Line(f"{text} {rest}".strip(), origin, is_constraint, None, **more)

    path, extras, marker = re.fullmatch(r"(.*?)(\[[\w\s,.-]*\])?(\s+;.*|;.*)?", wanted).groups(default="")  # type: ignore[union-attr]
    if re.match(r"(\w+\+)?\w+://", wanted) and not wanted.startswith("file:"):
        return line(wanted, address=wanted.partition(" ;")[0])
    if path.startswith(("file:", ".", "/")) or ("/" in path and "@" not in path):
        if is_constraint:
            raise ValueError(f"a constraint needs a name: {wanted}")
        inside = _in_release(path, top)
        return line(f"{inside}{extras}{marker}", address=inside)
    try:
        requirement = Requirement(wanted)
    except InvalidRequirement as error:
        raise ValueError(f"no requirement: {wanted} ({str(error).splitlines()[0]})") from error
    if requirement.url and requirement.url.startswith("file:"):
        inside = _in_release(requirement.url, top)
        extra = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        return line(f"{inside}{extra}{f' ; {requirement.marker}' if requirement.marker else ''}", address=inside)
    if is_constraint and requirement.extras:
        raise ValueError(f"a constraint cannot have extras: {wanted}")
    return Line(f"{wanted} {rest}".strip(), origin, is_constraint, requirement)


def _in_release(place: str, top: Path) -> str:
    """Return where a release has a folder or file of the application's source."""
    path = Path(os.path.normpath(top / re.sub(r"^file:(//(localhost)?(?=/))?", "", place)))
    if not top.is_dir() or not path.is_relative_to(top):
        raise ValueError(f"{place} is outside of the application's source, and is not deployed")
    if not path.exists():
        raise ValueError(f"there is no {path}")
    inside = path.relative_to(top)
    return f"{SOURCE}/{inside}" if inside.parts else SOURCE


def unpinned(lines: list[Line]) -> list[str]:
    """Return the requirements, without logins, that may be another version tomorrow; a constraint pins them as well."""
    pinned = {line.name for line in lines if line.is_pinned}
    return [
        f"{without_logins(line.text.split(' --')[0])} ({line.origin})"
        for line in lines
        if not line.is_constraint and (line.requirement or line.address) and not line.is_pinned and (line.name or "?") not in pinned
    ]


def conflicts(lines: list[Line], dependencies: list[str]) -> list[str]:
    """Return the application's pins that another package's dependencies do not take: each with both, file and line."""
    found = []
    for wanted in map(Requirement, dependencies):
        for line in lines:
            if line.name != project_name(wanted.name) or not line.requirement or line.requirement.url or line.requirement.marker:
                continue
            versions = [one.version for one in line.requirement.specifier if one.operator in ("==", "===") and "*" not in one.version]
            if versions and not wanted.specifier.contains(versions[0], prereleases=True):
                found.append(f"{line.requirement.name}=={versions[0]} ({line.origin}), but it takes {wanted.name}{wanted.specifier}")
    return found
