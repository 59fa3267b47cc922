// openai-node against /v1/responses; run by test_responses_node.py. Prints one line for each test.
import assert from "node:assert/strict";
import OpenAI from "openai";

const options = { apiKey: "any", maxRetries: 0, timeout: 30_000 };
const client = new OpenAI({ baseURL: process.env.REJOIN_URL, ...options });
const other = new OpenAI({ baseURL: process.env.REJOIN_OTHER_URL, ...options });
const TEXT = process.env.REJOIN_TEXT;
const input = "hello";

async function all(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

const tests = {
  async "create is the whole answer"() {
    const answer = await client.responses.create({ model: "node-words", input });
    assert.equal(answer.output_text, TEXT);
    assert.equal(answer.status, "completed");
    assert.ok(answer.usage.total_tokens > 0);
    assert.deepEqual((await other.responses.retrieve(answer.id)).output, answer.output);
  },

  async "a stream is numbered and has the same words"() {
    const events = await all(await client.responses.create({ model: "node-words", input, stream: true }));
    assert.deepEqual(events.map((event) => event.sequence_number), events.map((_, n) => n));
    const said = events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta);
    assert.equal(said.join(""), TEXT);
    assert.equal(events.at(-1).type, "response.completed");
  },

  async "the stream helper gives the final response, also of one found again"() {
    const runner = client.responses.stream({ model: "node-words", input });
    let heard = "";
    runner.on("response.output_text.delta", (event) => { heard += event.delta; });
    const final = await runner.finalResponse();
    assert.equal(heard, TEXT);
    assert.equal(final.output_text, TEXT);
    const again = other.responses.stream({ response_id: final.id, starting_after: 7 });
    const events = await all(again);
    assert.equal(events[0].sequence_number, 8);
    assert.deepEqual((await again.finalResponse()).output, final.output);
  },

  async "background is resumed after every number, on either api"() {
    const queued = await client.responses.create({ model: "node-words", input, background: true });
    assert.ok(["queued", "in_progress"].includes(queued.status));
    const whole = await all(await client.responses.retrieve(queued.id, { stream: true }));
    for (let n = 0; n < whole.length; n++) {
      const query = { stream: true, starting_after: n };
      const rest = await all(await [client, other][n % 2].responses.retrieve(queued.id, query));
      assert.deepEqual(rest, whole.slice(n + 1));
    }
  },

  async "reasoning, words and tool calls pass the helper"() {
    const tools = [{ type: "function", name: "weather", parameters: { type: "object" }, strict: false }];
    const final = await client.responses.stream({ model: "node-tools", input, tools }).finalResponse();
    assert.deepEqual(final.output.map((item) => item.type), ["reasoning", "message", "function_call"]);
    const [reasoning, message, call] = final.output;
    assert.equal(reasoning.summary[0].text, "Let me think.");
    assert.equal(message.content[0].text, "Looking.");
    assert.deepEqual([call.call_id, call.name, call.arguments], ["call_a", "weather", '{"city":"Paris"}']);
    const result = { type: "function_call_output", call_id: call.call_id, output: "sun" };
    const next = await client.responses.create({
      model: "node-words", input: [result], previous_response_id: final.id,
    });
    assert.equal(next.previous_response_id, final.id);
    const listed = [];
    for await (const item of client.responses.inputItems.list(next.id, { order: "asc", limit: 2 })) listed.push(item);
    assert.deepEqual(listed.map((item) => item.type), ["message", "message", "function_call", "function_call_output"]);
  },

  async "a refusal passes the helper"() {
    const final = await client.responses.stream({ model: "node-refusal", input }).finalResponse();
    const [part] = final.output[0].content;
    assert.deepEqual([part.type, part.refusal], ["refusal", "I cannot."]);
  },

  async "incomplete and failed answers are final responses"() {
    const incomplete = await client.responses.stream({ model: "node-length", input }).finalResponse();
    assert.equal(incomplete.status, "incomplete");
    assert.equal(incomplete.incomplete_details.reason, "max_output_tokens");
    const failed = await client.responses.stream({ model: "node-failed", input }).finalResponse();
    assert.equal(failed.status, "failed");
    assert.equal(failed.error.code, "server_error");
  },

  async "cancel ends the stream with what was said"() {
    const runner = client.responses.stream({ model: "node-stalls", input, background: true });
    let id, cancelling;
    runner.on("response.created", (event) => { id = event.response.id; });
    runner.on("response.output_text.delta", () => { cancelling = other.responses.cancel(id); });
    const final = await runner.finalResponse();
    assert.equal(final.status, "cancelled");
    assert.equal(final.output[0].content[0].text, "word ");
    assert.equal((await cancelling).output[0].content[0].text, "word ");
  },

  async "errors are typed"() {
    await assert.rejects(client.responses.retrieve("resp_nothing"), (error) =>
      error instanceof OpenAI.NotFoundError && error.code === "response_not_found");
    await assert.rejects(client.responses.create({ model: "node-words", input, tools: [{ type: "web_search" }] }),
      (error) => error instanceof OpenAI.BadRequestError && error.param === "tools[0].type");
    const answer = await client.responses.create({ model: "node-words", input });
    await client.responses.delete(answer.id);
    await assert.rejects(client.responses.retrieve(answer.id), OpenAI.NotFoundError);
  },
};

let passed = 0;
for (const [name, test] of Object.entries(tests)) {
  await test();
  console.log(`ok ${name}`);
  passed += 1;
}
console.log(`${passed} tests passed`);
