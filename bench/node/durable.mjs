// The reference server of Durable Streams, in memory.
//   node durable.mjs PORT
import { DurableStreamTestServer } from "@durable-streams/server";

const server = new DurableStreamTestServer({ port: Number(process.argv[2]), host: "127.0.0.1" });
await server.start();
