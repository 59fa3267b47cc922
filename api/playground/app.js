// The page: joins the conversations, the answers that are on their way and what is seen of them, and says what a click
// or a key does. It draws what is kept and what was heard; nothing that is drawn waits for the network.

import * as conversations from "./conversations.js";
import * as server from "./server.js";
import { Problem } from "./server.js";
import { Answers } from "./answers.js";
import { Sidebar } from "./sidebar.js";
import { Strip } from "./strip.js";
import { Turn } from "./turn.js";

const DROP_MS = 3000;
const CLOCK_MS = 200; // how often the strip moves while nothing arrives
const MODEL_ITEM = "rejoin.model";
const OTHER_MODEL = "\u0000other";
const GENERATION_ID = /^[0-9a-f]{32}$/;
const SPOKEN_CHARS = 1500; // of a finished answer, to a screen reader
const CONNECTION_WORDS = {
  connecting: "connecting",
  connected: "connected",
  reconnecting: "reconnecting",
  dropped: "no network",
  refused: "asking why",
  closed: "all received",
};

const $ = (id) => document.getElementById(id);

const answers = new Answers({
  changed: draw,
  moved: repaint,
  ended: answerEnded,
  keyWanted: askForKey,
  failed: ({ title, detail }) => announce(`${title}. ${detail}`),
  network: networkIs,
  keeping,
});
const strip = new Strip($("strip"));
const sidebar = new Sidebar($("conversations"), { rename: askForName, delete: askToDelete });

let current = null; // id of the conversation on the page
let turns = []; // its Turns
let downUntil = 0; // until when there is no network, Unix milliseconds

// ---- the conversation on the page ----

const conversation = () => (current ? conversations.get(current) : null);

function open(id) {
  current = answers.current = id;
  turns = [];
  $("turns").replaceChildren();
  clearProblem();
  draw();
  answers.attend();
  const last = answers.pending(conversation());
  if (last && !last.generation) answers.order(last.key); // the page was reloaded before it was
  chooseModel(conversation()?.model);
  pinned = true;
}

/** Open what the address names: a conversation, or any generation by its id. */
async function openFromAddress() {
  const name = decodeURIComponent(location.hash.slice(1));
  if (GENERATION_ID.test(name)) return openGeneration(name);
  open(conversations.get(name) ? name : null);
  if (name && !current) showProblem({ title: "That conversation is not in this browser", code: "" });
}

async function openGeneration(id) {
  const known = conversations.holding(({ generation }) => generation === id);
  if (known) return open(known.id);
  open(null);
  await reporting(async () => {
    const snapshot = await server.look(id);
    const { model, events_url: events } = snapshot;
    const answer = { ...conversations.newAnswer(model), generation: id, events };
    const turn = { question: null, answers: [answer], shown: 0 };
    open(conversations.create({ title: `Answer ${id.slice(0, 8)}`, named: true, model, turns: [turn] }).id);
  });
}

function draw() {
  const opened = conversation();
  const title = opened?.title || "New conversation";
  $("title").textContent = title;
  document.title = opened ? `${title} · Rejoin` : "Rejoin playground";
  $("welcome").hidden = Boolean(opened?.turns.length);
  $("second-tab").hidden = !opened;
  if (opened) $("second-tab").href = `/#${opened.id}`;
  drawTurns(opened);
  drawControls(opened);
  sidebar.draw(conversations.list(), current);
  $("none").hidden = $("conversations").childElementCount > 0;
  repaint();
}

function drawTurns(opened) {
  const wanted = opened?.turns ?? [];
  while (turns.length > wanted.length) turns.pop().root.remove();
  while (turns.length < wanted.length) {
    const turn = new Turn(act);
    turns.push(turn);
    $("turns").append(turn.root);
  }
  const busy = answers.isWriting(opened);
  for (const [number, turn] of wanted.entries()) {
    const record = conversations.shown(turn);
    const problem = answers.problems.get(record.key) ?? null;
    turns[number].frame({ turn, record, problem, last: number === wanted.length - 1, busy });
  }
}

function drawControls(opened) {
  const running = answers.pending(opened);
  $("send").hidden = answers.isWriting(opened);
  $("stop").hidden = !$("send").hidden;
  $("stop").disabled = !running?.generation;
  $("send").disabled = !$("prompt").value.trim() || running !== null;
}

