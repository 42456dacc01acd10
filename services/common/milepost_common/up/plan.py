"""Which children a configuration asks for, in which order, and how each learns where the others are.

    buffer -> router -> engines          (an arrow: is started once the one before it is ready)
       \\         \\-> rollout, trainer
        \\-> feed

Services read the same TOML file and environment as ever; flags are added only for what is known here alone:
the addresses the others got, the run's name, ports on a restart, and folders inside the run's, where nothing
else was said.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from milepost.errors import InvalidArgument
from milepost_common.catalogue import effective, given_keys, settings_class
from milepost_common.settings import ServiceSettings, load
from milepost_common.up.settings import UpSettings
from milepost_common.up.spec import Addresses, ChildSpec

DEFAULT_RUN = "default"
LOCAL = "127.0.0.1"
_FOR_EVER_S = "31536000"
_TRAINER_DONE, _TRAINER_REPLACED, _NOTHING_TRAINED = 0, 3, 4
_TRAINER_FINAL = frozenset((_TRAINER_DONE, _TRAINER_REPLACED, _NOTHING_TRAINED))
"""A trainer that was replaced is not started again: that would fence its successor, whom the others serve."""
_TRAINER_ENDS_RUN = {_TRAINER_DONE: 0, _NOTHING_TRAINED: 1}
_STOP_RANK = {"feed": 0, "trainer": 0, "rollout": 1, "engine": 2, "router": 3, "buffer": 4}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `milepost up` is about to run."""

    run_id: str
    run_dir: Path
    specs: tuple[ChildSpec, ...]


def make_plan(settings: UpSettings, *, config: str, environ: Mapping[str, str] = os.environ) -> Plan:
    """Checks the settings of every service that will be started, and plans the children.

    Args:
      settings: the table `[up]`.
      config: path of the TOML file; empty: none.
      environ: environment of the children.

    Raises:
      InvalidArgument: a setting of a service is wrong or missing, or names a file that is not there.
    """
    run_id = _run_id(config, environ)
    run_dir = Path(settings.run_dir or f"runs/{run_id}")
    planner = _Planner(settings, config=config, environ=environ, run_id=run_id, run_dir=run_dir)
    return Plan(run_id=run_id, run_dir=run_dir, specs=tuple(planner.specs()))


