"""JSON only, encrypted if wanted, and no arguments of tasks where they need not be.

Encryption (CELERY_PLATFORM_ENCRYPTION) covers the bodies of task messages and whole results: state, result, traceback,
children, and what `result_extended` adds. It does not cover what a broker or a monitor needs to see: names and ids of
tasks, times, retries, priorities, stamps, headers of the application's own; remote control and events are plain JSON.
Nor does it cover beat's schedule file. The bodies are authenticated, their headers are not: who may write to the broker
can send an old body again, or under another task's name. Compression gains nothing, as ciphertext does not compress.

Arguments and results are hidden in headers, events, replies to `celery inspect`, and logs; without encryption, headers
show them. The texts of exceptions and of tracebacks are left alone: an application that puts arguments into them shows
them in logs and events.

Both ends need the keys: processes that send tasks or read results are producers (producer.py), with the same credential.

To turn encryption on without losing a message (each step on all hosts, then restart, before the next one):
    1. Give all hosts the keys, with `off`: plain text is written, encrypted messages and results are read, too.
    2. `migrate`: all is written encrypted, plain text is still read.
    3. `on`, once no plain-text message waits (countdowns and retries, too), and results have expired: a message in
       plain text is then refused, a result in plain text cannot be read.
Back is the same in reverse.

To rotate keys, which are read at start: add the new key as the last line everywhere and restart; move it to the first
line everywhere and restart; drop the old one once no message waits that it wrote, and its results have expired.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from celery import Celery, bootsteps
from celery.events.dispatcher import EventDispatcher
from kombu import serialization
from kombu.exceptions import DecodeError
from kombu.pidbox import Node
from kombu.utils import json
from kombu.utils.encoding import str_to_bytes

from celery_platform import versions
from celery_platform.settings import KEY_SIZE, MASK, PREFIX, Settings, keys_in

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

logger = logging.getLogger(__name__)

#: What Celery and kombu call our serializer, and what the messages that it writes are labelled with.
NAME = "celery-platform"
CONTENT_TYPE = "application/x-celery-platform"

#: A sealed text: version, key id, nonce, ciphertext with its tag. No JSON begins with this version's byte (RFC 8259, 2).
VERSION = b"\x01"
KEY_ID_SIZE = 8
#: Bytes; NIST SP 800-38D, 8.2 and 8.3: 96 bits at random, for at most 2^32 texts under one key.
NONCE_SIZE = 12
HEADER_SIZE = len(VERSION) + KEY_ID_SIZE

#: Where Celery shows arguments and results: headers of messages, replies to remote control, and events. (And logs: logs.py.)
IN_HEADERS = frozenset({"argsrepr", "kwargsrepr"})
IN_REPLIES = frozenset({"args", "kwargs"})
IN_EVENTS = frozenset({"args", "kwargs", "result"})


def generate_key() -> str:
    """Return a new key for the credential `encryption_keys`: 32 random bytes in base64url, 44 characters."""
    return base64.urlsafe_b64encode(secrets.token_bytes(KEY_SIZE)).decode()


class Key(NamedTuple):
    """A key of AES-256-GCM, and the first 8 bytes of its SHA-256, which sealed texts name it by."""

    id: bytes
    cipher: AESGCM


class KeyRing:
    """The keys of a service: the first one writes, all read.

    Args:
        text: one key a line, 32 bytes in base64url, with a comment after a space if wanted.

    Raises:
        ValueError: if there is no key, or a line that holds none.
    """

    def __init__(self, text: str) -> None:
        # Imported where it is needed: who does not encrypt need not have it.
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        keys = [Key(hashlib.sha256(key).digest()[:KEY_ID_SIZE], AESGCM(key)) for key in keys_in(text)]
        self.first = keys[0]
        self.ciphers = dict(keys)

    def seal(self, text: bytes) -> bytes:
        """Return a text encrypted under the first key."""
        header, nonce = VERSION + self.first.id, os.urandom(NONCE_SIZE)
        return header + nonce + self.first.cipher.encrypt(nonce, text, header)

    def open(self, sealed: bytes) -> bytes:
        """Return the text that was sealed.

        Raises:
            DecodeError: if its key is not in this ring, or it is not what was sealed.
        """
        from cryptography.exceptions import InvalidTag

        header, nonce, ciphertext = sealed[:HEADER_SIZE], sealed[HEADER_SIZE:][:NONCE_SIZE], sealed[HEADER_SIZE + NONCE_SIZE :]
        key_id = header[len(VERSION) :]
        if key_id not in self.ciphers:
            raise DecodeError(f"encrypted under key {key_id.hex()}, which is not in the credential encryption_keys")
        try:
            return self.ciphers[key_id].decrypt(nonce, ciphertext, header)
        # A nonce or a tag that was cut off is a ValueError.
        except (InvalidTag, ValueError) as error:
            raise DecodeError(f"names key {key_id.hex()}, but is not what was encrypted under it: damaged or forged") from error


def install(app: Celery, settings: Settings) -> None:
    """Let an application encrypt, and hide the arguments of its tasks."""
    if settings.encryption_keys is not None:
        _register(KeyRing(settings.encryption_keys.get_secret_value()), settings)
        use_serializer(app, settings)
    if settings.encryption != "off":
        _send_encrypted(app)
    if settings.encryption != "off" or not settings.log_arguments:
        _hide_arguments(app)


def _register(ring: KeyRing, settings: Settings) -> None:
    writes, reads_plain = settings.encryption != "off", settings.encryption != "on"

    def encode(data: Any) -> bytes:
        text = str_to_bytes(json.dumps(data))
        return ring.seal(text) if writes else text

    # Results come without their content type: Celery's backends take what they read for what they would write.
    def decode(data: str | bytes | memoryview) -> Any:
        text = bytes(str_to_bytes(data))
        if text.startswith(VERSION):
            text = ring.open(text)
        elif not reads_plain:
            raise DecodeError(f"not encrypted, so it is refused: {PREFIX}ENCRYPTION is on")
        return json.loads(text)

    serialization.register(NAME, encode, decode, CONTENT_TYPE, content_encoding="binary")


def use_serializer(app: Celery, settings: Settings) -> None:
    """Put the serializer into an application's configuration, which may have been read anew."""
    accepted = [NAME] if settings.encryption == "on" else [NAME, "json"]
    versions.put(app, {"accept_content": accepted, "result_accept_content": accepted, "result_serializer": NAME})
    if settings.encryption != "off":
        versions.put(app, {"task_serializer": NAME})
    # Celery has no settings of their own for remote control, it takes those of tasks; monitors have no keys.
    app.control.mailbox.accept = ["json"]
    app.control.mailbox.serializer = "json"