function answerEnded(answer, isHere) {
  if (isHere) announce(spoken(answer));
  draw();
}

function spoken({ status, text, refusal, error }) {
  if (status === "failed") return `The answer failed. ${error?.message ?? ""}`;
  const how = { completed: "Answer", incomplete: "Answer, cut short", cancelled: "Answer, stopped" }[status];
  return `${how}: ${(text || refusal).slice(0, SPOKEN_CHARS)}`;
}

// ---- what the reader does ----

function send(event) {
  event?.preventDefault();
  const question = $("prompt").value.trim();
  const model = $("model").value;
  if (!question || !model || $("send").hidden || $("send").disabled) return;
  const kept = keeping(() => {
    const opened = conversation() ?? conversations.create({ model });
    return conversations.update(opened.id, (one) => conversations.ask(one, question, model));
  });
  if (!kept) return;
  $("prompt").value = "";
  fitPrompt();
  clearProblem();
  pinned = true;
  if (kept.id !== current) {
    history.pushState(null, "", `#${kept.id}`);
    current = answers.current = kept.id;
  }
  announce("Sent");
  answers.order(conversations.shown(kept.turns.at(-1)).key);
}

function act(name, turn, button) {
  const number = turns.indexOf(turn);
  if (name === "retry") retry();
  if (name === "again") answers.order(turn.record.key);
  if (name === "edit") askForEdit(number);
  if (name === "older") page(number, -1);
  if (name === "newer") page(number, 1);
  if (name === "copy") copy(answers.stateOf(turn.record).text, button);
}

function retry() {
  const opened = conversation();
  if (!opened?.turns.length || answers.isWriting(opened) || opened.turns.at(-1).question === null) return;
  askAnew((one) => conversations.askAgain(one, $("model").value));
}

function askAnew(how) {
  const kept = keeping(() => conversations.update(current, how));
  if (!kept) return;
  clearProblem();
  pinned = true;
  answers.order(conversations.shown(kept.turns.at(-1)).key);
  $("prompt").focus();
}

function page(number, step) {
  keeping(() =>
    conversations.update(current, ({ turns: kept }) => {
      const turn = kept[number];
      turn.shown = Math.min(Math.max(turn.shown + step, 0), turn.answers.length - 1);
    }),
  );
  draw();
}

async function stop() {
  const id = answers.pending(conversation())?.generation;
  if (!id) return;
  $("stop").disabled = true;
  await reporting(() => answers.stop(id));
  $("prompt").focus();
}

function startNew() {
  if (location.hash) history.pushState(null, "", "/");
  open(null);
  openSide(false);
  $("prompt").focus();
}

function dropNetwork() {
  if (Date.now() < downUntil || $("strip").hidden) return;
  answers.connection.drop(DROP_MS);
}

function networkIs(until) {
  downUntil = until;
  const down = Date.now() < until;
  if (down) announce("The network is gone for 3 seconds. The answer goes on.");
  repaint();
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const detail = "Mark the text and copy it yourself.";
    return showProblem({ title: "The browser does not let this page copy", detail, code: "" });
  }
  button.dataset.done = "true";
  announce("Copied");
  setTimeout(() => delete button.dataset.done, 1500);
}

// ---- dialogs ----

function dialog(name, prepare) {
  const box = $(`${name}-dialog`);
  prepare?.();
  box.showModal();
  return box;
}

function onDialog(name, submitted) {
  const box = $(`${name}-dialog`);
  box.addEventListener("click", ({ target }) => (target === box || target.closest("[data-close]")) && box.close());
  $(`${name}-form`)?.addEventListener("submit", (event) => {
    event.preventDefault();
    box.close();
    submitted();
  });
}

function askForName(id) {
  $("rename-dialog").dataset.id = id;
  dialog("rename", () => ($("rename-name").value = conversations.get(id)?.title ?? ""));
  $("rename-name").select();
}

function rename() {
  const title = $("rename-name").value.trim();
  const { id } = $("rename-dialog").dataset;
  if (title) keeping(() => conversations.update(id, (one) => Object.assign(one, { title, named: true })));
  draw();
}

