// One client of the AI SDK in Node, told in argv what to do. Prints JSON lines: {text} as words come, {result} at the end.
import { Chat } from "@ai-sdk/react";
import * as ai from "ai"; // the WebSocket transport is not in every version

const task = JSON.parse(process.argv[2]);
const say = (line) => console.log(JSON.stringify(line));
const textOf = (message) =>
  message?.role === "assistant" ? message.parts.filter((p) => p.type === "text").map((p) => p.text).join("") : "";

async function chat() {
  const finishes = [];
  const statuses = new Set();
  const transports = { text: ai.TextStreamChatTransport, websocket: ai.WebSocketChatTransport };
  const Transport = transports[task.transport] ?? ai.DefaultChatTransport;
  const one = new Chat({
    id: task.id,
    messages: task.messages ?? [],
    transport: new Transport({ api: task.api, url: task.api, body: task.body ?? {} }),
    sendAutomaticallyWhen: task.tools ? ai.lastAssistantMessageIsCompleteWithToolCalls : undefined,
    onToolCall: async ({ toolCall }) => {
      // Not awaited: it would wait for the stream that is waiting for it.
      if (task.tools) one.addToolOutput({ tool: toolCall.toolName, toolCallId: toolCall.toolCallId, output: task.tools });
    },
    onError: () => {},
    onFinish: ({ isAbort, isDisconnect, isError, finishReason }) =>
      finishes.push({ isAbort, isDisconnect, isError, finishReason }),
  });
  let shown = 0;
  const watch = setInterval(() => {
    statuses.add(one.status);
    const text = textOf(one.lastMessage);
    if (text.length === shown) return;
    shown = text.length;
    say({ text });
    if (task.leaveAfter && shown >= task.leaveAfter) process.exit(0);
  }, 5);
  if (task.do === "send") await one.sendMessage({ text: task.text ?? "hello" });
  if (task.do === "regenerate") await one.regenerate();
  if (task.do === "resume") await one.resumeStream();
  if (task.then === "resume") await one.resumeStream();
  while (task.tools && (one.status !== "ready" || finishes.length < 2)) await new Promise((next) => setTimeout(next, 5));
  clearInterval(watch);
  statuses.add(one.status);
  say({
    result: {
      status: one.status,
      statuses: [...statuses],
      error: one.error?.message ?? null,
      messages: one.messages,
      text: textOf(one.lastMessage),
      finishes,
    },
  });
}

// The stream without a Chat: every chunk held against the SDK's own schema, and the message they make.
async function raw() {
  const { method, url, body } = task.request;
  const headers = { "content-type": "application/json" };
  const response = await fetch(url, { method, headers, body: body ? JSON.stringify(body) : undefined });
  const chunks = [];
  let message = null;
  if (response.status === 200) {
    const parsed = ai.parseJsonEventStream({ stream: response.body, schema: ai.uiMessageChunkSchema });
    const checked = parsed.pipeThrough(
      new TransformStream({
        transform(result, controller) {
          if (!result.success) throw result.error;
          chunks.push(result.value);
          controller.enqueue(result.value);
        },
      }),
    );
    for await (const state of ai.readUIMessageStream({ stream: checked, terminateOnError: true })) message = state;
  }
  say({ result: { status: response.status, headers: Object.fromEntries(response.headers), chunks, message } });
}

await (task.do === "raw" ? raw() : chat());
process.exit(0);
