"""A host of the layout in which an application's name was in no folder, and applications that are no longer wanted.

With real files and users; systemd does not run here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from modules import celery_revision

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


class Systemd:
    """Notes what it is asked for, and removes units' files."""

    def __init__(self, units: Path) -> None:
        self.units = units
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, *arguments: str) -> None:
        self.calls.append(arguments)

    def remove(self, unit: str) -> None:
        self.calls.append(("remove", unit))
        (self.units / unit).unlink()


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    """Return a host's systemd, beside which the folders of services are below the test's own."""
    state = [tmp_path / "lib", tmp_path / "beat", tmp_path / "log"]
    monkeypatch.setattr(celery_revision, "STATE", tuple(map(str, state)))
    monkeypatch.setattr(celery_revision, "UNITS", str(tmp_path / "units"))
    (tmp_path / "units").mkdir()
    return Systemd(tmp_path / "units")


@pytest.fixture
def earlier(tmp_path: Path, systemd: Systemd) -> celery_revision.Earlier:
    """Lay a host out as before, with an application of the user daemon."""
    for name in ("etc/revisions/1", "etc/credentials", "opt/releases/a", "lib/tmp", "beat", "log", "units/celery-.service.d", "srv/new"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("lib/cache", "lib/tmp/x", "beat/schedule", "log/batch.log", "srv/upload", "units/celery-worker@batch.service"):
        (tmp_path / name).write_text(name)
    for name in ("units/celery-beat.service", "units/celery-orders-beat.service", "units/other.service", "etc/celery.env"):
        (tmp_path / name).write_text(name)
    (tmp_path / "etc/revisions/1/platform.conf").write_text("[Service]\nUser=daemon\n")
    (tmp_path / "etc/revisions/1/release").symlink_to(tmp_path / "opt/releases/a")
    (tmp_path / "etc/current").symlink_to("revisions/1")
    (tmp_path / "opt/current").symlink_to(tmp_path / "etc/current/release")
    (tmp_path / "opt").chmod(0o750)
    for top in ("lib", "beat", "log", "srv/upload"):
        for path in (tmp_path / top, *(tmp_path / top).rglob("*")):
            os.chown(path, 1, 1)
    return celery_revision.Earlier(str(tmp_path / "etc"), systemd)  # type: ignore[arg-type]


def move(earlier: celery_revision.Earlier, folder: Path, **others: Any) -> None:
    wanted = {"application": "orders", "user": "nobody", "releases": f"{folder}/opt/orders/releases", "writable_paths": [f"{folder}/srv"]}
    earlier.move(**(wanted | others))


def tree(folder: Path) -> dict[str, int]:
    """Return the owners of all files and folders of applications, by path."""
    return {str(path.relative_to(folder)): path.lstat().st_uid for top in ("lib", "beat", "log") for path in (folder / top).rglob("*")}


def test_what_an_application_had_becomes_its_own(tmp_path: Path, systemd: Systemd, earlier: celery_revision.Earlier) -> None:
    # systemd has made it already, when the application was checked.
    (tmp_path / "lib/orders/tmp").mkdir(parents=True)
    assert earlier.is_here()
    earlier.let_pass()
    assert (tmp_path / "opt").stat().st_mode & 0o777 == 0o755
    move(earlier, tmp_path)

    assert systemd.calls[0] == ("stop", "celery-beat.service", "celery-worker@batch.service")
    assert sorted(os.listdir(tmp_path / "units")) == ["celery-orders-beat.service", "other.service"]
    nobody = 65534
    owners = tree(tmp_path)
    assert owners.pop("lib/orders") == owners.pop("beat/orders") == owners.pop("log/orders") == 0
    assert owners.pop("lib/orders/tmp") == 0
    files = ("lib/orders/cache", "lib/orders/tmp.earlier", "lib/orders/tmp.earlier/x", "beat/orders/schedule", "log/orders/batch.log")
    assert owners == dict.fromkeys(files, nobody)
    assert (tmp_path / "beat/orders/schedule").read_text() == "beat/schedule"
    assert [(tmp_path / name).stat().st_uid for name in ("lib", "srv/new", "srv/upload")] == [0, 0, nobody]
    assert os.listdir(tmp_path / "etc") == []
    assert os.listdir(tmp_path / "opt") == []
    assert not earlier.is_here()


def test_a_move_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: celery_revision.Earlier) -> None:
    def fails_at(name: str, last: int) -> Callable[..., None]:
        calls, real = iter(range(1, last)), getattr(os, name)

        def call(*arguments: Any, **options: Any) -> None:
            if next(calls, None) is None:
                raise InterruptedError
            real(*arguments, **options)

        return call

    for name, call in product(("rename", "chown", "unlink"), (1, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(celery_revision.os, name, fails_at(name, call))
            with pytest.raises(InterruptedError):
                move(earlier, tmp_path)
        assert earlier.is_here()
    move(earlier, tmp_path)

    assert not earlier.is_here()
    assert {owner for path, owner in tree(tmp_path).items() if path.count("/") > 1} == {65534}
    assert len(tree(tmp_path)) == 8


def test_a_release_that_stays_where_it_is_is_kept(tmp_path: Path, earlier: celery_revision.Earlier) -> None:
    move(earlier, tmp_path, releases=f"{tmp_path}/opt/releases", user="daemon")

    assert (tmp_path / "opt/releases/a").is_dir()
    assert (tmp_path / "srv/upload").stat().st_uid == 1


def test_applications_that_are_not_kept_are_removed(tmp_path: Path, systemd: Systemd) -> None:
    for name in ("shop", "orders"):
        for folder in (f"etc/{name}/revisions/1", f"opt/{name}/releases/a", f"units/celery-{name}-.service.d", f"log/{name}"):
            (tmp_path / folder).mkdir(parents=True)
        (tmp_path / f"etc/{name}/revisions/1/release").symlink_to(tmp_path / f"opt/{name}/releases/a")
        (tmp_path / f"etc/{name}/current").symlink_to("revisions/1")
        (tmp_path / f"opt/{name}/current").symlink_to(tmp_path / f"etc/{name}/current/release")
        (tmp_path / f"units/celery-{name}-worker@a.service").touch()

    def gone(check: bool) -> list[str]:
        return celery_revision.remove_others(str(tmp_path / "etc"), ["orders"], systemd, check)  # type: ignore[arg-type]

    assert gone(check=True) == ["shop"]
    assert systemd.calls == []
    assert gone(check=False) == ["shop"]
    assert systemd.calls == [("remove", "celery-shop-worker@a.service")]
    assert os.listdir(tmp_path / "etc") == ["orders"]
    assert sorted(os.listdir(tmp_path / "units")) == ["celery-orders-.service.d", "celery-orders-worker@a.service"]
    assert os.listdir(tmp_path / "opt/shop") == ["releases"]
    assert (tmp_path / "opt/orders/current").is_symlink()
    assert (tmp_path / "log/shop").is_dir()
    assert gone(check=False) == []
