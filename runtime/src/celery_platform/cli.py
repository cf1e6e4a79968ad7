"""The command `celery-platform`: what is configured, and what has failed for good.

It ends with 0 if all is done, 1 if something is not, 2 if it is called wrongly, and 78 (EX_CONFIG) on bad settings.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
from celery import Celery
from celery.exceptions import BackendError
from kombu import serialization
from kombu.entity import Queue
from kombu.exceptions import KombuError

from celery_platform import application, broker, configuration
from celery_platform.dead_letters import REASONS, DeadLetter, Letters, Store, StoreError, store_of
from celery_platform.logs import secrets_of
from celery_platform.queue_status import queues
from celery_platform.settings import FIELDS, MASK, PREFIX, BadSettings, Settings, as_written, is_secret, load_settings

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.group()
def main() -> None:
    """Look after a site's Celery services."""


# --- config ---


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def config(as_json: bool) -> None:
    """Print the effective configuration, without secrets, and where each value comes from."""
    settings = _settings()
    with application.explained():
        app = application.find(settings.application)
        in_force = configuration.with_own(app, settings)
        choices = configuration.apply(app, settings)
    hide = hider(settings)
    ours = [(PREFIX + name.upper(), hide(_own(settings, name)), _source(name)) for name in FIELDS]
    rows = [{"name": name, "value": value, "source": source} for name, value, source in ours]
    for choice in configuration.in_force(choices, in_force):
        row = {"name": choice.name, "value": hide(choice.value), "source": choice.source}
        rows.append(row | ({"overridden": hide(choice.overridden), "reason": hide(choice.reason)} if choice.reason else {}))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        columns = ("name", "value", "source", "overridden")
        _print_table(("Name", "Value", "From", "Overruled"), [[_shown(row.get(column)) for column in columns] for row in rows])


def _own(settings: Settings, name: str) -> Any:
    value = getattr(settings, name)
    if is_secret(name):
        return value and MASK
    return as_written(value)


def _source(name: str) -> str:
    if is_secret(name):
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        return "credential" if folder and os.path.exists(os.path.join(folder, name)) else "default"
    return "environment" if PREFIX + name.upper() in os.environ else "default"


def hider(settings: Settings) -> Callable[[Any], Any]:
    """Return a function that makes any value one of JSON, without secrets.

    Hidden are what belongs to a key `password`, passwords in URLs, and every text that holds a secret of this process.
    """
    written = sorted({form for secret in secrets_of(settings) for form in (secret, quote(secret, safe=""))}, key=len, reverse=True)

    def hide(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): MASK if "password" in str(key) and item else hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple, set)):
            return [hide(item) for item in value]
        if isinstance(value, Enum):
            return value.name
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, Queue):
            return hide(value.name)
        text = re.sub(r"(://[^/@\s:]*):[^/@\s]*@", rf"\1:{MASK}@", str(value))
        if callable(value):
            text = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        for secret in written:
            text = text.replace(secret, MASK)
        return text

    return hide


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- check, round-trip ---


@main.command()
def check() -> None:
    """Load all that a worker loads before it consumes, and tell why it could not start. Its broker need not be there."""
    settings = _settings()
    if clusters := broker.redis_clusters(settings):
        which = " and the ".join(clusters)
        raise click.ClickException(f"The {which} is a Redis Cluster, which Celery cannot use; allowed: one Redis, or Sentinel")
    from celery_platform.worker import app

    with application.explained():
        tasks = application.load_tasks(app)
    click.echo(f"ok: {len(tasks)} tasks of {settings.application}")


@main.command("round-trip")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=30, show_default=True, help="Seconds for all answers.")
def round_trip(timeout: float) -> None:
    """Send a task of ours to each queue, and print how long each worker's answer takes."""
    from celery_platform import round_trip as ours

    settings = _settings()
    from redis import RedisError

    from celery_platform.worker import app

    names = [queue.name for queue in settings.queues]
    missing = []
    try:
        for answer in ours.ping_queues(app, names, timeout):
            if answer.seconds is not None:
                told = f"{answer.seconds * 1000:.0f} ms"
            else:
                told = answer.error or "sent; there is no result backend, so whether a worker answers is not known"
            if answer.error:
                missing.append(answer.queue)
            click.echo(f"{answer.queue}: {_printable(hider(settings)(told))}")
    except (KombuError, RedisError, BackendError, OSError) as error:
        raise click.ClickException(f"The broker or the result backend cannot be reached: {hider(settings)(error)}") from error
    if missing:
        raise click.ClickException(f"no answer from {', '.join(missing)}")


@main.command("generate-key")
def generate_key() -> None:
    """Print a new key for the credential `encryption_keys`."""
    from celery_platform import serialization as ours

    click.echo(ours.generate_key())


# --- dead letters ---


@main.group("dead-letters")
def dead_letters() -> None:
    """Tasks that failed for good."""


