"""What the script refuses, and the error that a caller gets for it: one table, with the remedy in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from milepost import errors as e

_TABLE: Mapping[str, tuple[type[e.MilepostError], str]] = {
    "UNKNOWN_RUN": (e.NotFound, "run_id = {run_id}: no such run; the trainer creates it with CreateRun"),
    "RUN_EXISTS": (
        e.AlreadyExists,
        "run_id = {run_id} exists with another config ({config}); use its config, change the live fields "
        "with "
        "UpdateRun, or choose another run_id",
    ),
    "SCHEMA": (
        e.FailedPrecondition,
        "run_id = {run_id} was written by schema {ledger}, this build writes {build}; use the build that "
        "wrote it",
    ),
    "CONFIG_RACE": (
        e.FailedPrecondition,
        "config: somebody else changed it in between; read it and change it again",
    ),
    "UNKNOWN_SOURCE": (e.NotFound, "source_id: not open in run {run_id}; call OpenSource first"),
    "SOURCE_CLOSED": (
        e.FailedPrecondition,
        "source_id: it is closed and stays closed; open one under another name",
    ),
    "SOURCE_DIGEST": (
        e.FailedPrecondition,
        "digest = {given}: the source was opened with digest {stored}, so its cursor means nothing here; "
        "restore the "
        "content or open a source under another name",
    ),
    "CURSOR": (
        e.FailedPrecondition,
        "expected_cursor = {expected!r}: the stored cursor is {stored!r}; call OpenSource and go on from "
        "there",
    ),
    "PROMPT_EXISTS": (
        e.AlreadyExists,
        "prompt_id = {prompt_id}: it is in the ledger with other content; give the new content another "
        "prompt_id",
    ),
    "INSTANCE_SUPERSEDED": (
        e.FailedPrecondition,
        "instance_id = {instance_id}: a newer instance of this gateway took over; stop this one, or give "
        "it another "
        "gateway_id",
    ),
    "STALE_TERM": (e.StaleTerm, "term = {term}: {newest} is in force, another one took over; stop"),
    "UNKNOWN_TERM": (
        e.FailedPrecondition,
        "term = {term}: the ledger knows terms up to {newest}, Redis forgot the newer one; restate it with "
        "ResumeConsumer(term, checkpoint_step, manifest)",
    ),
    "NOT_RESUMED": (
        e.FailedPrecondition,
        "term = {term}: no checkpoint was stated in it; call ResumeConsumer(term, checkpoint_step) first",
    ),
    "STEP_AHEAD": (
        e.FailedPrecondition,
        "step = {step}: {committed} is the newest committed step and at most two ahead may be leased; "
        "commit first",
    ),
    "STEP_SKIPPED": (
        e.FailedPrecondition,
        "step = {step}: the step before it is not leased ({committed} is committed); lease steps in order",
    ),
    "STEP_ORDER": (
        e.FailedPrecondition,
        "step = {step}: {committed} is the newest committed step; commit steps in order",
    ),
    "STEP_NOT_LEASED": (e.FailedPrecondition, "step = {step} was never leased; call LeaseStep first"),
    "STEP_IDS": (
        e.FailedPrecondition,
        "prompt_ids: expected {expected}, given {given}; commit the groups in the order LeaseStep gave them",
    ),
    "STEP_DROPPED": (
        e.FailedPrecondition,
        "dropped: step {step} is committed with another account of prompt {prompt_id}; it cannot be changed",
    ),
    "TRIM_AHEAD": (
        e.FailedPrecondition,
        "step = {step}: only {committed} is committed; trim at most to the oldest checkpoint kept",
    ),
    "MANIFEST_MISMATCH": (
        e.FailedPrecondition,
        "manifest: at step {step} prompt {prompt_id} is not where the ledger has it; this checkpoint is "
        "of another "
        "history: use one of this run, or fork",
    ),
    "MANIFEST_LACKS": (
        e.DataLoss,
        "manifest: step {step} is missing; the ledger knows steps up to {committed} and the checkpoint "
        "is of step "
        "{checkpoint}; give the manifest that lies in the checkpoint, or load one at or before {committed}",
    ),
    "GAP": (
        e.DataLoss,
        "checkpoint_step = {checkpoint}: payloads up to step {trimmed} are gone; load a newer "
        "checkpoint, or say "
        "on_gap = regenerate | drop",
    ),
    "VERSION_VOID": (
        e.FailedPrecondition,
        "version = {version} was burned when a newer term opened; reserve another number",
    ),
    "UNKNOWN_VERSION": (
        e.NotFound,
        "version = {version}: never reserved in this run; reserve it first",
    ),
    "NO_VERSION": (e.NotFound, "version = {version}: none such; 0 needs a first publication"),
    "LABEL_MISMATCH": (
        e.FailedPrecondition,
        "label = {given}: version {version} was reserved for step {reserved}; publish it with that label",
    ),
    "OLDER_LABEL": (
        e.FailedPrecondition,
        "label = {label} is below the published {published}; replay in silence up to it, or set "
        "allow_older_label when "
        "no engine serves it any more",
    ),
    "OLDER_VERSION": (
        e.FailedPrecondition,
        "version = {version}: {newest} is published already; reserve a new number",
    ),
    "ROUTER_HELD": (
        e.FailedPrecondition,
        "router_id: {holder} holds the lease for another {for_ms} ms; wait, or stop it",
    ),
    "AUDIT_RUNS": (e.Unavailable, "run_id = {run_id}: another audit of it is under way; ask again"),
    "AUDIT_REPLACED": (
        e.Unavailable,
        "run_id = {run_id}: another audit has begun, for this one stood still for long; ask again",
    ),
    "FINISHED": (
        e.OutOfRange,
        "step = {step}: all sources are closed and everything is trained or dropped; the run is finished",
    ),
}


def refusal(run_id: str, reply: Sequence[object]) -> e.MilepostError:
    """The error for `{'!', REASON, name, value, ...}`."""
    reason = _text(reply[1])
    pairs = [_text(v) for v in reply[2:]]
    values = {"run_id": run_id, **dict(zip(pairs[::2], pairs[1::2], strict=True))}
    known = _TABLE.get(reason)
    if known is None:
        return e.Internal(f"the ledger answered {reason} {values}; please report this", metadata=values)
    kind, words = known
    retry = float(values["for_ms"]) / 1000 if "for_ms" in values else None
    return kind(words.format(**values), reason=reason, metadata=values, retry_after_s=retry)


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
