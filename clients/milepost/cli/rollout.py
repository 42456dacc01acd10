"""`milepost rollout`: prompts in, scored trajectories out, through a gateway; no trainer and no buffer."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Generator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from milepost import errors
from milepost.channel import NO_RETRY
from milepost.cli.options import add_address, add_run, address, in_words
from milepost.cli.services import missing_extra
from milepost.cli.tables import plain
from milepost.client.rollout import RolloutClient
from milepost.jsonl import Line, read_file
from milepost.types import Outcome, Prompt, RolloutOptions, Sample, SamplingParams, Trajectories

_DELAY_S = 0.5


def add(commands: Any, text: str) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "rollout", help=text, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="JSONL: one prompt a line, as for `milepost feed`")
    parser.add_argument(
        "--out", default="-", metavar="FILE", help="JSONL, one sample a line (default: standard output)"
    )
    _add_how(parser.add_argument_group("how"))
    where = parser.add_argument_group("where")
    add_run(where)
    add_address(where, "rollout")
    where.add_argument(
        "--weight-version", type=int, default=0, metavar="N", help="exactly this one (default: any)"
    )
    where.add_argument(
        "--retry-s", type=float, default=60.0, metavar="S", help="how long the gateway may be away"
    )
    alone = parser.add_argument_group("on its own (starts a router and a gateway, and ends them afterwards)")
    alone.add_argument("--standalone", action="store_true", help="if no gateway answers")
    alone.add_argument("--engine", action="append", default=[], metavar="URL", help="an engine; repeatable")
    alone.add_argument("--model", default="", metavar="DIR", help="start a CPU engine with this model")
    alone.add_argument(
        "--tokenizer", default="", metavar="DIR", help="folder of the tokenizer (default: --model)"
    )
    parser.set_defaults(run=rollout, usage_error=parser.error)


def _add_how(group: Any) -> None:
    group.add_argument(
        "--samples", type=int, default=1, metavar="N", help="samples a prompt (default: %(default)s)"
    )
    group.add_argument(
        "--reward", default="", metavar="R", help="exact, math, regex:PATTERN, module:function, grpc://..."
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--max-new-tokens", type=int, metavar="N")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends an output; repeatable"
    )
    group.add_argument("--seed", type=int, metavar="N")
    group.add_argument(
        "--concurrency", type=int, default=0, metavar="N", help="groups at once (default: the gateway's)"
    )


_DESCRIPTION = """Rolls the prompts of a JSONL file out and writes each scored sample as one line:
prompt_id, index, outcome, reward, reward_parts, text, tokens, prompt_length, logprobs, loss_mask,
version_spans, error. Groups come in the order they finish. Prompts whose group was not finished when a
gateway went away are asked for again.

`milepost rollout serve` runs the gateway itself.

