"""The command `celery-platform queues`: tasks that wait in each queue, and who consumes it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import click
from amqp.exceptions import NotFound
from celery import Celery
from kombu.transport.redis import Channel as RedisChannel

from celery_platform import broker, dead_letters
from celery_platform.settings import Settings

#: Seconds that one answer of the broker may take.
ANSWER_TIMEOUT = 5
#: Seconds that workers have to reply; the second time is for those on a busy host, before a queue counts as without consumer.
REPLY_TIMEOUTS = (1, 3)


@dataclass(frozen=True)
class QueueStatus:
    """A queue: its tasks that no worker has taken yet, and the number of workers that consume it."""

    name: str
    waiting: int
    consumers: int

    @property
    def stalled(self) -> bool:
        """Whether tasks wait that nobody will take."""
        return self.waiting > 0 and not self.consumers


def read(app: Celery, settings: Settings) -> tuple[list[QueueStatus], int]:
    """Return the status of all declared queues, and the number of dead letters.

    Raises:
        redis.RedisError: if Redis does not answer.
        OperationalError: if RabbitMQ does not (kombu.exceptions).
    """
    if settings.uses_redis_broker:
        return _read_redis(app, settings)
    return _read_rabbitmq(app, settings)


def _read_redis(app: Celery, settings: Settings) -> tuple[list[QueueStatus], int]:
    names = [queue.name for queue in settings.queues]
    client: Any = broker.redis_client(settings, settings.broker_url, settings.broker_password, ANSWER_TIMEOUT)
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            for step in RedisChannel.priority_steps:
                pipe.llen(settings.key_prefix + (f"{name}{RedisChannel.sep}{step}" if step else name))
        pipe.hlen(settings.key_prefix + dead_letters.NAME)
        *lengths, dead = pipe.execute()
    steps = len(RedisChannel.priority_steps)
    waiting = {name: sum(lengths[number * steps : (number + 1) * steps]) for number, name in enumerate(names)}
    # Redis does not know who waits for a list on behalf of which queue: the workers are asked.
    for timeout in REPLY_TIMEOUTS:
        consumers = _consumers(app, timeout)
        queues = [QueueStatus(name, waiting[name], consumers[name]) for name in names]
        if all(queue.consumers for queue in queues):
            break
    return queues, dead


def _consumers(app: Celery, timeout: float) -> Counter[str]:
    """Return the number of workers that reply in time, by the queue that they consume."""
    replies = app.control.inspect(timeout=timeout).active_queues() or {}
    return Counter(queue.get("name", "") for queues in replies.values() for queue in queues)


def _read_rabbitmq(app: Celery, settings: Settings) -> tuple[list[QueueStatus], int]:
    queues, dead = [], 0
    options = {"read_timeout": ANSWER_TIMEOUT, "write_timeout": ANSWER_TIMEOUT}
    with app.connection_for_read(connect_timeout=ANSWER_TIMEOUT, transport_options=options) as connection:
        connection.ensure_connection(max_retries=1, timeout=ANSWER_TIMEOUT)
        channel = connection.default_channel
        for name in [*(queue.name for queue in settings.queues), dead_letters.NAME]:
            try:
                _, messages, consumers = channel.queue_declare(name, passive=True)
            except NotFound:
                # There is no such queue yet. py-amqp has opened the channel again.
                messages = consumers = 0
            if name == dead_letters.NAME:
                dead = messages
            else:
                queues.append(QueueStatus(name, messages, consumers))
    return queues, dead


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def queues(as_json: bool) -> None:
    """Show how many tasks wait in each queue, and how many workers consume it.

    It ends with 1 if tasks wait in a queue that no worker consumes.
    """
    from celery_platform import cli

    settings = cli._settings()
    with cli._site() as (app, _):
        found, dead = read(app, settings)
    if as_json:
        click.echo(json.dumps({"queues": [asdict(queue) for queue in found], "dead_letters": dead}, indent=2))
    else:
        rows = [(queue.name, str(queue.waiting), str(queue.consumers), "no consumer" if queue.stalled else "") for queue in found]
        cli._print_table(("Queue", "Waiting", "Consumers", ""), rows)
        click.echo(f"{dead} dead letters")
    if any(queue.stalled for queue in found):
        raise click.exceptions.Exit(1)
