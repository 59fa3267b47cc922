// The answers that are on their way: ordered, followed to their end, kept, whichever conversation they belong to.
//
// The one rule: what was asked is written down first, with its Idempotency-Key, and ordered then. So a reload at any
// moment finds either an answer to follow, or a request that may be sent again and is the same answer. Tells the page
// when something changed, and knows nothing of how it looks.

import * as conversations from "./conversations.js";
import * as server from "./server.js";
import { Problem } from "./server.js";
import { blank, finished, fromSnapshot, refused } from "./answer.js";
import { Connection } from "./connection.js";
import { Live } from "./live.js";

const COME_BACK_MS = 2000; // after the server refused a stream
const BACKGROUND = 3; // answers of other conversations that are followed too, of the six connections a host allows

export class Answers {
  /** `page` has `changed()`, `moved()`, `ended(answer, isHere)`, `keyWanted()`, `failed(problem)`, `network(downUntil)`
   *  and `keeping(action)`, which runs a change to what is kept. */
  constructor(page) {
    this.page = page;
    this.current = null; // id of the conversation on the page
    this.lives = new Map(); // generation id -> Live
    this.seen = new Map(); // generation id -> Live that ended while this page looked on
    this.problems = new Map(); // key of an answer -> Problem: its request may be sent again
    this.ordering = new Set(); // keys of answers whose request is under way
    this.connection = new Connection((message) => this.hear(message));
  }

  // ---- what is known ----

  /** What is known of how an answer came to this browser; null for one that ended before. */
  liveOf({ generation }) {
    return this.lives.get(generation) ?? this.seen.get(generation) ?? null;
  }

  /** The state of an answer: as it was kept, as it is being written, or nothing yet. */
  stateOf(record) {
    return record.end ?? this.liveOf(record)?.answer ?? blank();
  }

  /** The answer to the last question that is being written, or was not ordered; null when there is none. */
  pending(conversation) {
    const last = conversation?.turns.at(-1);
    const answer = last ? conversations.shown(last) : null;
    return answer && answer.end === null && !this.seen.has(answer.generation) ? answer : null;
  }

  /** Is it on its way? One whose request came to nothing is not. */
  isWriting(conversation) {
    const answer = this.pending(conversation);
    return answer !== null && !this.problems.has(answer.key);
  }

  // ---- order, follow, end ----

  /** Follow what has no end: in this conversation, and some in the others, so that they are kept as well. */
  attend() {
    const open = (each) =>
      conversations.running(each).filter(({ generation }) => generation && !this.seen.has(generation));
    const here = this.current ? conversations.get(this.current) : null;
    const others = conversations.list().filter(({ id }) => id !== this.current);
    const behind = others.flatMap(open).slice(0, this.connection.shared ? BACKGROUND : 0);
    for (const answer of [...(here ? open(here) : []), ...behind]) this.follow(answer);
  }

  /** Ask for an answer. The same key again, after whatever broke: the same answer. */
  async order(key) {
    const holder = conversations.holding((answer) => answer.key === key);
    if (!holder || this.ordering.has(key)) return;
    this.ordering.add(key);
    this.problems.delete(key);
    this.page.changed();
    const { model } = conversations.answers(holder).find((answer) => answer.key === key);
    try {
      const made = await server.generate(key, model, conversations.history(holder, { key }));
      const found = { generation: made.id, events: made.events_url };
      this.change((answer) => answer.key === key, (answer) => Object.assign(answer, found));
      this.follow(found);
    } catch (problem) {
      this.notOrdered(key, problem);
    } finally {
      this.ordering.delete(key);
      this.page.changed();
    }
  }

  notOrdered(key, problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (problem.status === 401) this.page.keyWanted();
    if (problem.passes) this.problems.set(key, problem);
    else this.change((answer) => answer.key === key, (answer) => (answer.end = refused(problem)));
    this.page.failed(problem);
  }

  follow({ generation, events }) {
    if (this.lives.has(generation)) return;
    this.lives.set(generation, new Live(generation));
    this.connection.follow(generation, events);
    this.page.moved();
  }

  /** What the hub says. */
  hear(message) {
    if (message.what === "open") return this.attend();
    if (message.what === "network") return this.page.network(message.downUntil);
    const live = this.lives.get(message.id);
    if (!live) return;
    live.hear(message);
    if (finished(live.answer)) this.end(message.id, live.answer);
    else if (live.state === "refused") this.findOut(message.id);
    this.page.moved();
  }

  /** An answer has come to its end: keep it, and let go of its log. */
  end(id, answer) {
    const last = conversations.get(this.current)?.turns.at(-1);
    const isHere = Boolean(last) && conversations.shown(last).generation === id;
    const live = this.lives.get(id);
    this.forget(id);
    if (live) this.seen.set(id, live.close(answer));
    this.change(({ generation }) => generation === id, (kept) => {
      kept.end ??= { ...answer, connections: live?.connections };
      kept.events = null; // its token is of no use any more
    });
    this.page.ended(answer, isHere);
    this.attend();
  }

  /** Leaving is not cancelling. */
  forget(id) {
    this.lives.delete(id);
    this.connection.leave(id);
  }

  async stop(id) {
    const snapshot = await server.stop(id);
    const live = this.lives.get(id);
    if (live && live.state !== "connected") this.end(id, fromSnapshot(snapshot)); // else the stream tells it
  }

  /** A key was given: what waited for one is tried again. */
  retryAll() {
    for (const key of [...this.problems.keys()]) this.order(key);
    for (const [id, { state }] of this.lives) if (state === "refused") this.findOut(id);
  }

  // ---- when a stream is refused ----

  /** The server closed a stream for good. Its snapshot, or the refusal of that, tells why. */
  async findOut(id) {
    try {
      const snapshot = await server.look(id);
      if (finished(snapshot)) return this.end(id, fromSnapshot(snapshot));
      setTimeout(() => this.lives.has(id) && this.connection.follow(id, snapshot.events_url), COME_BACK_MS);
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem;
      if (problem.status === 401) this.page.keyWanted();
      else if (problem.passes) setTimeout(() => this.lives.has(id) && this.findOut(id), COME_BACK_MS);
      else this.end(id, { ...(this.lives.get(id)?.answer ?? blank()), ...lost(problem) });
    }
  }

  /** Change the answers for which `test` holds, where they are kept. */
  change(test, how) {
    const holder = conversations.holding(test);
    if (!holder) return;
    this.page.keeping(() =>
      conversations.update(holder.id, (kept) => {
        for (const answer of conversations.answers(kept).filter(test)) how(answer);
      }),
    );
  }
}

/** What becomes of an answer whose log cannot be read any more. */
function lost({ code, title, detail }) {
  const message = `${detail || title}. What had arrived is all there is.`;
  return { status: "failed", error: { code, message, retryable: true }, finishedAt: Date.now() };
}
