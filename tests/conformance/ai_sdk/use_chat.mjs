// useChat in React on jsdom: send, unmount in mid-stream, mount again with `resume`. Prints JSON lines like chat.mjs.
import { JSDOM } from "jsdom";

const dom = new JSDOM("<!doctype html><div id=root></div>", { url: "http://127.0.0.1/" });
globalThis.window = dom.window;
globalThis.document = dom.window.document;

const { createElement, useEffect } = await import("react");
const { createRoot } = await import("react-dom/client");
const { useChat } = await import("@ai-sdk/react");
const { DefaultChatTransport } = await import("ai");

const task = JSON.parse(process.argv[2]);
const say = (line) => console.log(JSON.stringify(line));
const requests = [];

const textOf = (message) => message.parts.filter((p) => p.type === "text").map((p) => p.text).join("");

const watchedFetch = async (url, options) => {
  const response = await fetch(url, options);
  requests.push(`${options?.method ?? "GET"} ${new URL(url).pathname} ${response.status}`);
  return response;
};

function Page({ messages, onState }) {
  const chat = useChat({
    id: task.id,
    messages,
    resume: true,
    transport: new DefaultChatTransport({ api: task.api, body: task.body, fetch: watchedFetch }),
  });
  useEffect(() => void onState(chat));
  return createElement(
    "ul",
    null,
    ...chat.messages.map((message) => createElement("li", { key: message.id, className: message.role }, textOf(message))),
  );
}

// Mount a page, give its newest state to `until` again and again, unmount when that says so.
function page(messages, until) {
  return new Promise((resolve) => {
    const root = createRoot(document.getElementById("root"));
    let chat = null;
    root.render(createElement(Page, { messages, onState: (state) => (chat = state) }));
    const watch = setInterval(() => {
      if (!chat || !until(chat)) return;
      clearInterval(watch);
      const shown = [...document.querySelectorAll("li")].map((li) => [li.className, li.textContent]);
      root.unmount();
      resolve({ chat, shown });
    }, 5);
  });
}

let sent = false;
const first = await page([], (chat) => {
  if (!sent && chat.status === "ready" && requests.length === 1) {
    sent = true;
    chat.sendMessage({ text: "hello" });
  }
  return chat.messages.length === 2 && textOf(chat.messages[1]).length >= task.leaveAfter;
});
say({ left: first.shown });

// What an application keeps of a chat whose answer is not there yet: the user's message.
let started = false;
const second = await page(first.chat.messages.slice(0, 1), (chat) => {
  started ||= chat.status === "streaming";
  return started && chat.status === "ready";
});
say({ result: { shown: second.shown, requests, messages: second.chat.messages } });
process.exit(0);
