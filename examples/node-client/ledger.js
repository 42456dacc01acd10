// The ledger of a run: one JSON object a prompt, then the counts.
//
//   node ledger.js --buffer 127.0.0.1:7101 --run demo --state TRAINED

import { parseArgs } from "node:util";

import { MilepostError, connect } from "./milepost.js";

const { values: options } = parseArgs({
  options: {
    buffer: { type: "string", default: "127.0.0.1:7101" },
    run: { type: "string", default: "default" },
    state: { type: "string", multiple: true, default: [] }, // WAITING, ROLLING, READY, ASSIGNED, TRAINED, DROPPED
  },
});

const buffer = connect("BufferService", options.buffer);
const short = (name, prefix) => name.slice(prefix.length).toLowerCase();

try {
  const states = options.state.map((state) => `PROMPT_STATE_${state.toUpperCase()}`);
  for await (const { rows } of buffer.stream("GetLedger", { run_id: options.run, states })) {
    for (const { prompt_id, state, attempt, step, position, staleness, drop_reason, detail } of rows) {
      const dropped = short(drop_reason, "DROP_REASON_");
      const why = dropped === "unspecified" ? {} : { dropped, detail };
      console.log(JSON.stringify({ prompt_id, state: short(state, "PROMPT_STATE_"), attempt, step, position, staleness, ...why }));
    }
  }
  const { runs } = await buffer.call("GetStats", { run_id: options.run });
  console.log(JSON.stringify({ stats: runs[0] }));
} catch (error) {
  if (!(error instanceof MilepostError)) throw error;
  console.error(`${error.address}: ${error.status} ${error.reason}: ${error.message}`);
  process.exitCode = 1;
} finally {
  buffer.close();
}
