// The conversations, kept in this browser's storage and nowhere else: what was asked, and what became of it.
//
// A conversation is a list of turns, a turn a question with one answer or several (each retry is one more). An answer
// without an end is running somewhere: its generation, or before there is one its Idempotency-Key, leads back to it.
// Every change reads, changes and writes at once, since other tabs do the same; they hear of it by the storage event.

import { Problem, uuid } from "./server.js";

const PREFIX = "rejoin.conversation.";
const TITLE_CHARS = 60;

export const storage = usableStorage();
const parsed = new Map(); // key -> [JSON, conversation]: what has not changed is not parsed again, and is not changed

/** localStorage, or what stands in for it where the browser keeps nothing. */
function usableStorage() {
  try {
    localStorage.getItem(PREFIX);
    return localStorage;
  } catch {
    return new MemoryStorage();
  }
}

class MemoryStorage {
  constructor() {
    this.items = new Map();
  }
  get length() {
    return this.items.size;
  }
  key(place) {
    return [...this.items.keys()][place] ?? null;
  }
  getItem(key) {
    return this.items.get(key) ?? null;
  }
  setItem(key, text) {
    this.items.set(key, text);
  }
  removeItem(key) {
    this.items.delete(key);
  }
}

function read(key) {
  const json = storage.getItem(key);
  if (json === null) return null;
  if (parsed.get(key)?.[0] !== json) parsed.set(key, [json, JSON.parse(json)]);
  return parsed.get(key)[1];
}

function write(conversation) {
  try {
    storage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
  } catch {
    throw new Problem({
      title: "This browser's storage is full",
      detail: "What you see is not kept. Delete a conversation you no longer need, then go on.",
      code: "storage_full",
    });
  }
  return conversation;
}

// ---- conversations: what is read is not to be changed, but by `update` ----

export const get = (id) => read(PREFIX + id);

/** All of them, the one that changed last first. */
export function list() {
  const keys = Array.from({ length: storage.length }, (_, place) => storage.key(place));
  const found = keys.filter((key) => key?.startsWith(PREFIX)).map(read);
  return found.filter(Boolean).sort((one, other) => other.changed - one.changed);
}

export function create(fields = {}) {
  const id = `c-${uuid()}`;
  return write({ id, title: "", named: false, model: "", changed: Date.now(), turns: [], ...fields });
}

/** Read, change, write; null when it was deleted meanwhile. */
export function update(id, change) {
  const json = storage.getItem(PREFIX + id);
  if (json === null) return null;
  const conversation = JSON.parse(json);
  change(conversation);
  return write(conversation);
}

export function remove(id) {
  storage.removeItem(PREFIX + id);
  parsed.delete(PREFIX + id);
}

/** Call `changed` with the id of a conversation that another tab has changed or deleted. */
export function onOtherTabs(changed) {
  addEventListener("storage", ({ key }) => {
    if (key?.startsWith(PREFIX)) changed(key.slice(PREFIX.length));
  });
}

// ---- turns and answers ----

export const newAnswer = (model) => ({ key: uuid(), model, generation: null, events: null, end: null });

export function ask(conversation, question, model) {
  conversation.turns.push({ question, answers: [newAnswer(model)], shown: 0 });
  if (!conversation.named) conversation.title ||= question.trim().split("\n")[0].slice(0, TITLE_CHARS);
  touch(conversation, model);
}

export function askAgain(conversation, model) {
  const turn = conversation.turns.at(-1);
  turn.answers = turn.answers.filter((answer) => answer.end || answer.generation); // not what was never ordered
  turn.shown = turn.answers.push(newAnswer(model)) - 1;
  touch(conversation, model);
}

export function askOtherwise(conversation, question, model) {
  conversation.turns.pop();
  if (!conversation.named && conversation.turns.length === 0) conversation.title = "";
  ask(conversation, question, model);
}

function touch(conversation, model) {
  Object.assign(conversation, { model, changed: Date.now() });
}

export const shown = (turn) => turn.answers[turn.shown];
export const answers = (conversation) => conversation.turns.flatMap((turn) => turn.answers);
export const running = (conversation) => answers(conversation).filter((answer) => !answer.end);
export const holding = (test) => list().find((conversation) => answers(conversation).some(test)) ?? null;

/** What the model is told: the question of this turn, behind those before it that were answered in words. */
export function history(conversation, answer) {
  const messages = [];
  for (const turn of conversation.turns) {
    const asked = turn.question === null ? [] : [{ role: "user", content: turn.question }];
    if (turn.answers.some(({ key }) => key === answer.key)) return [...messages, ...asked];
    const words = shown(turn).end?.text;
    if (words) messages.push(...asked, { role: "assistant", content: words });
  }
  return messages;
}
