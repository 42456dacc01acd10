// Prompts from a JSONL file: {"prompt_id", "prompt" | "messages" | "input_ids", "label", "metadata"}; one a line.
// `cursor` names the position after a line, so that a feeder that died goes on where the ledger stands.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { basename } from "node:path";

import { int32Bytes } from "./milepost.js";

/** The file's prompts, what its content hashes to, and a name for it. */
export function readPrompts(path) {
  const bytes = readFileSync(path);
  const name = basename(path).replace(/\.[^.]*$/, "");
  const items = [];
  bytes
    .toString("utf8")
    .split("\n")
    .forEach((line, i) => {
      if (line.trim()) items.push({ prompt: prompt(line, i + 1, `${name}/${i}`), cursor: String(i + 1) });
    });
  return { name, items, digest: "sha256:" + createHash("sha256").update(bytes).digest("hex") };
}

function prompt(line, number, defaultId) {
  let row;
  try {
    row = JSON.parse(line);
  } catch (error) {
    throw new Error(`line ${number}: no JSON (${error.message}); correct or remove it`);
  }
  const { prompt_id = defaultId, prompt: text, messages, input_ids, label = "", metadata } = row;
  const forms = [text, messages, input_ids].filter((form) => form !== undefined);
  if (forms.length !== 1) throw new Error(`line ${number}: give one of prompt, messages and input_ids, not ${forms.length}`);
  const input = text !== undefined ? { text } : messages ? { chat: { messages } } : { input_ids: int32Bytes(input_ids) };
  return { prompt_id, ...input, label: String(label), metadata_json: metadata ? JSON.stringify(metadata) : "" };
}
