"""Finds and loads the user's application, and explains to an operator why it cannot be loaded."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from celery import Celery, _state, signals
from celery.app.utils import find_app
from celery.utils.imports import import_from_cwd

from celery_platform import systemd
from celery_platform.logs import masker
from celery_platform.settings import BadSettings, load_settings

#: Folders of installed packages: code there is not the application's, unless the application is such a package.
INSTALLED = frozenset({"site-packages", "dist-packages"})

#: What the names of Celery's tasks and of ours begin with, which no application has.
BUILT_IN = ("celery.", "celery_platform.")

NO_PICKLE = "pickle is impossible here: who can write to the broker could run any code"


class BadApplication(Exception):
    """The setting `application` names no Celery application."""


def find(name: str) -> Celery:
    """Return the application that a name stands for, as `celery -A` takes it: `shop.celery:app`, `shop.celery` or `shop`.

    It may also name a factory that needs no arguments (`shop:create_app`), or a Flask application with its Celery
    application where Flask's documentation puts it, in `extensions["celery"]`.

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
    attribute = attribute.removesuffix("()")
    found: Any = getattr(module, attribute, None) if attribute else _search(module)
    app = found if isinstance(found, Celery) else _of_flask(_called(found, module, attribute))
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


def _called(found: Any, module: ModuleType, attribute: str) -> Any:
    """Return what a factory makes; anything else as it is."""
    if not inspect.isroutine(found):
        return found
    needed = [
        parameter.name
        for parameter in inspect.signature(found).parameters.values()
        if parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise BadApplication(
            f"{attribute} of module {module.__name__} needs arguments ({', '.join(needed)}); "
            "name a Celery application, or a factory that needs none"
        )
    return found()


def _of_flask(found: Any) -> Any:
    extensions = getattr(found, "extensions", None)
    return extensions.get("celery", found) if isinstance(extensions, Mapping) else found


def serve_twins(app: Celery, broker_url: str) -> None:
    """Let every further Celery application that the same code makes be this one.

    A factory that is called once more (by a module of tasks, say) makes another instance, which Celery takes for the
    current one. It would have the settings of the code alone, and what is sent through it would go to their broker. One that
    has the same name, and that its own settings lead to the same broker, shares all that this one has.

    Args:
        app: The application, configured.
        broker_url: Its broker by its own settings, before they were overridden.
    """

    def unite(other: Celery) -> None:
        if other is app or vars(other) is vars(app) or other.main != app.main or other.conf.broker_url != broker_url:
            return
        # A task that both have is the one that this one has.
        for name, task in other._tasks.items():
            app._tasks.setdefault(name, task)
        app._pending.extend(other._pending)
        vars(other).clear()
        other.__dict__ = vars(app)

    def unite_all(**_: Any) -> None:
        for other in list(_state._get_active_apps()):
            unite(other)

    _state.connect_on_app_finalize(unite)
    unite_all()
    # By now, the modules of tasks are there.
    signals.celeryd_init.connect(unite_all, weak=False)


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
        BadApplication: if a task is sent in a form that no worker takes.
        Exception: whatever a module raises.
    """
    # Celery logs the traceback of what it then raises.
    logging.getLogger("celery.utils.dispatch.signal").setLevel(logging.CRITICAL)
    app.loader.init_worker()
    app.finalize(auto=True)
    _ = app.backend, app.connection_for_read().get_transport_cls()
    if "DJANGO_SETTINGS_MODULE" in os.environ and "django.conf" in sys.modules:
        _ = sys.modules["django.conf"].settings.SECRET_KEY
    tasks = {name: task for name, task in app.tasks.items() if not name.startswith(BUILT_IN)}
    # With encryption, all are sent as JSON, whatever they ask for.
    for name, task in tasks.items() if app.conf.task_serializer == "json" else ():
        if task.serializer not in (None, "json"):
            raise BadApplication(f"task {name} has serializer={task.serializer!r}; allowed: json ({NO_PICKLE})")
    return list(tasks)


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
