// One generation in every dialect, side by side: the bytes of each stream as they come, shown as text and nothing else.

import { key } from "./server.js";

const DIALECTS = [
  ["native", "Native SSE", "EventSource, curl: every event under its own id"],
  ["text", "Plain text", "the words alone"],
  ["chat_completions", "Chat Completions", "openai, LangChain, LlamaIndex, Open WebUI"],
  ["responses", "Responses", "openai: numbered events, resumable"],
  ["ui_messages", "UI message stream", "Vercel AI SDK, useChat"],
];

function column(title, clients) {
  const section = document.getElementById("column").content.cloneNode(true).firstElementChild;
  section.querySelector("h2").textContent = title;
  section.querySelector(".hint").textContent = clients;
  document.getElementById("columns").append(section);
  return section;
}

function say(pre, text) {
  const follows = pre.scrollTop + pre.clientHeight >= pre.scrollHeight - 8;
  pre.append(text);
  if (follows) pre.scrollTop = pre.scrollHeight;
}

async function show(id, [name, title, clients]) {
  const section = column(title, clients);
  section.dataset.testid = `dialect-${name}`;
  const pre = section.querySelector("pre");
  try {
    const answer = await fetch(`/v1/generations/${id}/dialects/${name}`, { headers: key.headers() });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) say(pre, part.value);
    section.dataset.state = answer.ok ? "ended" : "refused";
  } catch {
    say(pre, "\n(the connection was broken off: this is not the whole answer)");
    section.dataset.state = "broken";
  }
}

const id = location.hash.slice(1);
if (/^[0-9a-f]{32}$/.test(id)) {
  document.getElementById("back").href = `/#${id}`;
  document.getElementById("note").textContent = `Generation ${id}`;
  for (const dialect of DIALECTS) show(id, dialect);
} else {
  document.getElementById("note").textContent =
    "Open this page from an answer in the playground: its address names the generation after the #.";
}
window.addEventListener("hashchange", () => location.reload());
