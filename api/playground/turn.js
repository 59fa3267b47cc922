// One question and its answer on the page. Shows the state it is given and changes only what is different; what a
// reader may do with it, it passes on. Text of a model or a server becomes text nodes and Markdown's elements, no more.

import { finished } from "./answer.js";
import { Markdown, mayBeFollowed } from "./markdown.js";

const STATUS_WORDS = {
  completed: "",
  incomplete: "stopped early",
  failed: "failed",
  cancelled: "stopped",
};

export class Turn {
  /** `act` is called with the name of what the reader wants: edit, retry, again, older, newer, copy. */
  constructor(act) {
    this.root = document.getElementById("turn-template").content.cloneNode(true).firstElementChild;
    this.root.addEventListener("click", ({ target }) => {
      const button = target.closest("button[data-act]");
      if (button) act(button.dataset.act, this, button);
    });
    this.words = new Stream(this.find("words"));
    this.reasoning = new Stream(this.find("reasoning-words"));
    this.refusal = new Stream(this.find("refusal-words"));
    this.shownKey = null;
    this.lists = "";
  }

  find(part) {
    return this.root.querySelector(`[data-part="${part}"]`);
  }

  /** What changes seldom: the question, which answer it is, what may be done. */
  frame({ turn, record, problem, last, busy }) {
    if (this.shownKey !== record.key) this.clear(record.key);
    Object.assign(this, { record, problem });
    this.put("question-text", turn.question ?? "");
    this.find("question").hidden = turn.question === null;
    this.find("edit").hidden = !last || busy || turn.question === null;
    this.find("retry").hidden = !last || busy || turn.question === null;
    this.find("pager").hidden = turn.answers.length < 2 || (last && busy);
    this.put("page", `${turn.shown + 1} of ${turn.answers.length}`);
    this.find("older").disabled = turn.shown === 0;
    this.find("newer").disabled = turn.shown === turn.answers.length - 1;
  }

  clear(key) {
    this.shownKey = key;
    for (const stream of [this.words, this.reasoning, this.refusal]) stream.clear();
    this.lists = "";
    this.find("reasoning").open = false;
  }

  /** What changes with every event. */
  paint(answer, live) {
    const over = finished(answer);
    const begun = answer.text !== "" || answer.refusal !== "";
    this.root.dataset.status = answer.status;
    this.root.dataset.connection = over ? "closed" : (live?.state ?? "connecting");
    this.find("answer").setAttribute("aria-busy", String(!over && !this.problem));
    this.words.show(answer.text, answer.voided, over);
    this.reasoning.show(answer.reasoning, answer.voided, over || begun);
    this.refusal.show(answer.refusal, answer.voided, over);
    this.find("reasoning").hidden = answer.reasoning === "";
    this.put("reasoning-title", begun || over ? "Reasoning" : "Reasoning…");
    this.find("refusal").hidden = answer.refusal === "";
    this.find("waiting").hidden = over || begun || this.problem != null;
    this.put("waiting-text", waiting(answer));
    this.notice(answer);
    this.trouble(answer);
    this.extras(answer);
    this.find("foot").hidden = !over;
    this.put("summary", over ? summary(answer, this.record.model) : "");
    this.facts(answer, live);
  }

  put(part, text) {
    const node = this.find(part);
    if (node.textContent !== text) node.textContent = text;
  }

  notice(answer) {
    this.find("notice").hidden = answer.attempt < 2;
    this.put("notice", answer.attempt < 2 ? "" : attemptWords(answer));
  }

  trouble({ status, error }) {
    const problem = this.problem ?? (status === "failed" ? error : null);
    this.find("problem").hidden = problem === null;
    if (problem === null) return;
    const again = this.problem
      ? "Nothing was lost: “Try again” sends the very same request."
      : problem.retryable
        ? "What had arrived stays. Asking again may work."
        : "Asking the same again would fail again: change the question, the model or the server's settings.";
    this.put("problem-title", this.problem?.title ?? "The answer failed");
    this.put("problem-text", [sentence(this.problem?.detail ?? problem.message), again].filter(Boolean).join(" "));
    this.put("problem-code", problem.code ?? "");
    this.find("again").hidden = !this.problem && this.find("retry").hidden;
    this.find("again").dataset.act = this.problem ? "again" : "retry";
  }

