// npm's EventSource follows one generation through a proxy that cuts connections, and prints what it heard as JSON.
import { EventSource } from "eventsource";

const TERMINAL = ["generation.completed", "generation.failed", "generation.cancelled"];
const heard = { ids: [], text: "", opened: 0, terminal: null };
const source = new EventSource(process.env.EVENTS_URL);

source.addEventListener("open", () => (heard.opened += 1));
source.addEventListener("generation.started", (event) => heard.ids.push(event.lastEventId));
source.addEventListener("text.delta", (event) => {
  heard.ids.push(event.lastEventId);
  heard.text += JSON.parse(event.data).text;
});
for (const type of TERMINAL) source.addEventListener(type, () => (heard.terminal = type));
// After the end it comes back once, is answered 204, and closes itself: readyState 2.
source.addEventListener("error", () => {
  if (source.readyState === EventSource.CLOSED) console.log(JSON.stringify(heard));
});