function askToDelete(id) {
  $("delete-dialog").dataset.id = id;
  const kept = conversations.get(id);
  $("delete-name").textContent = kept?.title || "New conversation";
  $("delete-server").checked = !kept?.turns.some(({ question }) => question === null); // another one's answer stays
  dialog("delete");
}

function remove() {
  const { id } = $("delete-dialog").dataset;
  const generations = conversations.answers(conversations.get(id) ?? { turns: [] }).map(({ generation }) => generation);
  conversations.remove(id);
  for (const generation of generations.filter(Boolean)) {
    answers.forget(generation);
    if ($("delete-server").checked) server.erase(generation).catch(() => {}); // its words expire by themselves
  }
  if (id === current) startNew();
  else draw();
  announce("Deleted");
}

function askForEdit(number) {
  dialog("edit", () => ($("edit-text").value = conversation().turns[number].question));
}

function edit() {
  const question = $("edit-text").value.trim();
  if (!question || answers.isWriting(conversation())) return;
  askAnew((one) => conversations.askOtherwise(one, question, $("model").value));
}

// ---- models and the key ----

async function loadModels() {
  await reporting(async () => {
    const names = await server.models();
    const other = new Option("another…", OTHER_MODEL);
    $("model").replaceChildren(...names.map((name) => new Option(name, name)), other);
    chooseModel(conversation()?.model ?? conversations.storage.getItem(MODEL_ITEM));
  });
}

function chooseModel(name) {
  const select = $("model");
  if (!name || !select.options.length) return;
  const known = [...select.options].some(({ value }) => value === name);
  if (!known) select.add(new Option(name, name), select.options.length - 1);
  select.value = name;
}

function modelChosen() {
  if ($("model").value === OTHER_MODEL) {
    $("model").selectedIndex = 0;
    return dialog("model", () => ($("model-name").value = ""));
  }
  conversations.storage.setItem(MODEL_ITEM, $("model").value);
}

function otherModel() {
  chooseModel($("model-name").value.trim());
  modelChosen();
}

function askForKey() {
  if (server.key.known()) $("key-note").textContent = "The server did not accept this key.";
  server.key.forget();
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("key").focus();
}