  /** Tool calls and sources, drawn anew when there is more of them. */
  extras({ toolCalls, sources }) {
    const calls = toolCalls.map((one) => [one.name, one.arguments.length]);
    const now = JSON.stringify([calls, sources.length, this.shownKey]);
    if (now === this.lists) return;
    this.lists = now;
    this.find("tools").hidden = toolCalls.length === 0;
    this.find("tool-list").replaceChildren(...toolCalls.map(toolItem));
    this.find("sources").hidden = sources.length === 0;
    this.find("source-list").replaceChildren(...sources.map(sourceItem));
  }

  facts(answer, live) {
    const { usage } = answer;
    const id = this.record.generation;
    this.put("fact-id", id ?? "–");
    this.put("fact-event", answer.lastEventId ?? "–");
    this.put("fact-attempt", answer.attempt ? String(answer.attempt) : "–");
    this.put("fact-provider", answer.provider ?? "–");
    this.put("fact-connections", String(live?.connections ?? answer.connections ?? "–"));
    this.put("fact-first", duration(answer.createdAt, answer.firstTokenAt));
    this.put("fact-elapsed", duration(answer.createdAt, answer.finishedAt));
    this.put("fact-finish", answer.finishReason ?? answer.by ?? answer.error?.code ?? "–");
    this.put("fact-tokens", usage ? `${usage.input_tokens} in, ${usage.output_tokens} out` : "–");
    const link = this.find("dialects");
    if (id) link.href = `/playground/dialects.html#${encodeURIComponent(id)}`;
    link.hidden = !id;
  }
}

/** A box of Markdown that is fed the growing text, and starts over when words were taken back. */
class Stream {
  constructor(box) {
    this.box = box;
    this.markdown = new Markdown(box);
    this.clear();
  }

  clear() {
    this.markdown.clear();
    Object.assign(this, { length: 0, voided: 0, ended: false });
  }

  show(text, voided, over) {
    if (voided !== this.voided || text.length < this.length) this.clear();
    const [grown, ends] = [text.length > this.length, over && !this.ended];
    Object.assign(this, { voided, ended: this.ended || over });
    if (!grown && !ends) return;
    this.markdown.append(text.slice(this.length));
    this.length = text.length;
    if (over) this.markdown.end();
    else this.markdown.paint();
  }
}

function toolItem({ name, arguments: json }) {
  const item = document.createElement("li");
  item.append(element("span", "tool-name", name || "a tool"), element("code", "", json));
  return item;
}

function sourceItem({ title, url, score, snippet }) {
  const item = document.createElement("li");
  const head = element("div", "source-head");
  head.append(mayBeFollowed(url) ? linkTo(url, title || url) : element("span", "", title || "untitled"));
  if (typeof score === "number") head.append(element("span", "score", score.toFixed(2)));
  item.append(head);
  if (mayBeFollowed(url)) item.append(element("p", "host", new URL(url).host || url));
  if (snippet) item.append(element("p", "snippet", snippet));
  return item;
}

function linkTo(url, text) {
  const link = element("a", "", text);
  Object.assign(link, { href: url, target: "_blank", rel: "noopener noreferrer" });
  return link;
}

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function attemptWords({ attempt, mode, voided }) {
  const number = `Attempt ${attempt}`;
  if (voided) return `${number} started over. What an earlier attempt had said is void and was taken off the page.`;
  if (mode === "continued") return `${number} goes on where the last one stopped. Its worker was lost, no word was.`;
  return `${number} started. The one before had not said anything yet.`;
}

const sentence = (text) => (!text || /[.!?…]$/.test(text) ? text : `${text}.`);

function waiting({ status, reasoning }) {
  if (status === "queued") return "Waiting for a worker";
  return reasoning ? "Thinking" : "The model is starting";
}

function summary(answer, model) {
  const { usage, createdAt, firstTokenAt, finishedAt } = answer;
  return [
    model || "",
    STATUS_WORDS[answer.status],
    usage ? `${usage.output_tokens} tokens` : "",
    firstTokenAt && createdAt ? `first after ${duration(createdAt, firstTokenAt)}` : "",
    finishedAt && createdAt ? duration(createdAt, finishedAt) : "",
  ]
    .filter(Boolean)
    .join(" · ");
}

export function duration(from, to) {
  if (from == null || to == null) return "–";
  const ms = Math.max(0, to - from);
  if (ms < 1000) return `${Math.round(ms)} ms`;
  return ms < 60000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.floor(ms / 60000)} min ${Math.floor(ms / 1000) % 60} s`;
}
