// One answer: the fold over its events, as every Rejoin client may keep it.
//
// FOLD has one small function per event type; an answer from the browser's store or from a snapshot has the same
// fields. The one rule: a fresh start voids what earlier attempts said, and nothing else does. Knows no page and no net.

export const FINISHED = new Set(["completed", "incomplete", "failed", "cancelled"]);
const CUT_SHORT = new Set(["length", "content_filter"]);

/** An answer of which nothing is known yet. Times are Unix milliseconds. */
export function blank() {
  return {
    status: "queued",
    attempt: 0,
    provider: null,
    mode: "fresh",
    text: "",
    reasoning: "",
    refusal: "",
    toolCalls: [],
    sources: [],
    error: null,
    finishReason: null,
    usage: null,
    by: null,
    deltas: 0,
    voided: 0, // how often words were taken back
    createdAt: null,
    firstTokenAt: null,
    finishedAt: null,
    lastEventId: null,
  };
}

export const finished = (answer) => FINISHED.has(answer.status);

export const FOLD = {
  "generation.queued"(answer, event) {
    answer.createdAt = event.created_at;
  },
  "generation.started"(answer, event) {
    if (event.mode !== "continued") startOver(answer);
    Object.assign(answer, {
      status: "in_progress",
      attempt: event.attempt,
      provider: event.provider,
      mode: event.mode,
    });
  },
  "text.delta"(answer, event) {
    answer.text += said(answer, event);
  },
  "reasoning.delta"(answer, event) {
    answer.reasoning += said(answer, event);
  },
  "refusal.delta"(answer, event) {
    answer.refusal += said(answer, event);
  },
  "tool_call.delta"(answer, event) {
    said(answer, event);
    const { index, id, name, arguments: fragment = "" } = event;
    let toolCall = answer.toolCalls.find((one) => one.index === index);
    if (!toolCall) answer.toolCalls.push((toolCall = { index, id: null, name: "", arguments: "" }));
    toolCall.id = id ?? toolCall.id;
    toolCall.name = name ?? toolCall.name;
    toolCall.arguments += fragment;
  },
  "source.added"(answer, { id, title, url, score, snippet }) {
    answer.sources.push({ id, title, url, score, snippet });
  },
  "generation.completed"(answer, event) {
    Object.assign(answer, { finishReason: event.finish_reason, usage: event.usage ?? null });
    finish(answer, CUT_SHORT.has(event.finish_reason) ? "incomplete" : "completed", event);
  },
  "generation.failed"(answer, event) {
    const { code, message, retryable } = event;
    answer.error = { code, message, retryable };
    finish(answer, "failed", event);
  },
  "generation.cancelled"(answer, event) {
    answer.by = event.by;
    finish(answer, "cancelled", event);
  },
};

function startOver(answer) {
  if (answer.deltas || answer.sources.length) answer.voided += 1;
  Object.assign(answer, { text: "", reasoning: "", refusal: "", toolCalls: [], sources: [] });
  Object.assign(answer, { deltas: 0, firstTokenAt: null });
}

function said(answer, event) {
  answer.deltas += 1;
  answer.firstTokenAt ??= event.at ?? null;
  return event.text ?? "";
}

function finish(answer, status, event) {
  Object.assign(answer, { status, finishedAt: event.at ?? Date.now() });
}

/** The answer that a snapshot of the server's describes. */
export function fromSnapshot(snapshot) {
  return {
    ...blank(),
    status: snapshot.status,
    attempt: snapshot.attempt,
    text: snapshot.text,
    reasoning: snapshot.reasoning,
    refusal: snapshot.refusal,
    toolCalls: snapshot.tool_calls,
    sources: snapshot.sources,
    error: snapshot.error,
    finishReason: snapshot.finish_reason,
    usage: snapshot.usage,
    createdAt: milliseconds(snapshot.created_at),
    firstTokenAt: milliseconds(snapshot.first_token_at),
    finishedAt: milliseconds(snapshot.finished_at),
    lastEventId: snapshot.last_event_id,
  };
}

/** The answer that came to nothing before there was one. */
export function refused(problem) {
  const message = [problem.title, problem.detail].filter(Boolean).join(": ");
  const error = { code: problem.code, message, retryable: problem.passes };
  return { ...blank(), status: "failed", error, finishedAt: Date.now() };
}

const milliseconds = (seconds) => (seconds == null ? null : seconds * 1000);
