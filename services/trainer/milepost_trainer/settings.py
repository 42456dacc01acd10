"""Settings of the trainer: the tables `[trainer]` and `[run]`. No torch here, so that any service may read
them.

    settings = load(TrainerSettings, ["--config", "milepost.toml", "--lr", ...])

What every service of a run must agree on stands in `[run]` and is handed to the buffer by `CreateRun`; what
only the learner cares about stands in `[trainer]`.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from milepost_common.settings import ServiceSettings, Table

_REWARD = re.compile(r"exact|math|regex:.+|grpc://.+|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", re.DOTALL)

Positive = Field(gt=0)


class ObjectiveSettings(Table):
    """What is minimised: `[trainer.objective]`."""

    algorithm: Literal["grpo", "sft"] = "grpo"
    """`grpo` learns from scored groups; `sft` from completions in a file (`milepost trainer sft`)."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """How far below 1 the probability ratio counts (PPO's epsilon)."""
    clip_high: float = Field(default=0.28, ge=0)
    """How far above 1 it counts; above `clip_low` by DAPO's "clip-higher"."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference model in the loss; 0 loads no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL; DeepSeekMath uses k3."""
    std_normalisation: bool = True
    """Divide advantages by the standard deviation of the group's rewards."""
    loss_aggregation: Literal["token", "sequence"] = "token"
    """`token`: mean over all predicted tokens of the update (DAPO); `sequence`: mean over each sequence's
    tokens, then over sequences (DeepSeekMath)."""
    truncated_importance_sampling: float = Field(default=0.0, ge=0)
    """Cap of the importance weight between trainer and engine; 0 turns it off, 2 is common."""
    entropy: bool = True
    """Report the policy's entropy."""


class OptimizerSettings(Table):
    """AdamW: `[trainer.optimizer]`."""

    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global L2 norm."""


class ScheduleSettings(Table):
    """Learning rate over time: `[trainer.schedule]`."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up."""
    warmup_updates: int = Field(default=0, ge=0)
    """Optimizer updates over which the rate rises linearly."""
    total_updates: int = Field(default=0, ge=0)
    """Where the decay ends; needed by `linear` and `cosine`."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Of the peak rate, at the end of the decay."""

    @model_validator(mode="after")
    def _decay_needs_an_end(self) -> ScheduleSettings:
        if self.kind != "constant" and self.total_updates <= self.warmup_updates:
            raise ValueError(
                f"schedule.total_updates is {self.total_updates}, not above warmup_updates "
                f"{self.warmup_updates}: say where the {self.kind} decay ends"
            )
        return self


class FsdpSettings(Table):
    """The FSDP2 backend: `[trainer.fsdp]`."""

    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward pass: less memory, one more all-gather."""
    reduce_every_micro_batch: bool = True
    """Reduce gradients at each micro-batch; false keeps whole gradients on each rank and reduces once an
    update."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What is computed again in the backward pass instead of kept: nothing, all but matrix products and
    attention, or whole layers."""
    checkpoint_every: int = Field(default=1, ge=1)
    """Activation checkpointing of every n-th layer; the others keep what they computed."""


class CheckpointSettings(Table):
    """Checkpoints: `[trainer.checkpoint]`."""

    dir: str = "checkpoints"
    """Folder of this run's checkpoints; on several hosts one that all ranks see."""
    every: int = Field(default=10, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=2, ge=1)
    """How many are kept; payloads live in the buffer until the oldest of them contains their step."""


class PublishSettings(Table):
    """Publication of weights: `[trainer.publish]`."""

    transport: Literal["gloo", "nccl", "shm", "cuda_ipc", "disk"] = "gloo"
    """How the bytes travel: gloo between CPUs, nccl between GPUs, shm on one host, cuda_ipc where engines
    see the GPU of rank 0, disk by a folder."""
    bucket_bytes: int = Field(default=256 * 1024 * 1024, gt=0)
    """Most bytes of one bucket; a larger tensor travels alone."""
    wire_dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Cast floating-point weights to this before sending; empty: as they are."""
    timeout_s: float = Field(default=120.0, gt=0, le=3600)
    """Deadline of one transaction over the fleet."""
    retry_delay_s: float = Field(default=1.0, gt=0)
    """Wait before a failed publication is tried again; doubles with each failure."""
    max_retry_delay_s: float = Field(default=10.0, gt=0)
    """Where that doubling ends."""
    master_address: str = "127.0.0.1"
    """Address under which engines reach rank 0 (gloo, nccl); its port is chosen by the system."""
    disk_dir: str = "weights"
    """Folder that engines see too (disk)."""
    mirrors: tuple[str, ...] = ()
    """`host:port` of every `milepost weights mirror`, which fetch that folder's files for engines that do not
    see it (disk)."""
    pause_mode: Literal["retract", "in_place", "abort"] = "retract"
    """What becomes of requests that run while weights change."""
    release_memory: tuple[str, ...] = ()
    """GPU memory that engines give up while a step trains, as SGLang tags it: kv_cache, weights, cuda_graph;
    they need enable_memory_saver. Nothing is generated meanwhile. Empty: none."""
    memory_drain_s: float = Field(default=1.0, ge=0, le=600)
    """How long requests may take to end by themselves before that memory goes; then they are aborted."""
    memory_lease_s: float = Field(default=600.0, gt=0, le=3600)
    """Engines take their memory back after this long in any case: longer than the longest step."""


class MetricsSettings(Table):
    """What is written down: `[trainer.metrics]`."""

    dir: str = "metrics"
    """Folder of `metrics.jsonl`, `steps.jsonl` and the TensorBoard files."""
    tensorboard: bool = True
    """Write TensorBoard files beside the JSONL."""
    transcripts_every: int = Field(default=0, ge=0)
    """Write prompts, responses and rewards of every n-th step; 0 never."""


class SftSettings(Table):
    """Supervised warm start from a file: `[trainer.sft]`."""

    data: str = ""
    """JSONL with `prompt` and `completion` on each line."""
    output_dir: str = ""
    """Where the Hugging Face export goes."""
    num_steps: int = Field(default=100, ge=1)
    """Optimizer updates."""
    batch_size: int = Field(default=64, ge=1)
    """Sequences of one update."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate. Unset: that of `[trainer.optimizer]`."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What follows the warm-up; it ends with the last update."""
    warmup_updates: int = Field(default=0, ge=0)
    """Updates over which the rate rises."""
    append_eos: bool = True
    """Add the tokenizer's end-of-sequence token to completions that do not end with it."""


class ProfileSettings(Table):
    """A look inside some steps: `[trainer.profile]`."""

    first_step: int = Field(default=0, ge=0)
    """Step with which the window opens; 0: never."""
    num_steps: int = Field(default=1, ge=1)
    """Steps that it is open for. Traces grow by the step, and all of it is in memory until the last."""
    dir: str = "profile"
    """Folder of the traces and, on CUDA, the memory snapshots: one of each a rank."""


class DebugSettings(Table):
    """Faults by order, to rehearse what happens then, and checks that cost time: `[trainer.debug]`."""

    enabled: bool = False
    """Without it faults are refused."""
    out_of_memory: Literal["", "forward", "head", "backward", "clip", "optimizer"] = ""
    """Where a rank runs out of memory: in a pass (before the middle layer, before the LM head, on the way
    back), or once in the gradient norm or the optimizer."""
    out_of_memory_rank: int = Field(default=0, ge=-1)
    """Which rank; -1: every one."""
    out_of_memory_tokens: int = Field(default=0, ge=0)
    """Passes of more tokens than this run out of memory."""

    check_logprobs: bool = False
    """After each publication every engine generates a few tokens, whose log-probs are compared with the
    trainer's own. It breaks nothing and needs no `enabled`, but holds each step up."""
    logprob_tolerance: float = Field(default=0.1, gt=0)
    """Differences above it are warned of, in nats; engines in bfloat16 need about 0.1."""

    @model_validator(mode="after")
    def _is_asked_for(self) -> DebugSettings:
        if self.out_of_memory and not self.enabled:
            raise ValueError(
                f"debug.out_of_memory is {self.out_of_memory!r}, which breaks passes on purpose: take it "
                "away, or set debug.enabled = true if that is what you want"
            )
        return self


class BenchSettings(Table):
    """What `milepost trainer bench` measures: `[trainer.bench]`."""

    loops: Literal["both", "trainer", "plain"] = "both"
    """The trainer's step, the plain loop's, or both. Several ranks measure the trainer's alone."""
    micro_batches: int = Field(default=8, ge=1)
    """Micro-batches of one update, on each rank."""
    updates: int = Field(default=3, ge=1)
    """Updates that are measured; the median counts."""
    warmup: int = Field(default=1, ge=0)
    """Updates before them, besides the first, which compiles."""
    min_length: int = Field(default=512, ge=2)
    """Shortest sequence."""
    max_length: int = Field(default=4096, ge=2)
    """Longest sequence; lengths are drawn uniformly."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens at the start of each sequence that carry no loss."""
    samples_per_prompt: int = Field(default=4, ge=1)
    """Sequences of a group."""
    seed: int = Field(default=0, ge=0)
    """Seed of lengths, tokens and rewards."""
    peak_tflops: float = Field(default=0.0, ge=0)
    """Of one device, for model FLOP utilisation; 0: by the data sheet, where it is a known one."""
    profile: bool = False
    """Also run one update of each loop under torch's profiler and print where the time went."""
    json_file: str = ""
    """Write everything measured to this file too."""

    @model_validator(mode="after")
    def _lengths_make_sense(self) -> BenchSettings:
        if not self.prompt_tokens < self.min_length <= self.max_length:
            raise ValueError(
                f"bench.prompt_tokens is {self.prompt_tokens}, min_length {self.min_length}, max_length "
                f"{self.max_length}: they must rise, and answers need at least one token"
            )
        return self


class SamplingTable(Table):
    """Sampling of every prompt that does not override it: `[run.sampling]`."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    """Softmax temperature; 0 is greedy. Unset: 1."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus mass. Unset: 1."""
    top_k: int | None = None
    """Tokens kept by rank; -1 is off. Unset: -1."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Probability floor relative to the best token. Unset: 0."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most tokens to generate. Unset: 128."""
    stop: tuple[str, ...] = ()
    """Strings that end the output."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, besides the tokenizer's own."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of the first sample of a group. Unset: not seeded."""
    ignore_eos: bool | None = None
    """Go on after the end-of-sequence token."""


class RunTable(Table):
    """What all services of a run agree on: `[run]`. What is unset takes the buffer's default."""

    run_id: str = Field(default="default", pattern=r"^[A-Za-z0-9._-]{1,128}$")
    """Name of the run."""
    groups_per_step: int | None = Field(default=None, ge=1)
    """Groups taken by one step."""
    samples_per_prompt: int | None = Field(default=None, ge=1)
    """Samples rolled out for each prompt."""
    max_staleness: int | None = Field(default=None, ge=0)
    """Staleness bound in steps; 0 is synchronous training."""
    publish_every: int | None = Field(default=None, ge=1)
    """Steps between publications."""
    on_stale: Literal["requeue", "wait", "drop"] | None = None
    """What happens to groups above the bound."""
    stale_attempts: int | None = Field(default=None, ge=0)
    """Requeues before a stale prompt is waited for."""
    max_attempts: int | None = Field(default=None, ge=1)
    """Expired leases before a prompt is dropped."""
    lease_ttl_s: float | None = Field(default=None, gt=0)
    """How long a lease of a prompt lasts without renewal."""
    max_group_bytes: int | None = Field(default=None, ge=1)
    """Largest payload of a group."""
    max_payload_bytes: int | None = Field(default=None, ge=1)
    """Payload bytes the run may hold."""
    tail: Literal["train", "drop"] | None = None
    """What happens to the groups left over at the end."""
    error_policy: Literal["retry", "drop", "mask"] | None = None
    """What happens to groups with failed samples."""
    reward: str = ""
    """Reward of every prompt that does not name one."""
    filter_equal_rewards: bool | None = None
    """Drop groups whose rewards are all equal (DAPO's dynamic sampling)."""
    max_lag_steps: int | None = Field(default=None, ge=1)
    """Steps a follower may lag before it is detached."""
    sampling: SamplingTable | None = None
    """Sampling of every prompt that does not override it."""

    @field_validator("reward")
    @classmethod
    def _reward_can_be_one(cls, name: str) -> str:
        # The run keeps the name for good, and the gateway would find out later.
        if name and not _REWARD.fullmatch(name):
            raise ValueError("use exact, math, regex:PATTERN, module:function or grpc://host:port")
        return name


class TrainerSettings(ServiceSettings, table="trainer", tables=("run",)):
    """The trainer: `[trainer]`."""

    run: RunTable = RunTable()
    """The run it trains."""
    model_dir: str
    """Hugging Face directory of the model: config, safetensors, tokenizer."""
    reference_dir: str = ""
    """Hugging Face directory of the frozen reference model; empty: the initial weights of `model_dir`."""
    initial_weights: Literal["load", "random"] = "load"
    """`random` draws them from `seed` and needs only `config.json`."""
    seed: int = Field(default=0, ge=0)
    """Seed of random weights and of shuffling."""
    buffer: str = "127.0.0.1:7101"
    """Address of the buffer."""
    router: str = "127.0.0.1:7102"
    """Address of the router (gRPC)."""
    listen: str = "127.0.0.1:7104"
    """Where rank 0 serves TrainerService."""
    advertise: str = ""
    """The name under which others reach it; empty: as it listens."""
    metrics_listen: str = "127.0.0.1:9104"
    """Where Prometheus finds rank 0's `/metrics`, host:port; port 0 takes a free one. Empty: nowhere."""
    nproc: int = Field(default=1, ge=1)
    """Ranks on this host; above 1 torchrun is started unless this already runs under it."""
    backend: Literal["fsdp"] = "fsdp"
    """How the model is sharded."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it lives; `auto` takes CUDA where there is any."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Dtype of parameters and optimizer."""
    compute_dtype: Literal["", "float32", "bfloat16"] = ""
    """Dtype of forward and backward passes; empty: that of the parameters."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile the decoder's layers with torch.compile; `auto` does where they run in half precision on CUDA.
    All layers share one compilation, which the first micro-batch waits for (a minute at most, as a rule)."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of a rank's tensor operations."""
    num_steps: int = Field(default=0, ge=0)
    """Steps to train; 0: until the sources are closed and everything is trained."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer updates over the groups of one step, each over its own share of them."""
    max_tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Token budget of one forward and backward pass of a rank."""
    head_chunk_tokens: int = Field(default=4096, ge=1)
    """Tokens whose logits exist at once."""
    collective_timeout_s: float = Field(default=300.0, gt=0)
    """Deadline of collectives between ranks."""
    ledger_timeout_s: float = Field(default=10.0, gt=0, le=600)
    """Deadline of one call to the buffer, besides the time that the call is asked to wait."""
    lease_wait_s: float = Field(default=5.0, gt=0, le=60)
    """How long one LeaseStep call waits; the trainer asks until the step comes."""
    prefetch: bool = True
    """Lease and fetch the next step while this one trains."""
    shutdown_timeout_s: float = Field(default=60.0, gt=0)
    """A stop finishes the step and saves within this, then the process ends in any case."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept on the host while the device has other uses: nothing; the optimizer's state, but while it
    moves the parameters; or, besides, all weights while the trainer waits for groups."""
    export_dir: str = ""
    """Where the final Hugging Face export goes; empty: `final` in the checkpoint folder."""
    on_gap: Literal["fail", "regenerate", "drop"] = "fail"
    """What to do when payloads after the newest checkpoint are gone."""
    on_poison: Literal["report", "drop"] = "report"
    """What to do with a step that was resumed three times without a commit: name its prompts and try it
    again, or commit it untrained, its prompts dropped with reason poison."""
    objective: ObjectiveSettings = ObjectiveSettings()
    """What is minimised."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How parameters move."""
    schedule: ScheduleSettings = ScheduleSettings()
    """Learning rate over time."""
    fsdp: FsdpSettings = FsdpSettings()
    """The FSDP2 backend."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """Checkpoints."""
    publish: PublishSettings = PublishSettings()
    """Publication of weights."""
    metrics: MetricsSettings = MetricsSettings()
    """What is written down."""
    sft: SftSettings = SftSettings()
    """Supervised warm start."""
    bench: BenchSettings = BenchSettings()
    """What `milepost trainer bench` measures."""
    profile: ProfileSettings = ProfileSettings()
    """A look inside some steps."""
    debug: DebugSettings = DebugSettings()
    """Faults by order."""

    @model_validator(mode="after")
    def _handles_stay_valid(self) -> TrainerSettings:
        if self.offload == "all" and self.publish.transport == "cuda_ipc":
            raise ValueError(
                "offload is 'all' with publish.transport 'cuda_ipc', whose engines keep the trainer's "
                'weights open where they lie: set offload = "optimizer", or publish by another transport'
            )
        return self
