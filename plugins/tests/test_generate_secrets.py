"""Tests of `make secrets`: the action plugin `generate_secrets`, with vault files that ansible-vault itself made."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from action import generate_secrets
from helpers import REPOSITORY

BIN = Path(sys.executable).parent
EXAMPLE = "---\n# Names of secrets.\nvault_one:\nvault_two: # the second\nvault_webhook: https://hooks.example.org/services\n"
VALUE = "nX7cY2pK9mQ4wL8vD3fG6hJ1"
PRESENT = "---\n# Mine.\nvault_one: kept-as-it-is # really\n"


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    folder = tmp_path / "inventory"
    (folder / "group_vars/all").mkdir(parents=True)
    (folder / "group_vars/all/vault.yml.example").write_text(EXAMPLE)
    for name in ("first", "second"):
        (tmp_path / name).write_text(f"password of {name}\n")
    return folder


def vault(inventory: Path) -> Path:
    return inventory / "group_vars/all/vault.yml"


def ansible_vault(*arguments: str | Path, folder: Path) -> str:
    return subprocess.run([BIN / "ansible-vault", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def command(inventory: Path, *options: str) -> list[str | Path]:
    """Return what `make secrets` runs; the Makefile itself is read for it."""
    (recipe,) = [line for line in (REPOSITORY / "Makefile").read_text().splitlines() if "generate_secrets.yml" in line]
    words = recipe.replace("$(BIN)", str(BIN)).replace("$(CURDIR)/inventories/$(ENV)", str(inventory)).lstrip("\t@").split()
    assert words[-1] == "$(ARGS)"
    return [*words[:-1], *options]


def make_secrets(inventory: Path, *options: str, **environment: str) -> tuple[int, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    inherited |= {"ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "COLUMNS": "500"}
    completed = subprocess.run(
        command(inventory, *options),
        env=inherited | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    return completed.returncode, " ".join((completed.stdout + completed.stderr).split())


def test_a_new_file_is_the_example_with_random_values_for_its_owner_only(inventory: Path) -> None:
    code, output = make_secrets(inventory)

    text = vault(inventory).read_text()
    values = yaml.safe_load(text)
    assert code == 0, output
    assert len(values["vault_one"]) == len(values["vault_two"]) == 40
    assert values["vault_one"] != values["vault_two"]
    assert text == EXAMPLE.replace("one:", f"one: {values['vault_one']}").replace("two:", f"two: {values['vault_two']}")
    assert vault(inventory).stat().st_mode & 0o777 == 0o600
    assert "plain text" in output
    assert values["vault_one"] not in output

    # As README says it; the names that come later are then added to the encrypted file.
    ansible_vault("encrypt", "--vault-password-file", "first", vault(inventory), folder=inventory.parent)
    before = vault(inventory).read_bytes()
    assert make_secrets(inventory, "--vault-password-file", str(inventory.parent / "first"))[0] == 0
    assert vault(inventory).read_bytes() == before


@pytest.mark.parametrize(
    ("encrypted_with", "given", "header"),
    [
        ("first", ["--vault-password-file", "{}/first"], "$ANSIBLE_VAULT;1.1;AES256"),
        ("prod@first", ["--vault-id", "prod@{}/first"], "$ANSIBLE_VAULT;1.2;AES256;prod"),
        ("prod@first", ["--vault-password-file", "{}/first"], "$ANSIBLE_VAULT;1.2;AES256;prod"),
        ("prod@first", ["--vault-id", "dev@{}/second", "--vault-id", "prod@{}/first"], "$ANSIBLE_VAULT;1.2;AES256;prod"),
    ],
)
def test_an_encrypted_file_stays_encrypted_with_its_vault_id(inventory: Path, encrypted_with: str, given: list[str], header: str) -> None:
    vault(inventory).write_text(PRESENT)
    vault(inventory).chmod(0o640)
    ansible_vault("encrypt", "--vault-id", encrypted_with, vault(inventory), folder=inventory.parent)
    vault(inventory).chmod(0o640)

    code, output = make_secrets(inventory, *(word.format(inventory.parent) for word in given))

    assert code == 0, output
    assert vault(inventory).read_text().splitlines()[0] == header
    assert vault(inventory).stat().st_mode & 0o777 == 0o640
    text = ansible_vault("view", "--vault-id", encrypted_with, vault(inventory), folder=inventory.parent)
    assert text.startswith(PRESENT + "vault_two: ")
    # The example's own value, where it has one.
    assert text.endswith("\nvault_webhook: https://hooks.example.org/services\n")
    assert set(yaml.safe_load(text)) == {"vault_one", "vault_two", "vault_webhook"}
    assert "vault_two" in output
    assert yaml.safe_load(text)["vault_two"] not in output


@pytest.mark.parametrize(
    ("encrypted_with", "given", "told"),
    [
        (
            "prod@first",
            [],
            'is encrypted with the vault ID prod: give its password with ARGS=--ask-vault-pass or ARGS="--vault-id prod@FILE"',
        ),
        ("first", [], 'is encrypted: give its password with ARGS=--ask-vault-pass or ARGS="--vault-password-file FILE"'),
        ("prod@first", ["--vault-password-file", "{}/second"], "No vault password that was given opens"),
    ],
)
def test_without_its_password_an_encrypted_file_is_left_as_it_is(inventory: Path, encrypted_with: str, given: list[str], told: str) -> None:
    vault(inventory).write_text(PRESENT)
    ansible_vault("encrypt", "--vault-id", encrypted_with, vault(inventory), folder=inventory.parent)
    before = vault(inventory).read_bytes()

    code, output = make_secrets(inventory, *(word.format(inventory.parent) for word in given))

    assert code != 0
    assert told in output
    assert vault(inventory).read_bytes() == before


def test_a_password_that_is_typed(inventory: Path) -> None:
    vault(inventory).write_text(PRESENT)
    ansible_vault("encrypt", "--vault-password-file", "first", vault(inventory), folder=inventory.parent)

    child, terminal = pty.fork()
    if child == 0:
        os.chdir(REPOSITORY)
        os.environ["ANSIBLE_CONFIG"] = str(REPOSITORY / "ansible.cfg")
        words = [str(word) for word in command(inventory, "--ask-vault-pass")]
        os.execv(words[0], words)
    output = b""
    while True:
        try:
            output += os.read(terminal, 1024)
        except OSError:
            break
        if output.endswith(b"Vault password: "):
            os.write(terminal, b"password of first\n")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, output.decode()

    assert vault(inventory).read_text().startswith("$ANSIBLE_VAULT;1.1;AES256\n")
    assert "vault_two" in ansible_vault("view", "--vault-password-file", "first", vault(inventory), folder=inventory.parent)


def test_a_new_file_is_encrypted_if_a_password_is_given(inventory: Path) -> None:
    first, second = inventory.parent / "first", inventory.parent / "second"
    assert make_secrets(inventory, "--check", "--vault-id", f"prod@{first}")[0] == 0
    assert not vault(inventory).exists()

    code, output = make_secrets(inventory, "--vault-id", f"prod@{first}", "--vault-id", f"dev@{second}")
    assert code != 0
    assert "ANSIBLE_VAULT_ENCRYPT_IDENTITY" in output
    assert not vault(inventory).exists()

    identity = {"ANSIBLE_VAULT_ENCRYPT_IDENTITY": "dev"}
    code, output = make_secrets(inventory, "--vault-id", f"prod@{first}", "--vault-id", f"dev@{second}", **identity)
    assert code == 0, output
    assert vault(inventory).read_text().startswith("$ANSIBLE_VAULT;1.2;AES256;dev\n")
    assert vault(inventory).stat().st_mode & 0o777 == 0o600
    assert "vault_one" in ansible_vault("view", "--vault-id", "dev@second", vault(inventory), folder=inventory.parent)


def test_values_that_are_encrypted_one_by_one_and_names_of_other_files_stay(inventory: Path) -> None:
    inline = ansible_vault("encrypt_string", "--vault-id", "prod@first", "--name", "vault_one", "x", folder=inventory.parent)
    vault(inventory).write_text(inline)
    (inventory / "group_vars/redis.yml").write_text("vault_two: set elsewhere\nvault_webhook: here, too\n")
    assert make_secrets(inventory)[0] == 0
    assert vault(inventory).read_text() == inline

    (inventory / "group_vars/redis.yml").unlink()
    assert make_secrets(inventory)[0] == 0
    assert vault(inventory).read_text().startswith(inline.rstrip("\n") + "\nvault_two: ")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", ""),
        ("# no newline", "# no newline\n"),
        ("vault_one: |\n  vault_two:\n", "vault_one: |\n  vault_two:\n"),
        ("a: {b: c}\n\n", "a: {b: c}\n\n"),
    ],
)
def test_lines_that_are_there_stay(text: str, kept: str) -> None:
    result = generate_secrets.filled(text, {"vault_two": VALUE})

    assert result.startswith(f"{kept}vault_two: ")
    assert len(result) == len(kept) + len(f"vault_two: {VALUE}\n")


def test_a_name_without_value_gets_one_in_its_line() -> None:
    text = "vault_one:\nvault_two:   # second\nvault_three: x\n"

    assert generate_secrets.filled(text, {"vault_one": VALUE, "vault_two": VALUE}) == (
        f"vault_one: {VALUE}\nvault_two: {VALUE}   # second\nvault_three: x\n"
    )


@pytest.mark.parametrize("value", ["", "https://example.org/a#b", "a: b", "yes", "12", "a\\1 # b", 'quoted "x"', VALUE])
def test_a_value_is_written_as_what_it_is(value: str) -> None:
    for text in ("", "vault_one:\n"):
        assert yaml.safe_load(generate_secrets.filled(text, {"vault_one": value})) == {"vault_one": value}


@pytest.mark.parametrize("text", ["{vault_one: x}\n", "vault_one: x\n...\n", "--- {vault_one: x}\n"])
def test_a_file_that_lines_cannot_be_added_to_is_left_as_it_is(text: str) -> None:
    with pytest.raises(ValueError, match="add these yourself: vault_two"):
        generate_secrets.filled(text, {"vault_two": VALUE})


def test_an_error_in_the_file_does_not_show_its_secrets(inventory: Path) -> None:
    vault(inventory).write_text("vault_one: 'kept-as-it-is\n")
    code, output = make_secrets(inventory)

    assert code != 0
    assert "is not YAML" in output
    assert "kept-as-it-is" not in output


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path, call: str) -> None:
    path = tmp_path / "vault.yml"
    path.write_text("old")
    code = f"""
import os, signal, sys
from pathlib import Path
from action import generate_secrets
os.{call} = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
generate_secrets.replace(Path(sys.argv[1]), b"new")
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "plugins")}
    assert subprocess.run([sys.executable, "-c", code, path], env=environment).returncode == -signal.SIGKILL

    assert path.read_text() == "old"
    # What is left over is read neither by Ansible nor by git.
    (left,) = set(tmp_path.iterdir()) - {path}
    assert left.name.startswith(".vault.yml.")
    ignored = REPOSITORY / "inventories/shop/group_vars/all" / left.name
    assert subprocess.run(["git", "check-ignore", "--quiet", ignored], cwd=REPOSITORY).returncode == 0


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "vault.yml").symlink_to("real")
    generate_secrets.replace(tmp_path / "vault.yml", b"new")

    assert (tmp_path / "vault.yml").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
