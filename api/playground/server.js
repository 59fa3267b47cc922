// What the page asks the server for, and the caller's key, which is kept for this tab alone and sent as a header only.
//
// Whatever goes wrong is a Problem: what happened, in words, and what to do.

const KEY_ITEM = "rejoin.api-key";
const UNREACHABLE = {
  title: "The server cannot be reached",
  detail: "An answer that was started goes on without you. Check that the server runs, then try again.",
  code: "unreachable",
};

export class Problem extends Error {
  constructor({ status = 0, title = "Something went wrong", detail = "", code = "", outcome = null }) {
    super(title);
    Object.assign(this, { status, title, detail, code, outcome });
  }

  /** May the very same request be sent again, with the same Idempotency-Key? */
  get passes() {
    return this.status === 0 || this.status === 401 || this.status === 429 || this.status >= 500;
  }
}

export const key = {
  known: () => sessionStorage.getItem(KEY_ITEM) !== null,
  keep: (text) => sessionStorage.setItem(KEY_ITEM, text),
  forget: () => sessionStorage.removeItem(KEY_ITEM),
  headers: () => (key.known() ? { Authorization: `Bearer ${sessionStorage.getItem(KEY_ITEM)}` } : {}),
};

/** JSON of an API call, null for an empty answer. Throws Problem, with status 0 when there was no answer at all. */
export async function call(path, { method = "GET", headers = {}, body } = {}) {
  const request = { method, body, cache: "no-store", headers: { ...headers, ...key.headers() } };
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
    outcome: body.outcome ?? null,
  });
}

export const models = async () => (await call("/v1/models")).data.map(({ id }) => id);

/** Order an answer. The same key and the same body again: the same answer. */
export function generate(key, model, messages) {
  const headers = { "Content-Type": "application/json", "Idempotency-Key": key };
  return call("/v1/generations", { method: "POST", headers, body: JSON.stringify({ model, messages }) });
}

export const look = (id) => call(`/v1/generations/${encodeURIComponent(id)}`);
export const stop = (id) => call(`/v1/generations/${encodeURIComponent(id)}/cancel`, { method: "POST" });
export const erase = (id) => call(`/v1/generations/${encodeURIComponent(id)}`, { method: "DELETE" });

/** A version 4 UUID. `randomUUID` exists on https and localhost only. */
export function uuid() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}