class _Planner:
    def __init__(
        self, settings: UpSettings, *, config: str, environ: Mapping[str, str], run_id: str, run_dir: Path
    ) -> None:
        self._up, self._config, self._environ = settings, config, environ
        self._run_id, self._run_dir = run_id, run_dir
        self._argv = ["--config", config] if config else []
        self._metrics_listen: dict[str, str] = {}

    def specs(self) -> list[ChildSpec]:
        if self._up.engine_gpus and len(self._up.engine_gpus) != self._up.engines:
            raise InvalidArgument(
                f"setting up.engine_gpus names the GPUs of {len(self._up.engine_gpus)} engines, up.engines = "
                f"{self._up.engines}; give one entry an engine, or none"
            )
        trainer = [self._trainer()] if self._up.trainer else []  # first: it names the model of the others
        specs = [self._buffer(), self._router()]
        specs += [self._engine(i) for i in range(self._up.engines)]
        specs += [self._rollout()] if self._up.rollout else []
        return [*specs, *trainer, *([self._feed()] if self._up.feed else [])]

    def _buffer(self) -> ChildSpec:
        service = self._service("buffer")
        fixed = service.default("data_dir", str(self._run_dir / "redis"))
        return self._spec("buffer", lambda at: [*fixed, *self._listen("buffer", at)])

    def _router(self) -> ChildSpec:
        self._service("router")

        def flags(at: Addresses) -> list[str]:
            return ["--buffer", at["buffer"]["grpc"], *self._listen("router", at)]

        return self._spec("router", flags, needs=("buffer",))

    def _engine(self, index: int) -> ChildSpec:
        name = f"engine-{index}"
        model = self._unless_given("engine", "model", self._value("trainer", "model_dir"))
        service = self._service("engine", *model)
        _check_model("engine.model", str(getattr(service.values, "model", "")))
        fixed = model + service.known("engine_id", name) + service.known("run_id", self._run_id)
        base = int(getattr(service.values, "port", 0))

        def flags(at: Addresses) -> list[str]:
            return [
                *fixed,
                "--router",
                at["router"]["grpc"],
                "--port",
                str(self._engine_port(name, base, index, at)),
                *self._metrics("engine", at[name], index=index),
            ]

        spec = self._spec("engine", flags, needs=("router",), name=name)
        spec = _on_gpus(spec, self._up.engine_gpus[index] if self._up.engine_gpus else "")
        if getattr(service.values, "backend", "cpu") == "cpu":
            return spec
        # Its launcher watches over SGLang, which takes minutes to start, and is silent while it is paused.
        start_s = float(getattr(service.values, "start_timeout_s", spec.ready_timeout_s))
        return replace(spec, ready_timeout_s=start_s, liveness_timeout_s=0.0)

    def _engine_port(self, name: str, base: int, index: int, at: Addresses) -> int:
        if at[name]:
            return int(at[name]["http"].rpartition(":")[2])
        return base + index if base and self._up.ports == "configured" else 0

    def _rollout(self) -> ChildSpec:
        service = self._service("rollout")
        model = self._value("engine", "model") or self._value("trainer", "model_dir")
        fixed = service.default("run_id", self._run_id)
        fixed += service.default("tokenizer", model) if model else []
        fixed += service.default("evaluate.results", str(self._run_dir / "eval.jsonl"))

        def flags(at: Addresses) -> list[str]:
            router = at["router"]
            wires = ["--buffer", at["buffer"]["grpc"], "--router", router["grpc"]]
            return [*fixed, *wires, "--router_http", f"http://{router['http']}", *self._listen("rollout", at)]

        return self._spec("rollout", flags, needs=("buffer", "router"))

    def _trainer(self) -> ChildSpec:
        service = self._service("trainer")
        _check_model("trainer.model_dir", str(getattr(service.values, "model_dir", "")))
        fixed = service.default("checkpoint.dir", str(self._run_dir / "checkpoints"))
        fixed += service.default("metrics.dir", str(self._run_dir))
        fixed += service.default("publish.disk_dir", str(self._run_dir / "weights"))
        fixed += ["--run.run_id", self._run_id]

        def flags(at: Addresses) -> list[str]:
            wires = ["--buffer", at["buffer"]["grpc"], "--router", at["router"]["grpc"]]
            return [*fixed, *wires, *self._listen("trainer", at)]

        stop_s = max(self._up.stop_timeout_s, float(getattr(service.values, "shutdown_timeout_s", 0)) + 5)
        spec = self._spec("trainer", flags, needs=("buffer", "router"), stop_timeout_s=stop_s)
        spec = _on_gpus(spec, self._up.trainer_gpus)
        return replace(spec, final_codes=_TRAINER_FINAL, ends_run=_TRAINER_ENDS_RUN)

    def _feed(self) -> ChildSpec:
        if not Path(self._up.feed).is_file():
            raise InvalidArgument(
                f"setting up.feed = {self._up.feed!r}: no such file; give a JSONL file of prompts"
            )
        acknowledged = self._up.feed_acknowledged or str(self._run_dir / "acknowledged.jsonl")

        def command(at: Addresses) -> list[str]:
            flags = ["--run", self._run_id, "--buffer", at["buffer"]["grpc"], "--acknowledged", acknowledged]
            flags += ["--epochs", str(self._up.feed_epochs)]
            flags += ["--wait-s", _FOR_EVER_S, "--retry-s", _FOR_EVER_S, "--stall-s", _FOR_EVER_S]
            flags += ["--source", self._up.feed_source] if self._up.feed_source else []
            return [sys.executable, "-m", "milepost.cli", "feed", self._up.feed, *flags]

        return ChildSpec(
            name="feed",
            command=command,
            needs=("buffer",),
            announces=False,
            final_codes=frozenset((0, 1, 2)),
            environ=_telemetry(self._up),
            stop_rank=_STOP_RANK["feed"],
            stop_timeout_s=self._up.stop_timeout_s,
        )

    # ------------------------------------------------------------------ parts

    def _service(self, service: str, *flags: str) -> _Service:
        kind = settings_class(service)
        given = given_keys(kind, self._argv, environ=self._environ)
        values = load(kind, [*self._argv, *flags], environ=self._environ)
        self._metrics_listen[service] = str(getattr(values, "metrics_listen", ""))
        return _Service(kind, values, given)

    def _value(self, service: str, key: str) -> str:
        """A setting of another service, if somebody set it."""
        rows = effective(settings_class(service), self._argv, environ=self._environ)
        return next((str(r.value) for r in rows if r.key == f"{service}.{key}" and r.origin != "default"), "")

    def _unless_given(self, service: str, key: str, value: str) -> list[str]:
        return [f"--{key}", value] if value and not self._value(service, key) else []

    def _spec(
        self,
        service: str,
        flags: Callable[[Addresses], list[str]],
        *,
        name: str = "",
        needs: tuple[str, ...] = (),
        stop_timeout_s: float | None = None,
    ) -> ChildSpec:
        head = [sys.executable, "-m", f"milepost_{service}", "serve", *self._argv]
        return ChildSpec(
            name=name or service,
            command=lambda at: head + flags(at),
            needs=needs,
            environ=_telemetry(self._up),
            stop_rank=_STOP_RANK[service],
            ready_timeout_s=self._up.ready_timeout_s,
            stop_timeout_s=stop_timeout_s or self._up.stop_timeout_s,
            liveness_timeout_s=self._up.liveness_timeout_s,
        )

    def _listen(self, service: str, at: Addresses) -> list[str]:
        """Nothing with configured ports; else a free port at first and the same one ever after."""
        if self._up.ports == "configured":
            return []
        flags = ["--listen", at[service].get("grpc", f"{LOCAL}:0"), *self._metrics(service, at[service])]
        if service == "router":
            flags += ["--http_listen", at[service].get("http", f"{LOCAL}:0")]
        return flags

    def _metrics(self, service: str, own: Mapping[str, str], *, index: int = 0) -> list[str]:
        """Where a child serves metrics: a free port, or the configured one plus its number, or nowhere."""
        listen = self._metrics_listen[service]
        if listen and self._up.ports == "free":
            return ["--metrics_listen", own.get("metrics", f"{LOCAL}:0")]
        host, _, port = listen.rpartition(":")
        return ["--metrics_listen", f"{host}:{int(port) + index}"] if index and port not in ("", "0") else []