function saveKey(event) {
  event.preventDefault();
  server.key.keep($("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  loadModels();
  answers.retryAll();
  if (!current) openFromAddress();
  $("prompt").focus();
}

// ---- what goes wrong ----

/** Run an action; what goes wrong is shown, never thrown away. */
async function reporting(action) {
  try {
    await action();
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    problem.status === 401 ? askForKey() : showProblem(problem);
  }
}

/** The same for what is kept in the browser. Gives what the action gave, or null. */
function keeping(action) {
  try {
    return action();
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    showProblem(problem);
    return null;
  }
}

function showProblem({ title, detail = "", code }) {
  $("problem-title").textContent = title;
  $("problem-detail").textContent = detail;
  $("problem-code").textContent = code;
  $("problem").hidden = false;
}

const clearProblem = () => ($("problem").hidden = true);
const announce = (text) => ($("announce").textContent = text);

// ---- painting ----

let frame = null;
let notBefore = 0; // painting takes a quarter of the time at most, however long the answer

/** Paint once before the next frame, however many events arrive until then. */
function repaint() {
  frame ??= requestAnimationFrame((now) => {
    frame = null;
    if (now < notBefore) return repaint();
    paint();
    const done = performance.now();
    notBefore = done + 3 * (done - now > 4 ? done - now : 0);
  });
}

function paint() {
  for (const turn of turns) turn.paint(answers.stateOf(turn.record), answers.liveOf(turn.record));
  paintStrip();
  followEnd();
}

/** The strip of the answer that is being written, or was the last to be. */
function paintStrip() {
  const record = turns.at(-1)?.record;
  const live = record ? answers.liveOf(record) : null;
  const down = Date.now() < downUntil;
  $("strip").hidden = !live;
  $("drop").setAttribute("aria-pressed", String(down));
  const left = Math.ceil((downUntil - Date.now()) / 1000);
  const label = down ? `No network for ${left} s` : "Drop my network for 3 s";
  if ($("drop").textContent !== label) $("drop").textContent = label;
  if (!live) return;
  strip.draw(live);
  $("connection").dataset.state = live.state;
  if ($("connection").textContent !== CONNECTION_WORDS[live.state])
    $("connection").textContent = CONNECTION_WORDS[live.state];
}

let pinned = true; // the page scrolls along until its reader scrolls up

function followEnd() {
  const box = $("thread");
  if (pinned && turns.length) box.scrollTop = box.scrollHeight;
  $("latest").hidden = pinned || box.scrollHeight <= box.clientHeight;
}

function notePinned() {
  const box = $("thread");
  pinned = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  $("latest").hidden = pinned;
}

function fitPrompt() {
  const box = $("prompt");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
  drawControls(conversation());
}

// ---- keys, clicks, addresses ----

const SHORTCUTS = {
  KeyN: startNew,
  KeyQ: () => $("prompt").focus(),
  KeyR: retry,
  KeyX: dropNetwork,
  KeyK: () => dialog("shortcuts"),
};

function pressed(event) {
  if (document.querySelector("dialog[open]")) return;
  if (event.isComposing) return;
  if (event.key === "Escape") return $("side").dataset.open ? openSide(false) : stop();
  const shortcut = event.altKey && !event.ctrlKey && !event.metaKey && SHORTCUTS[event.code];
  if (!shortcut) return;
  event.preventDefault();
  shortcut();
}

function pressedInPrompt(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
}

/** On a narrow window the list of conversations lies over the page. */
function openSide(shown) {
  if (shown) $("side").dataset.open = "true";
  else delete $("side").dataset.open;
  $("veil").hidden = !shown;
  $("menu").setAttribute("aria-expanded", String(shown));
  if (shown) $("close-side").focus();
  else if (document.activeElement && $("side").contains(document.activeElement)) $("menu").focus();
}

function clicked({ target }) {
  const copying = target.closest?.("button.copy");
  if (copying) copy(copying.closest("figure").querySelector("pre").textContent, copying);
  const idea = target.closest?.("#ideas button");
  if (!idea) return;
  $("prompt").value = idea.textContent;
  fitPrompt();
  send();
}

function wire() {
  $("ask").addEventListener("submit", send);
  $("key-form").addEventListener("submit", saveKey);
  $("prompt").addEventListener("keydown", pressedInPrompt);
  $("prompt").addEventListener("input", fitPrompt);
  $("model").addEventListener("change", modelChosen);
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", startNew);
  $("drop").addEventListener("click", dropNetwork);
  $("problem-close").addEventListener("click", clearProblem);
  $("menu").addEventListener("click", () => openSide(true));
  $("close-side").addEventListener("click", () => openSide(false));
  $("veil").addEventListener("click", () => openSide(false));
  $("conversations").addEventListener("click", ({ target }) => target.closest("a") && openSide(false));
  $("shortcuts").addEventListener("click", () => dialog("shortcuts"));
  $("latest").addEventListener("click", () => ((pinned = true), followEnd()));
  $("skip").addEventListener("click", (event) => (event.preventDefault(), $("prompt").focus()));
  $("home").addEventListener("click", (event) => (event.preventDefault(), startNew()));
  onDialog("rename", rename);
  onDialog("delete", remove);
  onDialog("edit", edit);
  onDialog("model", otherModel);
  onDialog("shortcuts");
  document.addEventListener("keydown", pressed);
  document.addEventListener("click", clicked);
  $("thread").addEventListener("scroll", notePinned, { passive: true });
  addEventListener("hashchange", openFromAddress);
  addEventListener("popstate", () => location.hash || open(null));
  addEventListener("resize", repaint);
  addEventListener("themechange", repaint);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  conversations.onOtherTabs(changedElsewhere);
  setInterval(() => (answers.lives.size || Date.now() < downUntil + 2 * CLOCK_MS) && repaint(), CLOCK_MS);
}

/** Another tab asked, renamed, finished or deleted. */
function changedElsewhere(id) {
  if (id === current && !conversations.get(id)) return startNew();
  draw();
  answers.attend();
}

wire();
fitPrompt();
loadModels();
openFromAddress();
$("prompt").focus({ preventScroll: true });