def _send_encrypted(app: Celery) -> None:
    """Overrule what tasks and callers say about how a message is written."""
    send = app.send_task
    overridden: set[str] = set()

    def send_task(name: str, *args: Any, **options: Any) -> Any:
        asked = options.get("serializer") or NAME
        if asked != NAME and name not in overridden:
            overridden.add(name)
            logger.warning("%s asks for the serializer %s; it is sent encrypted all the same (%sENCRYPTION)", name, asked, PREFIX)
        return send(name, *args, **options | {"serializer": NAME, "argsrepr": MASK, "kwargsrepr": MASK})

    app.send_task = send_task


def _hide_arguments(app: Celery) -> None:
    app.events.dispatcher_cls = DiscreetDispatcher
    app.control.mailbox.node_cls = DiscreetNode
    app.steps["consumer"].add(DiscreetConsumer)


def _hidden(fields: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: MASK if name in names else value for name, value in fields.items()}


class DiscreetDispatcher(EventDispatcher):  # type: ignore[misc]
    """Sends events about tasks without their arguments and results."""

    def send(self, type: str, **fields: Any) -> Any:
        """Send an event."""
        return super().send(type, **(_hidden(fields, IN_EVENTS) if type.startswith("task-") else fields))

    def publish(self, type: str, fields: dict[str, Any], producer: Any, **options: Any) -> Any:
        """Send an event with a producer of the caller's."""
        return super().publish(type, _hidden(fields, IN_EVENTS) if type.startswith("task-") else fields, producer, **options)


class DiscreetNode(Node):
    """Answers remote control without arguments of tasks: `inspect active`, `reserved`, `scheduled`, `query_task`, `conf`."""

    def reply(self, data: Any, *args: Any, **options: Any) -> None:
        """Send a reply."""
        super().reply(_without_arguments(data), *args, **options)  # type: ignore[no-untyped-call]


def _without_arguments(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: MASK if name in IN_REPLIES else _without_arguments(item) for name, item in value.items()}
    return [_without_arguments(item) for item in value] if isinstance(value, list | tuple) else value


class DiscreetConsumer(bootsteps.Step):  # type: ignore[misc]
    """Hides the arguments that other producers show in headers."""

    def __init__(self, consumer: Any, **_: Any) -> None:
        """Come between the broker and the worker."""
        super().__init__(consumer)
        create_task_handler, on_decode_error = consumer.create_task_handler, consumer.on_decode_error
        consumer.create_task_handler = lambda: _after_hiding(create_task_handler())
        consumer.on_decode_error = _after_hiding(on_decode_error)


def _after_hiding(handle: Callable[..., Any]) -> Callable[..., Any]:
    def hide_and_handle(message: Any, *args: Any) -> Any:
        message.headers = _hidden(message.headers, IN_HEADERS)
        return handle(message, *args)

    return hide_and_handle
