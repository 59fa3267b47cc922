// openai-node against /v1/chat/completions; run by test_openai_node.py. Prints one line for each test.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.REJOIN_URL, apiKey: "any", maxRetries: 0, timeout: 30_000 });
const chat = client.chat.completions;
const messages = [{ role: "user", content: "hello" }];
const SENSE = "This is, all in all, a sensible answer.";
const weather = {
  type: "function",
  function: {
    name: "weather",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

const tests = {
  async "create is the whole answer"() {
    const answer = await chat.create({ model: "sensible", messages });
    assert.equal(answer.choices[0].message.content, SENSE);
    assert.equal(answer.choices[0].finish_reason, "stop");
    assert.ok(answer.usage.total_tokens > 0);
    assert.deepEqual(await chat.retrieve(answer.id), answer);
  },

  async "a stream has the same words, and usage last"() {
    const stream = await chat.create({
      model: "sensible", messages, stream: true, stream_options: { include_usage: true },
    });
    const chunks = [];
    for await (const chunk of stream) chunks.push(chunk);
    assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), SENSE);
    assert.ok(chunks.at(-1).usage.total_tokens > 0);
    assert.equal(chunks.at(-2).choices[0].finish_reason, "stop");
  },

  async "the stream helper gives the final completion"() {
    const runner = chat.stream({ model: "sensible", messages, stream_options: { include_usage: true } });
    let heard = "";
    runner.on("content", (delta) => { heard += delta; });
    const final = await runner.finalChatCompletion();
    assert.equal(heard, SENSE);
    assert.equal(final.choices[0].message.content, SENSE);
    assert.ok(final.usage.total_tokens > 0);
  },

  async "reasoning comes along"() {
    const stream = await chat.create({ model: "thinking", messages, stream: true });
    let thought = "";
    for await (const chunk of stream) thought += chunk.choices[0].delta.reasoning_content ?? "";
    assert.equal(thought, "Let me think.");
  },

  async "tools are called, and their results sent back"() {
    const asked = [{ role: "user", content: "the weather of 'Rome'" }];
    const final = await chat.stream({ model: "sensible", messages: asked, tools: [weather] }).finalChatCompletion();
    const [call] = final.choices[0].message.tool_calls;
    assert.equal(final.choices[0].finish_reason, "tool_calls");
    assert.deepEqual([call.id, call.function.name, JSON.parse(call.function.arguments)],
      ["call_sensible", "weather", { city: "Rome" }]);
    const runner = chat.runTools({
      model: "sensible", messages: asked, stream: true,
      tools: [{ type: "function", function: { ...weather.function, parse: JSON.parse, function: ({ city }) => `rain in ${city}` } }],
    });
    assert.equal(await runner.finalContent(), SENSE);
  },

  async "errors are typed, before the stream and within it"() {
    await assert.rejects(chat.create({ model: "sensible", messages, n: 2 }),
      (error) => error instanceof OpenAI.BadRequestError && error.param === "n");
    await assert.rejects(chat.retrieve("chatcmpl-x"), OpenAI.NotFoundError);
    await assert.rejects(chat.create({ model: "broken", messages }), OpenAI.InternalServerError);
    const stream = await chat.create({ model: "broken", messages, stream: true });
    let seen = 0;
    await assert.rejects(async () => { for await (const _ of stream) seen += 1; },
      (error) => error instanceof OpenAI.APIError && error.code === "upstream_error");
    assert.ok(seen > 1);
    await assert.rejects(chat.stream({ model: "broken", messages }).finalChatCompletion(), OpenAI.APIError);
  },

  async "a key leads to the same answer, from its beginning"() {
    const options = { headers: { "Idempotency-Key": `node-${process.pid}` } };
    const first = await chat.create({ model: "sensible", messages, stream: true }, options);
    let id;
    for await (const chunk of first) { id = chunk.id; break; }
    const again = await chat.create({ model: "sensible", messages, stream: true }, options);
    let text = "";
    for await (const chunk of again) {
      assert.equal(chunk.id, id);
      text += chunk.choices[0].delta.content ?? "";
    }
    assert.equal(text, SENSE);
    assert.equal((await chat.delete(id)).deleted, true);
  },
};

for (const [name, test] of Object.entries(tests)) {
  await test();
  console.log(`ok ${name}`);
}
console.log(`${Object.keys(tests).length} tests passed`);
