"""The settings of a service: `CELERY_PLATFORM_*` from the environment, secrets from systemd credentials."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

PREFIX = "CELERY_PLATFORM_"
MASK = "********"
#: Bytes of a key for AES-256.
KEY_SIZE = 32
ALLOWED_KEYS = f"one key a line, {KEY_SIZE} bytes in base64url, as `celery-platform generate-key` prints them"
#: What stands for yes and no, in any case.
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class BadSettings(Exception):
    """Settings that cannot be worked with. Its text names each variable, its value and what is allowed."""


class Conflict(NamedTuple):
    """What is wrong with a few settings together: their names, and a text as that of BadSettings."""

    inputs: set[str]
    text: str


class SecretStr:
    """A text that is shown only to who asks for it by `get_secret_value()`."""

    def __init__(self, text: str) -> None:
        self._text = text

    def get_secret_value(self) -> str:
        """Return the text."""
        return self._text

    def __repr__(self) -> str:
        """Return asterisks."""
        return f"SecretStr({MASK!r})"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        """Tell whether both hold the same text."""
        return isinstance(other, SecretStr) and other._text == self._text

    def __hash__(self) -> int:
        """Return the text's hash."""
        return hash(self._text)


def _between(least: int, most: int | None = None) -> Callable[[int], None]:
    def check(value: int) -> None:
        if value < least:
            raise ValueError(f"Input should be greater than or equal to {least}")
        if most is not None and value > most:
            raise ValueError(f"Input should be less than or equal to {most}")

    return check


def _rate(text: str) -> None:
    if not re.fullmatch(r"[1-9][0-9]*/[smh]", text):
        raise ValueError("a number a second, minute or hour: 10/s, 10/m, 10/h")


def _queue_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError("letters, digits, _ . and -")


def _no_password(value: str) -> None:
    for url in value.split(";"):
        login, at, _ = url.partition("://")[2].partition("@")
        if at and ":" in login:
            raise ValueError("must hold no password; that is a credential")


def _hosts_and_ports(value: str) -> None:
    for url in value.split(";"):
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError:
            raise ValueError("must give hosts as name:port or address:port, with an IPv6 address in brackets: [::1]:6379") from None
        if parts.scheme in ("redis", "rediss", "sentinel") and not re.fullmatch(r"/?|/[0-9]+", parts.path):
            raise ValueError("must end with the number of a database of Redis, as in redis://host:6379/0")


def _known_broker(value: str) -> None:
    schemes = {url.partition("://")[0] for url in value.split(";")}
    if len(schemes) != 1 or not schemes <= {"redis", "rediss", "sentinel", "amqp", "amqps", "memory"}:
        raise ValueError("must begin with redis://, rediss://, sentinel://, amqp:// or amqps://, the same for all hosts")


def _webhook(value: SecretStr) -> None:
    parts = urlsplit(value.get_secret_value())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a URL, http:// or https://")


def _keys(value: SecretStr) -> None:
    keys_in(value.get_secret_value())


#: What a value is, and after that what it must keep to.
Count = Annotated[int, _between(1)]
Seconds = Count
Priority = Annotated[int, _between(0, 9)]
Rate = Annotated[str, _rate]
Url = Annotated[str, _no_password, _hosts_and_ports]


@dataclass(frozen=True)
class QueueSetting:
    """A queue: its name, and the priority of messages that are sent to it without one."""

    name: Annotated[str, _queue_name]
    priority: Priority | None = None


@dataclass(frozen=True)
class Route:
    """Where a task goes: a queue, a priority, or both."""

    queue: str | None = None
    priority: Priority | None = None


