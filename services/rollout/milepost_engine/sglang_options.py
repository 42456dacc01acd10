"""The command line of SGLang's server, from `[engine]` and `[engine.sglang]`. Pure functions.

    [engine.sglang]
    tp_size = 2                    -> --tp-size 2
    enable_memory_saver = true     -> --enable-memory-saver          (false: left out)
    cuda_graph_bs = [1, 2, 4]      -> --cuda-graph-bs 1 2 4
    json_model_override_args = {}  -> --json-model-override-args {}  (a table: JSON)

What `[engine]` has of its own is refused here, so that every fact has one place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from milepost.errors import InvalidArgument
from milepost_engine.settings import EngineSettings

FLUSHES_WHEN_PAUSED = (0, 5, 21)
WEIGHT_HOOK = "milepost_engine.weight_hook.load"
"""What every engine that we launch can load weights by; named here since that module needs torch."""
_OWN = {
    "model_path": "model",
    "model": "model",
    "host": "host",
    "port": "port",
    "admin_api_key": "admin_api_key",
    "served_model_name": "served_model_name",
}
_SPELLINGS = {"tensor_parallel_size": "tp_size"}


def arguments(settings: EngineSettings, *, port: int, release: str) -> list[str]:
    """What follows `python -m sglang.launch_server`.

    Args:
      settings: the engine's.
      port: where it is to listen.
      release: SGLang's, for example "0.5.21".

    Raises:
      InvalidArgument: an option is ours to give.
    """
    options = _options(settings)
    if _numbers(release) < FLUSHES_WHEN_PAUSED:
        # It flushes cached prefixes only at rest: under load, KV of older weights would outlive an update.
        options.setdefault("disable_radix_cache", True)
    theirs: list[Any] = _as_list(options.get("custom_weight_loader"))
    options["custom_weight_loader"] = [*theirs, WEIGHT_HOOK]
    own: dict[str, Any] = {
        "model_path": str(settings.model),
        "host": settings.host,
        "port": port,
        "served_model_name": settings.name,
    }
    if settings.admin_api_key:
        own["admin_api_key"] = settings.admin_api_key
    return [word for name, value in (own | options).items() for word in _words(name, value)]


def tensor_parallel_size(settings: EngineSettings) -> int:
    """Ranks of one engine."""
    return int(str(_options(settings).get("tp_size", 1)))


def gpu_indices(settings: EngineSettings) -> list[int]:
    """Which of the visible GPUs its ranks use, in order of rank."""
    options = _options(settings)
    first, step = int(str(options.get("base_gpu_id", 0))), int(str(options.get("gpu_id_step", 1)))
    return [first + rank * step for rank in range(tensor_parallel_size(settings))]


def _options(settings: EngineSettings) -> dict[str, Any]:
    """The options by SGLang's first spelling of each."""
    found: dict[str, Any] = {}
    for key, value in settings.sglang.items():
        name = key.replace("-", "_").lstrip("_")
        name = _SPELLINGS.get(name, name)
        if name in _OWN:
            raise InvalidArgument(
                f"engine.sglang.{key} = {value!r}: that is engine.{_OWN[name]}; set it there",
                reason="BAD_SETTING",
            )
        if name == "weight_version":
            raise InvalidArgument(
                f"engine.sglang.{key} = {value!r}: the router names weights; leave it out",
                reason="BAD_SETTING",
            )
        found[name] = value
    return found


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _words(name: str, value: Any) -> Iterator[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        if value:
            yield flag
    elif isinstance(value, Mapping):
        yield from (flag, json.dumps(value))
    elif isinstance(value, list):
        yield from (flag, *(str(each) for each in value))  # pyright: ignore[reportUnknownVariableType]
    else:
        yield from (flag, str(value))


def _numbers(release: str) -> tuple[int, ...]:
    """(0, 5, 21) of "0.5.21.post1"."""
    numbers: list[int] = []
    for part in release.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)
