// Prompts in, scored trajectories out, through a gateway: no trainer and no buffer are needed.
//
//   node rollout.js prompts.jsonl --rollout 127.0.0.1:7103 --samples 4 --reward exact --max-new-tokens 64
//
// Prints one JSON object a sample, in the order in which prompts finish, with its arrays decoded.

import { parseArgs } from "node:util";

import { MilepostError, connect, float32s, int32s, uint8s } from "./milepost.js";
import { readPrompts } from "./prompts.js";

const { positionals, values: options } = parseArgs({
  allowPositionals: true,
  options: {
    rollout: { type: "string", default: "127.0.0.1:7103" },
    run: { type: "string", default: "" }, // engines of this run; default: any
    samples: { type: "string", default: "1" },
    reward: { type: "string", default: "" },
    temperature: { type: "string", default: "1" },
    "max-new-tokens": { type: "string", default: "128" },
  },
});

function* requests(items) {
  yield {
    options: {
      run_id: options.run,
      samples_per_prompt: Number(options.samples),
      reward: options.reward,
      sampling: { temperature: Number(options.temperature), max_new_tokens: Number(options["max-new-tokens"]) },
    },
  };
  for (const { prompt } of items) yield { prompts: [prompt] };
}

/** A sample as JSON; a reward that is not there is NaN on the wire and null here. */
function row(prompt_id, sample) {
  const tokens = int32s(sample.tokens);
  return {
    prompt_id,
    index: sample.index,
    outcome: sample.outcome,
    tokens,
    prompt_length: sample.prompt_length,
    loss_mask: uint8s(sample.loss_mask),
    logprobs: float32s(sample.logprobs),
    version_spans: sample.version_spans.map(({ start, end, weight_version }) => [start, end, weight_version]),
    reward: Number.isNaN(sample.reward) ? null : sample.reward,
    reward_parts: sample.reward_parts,
    text: sample.text,
    error: sample.error,
    engine_id: sample.engine_id,
  };
}

if (positionals.length !== 1) throw new Error("name one file: node rollout.js prompts.jsonl");
const gateway = connect("RolloutService", options.rollout);
try {
  for await (const group of gateway.duplex("Rollout", requests(readPrompts(positionals[0]).items))) {
    if (group.error) {
      console.error(`${group.prompt_id}: refused: ${group.error}`);
      process.exitCode = 1;
    }
    for (const sample of group.samples) console.log(JSON.stringify(row(group.prompt_id, sample)));
  }
} catch (error) {
  if (!(error instanceof MilepostError)) throw error;
  console.error(`${error.address}: ${error.status} ${error.reason}: ${error.message}`);
  process.exitCode = 1;
} finally {
  gateway.close();
}
