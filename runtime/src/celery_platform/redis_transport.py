"""kombu's Redis transport without its loss window, and with publishes that replicas confirm.

kombu takes a message off its list first and records it as unacknowledged afterwards; a worker killed in between loses
it. Here a script on the server does both at once. Lists, records, acknowledgements and redelivery are kombu's, so
workers and producers on kombu's own transport can share the broker. A record is kept under a tag that is new with each
claim, not the sender's: only Python parses what a sender wrote. Measurements: benchmarks/redis_transport.py.

A script cannot block. When it finds nothing, the worker waits for a wake-up that producers on this transport send with
each message, and looks again after IDLE_WAIT at the latest: for messages of other producers, restored ones, and those
whose wake-up another worker took.

Left as it is: `basic_get`, which Celery's workers do not use, still takes and records in two steps. A message claimed
by a reply that was lost with its connection returns after the visibility timeout, as those of a killed worker do.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from queue import Empty
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from celery import Celery
from kombu import pidbox
from kombu import transport as transports
from kombu.entity import TRANSIENT_DELIVERY_MODE
from kombu.exceptions import OperationalError
from kombu.transport import redis as base
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str, str_to_bytes
from kombu.utils.json import dumps, loads
from redis import exceptions

from celery_platform.dead_letters import OF_FORM
from celery_platform.settings import PREFIX, BadSettings, Settings

logger = logging.getLogger(__name__)

#: Versions of kombu whose internals this is proven with; with others, kombu's own transport carries the tasks. A new one: run
#: its tests and benchmark, then add it. Those before 5.7 read, connect and close in other ways.
PROVEN = ("5.7.0",)
#: Seconds until an idle worker looks for messages that came without a wake-up.
IDLE_WAIT = 0.1
#: Seconds that the wake-up for a reply is kept, if nobody waits for it.
WAKE_UP_EXPIRES = 60
#: Seconds until the next try of a claim or a publish that Redis refuses for a while.
REFUSED_WAIT = 0.5
#: What separates a message from its queue in a record: an exchange without a name.
RECORD_ROUTE = b',"",'
#: A content type that nobody accepts: such a message becomes a dead letter.
UNREADABLE = "application/octet-stream"
#: Its `count`: how many heard the latest message that this thread published to all who listen.
listeners = threading.local()

#: KEYS: kombu's lists in the order they are looked at, then its index and its hash of unacknowledged messages.
#: ARGV: the time, the tag of this claim, then for each list what follows the message in its record, or nothing if its
#: messages need no acknowledgement. Returns list and message.
#: The record is one of kombu's, as its QoS.append writes it; but it names the queue that the message was in. A message is
#: not parsed: there is text that Python's json writes and reads, and Redis' refuses.
#: The list comes first because Redis, when its memory is full, lets a script go on that began with a pop.
CLAIM = """
for i = 1, #KEYS - 2 do
  local item, where = redis.call('RPOP', KEYS[i]), ARGV[i + 2]
  if item and where == '' then return {KEYS[i], item} end
  if item then
    local replies = {
      redis.pcall('ZADD', KEYS[#KEYS - 1], ARGV[1], ARGV[2]),
      redis.pcall('HSET', KEYS[#KEYS], ARGV[2], '[' .. item .. where)
    }
    for _, reply in ipairs(replies) do
      if type(reply) == 'table' and reply.err then
        redis.call('RPUSH', KEYS[i], item)
        return reply
      end
    end
    return {KEYS[i], item}
  end
end
return false
"""
CLAIM_SHA = hashlib.sha1(CLAIM.encode(), usedforsecurity=False).hexdigest()


class Unconfirmed(OperationalError):
    """A publish that Redis refused for now, or that too few replicas confirmed in time. It is safe to publish again."""


def _passes(error: Exception) -> bool:
    """Tell whether Redis refuses writes for a while only: for want of replicas, memory or disk, or while it becomes a replica."""
    return isinstance(error, exceptions.OutOfMemoryError) or str(error).startswith(("NOREPLICAS", "MISCONF", "UNBLOCKED"))


def _unreadable(text: bytes, tag: str, queue: str) -> dict[str, Any]:
    """Return a message that kombu can take, whose body is one that it cannot."""
    return {
        "body": b64encode(text).decode(),
        "headers": {},
        "content-type": UNREADABLE,
        "content-encoding": "binary",
        "properties": {"body_encoding": "base64", "delivery_tag": tag, "delivery_info": {"exchange": "", "routing_key": queue}},
    }


def _message(text: bytes, tag: str, queue: str) -> dict[str, Any]:
    """Return a message of a queue, under the tag of its claim; the sender's own tag is not looked at."""
    try:
        message: dict[str, Any] = loads(bytes_to_str(text))
        properties = message["properties"]
        delivery = properties["delivery_info"]
        if delivery["exchange"] is None or delivery["routing_key"] is None:
            raise ValueError("It came from nowhere.")
        properties["delivery_tag"] = tag
    except (*OF_FORM, RecursionError):
        return _unreadable(text, tag, queue)
    return message


class Message(virtual.Message):
    """A message; one of an unexpected form is its own body. With kombu's own, it would end the worker, and each next one."""

    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        try:
            super().__init__(payload, channel=channel, **options)  # type: ignore[no-untyped-call]
        except OF_FORM:
            properties = payload["properties"]
            unreadable = _unreadable(str_to_bytes(dumps(payload)), properties["delivery_tag"], properties["delivery_info"]["routing_key"])
            super().__init__(unreadable, channel=channel, **options)  # type: ignore[no-untyped-call]


class QoS(base.QoS):
    """What a channel has delivered and not yet settled."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note a message as unacknowledged; not in Redis where the claim has done so."""
        if message._raw is self.channel._claimed:
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)  # type: ignore[no-untyped-call]

    def holds(self, delivery_tag: str) -> bool:
        """Tell whether a message is still this worker's, and was not redelivered meanwhile."""
        with self.channel.conn_or_acquire() as client:
            return client.hget(self.unacked_key, delivery_tag) is not None

    def ack(self, delivery_tag: str) -> None:
        """Forget a message; while Redis takes no writes, do so later, where kombu ends the worker."""
        self._forget(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:
        """Redeliver a message; one that is no JSON, and whose worker died before it was a dead letter, as one that is."""
        try:
            super().restore_by_tag(tag, client, leftmost)  # type: ignore[no-untyped-call]
        except (*OF_FORM, RecursionError):
            with self.channel.conn_or_acquire(client) as client:
                text, _, queue = (client.hget(self.unacked_key, tag) or b"")[1:].rpartition(RECORD_ROUTE)
                queue = loads(bytes_to_str(queue[:-1]))
                client.hset(self.unacked_key, tag, dumps([_unreadable(text, bytes_to_str(tag), queue), "", queue]))
            super().restore_by_tag(tag, client, leftmost)  # type: ignore[no-untyped-call]

    def restore_visible(self, *arguments: Any, **options: Any) -> None:
        """Redeliver what was not acknowledged in time. It is called every few seconds, also where nothing happens."""
        try:
            self._forget()
            super().restore_visible(*arguments, **options)  # type: ignore[no-untyped-call]
        except exceptions.ResponseError as error:
            if not _passes(error):
                raise

    def _forget(self, *tags: str) -> None:
        """Delete records, with those that could not be deleted before.

        kombu uses a transaction, which Redis refuses while its memory is full. Without one, the hash comes first: an entry
        of the index alone is removed by the next look for unacknowledged messages.
        """
        tags += tuple(self.channel._refused_acks)
        if not tags:
            return
        with self.channel.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            replies = pipe.hdel(self.unacked_key, *tags).zrem(self.unacked_index_key, *tags).execute(raise_on_error=False)
        for error in replies:
            if isinstance(error, exceptions.ResponseError):
                if not _passes(error):
                    raise error
                self.channel._refused_acks.update(tags)
                return
        self.channel._refused_acks.difference_update(tags)


class _Channel:
    """What is ours, for a channel with Sentinel or without."""

    Message = Message
    QoS = QoS

    #: How many replicas must have a message before its publish returns, and how many seconds they have.
    #: Transient messages (delivery_mode 1), as the replies of remote control are, need no confirmation.
    confirm_replicas = 0
    confirm_timeout = 5.0

    #: The command to send next, or being answered, if it is not a claim.
    _wait: list[Any] | None = None
    #: The tag of the latest claim.
    _tag = ""
    #: The payload that is being delivered, already recorded as unacknowledged.
    _claimed: Any = None
    _restored_at = 0.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._no_ack: set[str] = set()
        self._refused_acks: set[str] = set()
        super().__init__(*arguments, **options)

    # --- Consuming ---

    def basic_consume(self: Any, queue: str, no_ack: bool = False, *arguments: Any, **options: Any) -> Any:
        """Consume from a queue; remember whether its messages are acknowledged, or records of others would be left for ever."""
        (self._no_ack.add if no_ack else self._no_ack.discard)(queue)
        return super().basic_consume(queue, no_ack, *arguments, **options)  # type: ignore[misc]

    def _brpop_start(self: Any, timeout: Any = None) -> None:
        """Send a claim or a wait, where kombu sends its BRPOP."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        connection = self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        command = self._wait or self._claim(queues)
        # Without redis-py's own health check, which may reconnect where the event loop does not see it. A connection
        # that is half open is found by kombu's check of an overdue reply.
        connection.send_command(*command, check_health=False)

    def _claim(self: Any, queues: list[str]) -> list[Any]:
        lists = [(self._q_for_pri(queue, step), queue) for step in self.priority_steps for queue in queues]
        keys = [self.global_keyprefix + key for key in (*(key for key, _ in lists), self.unacked_index_key, self.unacked_key)]
        self._tag = str(uuid4())
        where = [
            b"" if queue in self._no_ack or not self.ack_emulation else RECORD_ROUTE + dumps(queue).encode() + b"]" for _, queue in lists
        ]
        return ["EVALSHA", CLAIM_SHA, len(keys), *keys, time.time(), self._tag, *where]

    def _brpop_read(self: Any, **_: Any) -> bool:
        """Read the reply to a claim or a wait, where kombu reads that to its BRPOP."""
        waited, self._wait = self._wait, None
        try:
            reply = self._reply(self.client.connection)
            if waited or not reply:
                if not waited and reply is None:
                    self._wait = ["BZPOPMIN", *(self.global_keyprefix + _wake_key(queue) for queue in self.active_queues), IDLE_WAIT]
                self._restore_without_event_loop()
                raise Empty
            key, item = reply
            queue = bytes_to_str(key)[len(self.global_keyprefix) :].rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            payload = self._claimed = _message(item, self._tag, queue)
            self.connection._deliver(payload, queue)
            return True
        finally:
            self._in_poll = self._claimed = None
            # As kombu does: only while no command is under way can new credentials be sent.
            self._flush_brpop_reauth()

    def _reply(self: Any, connection: Any) -> Any:
        """Return what Redis answers: None if there is nothing, False if the same has to be asked again."""
        try:
            return connection.read_response()
        except exceptions.NoScriptError:
            # A server that has restarted, or a replica that was promoted.
            connection.send_command("SCRIPT LOAD", CLAIM, check_health=False)
            connection.read_response()
            return False
        except self.connection_errors:
            connection.disconnect()
            raise
        except exceptions.ResponseError as error:
            if not _passes(error):
                raise
            # kombu would end the worker. This waits on any server, for more replicas than there are.
            self._wait = ["WAIT", 2**31 - 1, round(REFUSED_WAIT * 1000)]
            return False

    def _restore_without_event_loop(self: Any) -> None:
        """Look for messages to redeliver. kombu does so when nothing answers in time, and here something always does."""
        cycle, now = self.connection.cycle, time.monotonic()
        if cycle._in_protected_read and now - self._restored_at >= self.unacked_restore_interval:
            self._restored_at = now
            cycle.maybe_restore_messages()

    def close(self: Any) -> None:
        """Close. In kombu's own, a reply that was under way and is lost leaves the channel half closed, which ends the worker later."""
        if self._in_poll:
            with suppress(Empty, *self.connection_errors):
                self._brpop_read()
        super().close()  # type: ignore[misc]

    # --- Publishing ---

    @property
    def supports_batch_publish(self) -> bool:
        """Whether kombu may send many messages at once; not if each is to be confirmed."""
        return not self.confirm_replicas and bool(super().supports_batch_publish)  # type: ignore[misc]

    def basic_publish(self: Any, *arguments: Any, **options: Any) -> Any:
        """Publish. When kombu had to connect again to declare the queue, it goes on with the channel that it had before."""
        if self.closed:
            raise exceptions.ConnectionError("The channel is closed.")
        return super().basic_publish(*arguments, **options)  # type: ignore[misc]

    def _put(self: Any, queue: str, message: dict[str, Any], **options: Any) -> None:
        """Put a message on its list, wake a worker, and wait for the replicas, in one round trip.

        Raises:
            Unconfirmed: if Redis refuses it for now, or too few replicas confirmed it. The message is withdrawn then,
                lest it be there twice after the next try; one that a worker has already taken counts as published.
        """
        batch = options.get("_publish_batch")
        commands: list[Any] = []
        collect = SimpleNamespace(add=lambda *command: commands.append(command))
        super()._put(queue, message, _publish_batch=collect)  # type: ignore[misc]
        commands.append(("zadd", _wake_key(queue), {"": 0}))
        transient = message["properties"].get("delivery_mode") == TRANSIENT_DELIVERY_MODE
        if transient:
            # A reply's queue may be gone at any time, its wake-up must go, too.
            commands.append(("pexpire", _wake_key(queue), WAKE_UP_EXPIRES * 1000))
        if batch is not None:
            for command in commands:
                batch.add(*command)
            return
        _, key, text = commands[0]
        confirmed = self.confirm_replicas and not transient
        if confirmed:
            commands.append(("wait", self.confirm_replicas, round(self.confirm_timeout * 1000)))
        with self.conn_or_acquire() as client, _refusals_told():
            # Within a transaction, WAIT does not wait.
            with client.pipeline(transaction=False) as pipe:
                for name, *arguments in commands:
                    getattr(pipe, name)(*arguments)
                pushed, *_, replicas = pipe.execute(raise_on_error=False)
            for error in (pushed, replicas) if confirmed else (pushed,):
                if isinstance(error, exceptions.ResponseError):
                    raise error
            if confirmed and replicas < self.confirm_replicas and client.lrem(self.global_keyprefix + key, 1, text):
                told = f"{replicas} of {self.confirm_replicas} replicas confirmed it within {self.confirm_timeout} s"
                raise Unconfirmed(f"Message for {queue} withdrawn: {told}")

    def _queue_bind(self: Any, *arguments: Any) -> None:
        """Bind a queue, which a producer does before its first message."""
        with _refusals_told():
            super()._queue_bind(*arguments)  # type: ignore[misc]

    def _put_fanout(self: Any, exchange: str, message: dict[str, Any], routing_key: str, **options: Any) -> None:
        """Publish to all who listen, and note how many these are."""
        if options.get("_publish_batch") is not None:
            super()._put_fanout(exchange, message, routing_key, **options)  # type: ignore[misc]
            return
        payload = dumps(message)
        with self.conn_or_acquire() as client:
            listeners.count = sum(client.publish(topic, payload) for topic in self._get_publish_topics(exchange, routing_key))

    def _size(self: Any, queue: str) -> int:
        """Return the length of a queue, for which a producer asks before its first message."""
        with _refusals_told():
            return int(super()._size(queue))  # type: ignore[misc]


class Mailbox(pidbox.Mailbox):
    """Asks workers by remote control, and waits no longer than until all who were asked have answered.

    kombu waits until none has answered for a second (kombu/pidbox.py, _collect), since it does not know how many there
    are. Redis tells it. Can go when kombu asks.
    """

    def _publish(self, *arguments: Any, **options: Any) -> Any:
        listeners.count = None
        return super()._publish(*arguments, **options)  # type: ignore[no-untyped-call]

    @property
    def asked(self) -> int | None:
        """How many workers got this thread's latest question; None if it is not known."""
        return getattr(listeners, "count", None)

    def _collect(self, ticket: Any, limit: Any = None, *arguments: Any, **options: Any) -> Any:
        return super()._collect(ticket, limit or self.asked, *arguments, **options)  # type: ignore[no-untyped-call]


def _wake_key(queue: str) -> str:
    """Return the sorted set whose one member wakes a worker; as a set, it does not grow while nobody waits."""
    return f"wake-up:{queue}"


@contextmanager
def _refusals_told() -> Iterator[None]:
    """Raise the errors that Celery's callers know."""
    try:
        yield
    except exceptions.ResponseError as error:
        if not _passes(error):
            raise OperationalError(str(error)) from error
        # kombu would try again at once.
        time.sleep(REFUSED_WAIT)
        raise Unconfirmed(str(error)) from error


OPTIONS = ("confirm_replicas", "confirm_timeout")


class Channel(_Channel, base.Channel):  # type: ignore[misc]
    """A channel to one Redis."""

    from_transport_options = base.Channel.from_transport_options + OPTIONS  # type: ignore[assignment]


class SentinelChannel(_Channel, base.SentinelChannel):  # type: ignore[misc]
    """A channel to the master that Sentinel names."""

    from_transport_options = base.SentinelChannel.from_transport_options + OPTIONS  # type: ignore[assignment]


class _Transport:
    #: After these, kombu tries again to publish as often as its policy says, with a new connection or without. A transport
    #: that does not name them is given up at the second error in a row, as in a failover that takes its time.
    recoverable_connection_errors = base.Transport.connection_errors
    recoverable_channel_errors = (Unconfirmed,)

    def establish_connection(self: Any) -> Any:
        """Connect.

        Raises:
            RuntimeError: if it is a Redis Cluster, where a script cannot use the keys of several queues.
        """
        connection = super().establish_connection()  # type: ignore[misc]
        if self._avail_channels[-1].client.info("cluster")["cluster_enabled"]:
            raise RuntimeError("The broker is a Redis Cluster, which kombu cannot use; allowed: one Redis, or Sentinel")
        return connection

    @property
    def supports_batch_publish(self: Any) -> bool:
        """See the channel's."""
        return not self.client.transport_options.get("confirm_replicas") and bool(super().supports_batch_publish)  # type: ignore[misc]


class Transport(_Transport, base.Transport):
    """For redis:// and rediss://."""

    Channel = Channel


class SentinelTransport(_Transport, base.SentinelTransport):
    """For sentinel://."""

    Channel = SentinelChannel
    # A master without its replicas may not be the master any more: connecting again asks Sentinel who is.
    recoverable_connection_errors = (*base.Transport.connection_errors, Unconfirmed)


ALIASES = {"redis": Transport, "rediss": Transport, "sentinel": SentinelTransport}


def install(app: Celery, settings: Settings) -> None:
    """Let the URLs of Redis and Sentinel mean this transport, in this process.

    Not by `broker_transport`: on a failover to the next of several URLs, kombu goes by their scheme again.

    With a version of kombu that this is not proven with, they go on to mean kombu's own, with a warning.

    Raises:
        BadSettings: if the settings ask for this transport by name, and kombu's version is not one that it is proven with.
    """
    if not settings.uses_redis_broker or settings.redis_transport == "kombu":
        return
    if (found := version("kombu")) not in PROVEN:
        told = f"it is proven with kombu {', '.join(PROVEN)}, and this is {found}"
        if "redis_transport" in settings.given:
            raise BadSettings(f"{PREFIX}REDIS_TRANSPORT is atomic; allowed: kombu, since {told}")
        logger.warning(
            "kombu's own Redis transport is used instead of the atomic one: %s. A worker that is killed may lose a message, and no "
            "publish waits for replicas. (%sREDIS_TRANSPORT=kombu says that this is meant.)",
            told,
            PREFIX,
        )
        return
    for scheme, transport in ALIASES.items():
        transports.TRANSPORT_ALIASES[scheme] = f"{__name__}:{transport.__name__}"
        transports._transport_cache.pop(scheme, None)
    app.control.mailbox.__class__ = Mailbox
