// The React components of the docs: `Chat` is filled in and sent as a reader would, `Stop` is clicked in mid-answer.
import { answered, text, until } from "./doc_page.mjs";

const { createElement, useEffect } = await import("react");
const { createRoot } = await import("react-dom/client");
const { useChat } = await import("@ai-sdk/react");
const { Chat, Stop, transport } = await import("./block.mjs");

const prompt = process.argv[3];
const element = document.getElementById("root");

const first = createRoot(element);
first.render(createElement(Chat, { id: crypto.randomUUID(), savedMessages: [] }));
await until(() => answered.length === 1); // there was nothing to resume
const words = await until(() => document.querySelector("input:not([disabled])"));
words.value = prompt;
words.form.requestSubmit();
await until(() => document.querySelectorAll("p").length === 2 && document.querySelector("input:not([disabled])"));
const shown = [...document.querySelectorAll("p")].map((p) => p.textContent);
first.unmount();

let chat = null;
function Page({ id }) {
  chat = useChat({ id, transport });
  useEffect(() => void (chat.messages.length || chat.status !== "ready" || chat.sendMessage({ text: prompt })), []);
  return createElement(Stop, { id, messages: chat.messages, stop: chat.stop });
}
const second = createRoot(element);
second.render(createElement(Page, { id: crypto.randomUUID() }));
await until(() => text(chat?.messages[1]).length > 0);
document.querySelector("button").click();
await until(() => chat.status === "ready");
console.log(JSON.stringify({ shown, stopped: chat.messages[1].metadata.generationId }));
process.exit(0);
