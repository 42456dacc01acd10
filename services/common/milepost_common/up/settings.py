"""Settings of `milepost up`: the table `[up]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from milepost_common.settings import ServiceSettings


class UpSettings(ServiceSettings, table="up"):
    """Which services run on this machine, and how patient their owner is."""

    run_dir: str = ""
    """Folder of logs, `up.json`, and whatever the services are not told to put elsewhere; empty:
    `runs/<run_id>`."""
    engines: int = Field(default=1, ge=0, le=64)
    """Engines to start; 0 when `[router] engines` names others."""
    engine_gpus: tuple[str, ...] = ()
    """CUDA_VISIBLE_DEVICES of each engine, for example `["1", "2,3"]`; empty: as `milepost up` has it, and
    several engines on GPUs would all take the first one."""
    trainer_gpus: str = ""
    """CUDA_VISIBLE_DEVICES of the trainer; empty: as `milepost up` has it."""
    rollout: bool = True
    """Start the rollout gateway."""
    trainer: bool = True
    """Start the trainer."""
    feed: str = ""
    """JSONL file of prompts to feed; empty: others feed."""
    feed_epochs: int = Field(default=1, ge=1)
    """How often it is fed."""
    feed_source: str = ""
    """Name of its source; empty: the file's name."""
    feed_acknowledged: str = ""
    """File that gets the ids that were accepted, a witness for the audit; empty: `acknowledged.jsonl` in
    `run_dir`."""
    ports: Literal["configured", "free"] = "configured"
    """`configured`: services listen where their tables say; `free`: each takes a free port of 127.0.0.1."""
    stay: bool = False
    """Go on serving when the trainer has finished, instead of stopping everything."""
    ready_timeout_s: float = Field(default=180.0, gt=0)
    """A service that is not ready by then is started again."""
    stop_timeout_s: float = Field(default=35.0, gt=0)
    """A service that has not stopped by then is killed."""
    liveness_timeout_s: float = Field(default=30.0, ge=0)
    """A service that was ready and whose health check nobody has answered for this long is killed and started
    again; 0: never."""
    crash_limit: int = Field(default=5, ge=1)
    """A service that dies this often before it was ready, within 60 s, ends everything."""
