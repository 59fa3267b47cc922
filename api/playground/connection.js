// This tab's line to the hub: shared with the other tabs where the browser has SharedWorker, its own where not.
//
// Both speak through a port, so the rest of the page cannot tell them apart.

const NAME = "rejoin-1"; // to be counted up when the messages change: an older tab may still run the older hub
const WELCOME_MS = 4000; // a worker that has not answered by then never will

export class Connection {
  /** `heard` is called with each message of the hub's, and with {what: "open"} once there is a hub. */
  constructor(heard) {
    this.heard = heard;
    this.shared = false;
    this.waiting = []; // what is said before the hub is there
    this.port = null;
    addEventListener("pagehide", () => this.port?.postMessage({ ask: "bye" }));
    addEventListener("pageshow", ({ persisted }) => persisted && location.reload()); // back from the browser's cache
    this.open();
  }

  async open() {
    const port = (await sharedPort()) ?? (await ownPort());
    this.shared = port.shared;
    port.onmessage = ({ data }) => this.heard(data);
    port.postMessage({ ask: "hello" });
    this.port = port;
    for (const message of this.waiting.splice(0)) port.postMessage(message);
    this.heard({ what: "open" });
  }

  say(message) {
    if (this.port) this.port.postMessage(message);
    else this.waiting.push(message);
  }

  follow(id, url) {
    this.say({ ask: "follow", id, url });
  }

  leave(id) {
    this.say({ ask: "leave", id });
  }

  drop(milliseconds) {
    this.say({ ask: "drop", milliseconds });
  }
}

/** A port to the shared hub once it has answered; null where there is none. */
function sharedPort() {
  if (!("SharedWorker" in globalThis)) return Promise.resolve(null);
  return new Promise((resolve) => {
    const worker = new SharedWorker(new URL("./hub.js", import.meta.url), { type: "module", name: NAME });
    const giveUp = () => resolve(null);
    const timer = setTimeout(giveUp, WELCOME_MS);
    worker.onerror = giveUp;
    worker.port.onmessage = () => {
      clearTimeout(timer);
      worker.port.shared = true;
      resolve(worker.port);
    };
    worker.port.postMessage({ ask: "knock" });
  });
}

async function ownPort() {
  const { Hub } = await import("./hub.js");
  const { port1, port2 } = new MessageChannel();
  new Hub().join(port2);
  port1.shared = false;
  return port1;
}
