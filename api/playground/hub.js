// One connection per answer for all tabs of a browser, which allows six per host: this hub holds it.
//
// It follows logs with EventSource, keeps what it heard, and tells every port that asked, a late one from the start. It
// runs in a SharedWorker (the last lines), or in the page itself where there is none. It rejoins with the id of the
// last event it has; it asks for nothing but streams, and so never sees an API key. Knows nothing of what is said.

const BATCH_MS = 16; // what comes within one frame is told at once
const TYPES = [
  ...["generation.queued", "generation.started", "text.delta", "reasoning.delta", "refusal.delta", "tool_call.delta"],
  ...["source.added", "generation.completed", "generation.failed", "generation.cancelled"],
];
const TERMINAL = new Set(["generation.completed", "generation.failed", "generation.cancelled"]);

/** One log, as far as it was heard. `state`: connecting, connected, reconnecting, dropped, refused or closed. */
class Log {
  constructor(hub, id, url) {
    Object.assign(this, { hub, id, url, source: null, state: "connecting", connections: 0 });
    this.entries = []; // [when it was heard (Unix milliseconds), event id, event as JSON]
    this.told = 0; // how many of them all ports have
    this.gaps = []; // {from, to}: times without a connection; `to` is null while it lasts
    this.ports = new Set();
    this.timer = null;
  }

  connect() {
    if (this.source || this.state === "closed") return;
    if (this.hub.down()) return this.become("dropped");
    const url = new URL(this.url, location.origin);
    if (this.entries.length) url.searchParams.set("after", this.entries.at(-1)[1]);
    const source = (this.source = new EventSource(url));
    source.onopen = () => {
      this.connections += 1;
      this.closeGap();
      this.become("connected");
    };
    source.onerror = () => this.interrupted();
    for (const type of TYPES) source.addEventListener(type, (message) => this.heard(message));
    this.become(this.connections ? "reconnecting" : "connecting");
  }

  heard({ type, data, lastEventId }) {
    this.entries.push([Date.now(), lastEventId, data]);
    if (TERMINAL.has(type)) this.hangUp("closed"); // else EventSource would ask once more, and be told 204
    else this.tellSoon();
  }

  /** The browser comes back by itself, unless the server refused: then a page has to find out why. */
  interrupted() {
    this.openGap();
    if (this.source.readyState === EventSource.CLOSED) this.hangUp("refused");
    else this.become(this.connections ? "reconnecting" : "connecting");
  }

  drop() {
    if (!this.source) return;
    this.openGap();
    this.hangUp("dropped");
  }

  hangUp(state) {
    this.source?.close();
    this.source = null;
    this.become(state);
  }

  become(state) {
    this.state = state;
    this.tell();
  }

  openGap() {
    if (this.connections && this.gaps.at(-1)?.to !== null) this.gaps.push({ from: Date.now(), to: null });
  }

  closeGap() {
    if (this.gaps.at(-1)?.to === null) this.gaps.at(-1).to = Date.now();
  }

  tellSoon() {
    this.timer ??= setTimeout(() => this.tell(), BATCH_MS);
  }

  tell() {
    clearTimeout(this.timer);
    this.timer = null;
    const news = this.entries.slice(this.told);
    this.told = this.entries.length;
    for (const port of this.ports) port.postMessage(this.message(news));
  }

  message(entries) {
    const { id, state, connections, gaps } = this;
    return { what: "log", id, state, connections, gaps, entries, total: this.entries.length };
  }

  /** A port that comes later is told everything from the start. */
  add(port) {
    this.tell();
    this.ports.add(port);
    port.postMessage(this.message(this.entries));
  }
}

export class Hub {
  constructor() {
    this.logs = new Map(); // generation id -> Log
    this.ports = new Set();
    this.downUntil = 0; // until when no stream may be opened, Unix milliseconds
  }

  /** A tab has come. */
  join(port) {
    this.ports.add(port);
    port.onmessage = ({ data }) => this[data.ask](port, data);
  }

  /** Is anybody there? */
  knock(port) {
    port.postMessage({ what: "welcome" });
  }

  hello(port) {
    this.tellNetwork(port);
  }

  /** A tab has gone. One that was killed says nothing: what it followed is followed to its end. */
  bye(port) {
    for (const id of this.logs.keys()) this.leave(port, { id });
    this.ports.delete(port);
  }

  follow(port, { id, url }) {
    const log = this.logs.get(id) ?? new Log(this, id, url);
    this.logs.set(id, log);
    log.url = url; // its token may be newer
    if (!log.ports.has(port)) log.add(port);
    log.connect();
  }

  /** The last one out closes the connection; the answer goes on. */
  leave(port, { id }) {
    const log = this.logs.get(id);
    if (!log?.ports.delete(port) || log.ports.size) return;
    log.hangUp("closed");
    clearTimeout(log.timer);
    this.logs.delete(id);
  }

  /** No network for so long: every stream is closed, and none is opened before the time is over. */
  drop(port, { milliseconds }) {
    this.downUntil = Date.now() + milliseconds;
    for (const log of this.logs.values()) log.drop();
    for (const each of this.ports) this.tellNetwork(each);
    setTimeout(() => this.down() || this.comeBack(), milliseconds + 5);
  }

  down() {
    return Date.now() < this.downUntil;
  }

  comeBack() {
    for (const log of this.logs.values()) log.connect();
  }

  tellNetwork(port) {
    port.postMessage({ what: "network", downUntil: this.downUntil });
  }
}

if ("SharedWorkerGlobalScope" in globalThis) {
  const hub = new Hub();
  addEventListener("connect", ({ ports: [port] }) => hub.join(port));
}
