// An answer that is being followed: what its log said so far, and when and how it came to this browser.
//
// The hub may tell an entry twice (to a tab that asked again); it is folded once.

import { blank, finished, FOLD } from "./answer.js";

export class Live {
  constructor(id) {
    this.id = id;
    this.answer = blank();
    this.state = "connecting"; // as in hub.js
    this.connections = 0;
    this.gaps = []; // {from, to}: times without a connection
    this.ticks = []; // when each delta came
    this.voids = []; // when words were taken back
    this.heard = 0; // entries folded
    this.openedAt = Date.now(); // the strip's zero; all times are Unix milliseconds
    this.closedAt = null;
  }

  hear({ state, connections, gaps, entries, total }) {
    Object.assign(this, { state, connections, gaps });
    for (const entry of entries.slice(Math.max(0, this.heard - (total - entries.length)))) this.fold(entry);
    this.heard = Math.max(this.heard, total);
    if (finished(this.answer)) this.closedAt ??= Date.now();
  }

  /** It ended, and this is what became of it. */
  close(answer) {
    return Object.assign(this, { answer, state: "closed", closedAt: this.closedAt ?? Date.now() });
  }

  fold([at, eventId, data]) {
    const { answer } = this;
    const { deltas, voided } = answer;
    const event = JSON.parse(data);
    this.openedAt = Math.min(this.openedAt, at); // a second tab draws what the first one saw
    FOLD[event.type]?.(answer, event);
    answer.lastEventId = eventId || answer.lastEventId;
    if (answer.voided > voided) this.voids.push(at);
    else if (answer.deltas > deltas) this.ticks.push(at);
  }
}