@dataclass(frozen=True)
class Breaker:
    """When a circuit breaker opens: failures in a row. And for how many seconds, until one task is tried."""

    failures: Count = 5
    reset: Seconds = 60


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a service is told. Values may be as the environment has them: "900", or a queue's name.

    Raises:
        BadSettings: if a value does not fit. Whether they fit together is told by `load_settings`.
    """

    #: The user's application, as `celery -A` takes it.
    application: str

    # --- Broker and result backend. Secrets are credentials of the same names, never environment variables. ---
    #: One URL, or several with `;` between them: redis, rediss, sentinel, amqp, amqps. Without password.
    broker_url: Annotated[Url, _known_broker]
    broker_password: SecretStr | None = None
    #: None: results are not kept.
    result_backend: Url | None = None
    result_backend_password: SecretStr | None = None
    #: Nobody chose that result backend: one that the application has elsewhere (django-db) wins over it.
    result_backend_is_default: bool = False
    #: Name that Sentinel gives the master, and the user (None: `default`) and password of Sentinel itself.
    sentinel_master: str = "celery"
    sentinel_user: str | None = None
    sentinel_password: SecretStr | None = None
    tls_ca_file: Path | None = None
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    #: Name that the certificates of all RabbitMQ nodes share. None: each has its own host's.
    tls_server_name: str | None = None
    #: What all keys and channels in Redis begin with.
    key_prefix: str = ""
    pool_limit: Count = 10
    #: Seconds for which a task is tried to be published; must outlast a failover. A producer's is 10 (producer.py).
    publish_timeout: Annotated[int, _between(0)] = 60
    #: `atomic` loses no message of a killed worker; `kombu` is kombu's own, for versions that ours is not proven with.
    redis_transport: Literal["atomic", "kombu"] = "atomic"
    #: With `atomic`: replicas that must have a message before its publish returns, and seconds that they have for it.
    confirm_replicas: Annotated[int, _between(0)] = 0
    confirm_timeout: Annotated[int, _between(1, 8)] = 3

    # --- Queues ---
    default_queue: str = "default"
    queues: list[QueueSetting] = field(default_factory=lambda: [QueueSetting("default")])
    #: By task name; globs allowed, the first match wins.
    routes: dict[str, Route] = field(default_factory=dict)
    #: False: RabbitMQ has them and all that Celery needs beside them (roles/rabbitmq), so that no user need be permitted to declare.
    declare_queues: bool = True

    # --- Tasks ---
    #: Seconds until a task is told to stop, and until its process is killed.
    soft_time_limit: Seconds = 600
    time_limit: Seconds = 900
    #: Redis hands a task out again if it was not acknowledged for so many seconds.
    visibility_timeout: Seconds = 3600
    #: How often a task is run at most if it takes its worker process down each time.
    max_runs: Count = 3
    prefetch_multiplier: Count = 1
    max_tasks_per_child: Count = 1000
    #: Seconds that a worker process may take to start; one that takes longer is killed, and another one is started.
    child_start_timeout: Seconds = 120
    #: Mebibytes after which a worker process is replaced once its task is done.
    max_memory_per_child: Count | None = None

    # --- Resilience: by task name, globs allowed ---
    #: Tasks whose connection errors are retried, unless they do so themselves.
    retry_tasks: list[str] = field(default_factory=list)
    retry_max: Count = 5
    #: Seconds until the first retry and at most; each wait is twice the one before, less up to half of it by chance.
    retry_backoff: Seconds = 1
    retry_backoff_max: Seconds = 300
    #: The first match wins. The tasks of one glob share its circuit, and its rate.
    breakers: dict[str, Breaker] = field(default_factory=dict)
    #: Runs a second, minute or hour by all workers together: `10/m`.
    rate_limits: dict[str, Rate] = field(default_factory=dict)

    # --- Results ---
    result_expires: Seconds = 86400
    #: Seconds that a chord waits for its next part.
    chord_expires: Seconds = 2592000
    result_compression: Literal["none", "gzip", "bzip2"] = "none"

    # --- Encryption of bodies and results: `migrate` writes encrypted and still reads plain text. ---
    encryption: Literal["off", "migrate", "on"] = "off"
    #: One key a line, as `celery-platform generate-key` prints them. The first one writes, all read.
    encryption_keys: Annotated[SecretStr, _keys] | None = None

    # --- Logs ---
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    #: Show the arguments and results of tasks in logs and events.
    log_arguments: bool = False
    #: Names of variables of the environment that hold secrets of the application: these are hidden as credentials are.
    secret_variables: list[str] = field(default_factory=list)

    # --- Dead letters ---
    dead_letters: bool = True

    # --- Alerts: posted to the URL in the credential `alert_webhook`; none if there is none. ---
    alert_webhook: Annotated[SecretStr, _webhook] | None = None
    #: Seconds that alerts are gathered before one message tells them all, and that a post may take.
    alert_interval: Seconds = 30
    alert_timeout: Seconds = 5
    #: Messages an hour at most.
    alert_rate: Count = 30

    #: Names of the settings that were set; the others have their defaults.
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Make each value one of its field's type."""
        wrong: list[Unfit] = []
        for name, kind in FIELDS.items():
            object.__setattr__(self, name, _read(kind, getattr(self, name), (name,), wrong))
        if wrong:
            raise BadSettings("\n".join(map(_told, wrong)))

    def conflicts(self) -> Iterator[Conflict]:
        """Yield what is wrong with values that are right each by itself."""
        names = [queue.name for queue in self.queues]
        known = f"one of {PREFIX}QUEUES, {', '.join(names)}"
        if not self.soft_time_limit < self.time_limit:
            told = f"{PREFIX}SOFT_TIME_LIMIT is {self.soft_time_limit}; allowed: less than {PREFIX}TIME_LIMIT, {self.time_limit}"
            yield Conflict({"soft_time_limit", "time_limit"}, told)
        if self.retry_backoff > self.retry_backoff_max:
            told = f"{PREFIX}RETRY_BACKOFF is {self.retry_backoff}; allowed: at most {PREFIX}RETRY_BACKOFF_MAX, {self.retry_backoff_max}"
            yield Conflict({"retry_backoff", "retry_backoff_max"}, told)
        if len(set(names)) != len(names):
            yield Conflict({"queues"}, f"{PREFIX}QUEUES is {names}; allowed: each name once")
        if self.default_queue not in names:
            yield Conflict({"default_queue", "queues"}, f"{PREFIX}DEFAULT_QUEUE is {self.default_queue}; allowed: {known}")
        for pattern, route in self.routes.items():
            if route.queue is not None and route.queue not in names:
                yield Conflict({"routes", "queues"}, f"{PREFIX}ROUTES sends {pattern} to {route.queue}; allowed: {known}")
        if self.encryption != "off" and self.encryption_keys is None:
            told = f"{PREFIX}ENCRYPTION is {self.encryption}; allowed: off, unless there is a credential encryption_keys"
            yield Conflict({"encryption", "encryption_keys"}, told)
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            told = f"{PREFIX}TLS_CERT_FILE and {PREFIX}TLS_KEY_FILE are not both set; allowed: both or neither"
            yield Conflict({"tls_cert_file", "tls_key_file"}, told)
        if self.confirm_replicas and not (self.uses_redis_broker and self.redis_transport == "atomic"):
            allowed = f"0, unless {PREFIX}REDIS_TRANSPORT is atomic on Redis"
            told = f"{PREFIX}CONFIRM_REPLICAS is {self.confirm_replicas}; allowed: {allowed}"
            yield Conflict({"broker_url", "confirm_replicas", "redis_transport"}, told)
        if self.uses_redis_broker:
            yield from self._conflicts_of_redis()
        if self.uses_rabbitmq:
            yield from self._conflicts_of_rabbitmq(names)

    def _conflicts_of_redis(self) -> Iterator[Conflict]:
        inputs = {"broker_url", "time_limit", "visibility_timeout"}
        left = f"the seconds that {PREFIX}VISIBILITY_TIMEOUT leaves beyond {PREFIX}TIME_LIMIT"
        if not self.time_limit < self.visibility_timeout:
            allowed = f"more than {PREFIX}TIME_LIMIT, {self.time_limit}, or Redis hands out tasks that still run"
            yield Conflict(inputs, f"{PREFIX}VISIBILITY_TIMEOUT is {self.visibility_timeout}; allowed: {allowed}")
            return
        if self.retry_tasks and self.retry_backoff_max >= self.longest_wait:
            told = f"{PREFIX}RETRY_BACKOFF_MAX is {self.retry_backoff_max}; allowed: less than {self.longest_wait}, {left}"
            yield Conflict(inputs | {"retry_tasks", "retry_backoff_max"}, told)
        for glob, breaker in self.breakers.items():
            if breaker.reset * 2 > self.longest_wait:
                told = f"{PREFIX}BREAKERS[{glob}][reset] is {breaker.reset}; allowed: half of {self.longest_wait} at most, {left}"
                yield Conflict(inputs | {"breakers"}, told)

    @staticmethod
    def _conflicts_of_rabbitmq(names: list[str]) -> Iterator[Conflict]:
        """Yield queues of which a delayed message for one would reach another, too: `orders` and `eu.orders`.

        kombu binds a queue to delayed messages whose routing key ends with its name's words
        (bind_queue_to_native_delayed_delivery_exchange in kombu/transport/native_delayed_delivery.py: `#.orders`).
        Can go when that is bound to the 28 words of the delay and the name.
        """
        for name in names:
            for longer in names:
                if longer.endswith(f".{name}"):
                    told = f"{PREFIX}QUEUES has {name} and {longer}, and RabbitMQ would bring countdowns for {longer} to both"
                    yield Conflict({"broker_url", "queues"}, f"{told}; allowed: no queue named as another's end after a dot")

    @property
    def uses_redis_broker(self) -> bool:
        """Whether the broker is Redis, with Sentinel or without."""
        return self.broker_url.startswith(("redis", "sentinel"))

    @property
    def uses_rabbitmq(self) -> bool:
        """Whether the broker is RabbitMQ."""
        return self.broker_url.startswith("amqp")

    @property
    def redis_store(self) -> tuple[str, SecretStr | None] | None:
        """URL and password of the Redis that workers share; None: there is none.

        The result backend, which stays when a site changes its broker, or else the broker.
        """
        if self.result_backend and self.result_backend.startswith(("redis", "sentinel")):
            return self.result_backend, self.result_backend_password
        return (self.broker_url, self.broker_password) if self.uses_redis_broker else None

    @property
    def longest_wait(self) -> int:
        """Seconds that a task may wait for its time on Redis, where its message is unacknowledged meanwhile and while it runs."""
        return self.visibility_timeout - self.time_limit


