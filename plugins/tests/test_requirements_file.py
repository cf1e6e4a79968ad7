"""Requirements files: read as pip reads them."""

from __future__ import annotations

import codecs
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ansible.module_utils import requirements_file
from ansible.module_utils.requirements_file import BadRequirements, read


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


#: Of all syntax that pip knows, what a release can hold.
EVERYTHING: dict[str, str | bytes] = {
    "requirements.txt": """\
# comment
-i https://example.org/simple
--extra-index-url=https://robot:tok3n@example.org/more --trusted-host example.org
six==1.0 # comment
redis[hiredis] == 8.1.0 ; python_version < "3.13"
kombu==5.7.0 \\
    --hash=sha256:abc \\
    --hash=sha256:def
vine \\
  ==5.1.0
-r parts/base.txt
--constraint parts/limits.txt
shop @ https://robot:tok3n@example.org/shop-1.0-py3-none-any.whl#sha256=abc
git+https://${TOKEN}@example.org/kit@v2#egg=kit
-e git+ssh://git@example.org/tool@v3#egg=tool
-e ./libs/one[fast]
./libs/one; python_version < "3"
--only-binary :all:
--pre
""",
    "parts/base.txt": codecs.BOM_UTF16_LE + "amqp==5.4.2\r\n-rmore.txt\r\n".encode("utf-16-le"),
    "parts/more.txt": codecs.BOM_UTF8 + b"billiard===4.3\n",
    "parts/limits.txt": b"# -*- coding: latin-1 -*-\n# \xe9\ntzdata==2026.1\n",
    "libs/one/pyproject.toml": "",
}
#: Prints what pip makes of it: file, line, requirement, and whether it is a constraint.
PIP = """
import json, sys
from pip._internal.network.session import PipSession
from pip._internal.req.req_file import RequirementsFileParser, get_line_parser
lines = RequirementsFileParser(PipSession(), get_line_parser(None)).parse(sys.argv[1], False)
print(json.dumps([[l.filename, l.lineno, getattr(l, "requirement", ""), l.constraint] for l in lines]))
"""


def test_it_is_read_as_pip_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "t0ken")
    write(tmp_path, EVERYTHING)
    pip = subprocess.run([sys.executable, "-c", PIP, tmp_path / "requirements.txt"], check=True, capture_output=True, text=True)

    lines = read(tmp_path / "requirements.txt", tmp_path)

    theirs = [
        (str(Path(file).relative_to(tmp_path)), line, text.strip().replace("./libs", "./source/libs"), is_constraint)
        for file, line, text, is_constraint in json.loads(pip.stdout)
    ]
    ours = [(*line.origin.rsplit(":", 1), "" if line.options else line.text.split(" --hash")[0], line.is_constraint) for line in lines]
    assert [(file, int(number), text, c) for file, number, text, c in ours] == theirs
    assert len(ours) == 16
    assert requirements_file.unpinned(lines) == []