def _since(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]+)([smhd])", value)
    if not found:
        raise click.BadParameter("allowed: a number with s, m, h or d, as in 2h")
    return time.time() - int(found[1]) * UNITS[found[2]]


def _filters(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--queue", help="Only those of this queue."),
        click.option("--task", help="Only those of this task; * and ? are allowed."),
        click.option("--since", callback=_since, help="Only those that failed in this time: 30m, 2h, 7d."),
        click.option("--reason", type=click.Choice(REASONS), help="Only those that failed for this reason."),
    ):
        command = option(command)
    return command


def _chosen(letters: Letters, queue: str | None, task: str | None, since: float | None, reason: str | None) -> Letters:
    return [
        letter
        for letter in letters
        if queue in (None, letter.original.queue)
        and (task is None or fnmatch.fnmatchcase(letter.task, task))
        and (since is None or letter.failed >= since)
        and reason in (None, letter.reason)
    ]


@dead_letters.command("list")
@_filters
@click.option("--arguments", is_flag=True, help="Show the arguments of the tasks, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(arguments: bool, as_json: bool, **filters: Any) -> None:
    """List dead letters, the oldest first."""
    with _site() as (app, store):
        told = [_told(letter, app if arguments else None) for letter in _chosen(store.list(), **filters)]
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    columns = ["id", "task", "queue", "reason", "failed", "runs", "retries", "error"] + (["args", "kwargs"] if arguments else [])
    _print_table([column.capitalize() for column in columns], [[_shown(row[column]) for column in columns] for row in told])
    click.echo(f"{len(told)} dead letters")


@dead_letters.command()
@click.argument("id")
@click.option("--arguments", is_flag=True, help="Show the arguments of the task, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(id: str, arguments: bool, as_json: bool) -> None:
    """Show one dead letter with its traceback."""
    with _site() as (app, store):
        letter = store.get(id)
        if letter is None:
            raise click.ClickException(f"There is no dead letter {id}.")
        told = _told(letter, app if arguments else None)
    original = letter.original
    told |= {"content_type": original.content_type, "size": len(original.body), "traceback": letter.traceback}
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    for name, value in told.items():
        click.echo(f"{name + ':':<14} {_printable(_shown(value)) if name != 'traceback' else ''}")
    click.echo(_printable(letter.traceback or "-"))


@dead_letters.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="All, or all that the filters let through.")
@_filters
@click.option("--yes", is_flag=True, help="Do not ask.")
def replay(ids: tuple[str, ...], everything: bool, yes: bool, **filters: Any) -> None:
    """Put tasks back on their queues, with their ids, as if they had never run. They are no dead letters any more."""
    with _site() as (_, store):
        wanted = _wanted(store, ids, everything, filters)
        if wanted and not yes and everything:
            click.confirm(f"Replay {len(wanted)} tasks?", abort=True)
        _report("replayed", store.replay(wanted), wanted, ids)


@dead_letters.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="All, or all that the filters let through.")
@_filters
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(ids: tuple[str, ...], everything: bool, yes: bool, **filters: Any) -> None:
    """Forget dead letters for good."""
    with _site() as (_, store):
        wanted = _wanted(store, ids, everything, filters)
        if wanted and not yes:
            click.confirm(f"Forget {len(wanted)} tasks for good?", abort=True)
        _report("forgotten", store.remove(wanted), wanted, ids)


def _wanted(store: Store, ids: tuple[str, ...], everything: bool, filters: dict[str, Any]) -> list[str]:
    if bool(ids) == everything or (ids and any(filters.values())):
        raise click.UsageError("Name either ids, or --all and perhaps filters.")
    letters = _chosen(store.list(), **filters)
    return [letter.id for letter in letters if everything or letter.id in ids]


def _report(done: str, count: int, wanted: list[str], ids: tuple[str, ...]) -> None:
    """Print what was done, and fail if not all that was asked for was there."""
    click.echo(f"{count} {done}")
    missing = sorted(set(ids) - set(wanted))
    for id in missing:
        click.echo(f"There is no dead letter {_printable(id)}.", err=True)
    if missing or count < len(wanted):
        sys.exit(1)


def _told(letter: DeadLetter, app: Celery | None) -> dict[str, Any]:
    """Return what is shown of a dead letter; its arguments only if an application is given, which can read them."""
    told: dict[str, Any] = {
        "id": letter.id,
        "task": letter.task,
        "queue": letter.original.queue,
        "reason": letter.reason,
        "error": f"{letter.exception}: {letter.message}",
        "runs": letter.runs,
        "retries": letter.retries,
        "received": datetime.fromtimestamp(letter.received, UTC).isoformat(timespec="seconds"),
        "failed": datetime.fromtimestamp(letter.failed, UTC).isoformat(timespec="seconds"),
        "hostname": letter.hostname,
    }
    if app is not None:
        told["args"], told["kwargs"] = _arguments(letter, app)
    return told


