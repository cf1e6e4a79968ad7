"""The files of a role in one run: the module on its own, as Ansible runs it on a host, and the action plugin in a playbook."""

from __future__ import annotations

import base64
import grp
import json
import os
import pwd
import signal
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import REPOSITORY

MODULE = REPOSITORY / "plugins/modules/config_files.py"
#: Who runs the tests, so that they need not be root.
ME = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}
SECRET = "s3cret-that-nobody-sees"


def file(path: Path, content: str, **options: Any) -> dict[str, Any]:
    """Return a file as the action plugin sends it to the module."""
    given = {"path": str(path), "state": "file", "content": content, "mode": "0644", "target": None, "only": False, "secret": False}
    return {**given, "validate": None, **ME, **options}


def folder(path: Path, names: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    """Return a folder as the action plugin sends it to the module."""
    return file(path, "", **{"state": "directory", "mode": "0755", "names": list(names), **options})


def start(entries: list[dict[str, Any]], check: bool = False) -> subprocess.Popen[str]:
    """Start the module."""
    payload = base64.b64encode(zlib.compress(json.dumps(entries).encode())).decode()
    arguments = json.dumps({"ANSIBLE_MODULE_ARGS": {"payload": payload, "_ansible_check_mode": check}})
    process = subprocess.Popen([sys.executable, MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin
    process.stdin.write(arguments)
    process.stdin.close()
    return process


def run(*entries: dict[str, Any], check: bool = False) -> dict[str, Any]:
    """Run the module; return what it answers."""
    process = start(list(entries), check)
    assert process.stdout
    assert process.stderr
    with process:
        out, error = process.stdout.read(), process.stderr.read()
    assert out.strip(), error
    return dict(json.loads(out))


def hidden(top: Path) -> list[Path]:
    """Return the partial files below a folder."""
    return list(top.rglob(".*"))


def test_what_differs_is_written_and_nothing_else(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("gone")
    entries = [
        file(tmp_path / "a/b/text", "naïve\n", mode="0640"),
        folder(tmp_path / "private", mode="0700"),
        file(tmp_path / "private/key", SECRET, mode="0600", secret=True),
        file(tmp_path / "link", "", state="link", target="a/b"),
        file(old, "", state="absent"),
    ]
    wanted = {"a/b/text": "created", "private": "created", "private/key": "created", "link": "created", "old": "removed"}

    would = run(*entries, check=True)
    assert would["paths"] == {str(tmp_path / name): what for name, what in wanted.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["old"]

    done = run(*entries)
    assert done["paths"] == would["paths"]
    assert (tmp_path / "a/b/text").read_text() == "naïve\n"
    assert (tmp_path / "link").readlink() == Path("a/b")
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b/text", "private", "private/key")}
    assert modes == {"a": 0o755, "a/b/text": 0o640, "private": 0o700, "private/key": 0o600}
    assert SECRET not in json.dumps(done)
    assert [entry["after"] for entry in done["diff"]] == ["naïve\n", "a/b"]

    before = (tmp_path / "a/b/text").stat()
    assert run(*entries)["changed"] is False
    assert run(*entries, check=True)["changed"] is False
    assert (tmp_path / "a/b/text").stat() == before


def test_globs_name_what_is_to_go_but_not_what_the_same_run_writes(tmp_path: Path) -> None:
    for unit in ("a", "b", "c"):
        (tmp_path / unit).mkdir()
        (tmp_path / unit / "ours.conf").write_text("x")
    (tmp_path / "c/theirs.conf").write_text("x")
    entries = [file(tmp_path / "a/ours.conf", "x"), file(tmp_path / "*/ours.conf", "", state="absent")]
    gone = {str(tmp_path / unit / "ours.conf"): "removed" for unit in ("b", "c")}
    assert run(*entries, check=True)["paths"] == gone
    assert run(*entries)["paths"] == gone
    assert sorted(path.parent.name + "/" + path.name for path in tmp_path.rglob("*.conf")) == ["a/ours.conf", "c/theirs.conf"]
    assert run(*entries)["changed"] is False


def test_permissions_are_put_right(tmp_path: Path) -> None:
    entries = [folder(tmp_path / "private", mode="0700"), file(tmp_path / "private/key", SECRET, mode="0600", secret=True)]
    run(*entries)
    (tmp_path / "private").chmod(0o755)
    (tmp_path / "private/key").chmod(0o644)
    wanted = {str(tmp_path / "private"): "permissions", str(tmp_path / "private/key"): "permissions"}
    assert run(*entries, check=True)["paths"] == wanted
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o755
    assert run(*entries)["paths"] == wanted
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "private", tmp_path / "private/key")] == [0o700, 0o600]


def test_a_folder_has_only_what_is_named(tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    (rules / "kept").mkdir(parents=True)
    for name in ("old.yml", "kept/inner"):
        (rules / name).write_text("x")
    (rules / "link").symlink_to("kept")
    entries = [folder(rules, ["new.yml"], only=True), file(rules / "new.yml", "y")]
    wanted = {str(rules / "old.yml"): "removed", str(rules / "link"): "removed", str(rules / "new.yml"): "created"}
    assert run(*entries, check=True)["paths"] == wanted
    assert len(list(rules.iterdir())) == 3
    assert run(*entries)["paths"] == wanted
    assert sorted(path.name for path in rules.iterdir()) == ["kept", "new.yml"]
    assert (rules / "kept/inner").exists()


def test_a_link_in_the_way_is_replaced_and_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("of somebody else")
    (tmp_path / "file").symlink_to(other)
    run(file(tmp_path / "file", "ours"))
    assert other.read_text() == "of somebody else"
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_text() == "ours"


@pytest.mark.parametrize("state", ["file", "link"])
def test_a_folder_in_the_way_is_left(tmp_path: Path, state: str) -> None:
    (tmp_path / "taken").mkdir()
    result = run(file(tmp_path / "first", "x"), file(tmp_path / "taken", "x", state=state, target="y"))
    assert result["failed"]
    assert result["msg"] == f"{tmp_path / 'taken'} is a folder"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_one_file_that_is_not_valid_leaves_all_as_they_were(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    result = run(
        file(tmp_path / "a", "new", validate="grep -q new %s"), file(tmp_path / "b", "new", validate="sh -c 'echo bad; exit 1' %s")
    )
    assert result["failed"]
    assert f"{tmp_path / 'b'} would not be valid, so no file was changed.\nbad" in result["msg"]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}


def test_a_user_that_does_not_exist_matters_only_outside_check_mode(tmp_path: Path) -> None:
    entry = file(tmp_path / "a", "x", owner="nobody-of-this-name")
    assert run(entry, check=True)["paths"] == {str(tmp_path / "a"): "created"}
    result = run(entry)
    assert f"{tmp_path / 'a'}: " in result["msg"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_killed_while_it_prepares_changes_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    entries = [file(tmp_path / "a", "new"), file(tmp_path / "b", "new", validate="sh -c 'kill -9 $PPID' %s")]
    with start(entries) as process:
        assert process.wait(20) == -signal.SIGKILL
    assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["old", "old"]
    assert hidden(tmp_path)
    # Also what is no longer wanted goes, or is what another run wrote meanwhile.
    run(file(tmp_path / "a", "old"), file(tmp_path / "b", "new"))
    assert not hidden(tmp_path)


def test_a_run_that_is_killed_while_it_writes_leaves_files_that_are_old_or_new(tmp_path: Path) -> None:
    old, new = "old" * 100_000, "new" * 100_000
    paths = [tmp_path / f"{number}" for number in range(40)]
    entries = [file(path, new) for path in paths]
    # On a busy machine this process may not come to its turn before all are written.
    for _ in range(20):
        for path in paths:
            path.write_text(old)
        former = paths[0].stat()
        with start(entries) as process:
            while (now := paths[0].stat()).st_ino == former.st_ino and now.st_mtime_ns == former.st_mtime_ns:
                time.sleep(0.0001)
            process.send_signal(signal.SIGSTOP)
            # As whoever reads one meanwhile.
            seen = {path.read_text() for path in paths}
            process.kill()
        seen |= {path.read_text() for path in paths}
        assert {text[:3] + text[-3:] for text in seen - {old, new}} == set()
        if old in seen:
            break
    else:
        pytest.fail("no run was killed while it wrote")
    assert run(*entries)["changed"]
    assert {path.read_text() for path in paths} == {new}
    assert not hidden(tmp_path)


# --- The action plugin ---


def play(tmp_path: Path, tasks: list[list[dict[str, Any]]], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the action for each list of files, whatever becomes of it, in a role that has a template and files."""
    role = tmp_path / "roles/one"
    for name, text in {
        "tasks/main.yml": yaml.safe_dump([{"config_files": {"files": files}, "ignore_errors": True} for files in tasks]),
        "templates/plain.j2": "{{ ansible_managed }}\n{{ word }} {{ own | default('none') }}\n{% if true %}\nlast\n{% endif %}\n",
        "templates/angle.j2": "{{ left }} << word >>\n",
        "templates/empty.j2": "{% if false %}\nx\n{% endif %}\n",
        "templates/broken.j2": "{{ unknown }}",
        "files/some/a.txt": "a {{ word }}",
        "files/some/b.txt": "b",
    }.items():
        (role / name).parent.mkdir(parents=True, exist_ok=True)
        (role / name).write_text(text)
    (tmp_path / "play.yml").write_text(yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "roles": ["one"]}]))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    environment |= {
        "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_ROLES_PATH": str(tmp_path / "roles"),
    }
    command = [Path(sys.executable).with_name("ansible-playbook"), "-i", "localhost,", "-c", "local", "play.yml", "-e", "word=W"]
    command += ["-e", f"ansible_python_interpreter={sys.executable}", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=60)


def test_templates_are_rendered_and_secrets_are_shown_nowhere(tmp_path: Path) -> None:
    top = tmp_path / "host"
    files = [
        {"path": f"{top}/plain", "template": "plain.j2", "vars": {"own": "{{ word }}!"}, **ME},
        {"path": f"{top}/angle", "template": "angle.j2", "delimiters": "angle", **ME},
        {"path": f"{top}/empty", "template": "empty.j2", **ME},
        {"path": f"{top}/some", "source": "some", "only": True, **ME},
        {"path": f"{top}/texts", "contents": {"x": "{{ word }}"}, "mode": "0600", "directory_mode": "0700", **ME},
        {"path": f"{top}/secret", "content": SECRET, "secret": True, **ME},
        {"path": f"{top}/left-out", "content": "x", "when": "{{ word == 'V' }}", **ME},
    ]
    first = play(tmp_path, [files], "--diff", "-vvv")
    assert "changed=1 " in first.stdout
    assert "failed=0" in first.stdout
    shown = first.stdout + first.stderr
    assert "+W W!" in shown
    assert SECRET not in shown
    assert not [path for path in shown.split() if len(path) > 500], "the payload is shown"
    texts = {str(path.relative_to(top)): path.read_text() for path in top.rglob("*") if path.is_file()}
    assert texts == {
        "plain": "Ansible managed\nW W!\nlast\n",
        "angle": "{{ left }} W\n",
        "empty": "",
        "some/a.txt": "a {{ word }}",
        "some/b.txt": "b",
        "texts/x": "W",
        "secret": SECRET,
    }
    assert [stat.S_IMODE((top / name).stat().st_mode) for name in ("texts", "texts/x")] == [0o700, 0o600]
    assert "changed=0 " in play(tmp_path, [files]).stdout


WRONG = {
    "each of the files needs an absolute path": {"path": "etc/x", "content": ""},
    "/x has owned, which is unknown": {"path": "/x", "content": "", "owned": "root"},
    "when of /x must be true or false": {"path": "/x", "content": "", "when": "yes, please"},
    "/x needs one of template": {"path": "/x", "content": "", "template": "plain.j2"},
    "/x has no content": {"path": "/x", "state": "file"},
    'mode of /x must be octal digits in quotes, such as "0640"': {"path": "/x", "content": "", "mode": 420},
    "cannot have a file with the name '../x'": {"path": "/x", "contents": {"../x": ""}},
    "broken.j2, for /x: ": {"path": "/x", "template": "broken.j2"},
}


def test_what_is_wrong_with_an_entry_is_told(tmp_path: Path) -> None:
    result = play(tmp_path, [[entry] for entry in WRONG.values()] + [[{"path": "/x", "state": "absent"}] * 2, []])
    assert "changed=0 " in result.stdout
    # Ansible wraps what it shows.
    shown = " ".join(result.stdout.split())
    for message in (*WRONG, "more than one entry for /x", "takes files, at least one"):
        assert " ".join(message.split()) in shown, message
