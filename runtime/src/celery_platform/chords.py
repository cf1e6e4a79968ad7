"""Chords whose parts end far apart: what they need is kept as long as they wait, and one that is dropped is told.

What a chord counts by is kept apart from results (`result_chord_expires`, the setting `chord_expires`; each part that ends
begins the time anew). Owns a patch of `RedisBackend.on_chord_part_return` (celery/backends/redis.py, 5.7.0), in which
- the results of the parts of a nested chord, which its body is made of, are not kept as long as its counters,
- what a chord leaves that failed, or is done with, is kept as long as if it still waited,
- a part that ends when the counters are gone is silently ignored.
The last is told as other failures of chords are: to the body's result and errbacks, and to the log. Of a chord in which no
part ended in time, only parts that end SENDING seconds after another can tell. Can go when Celery does all that.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

from celery import Celery, maybe_signature, states
from celery.backends.redis import RedisBackend
from celery.exceptions import ChordError

from celery_platform.settings import Settings

logger = logging.getLogger(__name__)

#: Seconds for which a chord may still be on its way: Celery sets its size only when its last part is sent.
SENDING = 600
#: Times `chord_expires` for which it is known that a part of a chord has ended.
REMEMBERED = 12


def install(app: Celery, settings: Settings) -> None:
    """Guard the chords of this process; those of other result backends than Redis are left as they are."""
    # Celery before 5.7 keeps counters as long as results.
    if not hasattr(RedisBackend, "chord_expires"):
        return
    part_return = RedisBackend.on_chord_part_return

    @functools.wraps(part_return)
    def on_chord_part_return(backend: Any, request: Any, *arguments: Any, **options: Any) -> Any:
        returned = part_return(backend, request, *arguments, **options)
        if request.group and request.id:
            try:
                look_after(backend, request)
            except Exception:
                # The part has counted.
                logger.exception("Chord %s is not looked after", request.group)
        return returned

    RedisBackend.on_chord_part_return = on_chord_part_return


def look_after(backend: Any, request: Any) -> None:
    """Keep what a chord needs once one of its parts has ended, let go what it no longer needs, and tell if it is dropped.

    Raises:
        redis.exceptions.RedisError: if Redis is away.
    """
    whole = backend.get_key_for_group(request.group)
    results, difference, size, known, claim, ended = (backend.get_key_for_group(request.group, f".{key}") for key in "jtsdcx")
    now, kept = time.time(), backend.chord_expires or 0
    with backend.client.pipeline() as pipe:
        pipe.get(claim).exists(size).exists(whole).set(ended, now, nx=True, ex=kept * REMEMBERED or None).get(ended)
        claimed, waits, nested, _, first = pipe.execute()
    if claimed and (claimed in (b"done", "done") or not waits):
        # It is done, or has failed; a part that runs again must still be known.
        with backend.client.pipeline() as pipe:
            pipe.delete(ended)
            for key in (whole, results, difference, known) if backend.expires else ():
                pipe.expire(key, backend.expires)
            pipe.execute()
    elif waits:
        if nested and backend._chord_result_expires:
            backend.client.expire(backend.get_key_for_task(request.id), backend._chord_result_expires)
    elif not claimed and now - float(first) > SENDING:
        drop(backend, request)
        backend.client.delete(results, difference, known, ended)


def drop(backend: Any, request: Any) -> None:
    """Let a chord fail whose counters are gone, unless its end is known."""
    body = maybe_signature(request.chord, app=backend.app)
    if body.id and backend.get_state(body.id) in states.READY_STATES:
        return
    told = f"chord {request.group} is dropped: its parts ended more than {backend.chord_expires} s apart, so {body.task} never runs"
    logger.error("%s (CELERY_PLATFORM_CHORD_EXPIRES)", told)
    try:
        # As its name says, it wants one that was raised.
        raise ChordError(told)
    except ChordError as error:
        backend.chord_error_from_stack(body, error)
