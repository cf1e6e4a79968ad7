"""The log: always in the journal, also in Celery's file if it has one; with the task of each line, without secrets.

Every record passes through `Record`, also those of applications that set up logging themselves (the signal
`setup_logging`); handlers and formats are ours only where they would be Celery's. What fails in logging fails nothing
else. Where a task stood when it hit a time limit is logged too: under prefork, that is, since Celery enforces no time
limit with threads and solo.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import functools
import json
import logging
import os
import re
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, cast
from urllib.parse import quote, quote_plus, unquote, urlsplit

from celery import Celery, signals
from celery._state import get_current_worker_task
from celery.app.task import Context
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.log import ColorFormatter, get_multiprocessing_logger
from celery.worker.consumer import consumer as celery_consumer
from celery.worker.request import Request

from celery_platform import systemd
from celery_platform.queues import DELAY
from celery_platform.settings import MASK, SecretStr, Settings

logger = logging.getLogger(__name__)

Mask = Callable[[str], str]

#: Characters below which a secret is not looked for: it would mask parts of ordinary words.
SHORTEST_SECRET = 4

#: A password in a URL; it may hold an @ that should have been quoted.
URL_PASSWORD = re.compile(r"""(?<=://)([^\s:/@'"]*):[^\s/'"]*@""")

#: What the mappings that Celery logs call arguments and results (celery.app.trace, celery.worker.strategy).
VALUES = frozenset({"args", "kwargs", "return_value"})

#: Where Celery gives such a mapping to handlers as well, as an attribute of the record.
EXTRA = "data"

#: Celery's other messages that show arguments, and the positions of these among the message's own.
SHOWS_ARGUMENTS: dict[str, frozenset[int]] = {
    celery_consumer.UNKNOWN_FORMAT: frozenset({0}),
    celery_consumer.UNKNOWN_TASK_ERROR: frozenset({1, 2}),
    celery_consumer.INVALID_TASK_ERROR: frozenset({1}),
    celery_consumer.MESSAGE_DECODE_ERROR: frozenset({3, 4}),
    "TaskPool: Apply %s (args:%s kwargs:%s)": frozenset({1, 2}),
    "Couldn't convert ETA %r to timestamp: %r. Task: %r": frozenset({2}),
    "Failed to cancel active request %r after connection loss": frozenset({0}),
}

#: Beat's list of its schedule at level DEBUG, with the arguments already in the message (celery.beat).
SCHEDULE = "Current schedule:\n"

#: No part of Python, billiard or Celery uses this signal, and billiard does not reset it in a new child.
STACK_SIGNAL = signal.SIGRTMIN

#: What the worker itself adds to each stack, below the task.
BELOW_TASK = re.compile(r'\n  File "[^"]*/celery/app/trace\.py", .*?(?=\n\n|\Z)', re.DOTALL)

#: Seconds to wait for the first line of a stack, for any next one, and for all of them: the main process does nothing
#: else meanwhile, and a process in uninterruptible sleep never answers.
STACK_FIRST, STACK_NEXT, STACK_ALL = 0.5, 0.05, 1.0

#: Bytes at which a log file is set aside.
LARGEST_FILE = 100 * 1024 * 1024

#: Attributes that any record has, and that formatters add.
STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def secrets_of(settings: Settings) -> set[str]:
    """Return what this process must not show: secrets of the settings, all credentials, and the application's secret variables.

    Of the settings' secrets each line counts by itself (encryption_keys), and of a URL (DATABASE_URL) its password.
    """
    texts = {value.get_secret_value() for value in vars(settings).values() if isinstance(value, SecretStr)}
    found = {line for text in texts for line in text.splitlines()}
    texts |= {os.environ.get(name, "") for name in settings.secret_variables}
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    for path in Path(folder).glob("*") if folder else ():
        # What is no text is logged by nobody.
        with contextlib.suppress(OSError, UnicodeDecodeError):
            texts.add(path.read_text())
    for text in texts:
        with contextlib.suppress(ValueError):
            password = urlsplit(text).password or ""
            found |= {password, unquote(password)}
    return {text for text in found | {text.strip() for text in texts} if len(text) >= SHORTEST_SECRET}


def masker(settings: Settings) -> Mask:
    """Return a function that replaces passwords in URLs, and all secrets of this process, by asterisks."""
    forms = {
        form
        for text in secrets_of(settings)
        for form in (text, quote(text), quote(text, safe=""), quote_plus(text), repr(text)[1:-1], json.dumps(text)[1:-1])
    }
    # The longest first, or a secret that holds another one would show its end.
    wanted = sorted(forms, key=len, reverse=True)
    secrets = re.compile("|".join(map(re.escape, wanted))) if wanted else None

    def mask(text: str) -> str:
        if secrets:
            text = secrets.sub(MASK, text)
        return URL_PASSWORD.sub(rf"\1:{MASK}@", text) if "://" in text else text

    return mask


def task_fields(name: str, request: Context) -> dict[str, Any]:
    """Return what the log tells of a run of a task: its name and id, queue, attempt (1 is the first) and origin."""
    delivery = request.delivery_info or {}
    return {
        "task_id": request.id,
        "task_name": name,
        "queue": DELAY.sub("", delivery.get("routing_key") or "") or None,
        "attempt": (request.retries or 0) + 1,
        "redelivered": bool(delivery.get("redelivered")),
        "root_id": request.root_id,
        "parent_id": request.parent_id,
    }


class Record(logging.LogRecord):
    """A record that knows its task and shows neither secrets nor, in lines of Celery's own, arguments and results.

    Handlers and filters of an application find all that Celery gave it, if with asterisks in place of values. The fields
    join the record's other attributes only when a handler asks for its message: set before, they would make
    `extra={"task_id": …}` of an application an error in its task (logging.Logger.makeRecord).
    """

    mask: ClassVar[Mask]
    show_arguments: ClassVar[bool]
    _fields: Mapping[str, Any] = MappingProxyType({})

    def enter(self) -> None:
        """Note the task, and hide arguments; called once, where and when the line is logged."""
        self._fields = self._fields_of_task()
        if self.name.startswith("celery.") and not self.show_arguments:
            self._hide_arguments()

    @property
    def repeats_itself(self) -> bool:
        """Whether its `data` are what its message already says, and hides."""
        return self.name.startswith("celery.") and not self.show_arguments

    def _fields_of_task(self) -> dict[str, Any]:
        task = get_current_worker_task()
        if task is not None:
            return task_fields(task.name, task.request)
        if not self.name.startswith("celery."):
            return {}
        if isinstance(self.args, Mapping):
            return {"task_id": self.args["id"], "task_name": self.args["name"]} if {"id", "name"} <= self.args.keys() else {}
        before, found, _ = str(self.msg).partition("%s[%s]")
        if not found or not self.args:
            return {}
        position = before.count("%")
        return {"task_id": self.args[position + 1], "task_name": self.args[position]}

    def _hide_arguments(self) -> None:
        if isinstance(self.args, Mapping):
            self.args = {**self.args, **dict.fromkeys(VALUES & self.args.keys(), MASK)}
        elif self.args and str(self.msg) in SHOWS_ARGUMENTS:
            hidden = SHOWS_ARGUMENTS[str(self.msg)]
            self.args = tuple(MASK if position in hidden else value for position, value in enumerate(self.args))
        elif str(self.msg).startswith(SCHEDULE):
            self.msg = SCHEDULE + MASK

    def getMessage(self) -> str:
        """Return the message without secrets; complete the record for the handler that asks."""
        for name, value in self._fields.items():
            self.__dict__.setdefault(name, value)
        data = self.__dict__.get(EXTRA)
        if self.repeats_itself and isinstance(data, Mapping):
            self.__dict__[EXTRA] = {**data, **dict.fromkeys(VALUES & data.keys(), MASK)}
        if self.exc_info and not self.exc_text:
            # A formatter takes this text in place of its own, which it keeps where there is nothing to mask.
            text = "".join(traceback.format_exception(*self.exc_info)).rstrip("\n")
            masked = type(self).mask(text)
            self.exc_text = masked if masked != text else None
        if self.stack_info:
            self.stack_info = type(self).mask(self.stack_info)
        try:
            message = super().getMessage()
        except Exception:
            # logging would show the arguments, unmasked, and lose the line.
            message = f"{self.msg} (its arguments do not fit)"
        return type(self).mask(message)


def _make_record(make: Callable[..., logging.LogRecord], *arguments: Any, **named: Any) -> logging.LogRecord:
    try:
        record = make(*arguments, **named)
    except Exception as error:
        _tell_failure("factory of records", arguments[0], error)
        record = logging.LogRecord(*arguments, **named)
    if not isinstance(record, Record):
        record.__class__ = _with_task(type(record))  # type: ignore[arg-type]
        # An exception would be raised where the line is logged: in a task.
        with contextlib.suppress(Exception):
            cast(Record, record).enter()
    return record


@functools.cache
def _with_task(kind: type[logging.LogRecord]) -> type[logging.LogRecord]:
    """Return our class of records, on top of an application's own."""
    return Record if kind is logging.LogRecord else type(kind.__name__, (Record, kind), {})


def _tell_failure(what: str, name: str, error: Exception) -> None:
    """Tell on the standard error, which is no log here, where logging itself failed."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        print(
            f"celery_platform: the {what} failed on a line of {name}: {type(error).__name__} in {frame.filename}:{frame.lineno}",
            file=sys.__stderr__,
        )


def _survive_handlers() -> None:
    """Let an error of a handler or a filter not reach whoever logs: Celery, between a task's success and its acknowledgement.

    Python's own handlers catch theirs (Handler.handleError); filters, and handlers whose `emit` does not, raise it where
    the line is logged (logging/__init__.py: Logger.handle, Handler.handle). Both are guarded, so that the other handlers
    get the line.
    """
    for owner, what in ((logging.Logger, "filter"), (logging.Handler, "handler")):
        if not hasattr(owner.handle, "__wrapped__"):
            owner.handle = _surviving(owner.handle, what)  # type: ignore[method-assign]


def _surviving(handle: Callable[..., Any], what: str) -> Callable[..., Any]:
    @functools.wraps(handle)
    def surviving(self: Any, record: logging.LogRecord) -> Any:
        try:
            return handle(self, record)
        except SoftTimeLimitExceeded:
            # It is raised wherever the task stands.
            raise
        except Exception as error:
            _tell_failure(what, record.name, error)
            return False

    return surviving


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TextFormatter(logging.Formatter):
    """Writes `time level process logger [queue/task id #attempt] message`, and tracebacks below.

    The time is left out on request: the journal has its own.
    """

    def __init__(self, mask: Mask, with_time: bool = True) -> None:
        super().__init__()
        self.mask = mask
        self.with_time = with_time

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line without its traceback."""
        fields = record.__dict__
        task = ""
        if fields.get("task_id"):
            queue = f"{fields['queue']}/" if fields.get("queue") else ""
            attempt = f" #{fields['attempt']}" if fields.get("attempt") else ""
            task = f"[{queue}{fields.get('task_name')} {fields['task_id']}{attempt}{' redelivered' if fields.get('redelivered') else ''}] "
        time = f"{_time(record)} " if self.with_time else ""
        return f"{time}{record.levelname} {record.processName} {record.name} {task}{record.message}"

    def format(self, record: logging.LogRecord) -> str:
        """Return the whole text of a record."""
        return self.mask(super().format(record))


class JsonFormatter(logging.Formatter):
    """Writes one JSON object a line: what `task_fields` tells, what the caller gave as `extra`, and an exception's parts."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask
        self.host = socket.gethostname()

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        message = record.getMessage()
        left_out = STANDARD | {EXTRA} if isinstance(record, Record) and record.repeats_itself else STANDARD
        line: dict[str, Any] = {name: value for name, value in record.__dict__.items() if name not in left_out and not name.startswith("_")}
        line |= {
            "timestamp": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": message,
            "process": record.processName,
            "pid": record.process,
            "thread": record.threadName,
            "hostname": self.host,
        }
        if record.exc_info and record.exc_info[0]:
            kind, value, _ = record.exc_info
            text = record.exc_text or self.formatException(record.exc_info)
            summary = "".join(traceback.format_exception_only(kind, value)).strip()
            line["exception"] = {"type": kind.__qualname__, "message": summary, "traceback": text}
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(self._plain(line), ensure_ascii=False)

    def _plain(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {self.mask(str(name)): self._plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(item) for item in value]
        return self.mask(str(value))


class _Handler(logging.Handler):
    """Tells shortly that a line could not be written; Python would print its unmasked arguments."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            # sys.stderr leads back into this very log by now.
            print(f"celery_platform: a line of {record.name} is lost: {type(error).__name__}", file=sys.__stderr__)


class Journal(_Handler, logging.StreamHandler[Any]):
    """Writes to the standard error that systemd gave the service."""

    def __init__(self) -> None:
        super().__init__(sys.__stderr__)


class File(_Handler, WatchedFileHandler):
    """Writes to Celery's file, and opens it again once logrotate has replaced it.

    logrotate runs once a day: a file that is too large by then is set aside here (`critical.earlier.log`), and with it
    the one that was set aside before is gone.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; where the file cannot be opened again, WatchedFileHandler would raise that in the task."""
        try:
            super().emit(record)
            if self.stream and os.fstat(self.stream.fileno()).st_size > LARGEST_FILE:
                self._set_aside(self.stream.fileno())
        except OSError:
            self.handleError(record)

    def _set_aside(self, file: int) -> None:
        # A lock of the process: its children share the open file. It ends when the file is closed.
        fcntl.lockf(file, fcntl.LOCK_EX)
        path = Path(self.baseFilename)
        # Otherwise another process has done so.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file)):
            path.replace(path.with_name(f"{path.stem}.earlier{path.suffix}"))
        self.reopenIfNeeded()


def _is_celerys(handler: logging.Handler, logfile: str | None) -> bool:
    if isinstance(handler, _Handler):
        return True
    if type(handler) is WatchedFileHandler:
        return logfile is not None and handler.baseFilename == os.path.abspath(logfile)
    return type(handler) is logging.StreamHandler and handler.stream is sys.__stderr__


def _replace_handlers(target: logging.Logger, logfile: str | None, ours: Callable[[type[logging.Handler]], logging.Formatter]) -> None:
    for old in [handler for handler in target.handlers if _is_celerys(handler, logfile)]:
        target.removeHandler(old)
        old.close()
        # Any other formatter is one that the application chose in these same signals.
        chosen = None if old.formatter is None or isinstance(old.formatter, ColorFormatter) else old.formatter
        if not any(isinstance(handler, Journal) for handler in target.handlers):
            handlers: list[logging.Handler] = [
                Journal(),
                *([File(logfile, encoding="utf-8", errors="backslashreplace")] if logfile else []),
            ]
            for handler in handlers:
                handler.setFormatter(chosen or ours(type(handler)))
                target.addHandler(handler)


class Stacks:
    """Asks a child of the pool where it stands, also one that is stuck in C code: faulthandler answers, not Python."""

    def __init__(self) -> None:
        # Children inherit the pipe. One that finds it full leaves out the rest, it does not wait for a reader.
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def offer(self, **_: object) -> None:
        """Make this process answer."""
        faulthandler.register(STACK_SIGNAL, file=self._writer, all_threads=True)

    def of(self, pid: int) -> str:
        """Return the stacks of all threads of a process, or an empty text where it does not answer."""
        # The signal would end a process that does not catch it.
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        if not caught or not int(caught[1], 16) >> (STACK_SIGNAL - 1) & 1:
            return ""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        while poll.poll(0):
            os.read(self._reader, 65536)
        os.kill(pid, STACK_SIGNAL)
        stack, end, patience = b"", time.monotonic() + STACK_ALL, STACK_FIRST
        while time.monotonic() < end and poll.poll(patience * 1000):
            stack += os.read(self._reader, 65536)
            patience = STACK_NEXT
        return BELOW_TASK.sub("", stack.decode(errors="replace").strip())


def _log_stacks(**_: object) -> None:
    """Have a worker log where its tasks stand at a time limit, before they are told or killed.

    Celery sends no signal then; billiard calls this method of the request in the main process, for both limits.
    """
    stacks, on_timeout = Stacks(), Request.on_timeout
    signals.worker_process_init.connect(stacks.offer, weak=False)

    @functools.wraps(on_timeout)
    def logged(self: Request, soft: bool, timeout: float) -> Any:
        try:
            logger.log(
                logging.WARNING if soft else logging.ERROR,
                "%s time limit of %s[%s]: it stands at\n%s",
                "Soft" if soft else "Hard",
                self.name,
                self.id,
                stacks.of(self.worker_pid) or "(its process does not answer)",
                extra=task_fields(self.name, Context(self.request_dict)),
            )
        except Exception:
            logger.exception("Where %s[%s] stands is unknown", self.name, self.id)
        return on_timeout(self, soft, timeout)

    Request.on_timeout = logged


def _no_banner(instance: Any, **_: object) -> None:
    instance.quiet = True


def install(app: Celery, settings: Settings) -> None:
    """Give all records of this process and its children their task and masks, and Celery's loggers our handlers.

    The level is Celery's (`--loglevel`) unless the settings name one.
    """
    mask = masker(settings)
    Record.mask = staticmethod(mask)
    Record.show_arguments = settings.log_arguments and settings.encryption == "off"
    logging.setLogRecordFactory(functools.partial(_make_record, logging.getLogRecordFactory()))
    _survive_handlers()
    in_journal = systemd.stderr_is_journal()

    def formatter(handler: type[logging.Handler]) -> logging.Formatter:
        if settings.log_format == "json":
            return JsonFormatter(mask)
        return TextFormatter(mask, with_time=not (handler is Journal and in_journal))

    level = settings.log_level if "log_level" in settings.given else None

    def set_up(logger: logging.Logger, logfile: str | None = None, **_: object) -> None:
        for target in (logger, get_multiprocessing_logger()):
            _replace_handlers(target, logfile, formatter)
        if level:
            logger.setLevel(level)

    signals.after_setup_logger.connect(set_up, weak=False)
    signals.after_setup_task_logger.connect(set_up, weak=False)
    signals.celeryd_init.connect(_log_stacks, weak=False)
    if settings.log_format == "json":
        signals.celeryd_init.connect(_no_banner, weak=False)
