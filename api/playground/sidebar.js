// The list of conversations: choose, rename, delete. Rows are kept, so that focus and hover survive a redraw.

import { running } from "./conversations.js";

export class Sidebar {
  /** `acts` has what to do for `rename` and `delete`, each called with a conversation's id. */
  constructor(list, acts) {
    this.list = list;
    this.rows = new Map(); // conversation id -> its <li>
    list.addEventListener("click", ({ target }) => {
      const button = target.closest("button[data-act]");
      if (button) acts[button.dataset.act](button.closest("li").dataset.id);
    });
  }

  draw(conversations, current) {
    const wanted = conversations.map((conversation) => this.row(conversation, current));
    const there = [...this.list.children];
    if (wanted.length === there.length && wanted.every((row, place) => row === there[place])) return;
    const focused = this.list.contains(document.activeElement) ? document.activeElement : null;
    this.list.replaceChildren(...wanted);
    focused?.focus();
    const ids = new Set(conversations.map(({ id }) => id));
    for (const id of this.rows.keys()) if (!ids.has(id)) this.rows.delete(id);
  }

  row(conversation, current) {
    const { id, title } = conversation;
    if (!this.rows.has(id)) this.rows.set(id, newRow(id));
    const row = this.rows.get(id);
    const name = title || "New conversation";
    const label = row.querySelector(".name");
    if (label.textContent !== name) label.textContent = name;
    for (const button of row.querySelectorAll("button")) button.ariaLabel = `${button.title}: ${name}`;
    row.querySelector(".dot").hidden = running(conversation).length === 0;
    const link = row.querySelector("a");
    if (id === current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
    return row;
  }
}

function newRow(id) {
  const row = document.getElementById("conversation-template").content.cloneNode(true).firstElementChild;
  row.dataset.id = id;
  row.querySelector("a").href = `#${id}`;
  return row;
}
