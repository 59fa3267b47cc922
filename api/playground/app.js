// The playground: start a generation, watch its words arrive, leave, rejoin.
//
// The page is a fold over the event log, as every Rejoin client may be: FOLD has one small function per
// event type, and the id of the last folded event is the cursor a later connection goes on from.
// Whatever comes from a model or a server becomes a text node; nothing is ever parsed as HTML.

const MIN_SPAN_MS = 8000; // the timeline is at least this long before it starts to compress
const CLOCK_MS = 100; // how often elapsed time and timeline move while nothing arrives
const RECENT_MS = 4000; // how often the list of generations is asked for while the tab is visible
const RECENT_LIMIT = 20;
const KEY_ITEM = "rejoin.api-key";
const FINISHED = new Set(["completed", "incomplete", "failed", "cancelled"]);

const CONNECTION_WORDS = {
  idle: "not connected",
  connecting: "connecting…",
  connected: "connected",
  reconnecting: "reconnecting…",
  disconnected: "disconnected",
  closed: "closed: all received",
};

const $ = (id) => document.getElementById(id);

// ---------------------------------------------------------------- the server

class Problem extends Error {
  constructor({ status = 0, title = "Something went wrong", detail = "", code = "" }) {
    super(title);
    Object.assign(this, { status, title, detail, code });
  }
}

const UNREACHABLE = {
  title: "The server cannot be reached",
  detail: "Nothing is lost: a generation that was started goes on. Check that the server runs, then try again.",
  code: "unreachable",
};

/** JSON of an API call, null for an empty answer. Throws Problem, with status 0 when there was no answer at all. */
async function call(path, { method = "GET", headers = {}, body } = {}) {
  const key = sessionStorage.getItem(KEY_ITEM);
  const authorization = key ? { Authorization: `Bearer ${key}` } : {};
  const request = { method, body, cache: "no-store", headers: { ...headers, ...authorization } };
  const response = await fetch(path, request).catch(() => {
    throw new Problem(UNREACHABLE);
  });
  if (!response.ok) throw await problemOf(response);
  return response.status === 204 ? null : response.json();
}

async function problemOf(response) {
  const body = await response.json().catch(() => ({}));
  const said = body.detail ?? body.error?.message; // problem details, or the OpenAI shape of /v1/models
  return new Problem({
    status: response.status,
    title: body.title ?? `The server answered ${response.status}`,
    detail: typeof said === "string" ? said : "",
    code: body.code ?? body.error?.code ?? "",
  });
}

/** A version 4 UUID. `randomUUID` exists on https and localhost only. */
function uuid() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

// ---------------------------------------------------------------- what is on the screen

/** A box that text is streamed into. `seam` marks where a connection ended, without adding a character. */
function pane(box, shell = box) {
  let node = null;
  return {
    append(text) {
      if (!node) box.append((node = document.createTextNode("")));
      node.appendData(text);
      shell.hidden = false;
    },
    seam() {
      if (!node) return;
      const mark = document.createElement("span");
      mark.className = "seam";
      mark.title = "The connection ended here; the next one went on from here";
      box.append(mark);
      node = null;
    },
    clear() {
      box.replaceChildren();
      shell.hidden = shell !== box;
      node = null;
    },
    text: () => box.textContent,
  };
}

const answer = pane($("answer"));
const reasoning = pane($("reasoning"), $("reasoning-box"));
const refusal = pane($("refusal"), $("refusal-box"));
const panes = [answer, reasoning, refusal];

let view = blank();

/** All that is known of the generation on the screen. Times are Unix milliseconds. */
function blank() {
  return {
    id: null,
    eventsUrl: null,
    cancelUrl: null,
    status: "idle",
    attempt: null,
    provider: null,
    mode: "fresh",
    source: null,
    connection: "idle",
    connections: 0,
    lastEventId: null,
    deltas: 0,
    toolCalls: new Map(),
    createdAt: null,
    firstTokenAt: null,
    finishedAt: null,
    finishReason: null,
    usage: null,
    cancelledBy: null,
    cancelling: false,
    endedUnseen: false, // the list says it has finished, but this page has not read that far
    openedAt: null, // when this page began to follow it: the timeline's zero
    closedAt: null, // when the timeline stopped
    ticks: [],
    gaps: [],
    voids: [],
  };
}