exit status: 0 every sample was scored; 1 some were not, or it failed; 2 wrong command line; 130 interrupted
"""


async def rollout(options: argparse.Namespace) -> int:
    """Runs the subcommand."""
    await asyncio.to_thread(os.stat, options.file)  # a file that is not there is named before anything starts
    async with AsyncExitStack() as stack:
        gateway = await _gateway(options, stack)
        out = stack.enter_context(_opened(options.out))
        stream = _Stream(options, gateway, out)
        await stream.run()
    print(stream.summary(), file=sys.stderr)
    return 0 if stream.all_right else 1


async def _gateway(options: argparse.Namespace, stack: AsyncExitStack) -> str:
    """A gateway that answers, or one of our own."""
    where = address(options, "rollout")
    if not options.standalone or await _answers(where):
        return where
    if not options.engine and not options.model:
        options.usage_error("--standalone needs --engine URL --tokenizer DIR, or --model DIR")
    try:
        module = importlib.import_module("milepost_common.up.standalone")
    except ModuleNotFoundError as error:
        raise errors.Unavailable(missing_extra("rollout", error.name or "?")) from error
    context = module.standalone_gateway(
        engines=options.engine,
        model=options.model,
        tokenizer=options.tokenizer,
        report=_report,
    )
    return await stack.enter_async_context(context)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def _answers(where: str) -> bool:
    async with RolloutClient(where, retry=NO_RETRY, timeout_s=2.0) as client:
        try:
            await client.get_status()
        except errors.MilepostError:
            return False
    return True


@contextmanager
def _opened(path: str) -> Generator[TextIO]:
    if path == "-":
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8") as file:
        yield file


@dataclass
class _Stream:
    """One file's way through a gateway: what was asked, what is answered, what came back."""

    options: argparse.Namespace
    gateway: str
    out: TextIO
    asked: dict[str, Prompt] = field(default_factory=dict[str, Prompt])
    seen: set[str] = field(default_factory=set[str])
    outcomes: Counter[str] = field(default_factory=Counter[str])
    rewards: list[float] = field(default_factory=list[float])
    refused: int = 0
    tokens: int = 0
    started_s: float = field(default_factory=time.monotonic)

    async def run(self) -> None:
        """Asks until every prompt of the file is answered."""
        lines = read_file(self.options.file)
        answered_s = time.monotonic()
        while True:
            answers = 0
            try:
                async with RolloutClient(self.gateway, retry=NO_RETRY) as client:
                    async for group in client.rollout(self._prompts(lines), options=self._how()):
                        self._write(group)
                        answers += 1
                if not self.asked:
                    return
                raise errors.Unavailable(f"{self.gateway}: {len(self.asked)} prompts were not answered")
            except errors.Unavailable as error:
                answered_s = time.monotonic() if answers else answered_s
                if time.monotonic() - answered_s > self.options.retry_s:
                    raise
                print(f"milepost rollout: {in_words(error)}; asking again", file=sys.stderr, flush=True)
            await asyncio.sleep(_DELAY_S)

    async def _prompts(self, lines: Any) -> AsyncIterator[Prompt]:
        """First what was asked before without an answer, then the rest of the file."""
        for prompt in list(self.asked.values()):
            yield prompt
        line: Line
        for line in lines:
            if line.prompt is None:
                self._skip(str(line.error))
            elif line.prompt.prompt_id in self.seen:
                self._skip(f"line {line.number}: prompt_id {line.prompt.prompt_id!r} came before; rename it")
            else:
                self.seen.add(line.prompt.prompt_id)
                self.asked[line.prompt.prompt_id] = line.prompt
                yield line.prompt

    def _skip(self, why: str) -> None:
        self.refused += 1
        print(f"{self.options.file}: {why}; skipped", file=sys.stderr, flush=True)

    def _write(self, group: Trajectories) -> None:
        if self.asked.pop(group.prompt_id, None) is None:
            return
        if group.error:
            self.refused += 1
            print(f"{group.prompt_id}: refused: {group.error}", file=sys.stderr, flush=True)
        for sample in group.samples:
            self.out.write(json.dumps(as_row(group.prompt_id, sample), ensure_ascii=False) + "\n")
            self.outcomes[sample.outcome.name.lower()] += 1
            self.tokens += len(sample.tokens) - sample.prompt_length
            if math.isfinite(sample.reward):
                self.rewards.append(sample.reward)
        self.out.flush()

    def _how(self) -> RolloutOptions:
        o = self.options
        sampling = SamplingParams(
            temperature=o.temperature,
            top_p=o.top_p,
            top_k=o.top_k,
            min_p=o.min_p,
            max_new_tokens=o.max_new_tokens,
            stop=tuple(o.stop),
            seed=o.seed,
        )
        return RolloutOptions(
            samples_per_prompt=o.samples,
            sampling=sampling,
            reward=o.reward,
            run_id="" if o.run_id == "default" else o.run_id,
            weight_version=o.weight_version,
            max_concurrent_groups=o.concurrency,
        )

    @property
    def all_right(self) -> bool:
        """True when every prompt gave samples without errors."""
        return not self.refused and not any(Outcome[name.upper()].is_error for name in self.outcomes)

    def summary(self) -> str:
        """One line for people."""
        spent_s = max(1e-9, time.monotonic() - self.started_s)
        mean = f"mean reward {sum(self.rewards) / len(self.rewards):.4f}" if self.rewards else "no rewards"
        each = ", ".join(f"{n} {name}" for name, n in sorted(self.outcomes.items())) or "none"
        return (
            f"{sum(self.outcomes.values())} samples ({each}), {self.refused} prompts refused, {mean}, "
            f"{self.tokens / spent_s:.0f} tokens/s"
        )


def as_row(prompt_id: str, sample: Sample) -> dict[str, Any]:
    """One sample as a line of JSON; a reward that is not there is null."""
    row: dict[str, Any] = plain(sample)
    row["outcome"] = sample.outcome.name.lower()
    row["version_spans"] = [[s.start, s.end, s.weight_version] for s in sample.version_spans]
    row["metadata"] = json.loads(row.pop("metadata_json") or "null")
    return {"prompt_id": prompt_id, **row}
