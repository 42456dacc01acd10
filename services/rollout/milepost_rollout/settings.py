"""Settings of the rollout gateway: table `[rollout]`, `MILEPOST_ROLLOUT__<KEY>`, flags."""

from __future__ import annotations

from pydantic import Field

from milepost_common.settings import ServiceSettings, Table


class EvaluateSettings(Table):
    """Evaluation of held-out prompts, `[rollout.evaluate]`."""

    prompts: str = ""
    """JSONL file of held-out prompts. Empty: requests bring their own."""
    every_steps: int = Field(0, ge=0)
    """Evaluate a version whenever its step passed a multiple of this. 0: on request alone."""
    samples_per_prompt: int = Field(1, ge=1)
    """Samples for each prompt."""
    temperature: float = Field(0.0, ge=0, le=100)
    """Sampling temperature; 0 is greedy."""
    reward: str = ""
    """Reward of prompts that name none. Empty: the run's."""
    max_concurrent_samples: int = Field(0, ge=0)
    """Most samples of evaluations at the engines at once; they go before those of training. 0: half of
    rollout.max_concurrent_samples."""
    timeout_s: float = Field(300.0, gt=0)
    """Give an evaluation up after this long."""
    results: str = "runs/{run_id}/eval.jsonl"
    """JSONL file that periodic evaluations are appended to."""


class RolloutSettings(ServiceSettings, table="rollout"):
    """The rollout gateway."""

    listen: str = "127.0.0.1:7103"
    """`host:port` of gRPC; port 0 takes a free one."""
    advertise: str = ""
    """`host:port` under which others reach it. Unset: `listen`."""
    metrics_listen: str = "127.0.0.1:9103"
    """Where Prometheus finds `/metrics`, `host:port`; port 0 takes a free one. Empty: nowhere."""
    router_http: str = Field("http://127.0.0.1:7202", pattern=r"^https?://[^\s/]+")
    """Where `/generate` is: the router, or one engine."""
    router: str = "127.0.0.1:7102"
    """`host:port` of the router's gRPC, asked for the engines' context length. Empty: not asked."""
    buffer: str = "127.0.0.1:7101"
    """`host:port` of the ledger. Empty: standalone, only streams and evaluations are served."""
    ledger_timeout_s: float = Field(10.0, gt=0, le=600)
    """Deadline of one call to the buffer, besides the time that the call is asked to wait."""
    run_id: str = ""
    """The run whose prompts are rolled out. Empty: standalone."""
    gateway_id: str = ""
    """Stable name of this gateway; a new start takes over from the last. Unset: host name and port."""
    tokenizer: str = ""
    """Folder with the model's tokenizer.json. Empty: prompts must be token ids."""
    max_concurrent_samples: int = Field(256, ge=1)
    """Most samples at the engines at once; prompts are leased while there is room."""
    sample_timeout_s: float = Field(600.0, gt=0)
    """Time for a sample from its first request on."""
    engine_attempts: int = Field(3, ge=1)
    """Requests of a sample that may fail, or be answered with rubbish, before it is an ENGINE_ERROR."""
    keep_partial: bool = True
    """Go on from the tokens of a reply that was cut short, instead of starting over."""
    stream: bool = False
    """Ask engines for streams, so that tokens outlive an engine that dies; costs CPU on both sides."""
    reward_timeout_s: float = Field(30.0, gt=0)
    """Longest time for the reward of one sample, or of a group where the function takes groups."""
    reward_workers: int = Field(2, ge=1, le=256)
    """Processes that score; as many groups are scored at once."""
    reward_path: list[str] = Field(default_factory=list)
    """Folders to import rewards from, besides the current one."""
    environment: str = ""
    """`grpc://host:port` of an EnvironmentService for multi-turn episodes. Empty: one turn."""
    environment_timeout_s: float = Field(60.0, gt=0)
    """Longest time for an answer of the environment."""
    max_turns: int = Field(16, ge=1)
    """Turns of the model in one episode."""
    drain_s: float = Field(15.0, ge=0, le=600)
    """Time for groups in flight to finish once the gateway stops; the rest is given back."""
    evaluate: EvaluateSettings = EvaluateSettings.model_validate({})
    """Evaluation of held-out prompts."""