const finished = () => FINISHED.has(view.status);
const running = () => view.id !== null && !finished();

function clearOutput() {
  panes.forEach((each) => each.clear());
  for (const list of ["tools", "sources"]) {
    $(list).replaceChildren();
    $(`${list}-box`).hidden = true;
  }
  view.toolCalls.clear();
  view.deltas = 0;
  view.firstTokenAt = null;
}

// ---------------------------------------------------------------- the fold

const FOLD = {
  "generation.queued"(event) {
    view.status = "queued";
    view.createdAt = event.created_at;
  },
  "generation.started"(event) {
    if (event.mode !== "continued") startOver();
    Object.assign(view, { status: "in_progress", attempt: event.attempt, provider: event.provider, mode: event.mode });
    if (event.attempt > 1) announce(notice().text);
  },
  "text.delta"(event) {
    delta(event);
    answer.append(event.text);
  },
  "reasoning.delta"(event) {
    delta(event);
    reasoning.append(event.text);
  },
  "refusal.delta"(event) {
    delta(event);
    refusal.append(event.text);
  },
  "tool_call.delta"(event) {
    delta(event);
    showToolCall(event);
  },
  "source.added": showSource,
  "generation.completed"(event) {
    const cutShort = ["length", "content_filter"].includes(event.finish_reason);
    Object.assign(view, { finishReason: event.finish_reason, usage: event.usage ?? null });
    finish(cutShort ? "incomplete" : "completed", event);
  },
  "generation.failed"(event) {
    finish("failed", event);
    showFailure(event);
  },
  "generation.cancelled"(event) {
    view.cancelledBy = event.by;
    finish("cancelled", event);
  },
};

/** A fresh attempt voids what the earlier ones said. */
function startOver() {
  if (view.deltas) view.voids.push(Date.now());
  clearOutput();
}

function delta(event) {
  view.deltas += 1;
  view.firstTokenAt ??= event.at ?? Date.now();
  view.ticks.push(Date.now());
}

/** After the terminal event nothing more comes: close, or EventSource would ask once more and be told 204. */
function finish(status, event) {
  Object.assign(view, { status, finishedAt: event.at ?? Date.now() });
  hangUp("closed");
  view.closedAt = Date.now();
  announce(notice().text);
  refreshRecent();
}

function showToolCall({ index, name, arguments: fragment = "" }) {
  if (!view.toolCalls.has(index)) {
    const code = document.createElement("code");
    const item = document.createElement("li");
    item.append(code);
    $("tools").append(item);
    view.toolCalls.set(index, { name: "", arguments: "", code });
  }
  const toolCall = view.toolCalls.get(index);
  toolCall.name = name ?? toolCall.name;
  toolCall.arguments += fragment;
  toolCall.code.textContent = `${toolCall.name}(${toolCall.arguments})`;
  $("tools-box").hidden = false;
}

function showSource({ title, url, snippet }) {
  const item = document.createElement("li");
  item.append(isWebAddress(url) ? linkTo(url, title) : title);
  if (snippet) item.append(element("p", "hint", snippet));
  $("sources").append(item);
  $("sources-box").hidden = false;
}

const isWebAddress = (url) => URL.canParse(url ?? "") && /^https?:$/.test(new URL(url).protocol);

