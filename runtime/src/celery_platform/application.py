"""Finds and loads the user's application, and explains to an operator why it cannot be loaded."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from celery import Celery
from celery.app.utils import find_app
from celery.utils.imports import import_from_cwd

from celery_platform import systemd
from celery_platform.logs import masker
from celery_platform.settings import BadSettings, load_settings

#: Folders of installed packages: code there is not the application's, unless the application is such a package.
INSTALLED = frozenset({"site-packages", "dist-packages"})

#: What the names of Celery's tasks and of ours begin with, which no application has.
BUILT_IN = ("celery.", "celery_platform.")


class BadApplication(Exception):
    """The setting `application` names no Celery application."""


def find(name: str) -> Celery:
    """Return the application that a name stands for, as `celery -A` takes it: `shop.celery:app`, `shop.celery` or `shop`.

    Celery's own search (find_app in celery/app/utils.py, 5.7.0) takes an attribute that is missing, and any AttributeError
    while the module is imported, for a missing module. Its configuration is loaded, too: a KeyError there would else be
    taken for a setting that is not set (celery/utils/collections.py).

    Raises:
        BadApplication: if the module holds no such application.
        Exception: whatever the import of the module raises.
    """
    module_name, colon, attribute = name.partition(":")
    try:
        module = import_from_cwd(module_name)
    except ModuleNotFoundError as error:
        parent, _, last = module_name.rpartition(".")
        if colon or not parent or error.name != module_name:
            raise
        # `shop.celery.app`, where `app` is no module.
        module, attribute = import_from_cwd(parent), last
    app: Any = getattr(module, attribute, None) if attribute else _search(module)
    if not isinstance(app, Celery):
        raise BadApplication(_wrong(module, attribute))
    len(app.conf)
    return app


def _search(module: ModuleType) -> Any:
    if hasattr(module, "__path__") and not isinstance(getattr(module, "app", None), Celery):
        # Celery hides what this raises.
        submodule = f"{module.__name__}.celery"
        try:
            import_from_cwd(submodule)
        except ModuleNotFoundError as error:
            if error.name != submodule:
                raise
    try:
        return find_app(module.__name__)
    except AttributeError:
        return None


def _wrong(module: ModuleType, attribute: str) -> str:
    apps = [name for name, value in vars(module).items() if isinstance(value, Celery)]
    close = difflib.get_close_matches(attribute, apps, n=1, cutoff=0) or apps[:1]
    hint = f" (did you mean {close[0]}?)" if close else ""
    if not attribute:
        return f"module {module.__name__} has no Celery application"
    if hasattr(module, attribute):
        return f"{attribute} of module {module.__name__} is no Celery application{hint}"
    return f"module {module.__name__} has no attribute '{attribute}'{hint}"


def load_tasks(app: Celery) -> list[str]:
    """Load all that a worker loads before it consumes, without its broker; return the names of the application's tasks.

    Django's settings must have a SECRET_KEY, too: a worker would start without it, and fail in the first task that signs.

    Raises:
        Exception: whatever a module raises.
    """
    # Celery logs the traceback of what it then raises.
    logging.getLogger("celery.utils.dispatch.signal").setLevel(logging.CRITICAL)
    app.loader.init_worker()
    app.finalize(auto=True)
    _ = app.backend, app.connection_for_read().get_transport_cls()
    if "DJANGO_SETTINGS_MODULE" in os.environ and "django.conf" in sys.modules:
        _ = sys.modules["django.conf"].settings.SECRET_KEY
    return [name for name in app.tasks if not name.startswith(BUILT_IN)]


@contextmanager
def explained() -> Iterator[None]:
    """End this process with an explanation if the block fails: with 78 (EX_CONFIG) on bad settings, else with 1.

    The journal of a service gets the traceback, too.
    """
    try:
        yield
    except BadSettings as error:
        print(error, file=sys.stderr)
        sys.exit(os.EX_CONFIG)
    except (Exception, SystemExit) as error:
        if systemd.stderr_is_journal():
            print(hidden(traceback.format_exc()), file=sys.stderr)
        print(explain(error), file=sys.stderr)
        sys.exit(1)


def explain(error: BaseException) -> str:
    """Return type, message and place of an exception, and of the one that it began with."""
    first = error
    while earlier := first.__cause__ or (None if first.__suppress_context__ else first.__context__):
        first = earlier
    # Celery raises some anew, as another type.
    lines = [_told(error)] if str(error) != str(first) or error is first else []
    if first is not error:
        lines.append(f"caused by {_told(first)}" if lines else _told(first))
    return hidden("\n  ".join(lines))


def hidden(text: str) -> str:
    """Return a text without secrets; as it is where the settings are bad, from which they are known."""
    try:
        return masker(load_settings())(text)
    except BadSettings:
        return text


def _told(error: BaseException) -> str:
    if isinstance(error, BadApplication):
        return str(error)
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{name}: {error}{_place(error)}"


def _place(error: BaseException) -> str:
    """Return file and line of the innermost frame in the application, or else of the innermost of all."""
    if isinstance(error, SyntaxError) and error.filename:
        return f", at {error.filename}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    inside = [frame for frame in frames if _is_applications(Path(frame.filename))]
    return f", at {(inside or frames)[-1].filename}:{(inside or frames)[-1].lineno}" if frames else ""


def _is_applications(file: Path) -> bool:
    if file.is_relative_to(Path.cwd()) and not INSTALLED & set(file.parts):
        return True
    # An application can be an installed package.
    package = os.environ.get("CELERY_PLATFORM_APPLICATION", "").partition(":")[0].partition(".")[0]
    spec = importlib.util.find_spec(package) if package else None
    own = (spec.submodule_search_locations or [spec.origin or ""]) if spec else []
    return any(file.is_relative_to(path) for path in own if path)