def keys_in(text: str) -> list[bytes]:
    """Return the keys in the credential `encryption_keys`: 32 bytes in base64url a line, with a comment after a space if wanted.

    Raises:
        ValueError: if there is none, or a line that holds none.
    """
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        if encoded := line.split()[:1]:
            try:
                key = base64.b64decode(encoded[0] + "=" * (-len(encoded[0]) % 4), altchars=b"-_", validate=True)
            except ValueError:
                key = b""
            if len(key) != KEY_SIZE:
                raise ValueError(f"{ALLOWED_KEYS} (line {number} holds no key)")
            keys.append(key)
    if not keys:
        raise ValueError(ALLOWED_KEYS)
    return keys


class Unfit(NamedTuple):
    """A value that does not fit: where it stands (field, keys and indexes), and what is allowed."""

    path: tuple[Any, ...]
    value: Any
    allowed: str


def _read(kind: Any, value: Any, path: tuple[Any, ...], wrong: list[Unfit]) -> Any:
    """Return a value as one of this type; what does not fit is added to `wrong`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        before = len(wrong)
        found = _read(arguments[0], value, path, wrong)
        with _noting(wrong, path, value):
            for check in arguments[1:] if len(wrong) == before else ():
                check(found)
        return found
    if origin in (Union, UnionType):
        return None if value is None else _read(arguments[0], value, path, wrong)
    if origin is list and isinstance(value, list | tuple):
        return [_read(arguments[0], item, (*path, index), wrong) for index, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _read(arguments[1], item, (*path, key), wrong) for key, item in value.items()}
    if kind in (QueueSetting, Route, Breaker) and not isinstance(value, kind):
        return _read_dataclass(kind, {"name": value} if kind is QueueSetting and isinstance(value, str) else value, path, wrong)
    with _noting(wrong, path, value):
        return _scalar(kind, value)


def _read_dataclass(kind: Any, value: Any, path: tuple[Any, ...], wrong: list[Unfit]) -> Any:
    if not isinstance(value, Mapping):
        wrong.append(Unfit(path, value, "Input should be a mapping"))
        return None
    hints = get_type_hints(kind, include_extras=True)
    missing = [item.name for item in dataclasses.fields(kind) if item.default is dataclasses.MISSING and item.name not in value]
    wrong += [Unfit((*path, name), value, "Field required") for name in missing]
    read = {name: _read(hint, value[name], (*path, name), wrong) for name, hint in hints.items() if name in value}
    wrong += [Unfit((*path, name), item, "Extra inputs are not permitted") for name, item in value.items() if name not in hints]
    return None if missing else kind(**read)


def _scalar(kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        if value not in (choices := get_args(kind)):
            *most, last = map(repr, choices)
            raise ValueError(f"Input should be {', '.join(most)} or {last}")
        return value
    if kind is bool and str(value).lower() in BOOLEANS:
        return BOOLEANS[str(value).lower()]
    if kind is int and not isinstance(value, bool) and re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", str(value)):
        return int(value)
    if kind in (Path, SecretStr) and isinstance(value, str):
        return kind(value)
    if isinstance(kind, type) and kind is not int and isinstance(value, kind):
        return value
    names = {bool: "boolean", int: "integer", list: "list", dict: "dictionary"}
    raise ValueError(f"Input should be a valid {names.get(get_origin(kind) or kind, 'string')}")


@contextlib.contextmanager
def _noting(wrong: list[Unfit], path: tuple[Any, ...], value: Any) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        wrong.append(Unfit(path, value, str(error)))


#: The settings: names and types.
FIELDS: dict[str, Any] = {name: kind for name, kind in get_type_hints(Settings, include_extras=True).items() if name != "given"}
REQUIRED = ("application", "broker_url")
FILES = ("tls_ca_file", "tls_cert_file", "tls_key_file")


def is_secret(name: str) -> bool:
    """Tell whether a setting is a secret, which comes as a credential and is never shown."""
    return "SecretStr" in str(FIELDS[name])


def as_written(value: Any) -> Any:
    """Return the value of a setting as it can be written in JSON: a queue without a priority is its name."""
    if isinstance(value, QueueSetting) and value.priority is None:
        return value.name
    if dataclasses.is_dataclass(value):
        return {name: item for name, item in vars(value).items() if item is not None}
    if isinstance(value, dict):
        return {name: as_written(item) for name, item in value.items()}
    if isinstance(value, list):
        return [as_written(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def load_settings() -> Settings:
    """Return the settings of this process.

    Raises:
        BadSettings: if a variable is unknown, does not fit, or is missing; all of them are named at once.
    """
    secrets = _credentials()
    if wrong := _problems(os.environ, secrets, here=True):
        raise BadSettings("\n".join(wrong))
    values = _values(os.environ) | secrets
    return Settings(**values, given=frozenset(values))


def planned_problems(environment: Mapping[str, str], secrets: Mapping[str, str], unknown: Collection[str] = ()) -> list[str]:
    """Return what `load_settings` would say of a service on another host, whose files are not here.

    Args:
        environment: The variables of the service.
        secrets: Its credentials, by name.
        unknown: Settings that are not known yet: neither they nor what depends on them is judged.

    Returns:
        Texts: `<variable> <what is wrong>; allowed: <what is allowed>`, or `<variable> is not set`.
    """
    return _problems(environment, secrets, unknown)


def _problems(
    environment: Mapping[str, str], secrets: Mapping[str, str], unknown: Collection[str] = (), *, here: bool = False
) -> list[str]:
    values = {name: value for name, value in (_values(environment) | dict(secrets)).items() if name not in unknown}
    wrong: list[Unfit] = []
    told = _unknown_variables(environment)
    unfit = set(unknown)
    for name, kind in FIELDS.items():
        before = len(wrong)
        if name in values:
            found = _read(kind, values[name], (name,), wrong)
            if here and name in FILES and not os.access(found, os.R_OK):
                wrong.append(Unfit((name,), values[name], "must be a file that this service can read"))
        elif name in REQUIRED and name not in unknown:
            unfit.add(name)
            told.append(f"{PREFIX}{name.upper()} is not set")
        if len(wrong) > before:
            unfit.add(name)
            told += map(_told, wrong[before:])
    # Conflicts are looked for among values that fit; these two stand for those that do not.
    fit = {name: value for name, value in values.items() if name not in unfit}
    settings = Settings(**({"application": "-", "broker_url": "memory://"} | fit))
    return told + [conflict.text for conflict in settings.conflicts() if conflict.inputs.isdisjoint(unfit)]


def _credentials() -> dict[str, str]:
    """Return the secrets in the files that systemd hands over (LoadCredential=), named as the settings are."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    files = {name: Path(folder, name) for name in FIELDS if is_secret(name)} if folder else {}
    return {name: file.read_text().rstrip("\n") for name, file in files.items() if file.exists()}


