"""Tests of the module `celery_build`: real virtual environments and pip, with packages of our own and no index."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible.module_utils import requirements_file

from helpers import REPOSITORY
from helpers.targets import only_in_test_all
from modules import celery_build, celery_release

#: Builds a wheel of what stands in its pyproject.toml, without help of any other package.
BACKEND = """
import tomllib, zipfile
def build_wheel(folder, settings=None, metadata=None):
    project = tomllib.load(open("pyproject.toml", "rb"))["project"]
    name, version = project["name"], project["version"]
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {one}\\n" for one in project.get("dependencies", []))
    with zipfile.ZipFile(f"{folder}/{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}_code.py", f"version = {version!r}\\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        scripts = "".join(f"{key} = {value}\\n" for key, value in project.get("scripts", {}).items())
        wheel.writestr(f"{info}/entry_points.txt", f"[console_scripts]\\n{scripts}")
        wheel.writestr(f"{info}/RECORD", "")
    return f"{name}-{version}-py3-none-any.whl"
"""


def project(name: str, version: str, *needs: str, scripts: str = "") -> dict[str, str]:
    """Return the files of a project that can be built."""
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    own = f'[project]\nname = "{name}"\nversion = "{version}"\ndependencies = {json.dumps(needs)}\n{scripts}'
    return {"pyproject.toml": build + own, "backend.py": BACKEND}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


class Site:
    """An application, the runtime package, and an index with what both need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = folder / "index"
        self.index.mkdir()
        self.source = write(folder / "shop", {"shop.py": "x = 1\n"})
        self.runtime = write(
            folder / "runtime", project("runtime", "1.0", "queue>=5.4,<5.8", "client") | {"constraints.txt": "client==8.0\n"}
        )
        for version in ("5.3", "5.5", "5.7"):
            self.wheel("queue", version)
        for version in ("6.0", "8.0", "9.0"):
            self.wheel("client", version)

    def wheel(self, name: str, version: str, *needs: str, tag: str = "py3-none-any") -> str:
        """Put a wheel into the index; return its hash."""
        info, path = f"{name}-{version}.dist-info", self.index / f"{name}-{version}-{tag}.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            required = "".join(f"Requires-Dist: {one}\n" for one in needs)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}")
            wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: {tag}\n")
            digest = base64.urlsafe_b64encode(hashlib.sha256(b"").digest()).rstrip(b"=").decode()
            wheel.writestr(f"{name}.py", "")
            wheel.writestr(f"{info}/RECORD", f"{name}.py,sha256={digest},0\n")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def build(
        self, requirements: str, *, python: str = "python3", environment: dict[str, str] | None = None, **options: object
    ) -> list[str]:
        """Build a release of it as the role does; return the warnings."""
        write(self.source, {"requirements.txt": requirements})
        lines = requirements_file.read(self.source / "requirements.txt", self.source)
        files = celery_release.chosen_files(self.source)
        packed = celery_release.pack(celery_release.contents(self.source, lines, self.runtime, files, **options))  # type: ignore[arg-type]
        archive = self.folder / "release.tar.gz"
        archive.write_bytes(packed)
        self.release = self.folder / "releases" / hashlib.sha256(packed).hexdigest()[:12]
        try:
            return celery_build.build(
                self.release,
                archive,
                python=python,
                environment=environment or {},
                group="root",
                mode="0750",
                note="git+https://robot:tok3n@example.org/shop@v1",
            )
        finally:
            assert not archive.exists()

    def python(self, code: str) -> str:
        """Run Python in the environment, from elsewhere."""
        command = [self.release / "venv/bin/python", "-I", "-c", code]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout.strip()

    def version(self, name: str) -> str:
        return self.python(f"from importlib.metadata import version; print(version({name!r}))")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return Site(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let environments use the pip of the tests; to install one takes longer than all the rest of a build."""
    run = celery_build.Release.run

    def run_quickly(release: celery_build.Release, command: list[str]) -> str:
        if command != ["python3", "-m", "venv", "venv"]:
            return run(release, command)
        told = run(release, [*command, "--without-pip"])
        pip = release.path / "venv/bin/pip"
        pip.write_text(f'#!/bin/sh\nexec {sys.executable} -m pip --python {release.path}/venv/bin/python "$@"\n')
        pip.chmod(0o755)
        return told

    monkeypatch.setattr(celery_build.Release, "run", run_quickly)


def test_the_pins_of_the_application_are_installed_and_its_folder_too(site: Site) -> None:
    write(site.source, project("shop", "3.1", scripts='scripts = { shop = "shop_code:main" }\n') | {"src/deep/inner.py": "x = 2\n"})
    write(site.source, {"constraints.txt": "client==6.0\n"})

    warnings = site.build("queue==5.5\n-c constraints.txt\n", python_path=["src"])

    assert (site.version("queue"), site.version("client"), site.version("shop"), warnings) == ("5.5", "6.0", "3.1", [])
    assert (site.release / "venv/bin/shop").exists()
    # A folder of the source, without any setting of its environment.
    assert site.python("import deep.inner; print(deep.inner.x)") == "2"
    assert not (site.release / "source").exists()
    # Tokens of private indexes and repositories.
    assert (site.release / ".complete").read_text() == "git+https://example.org/shop@v1\n"
    for name in ("requirements.txt", "constraints.txt", "indexes.txt"):
        assert (site.release / name).stat().st_mode & 0o777 == 0o600
    assert site.release.stat().st_mode & 0o777 == 0o750
    assert (site.release / "app/shop.py").stat().st_mode & 0o777 == 0o644


@pytest.mark.usefixtures("quick")
def test_a_conflict_with_the_runtime_package_is_an_error_with_both_versions_file_and_line(site: Site) -> None:
    site.wheel("kit", "1.0", "queue<5.4")

    with pytest.raises(celery_build.BuildError) as told:
        site.build("# what it needs\nkit==1.0\nqueue==5.3\n")

    assert "The user requested queue==5.3 (requirements.txt:3)" in str(told.value)
    assert "runtime 1.0 depends on queue<5.8 and >=5.4" in str(told.value)
    assert not site.release.exists()


@pytest.mark.usefixtures("quick")
def test_pins_win_over_the_versions_that_the_runtime_package_is_tested_with(site: Site) -> None:
    site.wheel("kit", "1.0", "client>=9")

    warnings = site.build("kit==1.0\nqueue==5.7\n")

    assert site.version("client") == "9.0"
    assert "runtime/constraints.txt" in warnings[0]


@pytest.mark.usefixtures("quick")
def test_hashes_are_asked_for_and_nothing_of_them_is_replaced(site: Site) -> None:
    client = hashlib.sha256((site.index / "client-6.0-py3-none-any.whl").read_bytes()).hexdigest()
    site.build(f"client==6.0 \\\n    --hash=sha256:{client}\n")
    assert (site.version("client"), site.version("queue")) == ("6.0", "5.7")

    with pytest.raises(celery_build.BuildError, match="DO NOT MATCH THE HASHES"):
        site.build(f"client==8.0 --hash=sha256:{client}\n")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("1.0", ["no release of native==1.0 (requirements.txt:1)", f"Python {sys.version.split()[0]}", "python_version =="]),
        ("2.0", ["built from source: native (requirements.txt:1).", "has no wheel", "celery_app_build_packages", "no compiler here"]),
    ],
)
def test_a_package_without_a_wheel_for_this_python(site: Site, version: str, told: list[str]) -> None:
    site.wheel("native", "1.0", tag="cp27-cp27m-win32")
    source = write(site.folder / "native-2.0", project("native", "2.0") | {"backend.py": "raise SystemExit('no compiler here')\n"})
    subprocess.run(["tar", "-czf", site.index / "native-2.0.tar.gz", "-C", site.folder, source.name], check=True)

    with pytest.raises(celery_build.BuildError) as error:
        site.build(f"native=={version}\n")

    assert [text for text in told if text not in str(error.value)] == []


def replace_with_another(release: celery_build.Release) -> None:
    release.pip("install", "--no-deps", "queue==5.7")


def remove_a_need(release: celery_build.Release) -> None:
    release.pip("uninstall", "--yes", "client")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (replace_with_another, "queue==5.5 (requirements.txt:1), installed is 5.7"),
        (remove_a_need, "runtime 1.0 requires client, which is not installed"),
    ],
)
def test_what_is_installed_is_compared_with_the_pins(
    site: Site, monkeypatch: pytest.MonkeyPatch, change: Callable[[celery_build.Release], None], told: str
) -> None:
    install = celery_build.Release.install

    def install_something_else(release: celery_build.Release) -> None:
        install(release)
        change(release)

    monkeypatch.setattr(celery_build.Release, "install", install_something_else)

    with pytest.raises(celery_build.BuildError) as error:
        site.build("queue==5.5\n")

    assert told in str(error.value)
    assert not site.release.exists()


@pytest.mark.usefixtures("quick")
def test_a_folder_that_cannot_be_built_names_the_setting(site: Site) -> None:
    write(site.source, project("shop", "3.1") | {"backend.py": "raise SystemExit('not in package mode')\n"})

    with pytest.raises(celery_build.BuildError, match=r"(?s)celery_app_install: false.*not in package mode"):
        site.build("queue==5.5\n")

    site.build("queue==5.5\n", install=False)
    assert (site.release / ".complete").exists()


def test_tokens_are_not_in_what_is_told() -> None:
    release = celery_build.Release(Path("/tmp"), "python3", {})

    with pytest.raises(celery_build.BuildError) as error:
        release.run(["sh", "-c", "echo ERROR: cannot read https://robot:tok3n@example.org/simple >&2; exit 1"])

    assert "tok3n" not in str(error.value)
    assert "https://example.org/simple" in str(error.value)


@pytest.mark.usefixtures("quick")
def test_pip_has_the_environment_that_is_given(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(celery_build.BuildError, match=r"No matching distribution found for queue==5\.5"):
        site.build("queue==5.5\n")

    site.build("queue==5.5\n", environment={"PIP_FIND_LINKS": str(site.index)})
    assert site.version("queue") == "5.5"


def test_what_pip_is_given_is_in_no_result(tmp_path: Path) -> None:
    (tmp_path / "archive").write_text("not one")
    login = "https://robot:tok3n@example.org/simple"
    arguments = {"path": str(tmp_path / "releases/one"), "archive": str(tmp_path / "archive"), "python": "tok"}
    arguments |= {"environment": {"PIP_INDEX_URL": login, "PIP_RETRIES": "1", "TMP": str(tmp_path), "TOKEN": "tok3n-of-robot"}}  # type: ignore[dict-item]
    ansible = [Path(sys.executable).with_name("ansible"), "localhost", "-i", "localhost,", "-c", "local", "-vvv"]
    more = ["-e", f"ansible_python_interpreter={sys.executable}", "-m", "celery_build", "-a", json.dumps(arguments)]
    environment = os.environ | {"ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg")}

    told = subprocess.run([*ansible, *more], env=environment, capture_output=True, text=True, check=False)
    assert "cannot build the release, and nothing was switched" in told.stdout
    assert "tok3n" not in told.stdout + told.stderr
    assert "python: tok\n" in told.stdout
    assert f"path: {tmp_path}/releases/one\n" in told.stdout
    assert not list((tmp_path / "releases").glob("[!.]*"))


@pytest.mark.usefixtures("quick")
def test_another_python_than_the_system_s_is_taken_by_its_path(site: Site, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(sys.executable)

    site.build("queue==5.5\n", python=str(tmp_path / "other"))
    assert os.readlink(site.release / "venv/bin/python") in ("other", str(tmp_path / "other"))
    assert site.version("queue") == "5.5"


@only_in_test_all
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("apt-get"), reason="installs a package of Debian")
def test_what_a_build_needs_is_there_only_meanwhile(tmp_path: Path) -> None:
    assert not shutil.which("hello")
    record = tmp_path / "packages"

    def fail() -> None:
        with celery_build.installed_packages(["hello", "bash"], record):
            assert shutil.which("hello")
            raise celery_build.BuildError("no wheel")

    with pytest.raises(celery_build.BuildError, match="no wheel"):
        fail()
    assert not shutil.which("hello")
    assert shutil.which("bash")
    assert not record.exists()

    # As a killed build leaves it.
    celery_build.apt("install", "hello")
    record.write_text("hello\n")
    with celery_build.installed_packages([], record):
        assert shutil.which("hello")
    assert not shutil.which("hello")

    with pytest.raises(celery_build.BuildError, match=r"(?s)celery_app_build_packages\): .*no-such-package"):
        celery_build.installed_packages(["no-such-package"], record).__enter__()
    assert not record.exists()


def test_a_build_of_a_killed_run_that_goes_on_is_waited_for(tmp_path: Path) -> None:
    release = tmp_path / "releases/one"
    release.mkdir(parents=True)
    with (release.parent / ".building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waits = threading.Thread(target=celery_build.build, args=(release, tmp_path / "no.tar.gz"))
        waits.start()
        waits.join(0.5)
        assert waits.is_alive()
        (release / ".complete").touch()
    waits.join(10)
    assert not waits.is_alive()
    assert list(release.iterdir()) == [release / ".complete"]


def test_a_link_chooses_the_release_and_the_one_before_stays(tmp_path: Path) -> None:
    link = tmp_path / "venv"
    for age, name in enumerate(("three", "two", "one"), 1):
        (tmp_path / "releases" / name / "venv").mkdir(parents=True)
        os.utime(tmp_path / "releases" / name, times=(1000 - age, 1000 - age))

    def choose(name: str, check: bool = False) -> bool:
        return celery_build.choose(tmp_path / "releases" / name, link, check)

    assert choose("two", check=True)
    assert not link.is_symlink()
    assert choose("two")
    assert os.readlink(link) == "releases/two/venv"
    assert sorted(os.listdir(tmp_path / "releases")) == ["three", "two"]
    assert not choose("two")

    # Back to the one before.
    assert choose("three", check=True)
    assert choose("three")
    assert os.readlink(link) == "releases/three/venv"
    assert sorted(os.listdir(tmp_path / "releases")) == ["three", "two"]
