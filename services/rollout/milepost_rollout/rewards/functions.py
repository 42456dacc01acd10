"""Finds the function behind a reward's name, in a worker, and says how it wants to be called."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from milepost_rollout.rewards import builtin


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """A function, and whether it takes the whole group and must be awaited."""

    call: Callable[[Any], Any]
    per_group: bool = False
    is_async: bool = False


class CannotLoad(Exception):
    """The function cannot be found; the message names module, function and remedy."""


def load(name: str) -> RewardFunction:
    """Loads a reward that runs in a worker.

    Raises:
      CannotLoad: with a message for the user.
    """
    if name == "math":
        return RewardFunction(call=builtin.math())
    if name.startswith("regex:"):
        return RewardFunction(call=builtin.regex(name.removeprefix("regex:")))
    return _user_function(name)


def _user_function(name: str) -> RewardFunction:
    module_name, _, path = name.partition(":")
    found: Any = _module(name, module_name)
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            names = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n, None))]
            near = difflib.get_close_matches(part, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names[:8]) or 'none'}"
            raise CannotLoad(
                f"reward {name!r}: module {module_name!r} has no function {path!r}; {hint}"
            ) from None
    if not callable(found):
        raise CannotLoad(
            f"reward {name!r}: {path!r} is {type(found).__name__}, not a function; name a function"
        )
    return _described(name, found)


def _module(name: str, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == module_name or module_name.startswith(f"{error.name}."):
            searched = ", ".join(p or "." for p in sys.path[:4])
            raise CannotLoad(
                f"reward {name!r}: there is no module {module_name!r}; put its file's folder into "
                f"rollout.reward_path or start the gateway there (searched: {searched}, ...)"
            ) from None
        raise CannotLoad(
            f"reward {name!r}: module {module_name!r} needs {error.name!r}; install it"
        ) from error
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise CannotLoad(
            f"reward {name!r}: importing module {module_name!r} raised {type(error).__name__}: {error} "
            f"({where.filename}:{where.lineno}); mend the module"
        ) from error


def _described(name: str, function: Callable[[Any], Any]) -> RewardFunction:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    needed = [
        p
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if len(needed) > 1:
        names = ", ".join(p.name for p in needed)
        raise CannotLoad(
            f"reward {name!r}: the function takes ({names}); let it take a sample, or a list named `samples`"
        )
    first = parameters[0].name if parameters else ""
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  # an instance whose __call__ is async
    )
    return RewardFunction(call=function, per_group=first == "samples", is_async=is_async)
