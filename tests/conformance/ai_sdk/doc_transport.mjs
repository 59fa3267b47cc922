// A Chat over the transport that a block of the docs exports: asks, and tries to resume what is complete.
import { text } from "./doc_page.mjs";
import { Chat } from "@ai-sdk/react";
import { transport } from "./block.mjs";

const id = crypto.randomUUID();
const chat = new Chat({ id, transport });
await chat.sendMessage({ text: process.argv[3] });
const again = new Chat({ id, transport, messages: chat.messages.slice(0, 1) });
await again.resumeStream();
const answers = [chat, again].map((one) => text(one.messages[1]));
console.log(JSON.stringify({ answers, errors: [chat, again].map((one) => one.error?.message ?? null) }));
process.exit(0);
