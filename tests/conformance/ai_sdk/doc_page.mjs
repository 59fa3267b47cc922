// A browser's page on the address in argv, as far as the AI SDK and React need one: import it before them.
import { JSDOM } from "jsdom";

const dom = new JSDOM("<!doctype html><div id=root></div>", { url: process.argv[2] });
globalThis.window = dom.window;
globalThis.document = dom.window.document;
globalThis.location = dom.window.location;
globalThis.FormData = dom.window.FormData;

export const answered = []; // the status of each response so far
const { fetch } = globalThis;
globalThis.fetch = async (url, options) => {
  const response = await fetch(new URL(url, location.href), options);
  answered.push(response.status);
  return response;
};

// What `look` gives, once it gives something.
export const until = (look) =>
  new Promise((resolve) => {
    const watch = setInterval(() => {
      const seen = look();
      if (!seen) return;
      clearInterval(watch);
      resolve(seen);
    }, 5);
  });

export const text = (message) => message?.parts.map((p) => (p.type === "text" ? p.text : "")).join("") ?? "";