def test_what_is_written_is_read_as_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "t0ken")
    write(tmp_path, EVERYTHING | {"source/libs/one/pyproject.toml": ""})
    lines = [line for line in read(tmp_path / "requirements.txt", tmp_path) if "./" not in line.text]
    write(tmp_path, {"packed.txt": "".join(f"{line.text}  # {line.origin}\n" for line in lines)})

    assert [line.text for line in read(tmp_path / "packed.txt", tmp_path)] == [line.text for line in lines]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("-r no.txt", "there is no file"),
        ("-c https://robot:tok3n@example.org/c.txt", "an address"),
        ("-r requirements.txt", "includes itself"),
        ("celery=5.7.0", "no requirement: celery=5.7.0"),
        ("--no-such-option", "no such option"),
        ("six==1.0 -r other.txt", "line of its own"),
        ("-r other.txt -c other.txt", "more than one file"),
        ("-e ../elsewhere", "outside of the application's source"),
        ("/opt/kit", "outside of the application's source"),
        ("./nothing", "there is no"),
        ("kit @ file:///opt/kit", "outside of the application's source"),
        ("six @ https://${UNSET_TOKEN}@example.org/x.whl", "UNSET_TOKEN is not set"),
        ("six==1.0 'x", "no requirement"),
        ("--find-links 'x", "No closing quotation"),
        (b"six==1.0 # \xff\xfe".decode("latin-1"), None),
    ],
)
def test_what_a_host_cannot_do_is_refused_with_file_and_line(tmp_path: Path, line: str, told: str | None) -> None:
    write(tmp_path / "shop", {"requirements.txt": f"redis==8.1.0\n{line}\n", "other.txt": ""})
    write(tmp_path / "elsewhere", {"setup.py": ""})
    if told is None:
        assert len(read(tmp_path / "shop/requirements.txt", tmp_path / "shop")) == 2
        return

    with pytest.raises(BadRequirements) as error:
        read(tmp_path / "shop/requirements.txt", tmp_path / "shop")

    assert str(error.value).startswith("requirements.txt:")
    assert told in str(error.value)
    assert "tok3n" not in str(error.value)


def test_files_beside_the_source_are_packed_too(tmp_path: Path) -> None:
    write(tmp_path, {"shop/requirements.txt": "-c ../site.txt\ncelery\n", "site.txt": "celery==5.7.0\n"})

    lines = read(tmp_path / "shop/requirements.txt", tmp_path / "shop")

    assert [(line.text, line.origin, line.is_constraint) for line in lines] == [
        ("celery==5.7.0", "../site.txt:1", True),
        ("celery", "requirements.txt:2", False),
    ]
    assert requirements_file.unpinned(lines) == []


@pytest.mark.parametrize(
    ("line", "pinned"),
    [
        ("celery==5.7.0", True),
        ("celery[redis] == 5.7.0  # the broker", True),
        ("celery===5.7.0", True),
        ("celery==5.7.0; python_version < '3.13'", True),
        ("celery==5.7.0 \\\n    --hash=sha256:abc \\\n    --hash=sha256:def", True),
        ("celery==5.7.0 --config-settings=a=b", True),
        ("shop @ https://example.org/shop-1.0-py3-none-any.whl#egg=shop", True),
        ("shop @ git+https://example.org/shop@3f2a", True),
        ("git+https://example.org/shop@3f2a#egg=shop", True),
        ("--extra-index-url https://example.org/simple", True),
        ("./lib", True),
        ("celery", False),
        ("celery>=5.7", False),
        ("celery~=5.7.0", False),
        ("celery==5.7.*", False),
        ("celery>=5; python_version == '3.11'", False),
        ("shop @ git+https://robot:tok3n@example.org/shop", False),
        ("shop @ git+ssh://git@example.org/shop", False),
        ("git+https://example.org/shop#egg=shop@v1", False),
    ],
)
def test_what_may_be_another_version_tomorrow(tmp_path: Path, line: str, pinned: bool) -> None:
    write(tmp_path, {"requirements.txt": f"redis==8.1.0\n{line}\n", "lib/setup.py": ""})

    told = requirements_file.unpinned(read(tmp_path / "requirements.txt", tmp_path))

    assert told == ([] if pinned else [f"{line.replace('robot:tok3n@', '')} (requirements.txt:2)"])


def test_a_pin_that_another_package_does_not_take(tmp_path: Path) -> None:
    write(tmp_path, {"requirements.txt": "Celery[redis]==5.3.0\nkombu==5.4.2\nredis\n-c c.txt\n", "c.txt": "redis==4.0\n"})

    found = requirements_file.conflicts(read(tmp_path / "requirements.txt", tmp_path), ["celery>=5.4,<5.8", "kombu>=5.4", "redis>=5"])

    assert found == [
        "Celery==5.3.0 (requirements.txt:1), but it takes celery<5.8,>=5.4",
        "redis==4.0 (c.txt:1), but it takes redis>=5",
    ]
