"""The settings of a service: `CELERY_PLATFORM_*` from the environment, secrets from systemd credentials."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

PREFIX = "CELERY_PLATFORM_"
MASK = "********"


class BadSettings(Exception):
    """Settings that cannot be worked with. Its text names each variable, its value and what is allowed."""


def _readable(path: Path) -> Path:
    if not os.access(path, os.R_OK):
        raise ValueError("must be a file that this service can read")
    return path


Seconds = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[str, Field(pattern=r"^[1-9][0-9]*/[smh]$")]
ReadableFile = Annotated[Path, AfterValidator(_readable)]


class QueueSetting(BaseModel):
    """A queue: its name, and the priority of messages that are sent to it without one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
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
    result_expires: Seconds = 3600
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
        return init_settings, CredentialsSource(settings_cls), env_settings

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

    @field_validator("broker_url")
    @classmethod
    def _known_broker(cls, value: str) -> str:
        schemes = {url.partition("://")[0] for url in value.split(";")}
        if len(schemes) != 1 or not schemes <= {"redis", "rediss", "sentinel", "amqp", "amqps", "memory"}:
            raise ValueError("must begin with redis://, rediss://, sentinel://, amqp:// or amqps://, the same for all hosts")
        return value

    @model_validator(mode="after")
    def _values_fit_together(self) -> Self:
        names = [queue.name for queue in self.queues]
        limits = {name: getattr(self, name) for name in ("soft_time_limit", "time_limit", "visibility_timeout")}
        wrong = []
        if not limits["soft_time_limit"] < limits["time_limit"]:
            wrong.append(f"{PREFIX}SOFT_TIME_LIMIT is {self.soft_time_limit}; allowed: less than {PREFIX}TIME_LIMIT, {self.time_limit}")
        if self.uses_redis_broker and not limits["time_limit"] < limits["visibility_timeout"]:
            allowed = f"more than {PREFIX}TIME_LIMIT, {self.time_limit}, or Redis hands out tasks that still run"
            wrong.append(f"{PREFIX}VISIBILITY_TIMEOUT is {self.visibility_timeout}; allowed: {allowed}")
        if self.confirm_replicas and not (self.uses_redis_broker and self.redis_transport == "atomic"):
            wrong.append(
                f"{PREFIX}CONFIRM_REPLICAS is {self.confirm_replicas}; allowed: 0, unless {PREFIX}REDIS_TRANSPORT is atomic on Redis"
            )
        if self.retry_backoff > self.retry_backoff_max:
            allowed = f"at most {PREFIX}RETRY_BACKOFF_MAX, {self.retry_backoff_max}"
            wrong.append(f"{PREFIX}RETRY_BACKOFF is {self.retry_backoff}; allowed: {allowed}")
        if self.uses_redis_broker and self.retry_tasks and self.retry_backoff_max >= self.longest_wait:
            allowed = f"less than {self.longest_wait}, the seconds that {PREFIX}VISIBILITY_TIMEOUT leaves beyond {PREFIX}TIME_LIMIT"
            wrong.append(f"{PREFIX}RETRY_BACKOFF_MAX is {self.retry_backoff_max}; allowed: {allowed}")
        for glob, breaker in self.breakers.items():
            if self.uses_redis_broker and breaker.reset * 2 > self.longest_wait:
                allowed = (
                    f"half of {self.longest_wait} at most, the seconds that {PREFIX}VISIBILITY_TIMEOUT leaves beyond {PREFIX}TIME_LIMIT"
                )
                wrong.append(f"{PREFIX}BREAKERS[{glob}][reset] is {breaker.reset}; allowed: {allowed}")
        if len(set(names)) != len(names):
            wrong.append(f"{PREFIX}QUEUES is {names}; allowed: each name once")
        if self.default_queue not in names:
            wrong.append(f"{PREFIX}DEFAULT_QUEUE is {self.default_queue}; allowed: one of {PREFIX}QUEUES, {', '.join(names)}")
        for pattern, route in self.routes.items():
            if route.queue is not None and route.queue not in names:
                wrong.append(f"{PREFIX}ROUTES sends {pattern} to {route.queue}; allowed: one of {PREFIX}QUEUES, {', '.join(names)}")
        if self.encryption != "off" and self.encryption_keys is None:
            wrong.append(f"{PREFIX}ENCRYPTION is {self.encryption}; allowed: off, unless there is a credential encryption_keys")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            wrong.append(f"{PREFIX}TLS_CERT_FILE and {PREFIX}TLS_KEY_FILE; allowed: both or neither")
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

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


def is_secret(field: str) -> bool:
    """Tell whether a setting is a secret, which comes as a credential and is never shown."""
    return "SecretStr" in str(Settings.model_fields[field].annotation)


def load_settings() -> Settings:
    """Return the settings of this process.

    Raises:
        BadSettings: if a variable is unknown, does not fit, or is missing; all of them are named at once.
    """
    wrong = list(_unknown_variables(os.environ))
    try:
        settings = Settings()
    except SettingsError as error:
        wrong.append(f"{error} (lists and mappings are written as JSON)")
    except ValidationError as error:
        wrong.extend(_told(problem) for problem in error.errors())
    if wrong:
        raise BadSettings("\n".join(wrong))
    return settings


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


def _told(problem: Any) -> str:
    if not problem["loc"]:
        return str(problem["msg"]).removeprefix("Value error, ")
    field, *rest = problem["loc"]
    variable = PREFIX + str(field).upper() + "".join(f"[{part}]" for part in rest)
    if problem["type"] == "missing":
        return f"{variable} is not set"
    shown = MASK if is_secret(str(field)) else repr(problem["input"])
    return f"{variable} is {shown}; allowed: {str(problem['msg']).removeprefix('Value error, ')}"