def _values(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings in an environment by field; lists and mappings are JSON, and left as text where they are not."""
    values: dict[str, Any] = {}
    for name, kind in FIELDS.items():
        text = environment.get(PREFIX + name.upper())
        if text is None or is_secret(name):
            continue
        values[name] = text
        if get_origin(kind) in (list, dict):
            with contextlib.suppress(ValueError):
                values[name] = json.loads(text)
    return values


def _unknown_variables(environment: Mapping[str, str]) -> list[str]:
    known = {PREFIX + name.upper() for name in FIELDS}
    wrong = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            wrong.append(f"{name} is no setting" + (f"; allowed: {close[0]}, perhaps" if close else ""))
        elif name in known and is_secret(name.removeprefix(PREFIX).lower()):
            wrong.append(f"{name} is a secret; allowed: the credential {name.removeprefix(PREFIX).lower()}, not the environment")
    return wrong


def _told(unfit: Unfit) -> str:
    name, *rest = unfit.path
    variable = PREFIX + name.upper() + "".join(f"[{part}]" for part in rest)
    shown = MASK if is_secret(name) else repr(unfit.value)
    if name in ("broker_url", "result_backend"):
        shown = re.sub(r"(://[^/@;]*?:)[^;]*@", rf"\1{MASK}@", shown)
    return f"{variable} is {shown}; allowed: {unfit.allowed}"
