// Feeds a JSONL file into a run: waits for credits, resumes exactly, loses nothing.
//
//   node feed.js prompts.jsonl --buffer 127.0.0.1:7101 --run demo
//
// Prints one JSON object an event on standard output; the last is {"event": "fed", ...}. The ledger owns the position: the
// cursor is stored together with the prompts before it, so this process may be killed anywhere and started again.
//
//   waits for      until                                      event
//   credits        the buffer says, by RetryInfo              refused
//   the buffer     --patience seconds without an answer       away

import { parseArgs } from "node:util";

import { AGAIN, MilepostError, connect, duration, sleep } from "./milepost.js";
import { readPrompts } from "./prompts.js";

const { positionals, values: options } = parseArgs({
  allowPositionals: true,
  options: {
    buffer: { type: "string", default: "127.0.0.1:7101" },
    run: { type: "string", default: "default" },
    source: { type: "string" }, // default: the file's name
    batch: { type: "string", default: "64" }, // prompts a call, at most 1024
    wait: { type: "string", default: "0" }, // seconds that the buffer may hold a call that finds no credits
    patience: { type: "string", default: "60" }, // seconds without an answer, or without a credit
    "keep-open": { type: "boolean", default: false }, // do not close the source: more will come
  },
});

const buffer = connect("BufferService", options.buffer);
const tell = (event, facts) => console.log(JSON.stringify({ event, ...facts }));

/** Repeats a call while the buffer does not answer; every call of Milepost may be repeated. */
async function patiently(method, request, how) {
  const giveUpAt = Date.now() + 1000 * options.patience;
  for (let delay = 0.1; ; delay = Math.min(2 * delay, 2)) {
    try {
      return await buffer.call(method, request, how);
    } catch (error) {
      if (!AGAIN.includes(error.status) || Date.now() > giveUpAt) throw error;
      tell("away", { method, message: error.message });
    }
    await sleep(delay);
  }
}

/** Puts the first items of a batch; waits for credits as long as the buffer says. */
async function put(source_id, expected_cursor, items) {
  const giveUpAt = Date.now() + 1000 * options.patience;
  const wait = Number(options.wait);
  const request = { run_id: options.run, source_id, expected_cursor, items, max_wait: wait ? duration(wait) : null };
  for (;;) {
    try {
      return await patiently("PutPrompts", request, { waitS: wait });
    } catch (error) {
      if (error.status !== "RESOURCE_EXHAUSTED" || error.retryAfterS === null || Date.now() > giveUpAt) throw error;
      tell("refused", { status: error.status, reason: error.reason, domain: error.domain, metadata: error.metadata, retry_after_s: error.retryAfterS });
      await sleep(error.retryAfterS);
    }
  }
}

/** Puts everything from the stored cursor on; false when the position must be read again: Redis forgot, or another fed. */
async function feedFrom(source_id, stored, items, counts) {
  const redis = buffer.redisRunId;
  let next = items.findIndex((item) => item.cursor === stored) + 1; // 0 at the start: no item has the empty cursor
  while (next < items.length) {
    const reply = await put(source_id, stored, items.slice(next, next + Number(options.batch)));
    next += reply.accepted;
    stored = reply.cursor || stored;
    counts.accepted += reply.accepted;
    counts.duplicates += reply.duplicates;
    tell("accepted", { accepted: reply.accepted, duplicates: reply.duplicates, credits: reply.credits, cursor: stored });
    if (buffer.redisRunId !== redis) return false;
  }
  return true;
}

/** As `feedFrom`, and false as well when the stored cursor turns out to be another one. */
async function feedUnlessMoved(...args) {
  try {
    return await feedFrom(...args);
  } catch (error) {
    if (error.reason !== "CURSOR") throw error;
    return false;
  }
}

async function main() {
  if (positionals.length !== 1) throw new Error("name one file: node feed.js prompts.jsonl");
  const { name, items, digest } = readPrompts(positionals[0]);
  const source_id = options.source ?? name;
  const counts = { accepted: 0, duplicates: 0 };
  for (;;) {
    const { cursor, closed, credits } = await patiently("OpenSource", { run_id: options.run, source_id, digest });
    tell("opened", { source_id, cursor, closed, credits });
    if (closed || (await feedUnlessMoved(source_id, cursor, items, counts))) break;
  }
  if (!options["keep-open"]) await patiently("CloseSource", { run_id: options.run, source_id });
  tell("fed", counts);
}

try {
  await main();
} catch (error) {
  if (!(error instanceof MilepostError)) throw error;
  tell("failed", { status: error.status, reason: error.reason, message: error.message, metadata: error.metadata });
  process.exitCode = 1;
} finally {
  buffer.close();
}