@dataclass(frozen=True)
class _Service:
    """A service's settings, and which of them somebody set."""

    kind: type[ServiceSettings]
    values: ServiceSettings
    given: frozenset[str]

    def known(self, key: str, value: str) -> list[str]:
        """A flag, if the service has that setting and nobody set it."""
        return [f"--{key}", value] if key not in self.given and _has(self.kind, key) else []

    def default(self, key: str, value: str) -> list[str]:
        """A flag, if nobody set it."""
        return [f"--{key}", value] if key not in self.given else []


def _on_gpus(spec: ChildSpec, gpus: str) -> ChildSpec:
    return replace(spec, environ={**spec.environ, "CUDA_VISIBLE_DEVICES": gpus}) if gpus else spec


def _telemetry(up: UpSettings) -> dict[str, str]:
    """`[telemetry]` as this command got it, for children of which some read no file."""
    given = up.telemetry.model_dump(exclude_defaults=True)
    return {f"MILEPOST_TELEMETRY__{name.upper()}": str(value) for name, value in given.items()}


def _check_model(key: str, folder: str) -> None:
    """The folder of a model: what starts first would otherwise run until the engines have looked."""
    if not (Path(folder) / "config.json").is_file():
        why = "it holds no config.json" if Path(folder).is_dir() else "there is no such folder"
        raise InvalidArgument(f"setting {key} = {folder!r}: {why}; name a Hugging Face model folder")


def _has(kind: type[ServiceSettings], key: str) -> bool:
    return key in kind.model_fields


def _run_id(config: str, environ: Mapping[str, str]) -> str:
    """`[run] run_id`, which the trainer validates; here also without a trainer."""
    content: dict[str, Any] = tomllib.loads(Path(config).read_text(encoding="utf-8")) if config else {}
    run: Mapping[str, Any] = content.get("run", {})
    return environ.get("MILEPOST_RUN__RUN_ID") or str(run.get("run_id", DEFAULT_RUN))


def names_config(argv: Sequence[str]) -> bool:
    """True when the flags name a TOML file."""
    return any(arg == "--config" or arg.startswith("--config=") for arg in argv)


def find_config(argv: Sequence[str]) -> str:
    """The file named by `--config`, else `milepost.toml` where it is; empty: none."""
    for i, arg in enumerate(argv):
        if arg == "--config" and i + 1 < len(argv):
            return argv[i + 1]
        if arg.startswith("--config="):
            return arg.removeprefix("--config=")
    return "milepost.toml" if Path("milepost.toml").is_file() else ""