def _arguments(letter: DeadLetter, app: Celery) -> tuple[Any, Any]:
    original = letter.original
    try:
        accept = serialization.prepare_accept_content(app.conf.accept_content)
        body = serialization.loads(original.body, original.content_type, original.content_encoding, accept=accept)
        args, kwargs = (body["args"], body["kwargs"]) if isinstance(body, dict) else body[:2]
        json.dumps([args, kwargs])
    except Exception as error:
        return (f"not readable: {type(error).__name__}",) * 2
    return args, kwargs


# --- another broker ---


@main.command("move-tasks")
@click.option("--from", "url", required=True, help="URL of the other broker, without its password.")
def move_tasks(url: str) -> None:
    """Bring the tasks and dead letters of another broker, whose workers have ended, to the one in use.

    Its password is read from standard input. Can be run again: it goes on where it stopped.
    """
    from celery_platform import move

    with _site() as (app, store):
        try:
            brought = move.bring(url, sys.stdin.readline().rstrip("\n"), app, store, _settings())
        except (BadSettings, LookupError) as error:
            raise click.ClickException(str(error)) from error
    for queue, count in sorted(brought.items()):
        click.echo(f"{queue}: {count}")
    if not brought:
        click.echo("nothing to bring")


main.add_command(queues)

# --- metrics ---


def _address(_: click.Context, __: click.Parameter, value: str) -> tuple[str, int]:
    host, _colon, port = value.rpartition(":")
    if not host or not port.isdecimal():
        raise click.BadParameter("allowed: an address and a port, as in 127.0.0.1:9808 or [::1]:9808")
    return host.strip("[]"), int(port)


_file = click.Path(exists=True, dir_okay=False, path_type=Path)


@main.command(context_settings={"auto_envvar_prefix": "CELERY_EXPORTER"})
@click.option("--listen", default="127.0.0.1:9808", show_default=True, callback=_address, help="Address and port.")
@click.option("--tls-cert", type=_file, help="Serve https only, with this certificate.")
@click.option("--tls-key", type=_file, help="Its key.")
@click.option("--tls-client-ca", type=_file, help="Serve only who has a certificate of this CA.")
@click.option("--worker", multiple=True, help="Name of a worker that is to be there (name@host). Can be given several times.")
@click.option(
    "--most-tasks", type=click.IntRange(min=1), default=100_000, show_default=True, help="Tasks to remember between their events."
)
def exporter(
    listen: tuple[str, int],
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    worker: tuple[str, ...],
    most_tasks: int,
) -> None:
    """Serve metrics of the broker and of the events to Prometheus.

    Each option can be set in the environment: CELERY_EXPORTER_LISTEN, CELERY_EXPORTER_WORKER (spaces between several).
    """
    settings = _settings()
    if (tls_cert is None) != (tls_key is None) or (tls_client_ca and not tls_cert):
        raise click.UsageError("Name --tls-cert and --tls-key, both or neither; --tls-client-ca only with these.")
    try:
        from celery_platform import exporter as ours
    except ImportError as error:
        raise click.ClickException(f"{error}; install celery-platform[monitor]") from error
    from celery_platform.monitor import app

    logging.basicConfig(level=settings.log_level, format="%(levelname)s: %(message)s")
    tls = ours.Tls(tls_cert, tls_key, tls_client_ca) if tls_cert and tls_key else None
    try:
        ours.serve(app, settings, listen, tls, worker, most_tasks)
    except OSError as error:
        raise click.ClickException(str(error)) from error


# --- common ---


def _settings() -> Settings:
    try:
        return load_settings()
    except BadSettings as error:
        click.echo(str(error), err=True)
        sys.exit(os.EX_CONFIG)


@contextmanager
def _site() -> Iterator[tuple[Celery, Store]]:
    """Load the application as its services do."""
    settings = _settings()
    from celery_platform.worker import app

    store = store_of(app, settings)
    if store is None:
        raise click.ClickException("This broker keeps no dead letters.")
    connection = app.connection_for_write()
    try:
        yield app, store
    except (KombuError, StoreError, *connection.connection_errors, *connection.channel_errors) as error:
        raise click.ClickException(f"{type(error).__name__}: {hider(settings)(error)}") from error


def _printable(text: str) -> str:
    """Return a text without what a terminal would take as a command; it may come from anybody who can send a task."""
    return "".join(character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}" for character in text)


def _print_table(columns: Any, rows: Any) -> None:
    """Print a table that fits the terminal; to anything else, one row a line, with tabs between its cells."""
    rows = [[_printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            click.echo("\t".join(cell.replace("\n", " ") for cell in row))
        return
    rows.insert(0, list(columns))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # The widest columns give way.
    while sum(widths) + 2 * len(widths) > max(shutil.get_terminal_size().columns, 12 * len(widths)):
        widths[widths.index(max(widths))] -= 1
    for row in rows:
        cells = [_folded(cell, width) for cell, width in zip(row, widths, strict=True)]
        for line in zip_longest(*cells, fillvalue=""):
            click.echo("  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip())


def _folded(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]


if __name__ == "__main__":
    main(prog_name="celery-platform")
