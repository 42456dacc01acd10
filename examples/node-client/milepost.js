// Milepost from Node, from the protos alone: clients, arrays, errors.
//
//   const buffer = connect("BufferService", "127.0.0.1:7101");
//   const { run } = await buffer.call("GetRun", { run_id: "demo" });
//
// Contract: every unary call has a deadline and ends with a reply or a MilepostError. A call that ended with UNAVAILABLE
// or DEADLINE_EXCEEDED, or with CANCELLED by a service that stops, may be repeated as it is: every mutation of Milepost is
// idempotent. Whoever connects closes.

import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import protobuf from "protobufjs";

const PROTOS = process.env.MILEPOST_PROTOS ?? fileURLToPath(new URL("../../protos", import.meta.url));
const DETAILS = "grpc-status-details-bin";
const REDIS_RUN_ID = "x-milepost-redis-run-id";
const MAX_MESSAGE_BYTES = 16 * 1024 * 1024;
const CALL_S = 10;

/** How a call ends that may be repeated as it is. */
export const AGAIN = ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"];

const FILES = ["buffer", "rollout", "router", "trainer", "weights"].map((name) => `milepost/v1/${name}.proto`);
const api = grpc.loadPackageDefinition(
  loader.loadSync(FILES, { includeDirs: [PROTOS], keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true }),
).milepost.v1;
const rpc = protobuf.loadSync(fileURLToPath(new URL("status.proto", import.meta.url)));

/** What a service refused: `status` is gRPC's name, `reason` a constant for programs, `retryAfterS` null if waiting does not help. */
export class MilepostError extends Error {
  constructor(error, address) {
    super(error.details || error.message);
    this.name = "MilepostError";
    this.address = address;
    this.status = grpc.status[error.code] ?? "UNKNOWN";
    Object.assign(this, { reason: "", domain: "", metadata: {}, retryAfterS: null }, details(error));
  }
}

function details(error) {
  const raw = error.metadata?.get(DETAILS)[0];
  const found = {};
  if (!raw) return found;
  for (const any of rpc.lookupType("google.rpc.Status").decode(raw).details) {
    const name = any.type_url.split("/").pop();
    if (name === "google.rpc.ErrorInfo") {
      const { reason, domain, metadata } = rpc.lookupType(name).decode(any.value);
      Object.assign(found, { reason, domain, metadata });
    } else if (name === "google.rpc.RetryInfo") {
      const { seconds, nanos } = rpc.lookupType(name).decode(any.value).retryDelay;
      found.retryAfterS = Number(seconds) + nanos / 1e9;
    }
  }
  return found;
}

/** A client of one service ("BufferService", "RolloutService", ...) at `host:port`. */
export function connect(service, address) {
  const options = { "grpc.max_send_message_length": MAX_MESSAGE_BYTES, "grpc.max_receive_message_length": MAX_MESSAGE_BYTES };
  return new Client(new api[service](address, grpc.credentials.createInsecure(), options), address);
}

class Client {
  constructor(stub, address) {
    this.stub = stub;
    this.address = address;
    this.redisRunId = ""; // identity of the Redis behind the last reply: when it changes, read your cursor again
  }

  /** A unary call. `waitS` is what the request itself asks the server to wait; the deadline is that much later. */
  call(method, request, { waitS = 0 } = {}) {
    return new Promise((resolve, reject) => {
      const answer = (error, reply) => (error ? reject(new MilepostError(error, this.address)) : resolve(reply));
      const call = this.stub[method](request, { deadline: after(CALL_S + waitS) }, answer);
      call.on("status", ({ metadata }) => {
        this.redisRunId = metadata?.get(REDIS_RUN_ID)[0]?.toString() ?? this.redisRunId;
      });
    });
  }

  /** Messages of a server's stream. */
  async *stream(method, request, { timeoutS = 600 } = {}) {
    yield* this.#messages(this.stub[method](request, { deadline: after(timeoutS) }));
  }

  /** A stream both ways: writes `requests` as fast as flow control lets them, yields the replies. */
  async *duplex(method, requests, { timeoutS = 600 } = {}) {
    const call = this.stub[method]({ deadline: after(timeoutS) });
    const writing = write(call, requests);
    writing.catch((error) => call.destroy(error));
    yield* this.#messages(call);
    await writing;
  }

  async *#messages(call) {
    try {
      for await (const message of call) yield message;
    } catch (error) {
      throw "code" in error ? new MilepostError(error, this.address) : error;
    } finally {
      call.cancel();
    }
  }

  close() {
    this.stub.close();
  }
}

async function write(call, requests) {
  for await (const request of requests) {
    if (call.destroyed) return;
    if (!call.write(request)) {
      await new Promise((resolve) => {
        call.once("drain", resolve);
        call.once("close", resolve);
      });
    }
  }
  call.end();
}

const after = (seconds) => new Date(Date.now() + 1000 * seconds);

export const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

/** google.protobuf.Duration of seconds. */
export const duration = (seconds) => ({ seconds: Math.floor(seconds), nanos: Math.round((seconds % 1) * 1e9) });

// Arrays travel as little-endian bytes. A Buffer may start anywhere in its memory, so typed arrays cannot be laid over it.

/** int32 numbers of a field such as `Sample.tokens`. */
export const int32s = (bytes) => elements(bytes, 4, (at) => bytes.readInt32LE(at));

/** float32 numbers of a field such as `Sample.logprobs`. */
export const float32s = (bytes) => elements(bytes, 4, (at) => bytes.readFloatLE(at));

/** uint8 numbers of a field such as `Sample.loss_mask`. */
export const uint8s = (bytes) => elements(bytes, 1, (at) => bytes[at]);

/** The bytes of a field such as `Prompt.input_ids`. */
export function int32Bytes(numbers) {
  const bytes = Buffer.alloc(4 * numbers.length);
  numbers.forEach((number, i) => bytes.writeInt32LE(number, 4 * i));
  return bytes;
}

function elements(bytes, itemBytes, read) {
  if (bytes.length % itemBytes) throw new RangeError(`${bytes.length} bytes are no array of ${itemBytes}-byte elements`);
  return Array.from({ length: bytes.length / itemBytes }, (_, i) => read(i * itemBytes));
}
