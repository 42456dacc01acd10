"""Settings of an engine: table `[engine]`, `MILEPOST_ENGINE__<KEY>`, flags as SGLang spells them.

What SGLang is launched with stands in `[engine.sglang]`, spelled as its flags are and passed through.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from milepost_common.settings import ServiceSettings, load_or_exit
from milepost_engine.dialect import DialectName

_LAUNCHED = {
    "backend", "model", "host", "port", "router", "engine_id", "run_id", "advertise", "served_model_name",
    "admin_api_key", "shutdown_timeout_s", "sglang", "start_timeout_s", "hang_timeout_s", "telemetry",
    "metrics_listen",
}  # fmt: skip


class EngineSettings(ServiceSettings, table="engine"):
    """One engine. Keys that name no backend are of both."""

    backend: Literal["cpu", "sglang"] = "cpu"
    """cpu: the small engine of this package; sglang: launches SGLang, which must be installed, and keeps it
    alive."""

    model: Path
    """Folder of a Hugging Face causal LM; with a config.json alone, weights are random."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(30000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one, which the ready line names."""
    router: str = ""
    """`host:port` of the router (gRPC) to register with; unset: none."""
    engine_id: str = ""
    """Its name in the fleet; unset: the host and port it advertises."""
    run_id: str = ""
    """The run it belongs to; unset: any run may claim it."""
    advertise: str = ""
    """URL under which the router reaches it; unset: where it listens."""
    metrics_listen: str = "127.0.0.1:9105"
    """cpu: where Prometheus finds `/metrics`, host:port; port 0 takes a free one. Empty: nowhere. SGLang
    serves its own, beside its other routes, with enable_metrics."""
    dialect: DialectName = "0.5.21"
    """The SGLang release whose rules hold."""
    served_model_name: str = ""
    """Name of the model under /v1; unset: the folder's name."""
    weight_version: str = "default"
    """Version string of the weights at start."""
    skip_tokenizer_init: bool = False
    """Load no tokenizer: input_ids in, output_ids out, no text and no /v1."""
    load_format: Literal["auto", "dummy"] = "auto"
    """"dummy" takes random weights whatever the folder holds."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Of weights and computation."""
    context_length: int | None = Field(None, ge=2)
    """Tokens of prompt and output together; unset: what the model's config says."""
    max_running_requests: int = Field(64, ge=1, le=4096)
    """Rows of the running batch; further requests queue."""
    max_prefill_tokens: int = Field(4096, ge=1)
    """Padded tokens of one prefill batch."""
    seed: int = 0
    """Of random weights, and, with `engine_id`, of sampling without a seed of its own: engines that share it
    draw differently."""
    num_threads: int = Field(1, ge=1)
    """Threads of torch's operators."""
    admin_api_key: str = ""
    """When set, everything but generation, health and information wants `Authorization: Bearer <key>`."""
    group_timeout_s: float = Field(60.0, gt=0)
    """Deadline for joining a weight update group, and of a collective in it."""
    transfer_timeout_s: float = Field(120.0, gt=0)
    """Deadline of one weight update call, and of any command to the scheduler."""
    health_timeout_s: float = Field(20.0, gt=0)
    """Deadline of /health_generate."""
    shutdown_timeout_s: float = Field(10.0, gt=0)
    """Deadline from SIGTERM to the end of the process; half of it is for requests to end by themselves."""
    sglang: dict[str, Any] = Field(default_factory=dict)
    """sglang: options of its launch_server, spelled as its flags: `tp_size = 2`."""
    start_timeout_s: float = Field(900.0, gt=0)
    """sglang: how long a start may take."""
    hang_timeout_s: float = Field(180.0, gt=0)
    """sglang: it is killed and started again when its scheduler has not answered for so long."""

    @property
    def name(self) -> str:
        """The model's name under /v1."""
        return self.served_model_name or self.model.name

    @property
    def sampling_seed(self) -> int:
        """Of requests without a seed of their own. Two engines that drew alike would make a group's samples
        equal: nothing to learn from."""
        return zlib.crc32(f"{self.seed}/{self.engine_id}".encode()) if self.engine_id else self.seed


def from_command_line(argv: Sequence[str]) -> EngineSettings:
    """Reads the settings; flags may be spelled `--max-running-requests` or `--max_running_requests`."""
    settings = load_or_exit(EngineSettings, [_underscored(arg) for arg in argv])
    if settings.backend == "sglang":
        _require_used(settings)
    return settings


def _require_used(settings: EngineSettings) -> None:
    """SGLang has its own spelling of most that the CPU engine can be told; exits where it is not used."""
    for name in sorted(settings.model_fields_set - _LAUNCHED):
        print(
            f"milepost: setting engine.{name} = {getattr(settings, name)!r} is of backend 'cpu'; "
            "set what SGLang calls it in [engine.sglang]",
            file=sys.stderr,
        )
        raise SystemExit(2)


def _underscored(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