function linkTo(url, text) {
  const link = element("a", "", text);
  Object.assign(link, { href: url, target: "_blank", rel: "noopener noreferrer" });
  return link;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// ---------------------------------------------------------------- the connection

/** Follow the log from after the last folded event; from its start when there is none. */
function connect() {
  const url = new URL(view.eventsUrl, location.href);
  if (view.lastEventId) url.searchParams.set("after", view.lastEventId);
  const source = new EventSource(url);
  Object.assign(view, { source, connection: "connecting" });
  view.openedAt ??= Date.now();
  source.onopen = opened;
  source.onerror = interrupted;
  for (const type of Object.keys(FOLD)) source.addEventListener(type, received);
  repaint();
}

function opened() {
  view.connection = "connected";
  view.connections += 1;
  closeGap();
  if (view.connections > 1) panes.forEach((each) => each.seam());
  repaint();
}

function received(message) {
  if (message.lastEventId) view.lastEventId = message.lastEventId;
  FOLD[message.type](JSON.parse(message.data));
  repaint();
}

/** The browser comes back by itself unless the server refused: then the snapshot tells why. */
function interrupted() {
  openGap();
  if (view.source.readyState === EventSource.CONNECTING) {
    if (view.connections > 0) view.connection = "reconnecting";
    return repaint();
  }
  hangUp("disconnected");
  repaint();
  explainRefusal(view);
}

async function explainRefusal(mine) {
  await reporting(async () => {
    const snapshot = await call(`/v1/generations/${encodeURIComponent(mine.id)}`);
    if (mine !== view) return;
    if (FINISHED.has(snapshot.status)) return adopt(snapshot);
    view.eventsUrl = snapshot.events_url;
    showError({
      title: "The server closed the stream",
      detail: "The generation goes on. Press Rejoin to continue where you were.",
      code: "stream_refused",
    });
  });
}

function hangUp(connection) {
  view.source?.close();
  Object.assign(view, { source: null, connection });
}

function openGap() {
  const last = view.gaps.at(-1);
  if (!last || last.to !== null) view.gaps.push({ from: Date.now(), to: null });
}

function closeGap() {
  const last = view.gaps.at(-1);
  if (last && last.to === null) last.to = Date.now();
}

/** Take a finished generation's state from its snapshot, when there is no stream to hear the end from. */
function adopt(snapshot) {
  const shown = answer.text();
  if (snapshot.text.startsWith(shown)) {
    answer.seam();
  } else {
    clearOutput();
  }
  const missing = snapshot.text.slice(answer.text().length);
  if (missing) answer.append(missing);
  Object.assign(view, {
    attempt: snapshot.attempt,
    lastEventId: snapshot.last_event_id,
    finishReason: snapshot.finish_reason,
    usage: snapshot.usage,
    firstTokenAt: milliseconds(snapshot.first_token_at),
  });
  closeGap();
  finish(snapshot.status, { at: milliseconds(snapshot.finished_at) });
  if (snapshot.error) showFailure(snapshot.error);
  repaint();
}

const milliseconds = (seconds) => (seconds == null ? null : seconds * 1000);

// ---------------------------------------------------------------- what the visitor does

let order = null; // the last POST that got no answer: asked again with the same key, it is the same generation

async function start() {
  if ($("start").disabled) return;
  const prompt = $("prompt").value;
  const body = JSON.stringify({ model: $("model").value, prompt });
  if (order?.body !== body) order = { body, key: uuid() };
  $("start").disabled = true;
  clearError();
  await reporting(async () => {
    const created = await call("/v1/generations", {
      method: "POST",
      body,
      headers: { "Content-Type": "application/json", "Idempotency-Key": order.key },
    });
    order = null;
    history.pushState({ prompt }, "", `#${created.id}`);
    show(created, prompt);
    announce("Started");
    refreshRecent();
  });
  allowStart();
}

/** Put a generation on the screen and follow it from the start. */
function show(generation, prompt) {
  leave();
  Object.assign(view, {
    id: generation.id,
    eventsUrl: generation.events_url,
    cancelUrl: generation.cancel_url,
    status: generation.status,
    createdAt: milliseconds(generation.created_at),
  });
  $("question").textContent = prompt ?? "";
  $("question").hidden = !prompt;
  connect();
}

/** Forget the generation on the screen. It goes on: leaving is not cancelling. */
function leave() {
  hangUp("idle");
  view = blank();
  clearOutput();
  clearError();
  $("question").hidden = true;
}

/** Join the generation that the address names; the prompt, which only its author knows, is in the history entry. */
async function joinFromAddress() {
  const id = location.hash.slice(1);
  if (id === (view.id ?? "")) return;
  leave();
  repaint();
  if (!id) return;
  const mine = view;
  await reporting(async () => {
    const snapshot = await call(`/v1/generations/${encodeURIComponent(id)}`);
    // Its log tells the status again: what is not read yet is not shown as finished.
    if (mine === view) show({ ...snapshot, status: "joining" }, history.state?.prompt);
  });
}

function cut() {
  hangUp("disconnected");
  openGap();
  announce("Connection cut. The generation goes on.");
  moveFocus($("rejoin"));
}

function rejoin() {
  clearError();
  announce("Rejoined");
  connect();
  moveFocus($("cut"));
}

/** The button just pressed is disabled now; keep the keyboard at its counterpart. */
function moveFocus(button) {
  paint();
  button.focus();
}

async function cancel() {
  const mine = view;
  view.cancelling = true;
  repaint();
  await reporting(async () => {
    const snapshot = await call(view.cancelUrl, { method: "POST" });
    if (mine === view && !view.source && !finished()) adopt(snapshot); // else the stream tells the end
  });
  mine.cancelling = false;
  repaint();
}

async function copyId() {
  try {
    await navigator.clipboard.writeText(view.id);
    $("copy").textContent = "Copied";
    setTimeout(() => ($("copy").textContent = "Copy"), 1500);
  } catch {
    getSelection().selectAllChildren($("generation-id")); // no clipboard on plain http: select it instead
  }
}

const allowStart = () => ($("start").disabled = !$("prompt").value.trim() || !$("model").value);

// ---------------------------------------------------------------- errors and the key

/** Run an action; what goes wrong is shown, never thrown away. */
async function reporting(action) {
  try {
    await action();
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (problem.status !== 0) order = null;
    problem.status === 401 ? askForKey() : showError(problem);
  }
}

function showError({ title, detail, code }) {
  $("error-title").textContent = title;
  $("error-detail").textContent = detail;
  $("error-code").textContent = code;
  $("error").hidden = false;
}

function showFailure({ code, message, retryable }) {
  const advice = retryable ? "Asking again may work." : "The same prompt would fail again.";
  showError({ title: "The generation failed", detail: `${message} ${advice}`, code });
}

const clearError = () => ($("error").hidden = true);

function askForKey() {
  if (sessionStorage.getItem(KEY_ITEM)) $("key-note").textContent = "The server did not accept this key.";
  sessionStorage.removeItem(KEY_ITEM);
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("key").focus();
}

function saveKey() {
  sessionStorage.setItem(KEY_ITEM, $("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  load();
}

// ---------------------------------------------------------------- models and recent generations

async function loadModels() {
  await reporting(async () => {
    const { data } = await call("/v1/models").catch((problem) => {
      if (problem.status === 404) return { data: [{ id: "demo" }] };
      throw problem;
    });
    $("model").replaceChildren(...data.map(({ id }) => element("option", "", id)));
    allowStart();
  });
}

const rows = new Map(); // generation id -> its <li>, kept so that focus and hover survive a refresh

async function refreshRecent() {
  try {
    const page = await call(`/v1/generations?limit=${RECENT_LIMIT}`);
    showRecent(page.data);
    const all = page.data.length ? "" : "Nothing yet.";
    $("recent-note").textContent = page.has_more ? `The newest ${RECENT_LIMIT}.` : all;
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    if (problem.status === 401) return askForKey();
    $("recent-note").textContent = `${problem.title}.`;
  }
}

function showRecent(generations) {
  view.endedUnseen = generations.some(({ id, status }) => id === view.id && FINISHED.has(status));
  const wanted = generations.map((generation) => recentRow(generation));
  const list = $("recent");
  const same = wanted.length === list.children.length && wanted.every((row, place) => row === list.children[place]);
  if (same) return;
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  list.replaceChildren(...wanted);
  focused?.focus();
}

function recentRow({ id, status, model, created_at: createdAt }) {
  if (!rows.has(id)) rows.set(id, newRow(id));
  const row = rows.get(id);
  row.querySelector(".when").textContent = `${model} · ${ago(Date.now() - createdAt * 1000)}`;
  showStatus(row.querySelector(".badge"), status);
  markCurrent(row);
  return row;
}

function newRow(id) {
  const link = element("a", "", "");
  link.href = `#${encodeURIComponent(id)}`;
  link.append(element("code", "", id), element("span", "when", ""), element("span", "badge", ""));
  const row = document.createElement("li");
  row.dataset.id = id;
  row.append(link);
  return row;
}

/** The row of the generation on the screen; while connected, its stream knows better than the last list. */
function markCurrent(row) {
  const current = row.dataset.id === view.id;
  row.firstChild.setAttribute("aria-current", String(current));
  if (current && view.source && view.status !== "joining") showStatus(row.querySelector(".badge"), view.status);
}

function showStatus(badge, status) {
  if (badge.dataset.status === status) return;
  badge.dataset.status = status;
  badge.textContent = status.replace("_", " ");
}

const AGES = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];

function ago(elapsedMs) {
  const seconds = Math.floor(elapsedMs / 1000);
  const [size, unit] = AGES.find(([size]) => seconds >= size) ?? [];
  return size ? `${Math.floor(seconds / size)} ${unit} ago` : "just now";
}

// ---------------------------------------------------------------- painting

let painting = false;

/** Paint once before the next frame, however many events arrive until then. */
function repaint() {
  if (painting) return;
  painting = true;
  requestAnimationFrame(() => {
    painting = false;
    paint();
  });
}

function paint() {
  paintFacts();
  paintControls();
  paintTimeline();
  followEnd();
}

function paintFacts() {
  showStatus($("status"), view.status);
  $("connection").dataset.state = $("stage").dataset.connection = view.connection;
  $("stage").dataset.live = running();
  for (const [id, text] of Object.entries(facts())) {
    if ($(id).textContent !== text) $(id).textContent = text;
  }
  const { text, tone } = notice();
  $("notice").dataset.tone = tone;
  if ($("notice").textContent !== text) $("notice").textContent = text;
}

function facts() {
  const { usage } = view;
  const known = view.id !== null;
  return {
    connection: CONNECTION_WORDS[view.connection],
    "generation-id": view.id ?? "–",
    "last-event-id": view.lastEventId ?? "–",
    attempt: view.attempt ? String(view.attempt) : "–",
    provider: view.provider ?? "–",
    connections: known ? String(view.connections) : "–",
    deltas: known ? String(view.deltas) : "–",
    tokens: usage ? `${usage.input_tokens} in, ${usage.output_tokens} out` : "–",
    "first-token": duration(view.createdAt, view.firstTokenAt),
    elapsed: duration(view.createdAt, known ? view.finishedAt ?? Date.now() : null),
    finish: view.finishReason ?? view.cancelledBy ?? "–",
  };
}

function duration(from, to) {
  if (from === null || to === null) return "–";
  const ms = Math.max(0, to - from);
  if (ms < 1000) return `${Math.round(ms)} ms`;
  return ms < 60000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.floor(ms / 60000)} min ${Math.floor(ms / 1000) % 60} s`;
}

/** One sentence on where things stand, and what can be done. */
function notice() {
  if (finished()) return ending();
  const after = view.lastEventId ? ` after ${view.lastEventId}` : " from the start";
  if (view.connection === "disconnected" && view.endedUnseen)
    return { tone: "away", text: "It finished while you were away. Rejoin brings the rest." };
  if (view.connection === "disconnected")
    return { tone: "away", text: `Disconnected; the generation goes on without you. Rejoin continues${after}.` };
  if (view.connection === "reconnecting")
    return { tone: "away", text: `The connection dropped. The browser comes back by itself${after}.` };
  if (view.status === "joining") return { tone: "calm", text: "Joining: reading the log from its start." };
  if (view.status === "queued") return { tone: "calm", text: "Waiting for a worker." };
  if (view.attempt > 1) {
    const how = view.mode === "continued" ? "goes on where the last one stopped" : "started over";
    return { tone: "away", text: `Attempt ${view.attempt} ${how}.` };
  }
  if (view.status === "in_progress")
    return { tone: "calm", text: "Writing. Cut the connection, close the tab, come back: it goes on." };
  return { tone: "calm", text: "Nothing is running. Start something, then leave it." };
}

function ending() {
  const over = view.connections;
  const by = view.cancelledBy === "disconnect" ? ", because nobody was reading" : "";
  return {
    completed: { tone: "calm", text: over > 1 ? `Complete, in one piece over ${over} connections.` : "Complete." },
    incomplete: { tone: "away", text: `Stopped early: ${view.finishReason}.` },
    failed: { tone: "bad", text: "Failed. What had arrived stays." },
    cancelled: { tone: "away", text: `Cancelled${by}. What had arrived stays.` },
  }[view.status];
}

function paintControls() {
  $("cut").disabled = !view.source;
  $("rejoin").disabled = !running() || view.source !== null;
  $("cancel").disabled = !running() || view.cancelling;
  $("copy").disabled = view.id === null;
  const link = $("second-tab");
  link.setAttribute("aria-disabled", String(view.id === null));
  if (view.id) link.href = `/#${encodeURIComponent(view.id)}`;
  else link.removeAttribute("href");
  const dialects = $("dialects");
  dialects.hidden = view.id === null;
  if (view.id) dialects.href = `/playground/dialects.html#${encodeURIComponent(view.id)}`;
  rows.forEach(markCurrent);
}

const announce = (text) => ($("announce").textContent = text);

let pinned = true; // the answer scrolls along until its reader scrolls up

function followEnd() {
  if (pinned) $("answer").scrollTop = $("answer").scrollHeight;
}

function notePinned() {
  const box = $("answer");
  pinned = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
}

// ---------------------------------------------------------------- the timeline

function paintTimeline() {
  const canvas = $("timeline");
  const ratio = devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const now = view.closedAt ?? Date.now();
  const spanMs = Math.max(MIN_SPAN_MS, view.openedAt ? now - view.openedAt : 0);
  const x = (at) => 2 + ((at - view.openedAt) / spanMs) * (width - 6);
  drawGaps(pen, x, height, now);
  drawTicks(pen, x, height);
  drawVoids(pen, x, height);
  describeTimeline(canvas, spanMs);
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

function drawGaps(pen, x, height, now) {
  for (const { from, to } of view.gaps) {
    const [left, right] = [x(from), x(to ?? now)];
    pen.fillStyle = colour("--amber-wash");
    pen.fillRect(left, 0, right - left, height);
    pen.fillStyle = colour("--amber-line");
    pen.fillRect(left, 0, 1, height);
    pen.fillRect(right, 0, 1, height);
  }
}

/** One line per two pixels; the more deltas share it, the bigger, so that a burst of catching up stands out. */
function drawTicks(pen, x, height) {
  const columns = new Map();
  for (const at of view.ticks) {
    const column = Math.round(x(at) / 2) * 2;
    columns.set(column, (columns.get(column) ?? 0) + 1);
  }
  pen.fillStyle = colour("--accent");
  for (const [column, count] of columns) {
    const tall = Math.min(height - 6, height * (0.3 + 0.13 * Math.log2(count)));
    pen.fillRect(column, (height - tall) / 2, 1.5 + 0.5 * Math.log2(count), tall);
  }
}

function drawVoids(pen, x, height) {
  pen.fillStyle = colour("--red");
  for (const at of view.voids) pen.fillRect(x(at), 0, 2, height);
}

function describeTimeline(canvas, spanMs) {
  const { ticks, gaps } = view;
  const text = ticks.length ? `Deltas arrived: ${ticks.length}. Times away: ${gaps.length}.` : "No deltas yet";
  if (canvas.getAttribute("aria-label") !== text) canvas.setAttribute("aria-label", text);
  $("span").textContent = `${(spanMs / 1000).toFixed(0)} s`;
}

// ---------------------------------------------------------------- wiring

function load() {
  loadModels();
  refreshRecent();
  joinFromAddress();
}

function onSubmit(form, action) {
  $(form).addEventListener("submit", (event) => {
    event.preventDefault();
    action();
  });
}

function startByKeyboard(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
    event.preventDefault();
    start();
  }
}

function refreshWhenVisible() {
  if (document.visibilityState === "visible" && $("key-form").hidden) refreshRecent();
}

onSubmit("ask", start);
onSubmit("key-form", saveKey);
$("prompt").addEventListener("keydown", startByKeyboard);
$("prompt").addEventListener("input", allowStart);
$("cut").addEventListener("click", cut);
$("rejoin").addEventListener("click", rejoin);
$("cancel").addEventListener("click", cancel);
$("copy").addEventListener("click", copyId);
$("answer").addEventListener("scroll", notePinned, { passive: true });
addEventListener("hashchange", joinFromAddress);
addEventListener("resize", repaint);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
document.addEventListener("visibilitychange", refreshWhenVisible);
setInterval(refreshWhenVisible, RECENT_MS);
setInterval(() => running() && repaint(), CLOCK_MS);

allowStart();
paint();
load();
