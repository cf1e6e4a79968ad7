"""The settings of a service: `CELERY_PLATFORM_*` from the environment, secrets from systemd credentials."""

from __future__ import annotations

import base64
import contextlib
import difflib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_origin
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "CELERY_PLATFORM_"
MASK = "********"
#: Bytes of a key for AES-256.
KEY_SIZE = 32
ALLOWED_KEYS = f"one key a line, {KEY_SIZE} bytes in base64url, as `celery-platform generate-key` prints them"


class BadSettings(Exception):
    """Settings that cannot be worked with. Its text names each variable, its value and what is allowed."""


class Conflict(NamedTuple):
    """What is wrong with a few settings together: their names, and a text as that of BadSettings."""

    inputs: set[str]
    text: str


class Conflicts(ValueError):
    """Settings that do not fit together."""

    def __init__(self, conflicts: list[Conflict]) -> None:
        super().__init__("\n".join(conflict.text for conflict in conflicts))
        self.conflicts = conflicts


def _readable(path: Path) -> Path:
    if not os.access(path, os.R_OK):
        raise ValueError("must be a file that this service can read")
    return path


def _rate(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*/[smh]", text):
        raise ValueError("a number a second, minute or hour: 10/s, 10/m, 10/h")
    return text


def _queue_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError("letters, digits, _ . and -")
    return name


Seconds = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[str, AfterValidator(_rate)]
ReadableFile = Annotated[Path, AfterValidator(_readable)]


class QueueSetting(BaseModel):
    """A queue: its name, and the priority of messages that are sent to it without one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(_queue_name)]
    priority: Annotated[int, Field(ge=0, le=9)] | None = None


class Route(BaseModel):
    """Where a task goes: a queue, a priority, or both."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    queue: str | None = None
    priority: Annotated[int, Field(ge=0, le=9)] | None = None


class Breaker(BaseModel):
    """When a circuit breaker opens: failures in a row. And for how many seconds, until one task is tried."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    failures: Count = 5
    reset: Seconds = 60


class EnvironmentSource(PydanticBaseSettingsSource):
    """Reads `CELERY_PLATFORM_*` from the environment."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """Return the value of the field's variable."""
        return _values(os.environ).get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return all settings that are there."""
        return _values(os.environ)


class CredentialsSource(PydanticBaseSettingsSource):
    """Reads secrets from the files that systemd hands over (LoadCredential=), named as the fields are."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """Return the content of the field's file."""
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        path = Path(folder, field_name) if folder else None
        return (path.read_text().rstrip("\n") if path and path.exists() else None), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return all secrets that are there."""
        secrets = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items() if is_secret(name)}
        return {name: value for name, value in secrets.items() if value is not None}


class Settings(BaseSettings):
    """What a service is told."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    #: The user's application, as `celery -A` takes it.
    application: str

    # --- Broker and result backend. Secrets are credentials of the same names, never environment variables. ---
    #: One URL, or several with `;` between them: redis, rediss, sentinel, amqp, amqps. Without password.
    broker_url: str
    broker_password: SecretStr | None = None
    #: None: results are not kept.
    result_backend: str | None = None
    result_backend_password: SecretStr | None = None
    #: Name that Sentinel gives the master, and the user (None: `default`) and password of Sentinel itself.
    sentinel_master: str = "celery"
    sentinel_user: str | None = None
    sentinel_password: SecretStr | None = None
    tls_ca_file: ReadableFile | None = None
    tls_cert_file: ReadableFile | None = None
    tls_key_file: ReadableFile | None = None
    #: Name that the certificates of all RabbitMQ nodes share. None: each has its own host's.
    tls_server_name: str | None = None
    #: What all keys and channels in Redis begin with.
    key_prefix: str = ""
    pool_limit: Count = 10
    #: Seconds for which a task is tried to be published; must outlast a failover. (With Redis, tries, up to a second apart.)
    publish_timeout: Annotated[int, Field(ge=0)] = 60
    #: `atomic` loses no message of a killed worker; `kombu` is kombu's own, for versions that ours is not proven with.
    redis_transport: Literal["atomic", "kombu"] = "atomic"
    #: With `atomic`: replicas that must have a message before its publish returns, and seconds that they have for it.
    confirm_replicas: Annotated[int, Field(ge=0)] = 0
    confirm_timeout: Annotated[int, Field(gt=0, le=8)] = 3

    # --- Queues ---
    default_queue: str = "default"
    queues: list[QueueSetting] = [QueueSetting(name="default")]
    #: By task name; globs allowed, the first match wins.
    routes: dict[str, Route] = {}
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
    retry_tasks: list[str] = []
    retry_max: Count = 5
    #: Seconds until the first retry and at most; each wait is twice the one before, less up to half of it by chance.
    retry_backoff: Seconds = 1
    retry_backoff_max: Seconds = 300
    #: The first match wins. The tasks of one glob share its circuit, and its rate.
    breakers: dict[str, Breaker] = {}
    #: Runs a second, minute or hour by all workers together: `10/m`.
    rate_limits: dict[str, Rate] = {}

    # --- Results ---
    result_expires: Seconds = 86400
    #: Seconds that a chord waits for its next part.
    chord_expires: Seconds = 2592000
    result_compression: Literal["none", "gzip", "bzip2"] = "none"

    # --- Encryption of bodies and results: `migrate` writes encrypted and still reads plain text. ---
    encryption: Literal["off", "migrate", "on"] = "off"
    #: One key a line, as `celery-platform generate-key` prints them. The first one writes, all read.
    encryption_keys: SecretStr | None = None

    # --- Logs ---
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    #: Show the arguments and results of tasks in logs and events.
    log_arguments: bool = False

    # --- Dead letters ---
    dead_letters: bool = True

    # --- Alerts: posted to the URL in the credential `alert_webhook`; none if there is none. ---
    alert_webhook: SecretStr | None = None
    #: Seconds that alerts are gathered before one message tells them all, and that a post may take.
    alert_interval: Seconds = 30
    alert_timeout: Seconds = 5
    #: Messages an hour at most.
    alert_rate: Count = 30

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read credentials before the environment, and no other files."""
        return init_settings, CredentialsSource(settings_cls), EnvironmentSource(settings_cls)

    @field_validator("queues", mode="before")
    @classmethod
    def _names_are_queues(cls, value: Any) -> Any:
        return [{"name": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value

    @field_validator("broker_url", "result_backend")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        for url in (value or "").split(";"):
            login, at, _ = url.partition("://")[2].partition("@")
            if at and ":" in login:
                raise ValueError("must hold no password; that is a credential")
        return value

    @field_validator("broker_url", "result_backend")
    @classmethod
    def _hosts_and_ports(cls, value: str | None) -> str | None:
        for url in (value or "").split(";"):
            try:
                parts = urlsplit(url)
                _ = parts.port
            except ValueError:
                raise ValueError("must give hosts as name:port or address:port, with an IPv6 address in brackets: [::1]:6379") from None
            if parts.scheme in ("redis", "rediss", "sentinel") and not re.fullmatch(r"/?|/[0-9]+", parts.path):
                raise ValueError("must end with the number of a database of Redis, as in redis://host:6379/0")
        return value

    @field_validator("encryption_keys")
    @classmethod
    def _keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            keys_in(value.get_secret_value())
        return value

    @field_validator("alert_webhook")
    @classmethod
    def _webhook(cls, value: SecretStr | None) -> SecretStr | None:
        parts = urlsplit(value.get_secret_value() if value else "https://none")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("a URL, http:// or https://")
        return value

    @field_validator("broker_url")
    @classmethod
    def _known_broker(cls, value: str) -> str:
        schemes = {url.partition("://")[0] for url in value.split(";")}
        if len(schemes) != 1 or not schemes <= {"redis", "rediss", "sentinel", "amqp", "amqps", "memory"}:
            raise ValueError("must begin with redis://, rediss://, sentinel://, amqp:// or amqps://, the same for all hosts")
        return value

    @model_validator(mode="after")
    def _values_fit_together(self) -> Self:
        if conflicts := list(self._conflicts()):
            raise Conflicts(conflicts)
        return self

    def _conflicts(self) -> Iterator[Conflict]:
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


def is_secret(field: str) -> bool:
    """Tell whether a setting is a secret, which comes as a credential and is never shown."""
    return "SecretStr" in str(Settings.model_fields[field].annotation)


class _Given(Settings):
    """Settings of which this process's own environment and credentials are no part."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read nothing."""
        return (init_settings,)


class _Planned(_Given):
    """Settings of a service on another host, whose files are not here."""

    tls_ca_file: Path | None = None
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None


def load_settings() -> Settings:
    """Return the settings of this process.

    Raises:
        BadSettings: if a variable is unknown, does not fit, or is missing; all of them are named at once.
    """
    if wrong := _problems(_Given, os.environ, CredentialsSource(Settings)()):
        raise BadSettings("\n".join(wrong))
    return Settings()


def planned_problems(environment: Mapping[str, str], secrets: Mapping[str, str], unknown: Collection[str] = ()) -> list[str]:
    """Return what `load_settings` would say of a service on another host, whose files are not here.

    Args:
        environment: The variables of the service.
        secrets: Its credentials, by name.
        unknown: Settings that are not known yet: neither they nor what depends on them is judged.

    Returns:
        Texts: `<variable> <what is wrong>; allowed: <what is allowed>`, or `<variable> is not set`.
    """
    return _problems(_Planned, environment, secrets, unknown)


def _problems(kind: type[Settings], environment: Mapping[str, str], secrets: Mapping[str, str], unknown: Collection[str] = ()) -> list[str]:
    values = {name: value for name, value in (_values(environment) | dict(secrets)).items() if name not in unknown}
    errors = _errors(kind, values)
    unfit = {str(error["loc"][0]) for error in errors if error["loc"]}
    wrong = [*_unknown_variables(environment), *(_told(error) for error in errors if error["loc"] and error["loc"][0] not in unknown)]
    if unfit:
        # pydantic looks for conflicts only among values that fit, so these get what stands for those that do not.
        fit = {name: value for name, value in values.items() if name not in unfit}
        errors = _errors(kind, {"application": "-", "broker_url": "memory://"} | fit)
    conflicts = [conflict for error in errors for conflict in getattr(error.get("ctx", {}).get("error"), "conflicts", [])]
    return wrong + [conflict.text for conflict in conflicts if conflict.inputs.isdisjoint(unfit.union(unknown))]


def _errors(kind: type[Settings], values: dict[str, Any]) -> list[Any]:
    try:
        kind(**values)
    except ValidationError as error:
        return list(error.errors())
    return []


def _values(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings in an environment by field; lists and mappings are JSON, and left as text where they are not."""
    values: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        text = environment.get(PREFIX + name.upper())
        if text is None or is_secret(name):
            continue
        values[name] = text
        if get_origin(field.annotation) in (list, dict):
            with contextlib.suppress(ValueError):
                values[name] = json.loads(text)
    return values


def _unknown_variables(environment: Mapping[str, str]) -> list[str]:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    wrong = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            wrong.append(f"{name} is no setting" + (f"; allowed: {close[0]}, perhaps" if close else ""))
        elif name in known and is_secret(name.removeprefix(PREFIX).lower()):
            wrong.append(f"{name} is a secret; allowed: the credential {name.removeprefix(PREFIX).lower()}, not the environment")
    return wrong


def _told(error: Any) -> str:
    """Return the text of one of pydantic's errors."""
    field, *rest = error["loc"]
    variable = PREFIX + str(field).upper() + "".join(f"[{part}]" for part in rest)
    if error["type"] == "missing" and not rest:
        return f"{variable} is not set"
    shown = MASK if is_secret(str(field)) else repr(error["input"])
    if field in ("broker_url", "result_backend"):
        shown = re.sub(r"(://[^/@;]*?:)[^;]*@", rf"\1{MASK}@", shown)
    return f"{variable} is {shown}; allowed: {str(error['msg']).removeprefix('Value error, ')}"
