"""All settings of all services, by name: for `milepost config`, `milepost up` and the settings reference.

Services are found by name when they are asked for, never imported from here: their settings modules are free
of torch, Redis and the like, so that any machine can check a configuration for the whole run.
"""

from __future__ import annotations

import importlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from milepost.errors import InvalidArgument
from milepost_common.settings import ServiceSettings, layers, nearest

MODULES: Mapping[str, str] = {
    "buffer": "milepost_buffer.settings",
    "router": "milepost_router.settings",
    "rollout": "milepost_rollout.settings",
    "trainer": "milepost_trainer.settings",
    "engine": "milepost_engine.settings",
    "up": "milepost_common.up.settings",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting as documented.

    Attributes:
      key: dotted path from the top of the TOML file, for example "trainer.optimizer.lr".
      type: in words.
      default: as TOML would write it; "required" where there is none.
      environment: variable that sets it.
      flag: flag that sets it.
      description: its docstring, on one line.
    """

    key: str
    type: str
    default: str
    environment: str
    flag: str
    description: str


@dataclass(frozen=True, kw_only=True)
class Effective:
    """A setting's value, and the source it comes from: default, file, environment or flag."""

    key: str
    value: Any
    origin: str


def settings_class(service: str) -> type[ServiceSettings]:
    """The settings of a service.

    Raises:
      InvalidArgument: no such service, or what its settings need is not installed.
    """
    if service not in MODULES:
        raise InvalidArgument(f"unknown service {service!r}; {nearest(service, list(MODULES))}")
    try:
        module = importlib.import_module(MODULES[service])
    except ModuleNotFoundError as error:
        raise InvalidArgument(
            f"the settings of {service} need the package {error.name!r}: pip install 'milepost[{service}]'",
            reason="NOT_INSTALLED",
        ) from error
    found = [v for v in vars(module).values() if _is_settings_of(v, service)]
    if len(found) != 1:
        raise InvalidArgument(
            f"{MODULES[service]} has {len(found)} settings classes for [{service}], wanted 1"
        )
    return found[0]


def _is_settings_of(value: Any, service: str) -> typing.TypeGuard[type[ServiceSettings]]:
    return isinstance(value, type) and issubclass(value, ServiceSettings) and value.table == service


def describe(kind: type[ServiceSettings]) -> Iterator[Setting]:
    """Every setting of a service in the order of its definition, nested ones by their dotted path; those of
    tables that it shares come last."""
    for path, info in sorted(_leaves(kind, ()), key=lambda leaf: leaf[0][0] in kind.tables):
        outer = path[0] in kind.tables
        table, rest = (path[0], path[1:]) if outer else (kind.table, path)
        yield Setting(
            key=".".join((table, *rest)),
            type=_type_name(info.annotation),
            default=_default(info),
            environment=f"MILEPOST_{table.upper()}__" + "__".join(p.upper() for p in rest),
            flag="--" + ".".join(path),
            description=" ".join((info.description or "").split()),
        )


def effective(
    kind: type[ServiceSettings], argv: Sequence[str] = (), *, environ: Mapping[str, str] | None = None
) -> list[Effective]:
    """Every setting with the value that holds and where it comes from; values are not validated here."""
    sources = layers(kind, argv, environ=environ)
    rows: list[Effective] = []
    for path, info in _leaves(kind, ()):
        table, rest = (path[0], path[1:]) if path[0] in kind.tables else (kind.table, path)
        value, origin = _default(info), "default"
        for name, values in sources:
            given = _look_up(values, path)
            if given is not _ABSENT:
                value, origin = given, name
        rows.append(Effective(key=".".join((table, *rest)), value=value, origin=origin))
    return rows


def given_keys(
    kind: type[ServiceSettings], argv: Sequence[str] = (), *, environ: Mapping[str, str] | None = None
) -> frozenset[str]:
    """Dotted paths (from the class, not from the file) that the file, the environment or a flag sets."""
    sources = layers(kind, argv, environ=environ)
    paths = [path for path, _ in _leaves(kind, ())]
    return frozenset(".".join(p) for p in paths if any(_look_up(v, p) is not _ABSENT for _, v in sources))


# ---------------------------------------------------------------------------------------------- fields


def _leaves(kind: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for name, info in kind.model_fields.items():
        nested = _table_of(info.annotation)
        if nested is not None:
            yield from _leaves(nested, (*prefix, name))
        else:
            yield (*prefix, name), info


def _table_of(annotation: Any) -> type[BaseModel] | None:
    """The model of `Model` and `Model | None`; lists of tables are leaves."""
    candidates = [annotation] if isinstance(annotation, type) else typing.get_args(annotation)
    if typing.get_origin(annotation) in (tuple, list, dict):
        return None
    models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    others = [c for c in candidates if c not in models and c is not type(None)]
    return models[0] if len(models) == 1 and not others else None


_ABSENT: Any = object()


def _look_up(values: Mapping[str, Any], path: Sequence[str]) -> Any:
    at: Any = values
    for name in path:
        if not isinstance(at, Mapping) or name not in at:
            return _ABSENT
        at = typing.cast(Mapping[str, Any], at)[name]
    return at


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(f'"{a}"' if isinstance(a, str) else str(a) for a in args)
    if origin is typing.Annotated:
        return _type_name(args[0])
    if origin in (tuple, list):
        inner = [_type_name(a) for a in args if a is not Ellipsis]
        return "list of " + inner[0] if len(set(inner)) == 1 else "[" + ", ".join(inner) + "]"
    if origin is dict or origin is Mapping:
        return f"table of {_type_name(args[1])}"
    if args:
        return " | ".join(_type_name(a) for a in args if a is not type(None))
    names = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "Path": "path"}
    name = getattr(annotation, "__name__", str(annotation))
    return "table" if _table_of(annotation) else names.get(name, name)


def _default(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=True) if not info.is_required() else PydanticUndefined
    if value is PydanticUndefined:
        return "required"
    return "unset" if value is None else as_toml(value)


def as_toml(value: Any) -> str:
    """A value as a TOML file would hold it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(as_toml(v) for v in typing.cast(Sequence[Any], value)) + "]"
    if isinstance(value, Mapping):
        items = typing.cast(Mapping[str, Any], value).items()
        return "{" + ", ".join(f"{k} = {as_toml(v)}" for k, v in items) + "}"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
