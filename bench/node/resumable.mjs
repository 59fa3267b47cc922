// resumable-stream, as its documentation has it: one process makes the streams, another one lets clients resume them.
//   node resumable.mjs relay PORT REDIS_PORT
//   node resumable.mjs feed REDIS_PORT RATE SECONDS FILE      FILE: the id of one stream on each line
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { createClient } from "redis";
import { createResumableStreamContext } from "resumable-stream";

async function context(port) {
  const url = `redis://127.0.0.1:${port}`;
  const [subscriber, publisher] = [createClient({ url }), createClient({ url })];
  await Promise.all([subscriber.connect(), publisher.connect()]);
  return createResumableStreamContext({ waitUntil: null, subscriber, publisher });
}

async function relay(port, redisPort) {
  const streams = await context(redisPort);
  const server = createServer(async (request, response) => {
    const id = request.url.slice(1);
    if (id === "alive") return response.end();
    const stream = await streams.resumeExistingStream(id);
    if (!stream) {
      response.statusCode = 404;
      return response.end();
    }
    response.writeHead(200, { "content-type": "text/event-stream" });
    response.flushHeaders();
    for await (const chunk of stream) {
      if (response.destroyed) break;
      response.write(chunk);
    }
    response.end();
  });
  server.listen({ port: Number(port), host: "127.0.0.1", backlog: 4096 });
}

async function feed(redisPort, rate, seconds, file) {
  const streams = await context(redisPort);
  const ids = readFileSync(file, "utf8").split("\n").filter(Boolean);
  const controllers = [];
  await Promise.all(ids.map(async (id, number) => {
    const source = () => new ReadableStream({ start: (controller) => { controllers[number] = controller; } });
    const made = await streams.createNewResumableStream(id, source);
    (async () => { for await (const _ of made); })();
  }));
  console.log("ready");
  await new Promise((go) => process.stdin.once("data", go));
  const all = Math.floor(rate * seconds / ids.length) * ids.length;
  const started = process.hrtime.bigint();
  let sent = 0;
  let worstLag = 0;
  while (sent < all) {
    const elapsed = Number(process.hrtime.bigint() - started) / 1e9;
    const due = Math.min(all, Math.floor(elapsed * rate) + 1);
    if (sent < due) worstLag = Math.max(worstLag, elapsed - sent / rate);
    for (; sent < due; sent++) {
      const stream = sent % ids.length;
      const marker = `@${process.hrtime.bigint()}:${stream}:${Math.floor(sent / ids.length)}@`;
      controllers[stream].enqueue(`data: {"text":"${marker} a word "}\n\n`);
    }
    await new Promise((next) => (sent < all ? setTimeout(next, 1) : setImmediate(next)));
  }
  const used = process.cpuUsage();
  const took = Number(process.hrtime.bigint() - started) / 1e9;
  const cpu = (used.user + used.system) / 1e6;
  console.log(JSON.stringify({ sent, errors: 0, seconds: took, worst_lag_ms: worstLag * 1000, cpu }));
  process.stdin.once("end", () => process.exit(0)); // a stream lives in the process that makes it
  process.stdin.resume();
}

const [role, ...given] = process.argv.slice(2);
await (role === "relay" ? relay(...given) : feed(given[0], Number(given[1]), Number(given[2]), given[3]));
