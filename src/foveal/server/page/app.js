// Chat with the server that serves this page; a model without a chat template continues a text instead.

import * as look from "./look.js";

const element = (id) => document.getElementById(id);
const talk = element("talk");
const promptBox = element("prompt");
const key = element("key");

let messages = []; // the conversation so far, as the endpoint takes it
let model = "";
let chats = true;
let running = null; // an AbortController while an answer comes

key.value = sessionStorage.getItem("key") ?? "";
key.addEventListener("change", () => {
  sessionStorage.setItem("key", key.value);
  findModel();
});

function headers() {
  return { "content-type": "application/json", ...(key.value ? { authorization: `Bearer ${key.value}` } : {}) };
}

async function failure(response) {
  let text = `the server answered ${response.status}`;
  try {
    text = (await response.json()).error?.message ?? text;
  } catch {
    // Not JSON: the status has to do.
  }
  return new Error(response.status === 401 ? `${text} (the API key is in the settings)` : text);
}

async function findModel() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) throw await failure(response);
    const found = (await response.json()).data[0];
    setMode(found.chat);
    model = found.id;
    element("model").textContent = model;
    talk.querySelector(".wrong.start")?.remove();
  } catch (error) {
    complain(error.message, "start");
    if (/API key/.test(error.message)) toggleSettings(true);
  }
}

function setMode(chat) {
  chats = chat;
  element("ask").textContent = chat ? "Ask something." : "Write a beginning.";
  element("kind").textContent = chat ? "answer" : "continuation";
  element("fresh").textContent = chat ? "New chat" : "New text";
  promptBox.placeholder = chat ? "Message" : "The beginning of a text";
  promptBox.setAttribute("aria-label", promptBox.placeholder);
  element("system").closest("label").hidden = !chat;
}

function complain(text, kind = "") {
  if (kind) talk.querySelector(`.wrong.${kind}`)?.remove();
  const node = document.createElement("p");
  node.className = `wrong ${kind}`;
  node.setAttribute("role", "alert");
  node.textContent = text;
  talk.append(node);
  node.scrollIntoView({ block: "nearest" });
}

function message(role) {
  element("empty").hidden = true;
  element("fresh").hidden = false;
  const node = document.createElement("div");
  node.className = `message ${role}`;
  const text = document.createElement("div");
  text.className = "text";
  node.append(text);
  talk.append(node);
  return { node, text };
}

// The events of a stream, parsed; a line may come in pieces.
async function* events(body) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of readers(body)) {
    rest += decoder.decode(chunk, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message ?? "the server failed");
      yield event;
    }
  }
}

async function* readers(body) {
  const reader = body.getReader(); // not every browser can iterate over a stream
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function body() {
  const system = element("system").value.trim();
  const recorded = element("selection").checked;
  return {
    model,
    ...(chats
      ? { messages: [...(system ? [{ role: "system", content: system }] : []), ...messages] }
      : { prompt: messages.map((one) => one.content).join("") }),
    temperature: Number(element("temperature").value),
    max_tokens: Number(element("max-tokens").value),
    stream: true,
    stream_options: { include_usage: true },
    ...(recorded ? { foveal: { selection: true } } : {}),
  };
}

async function answer() {
  running = new AbortController();
  busy(true);
  const { node, text } = message("assistant");
  text.classList.add("waiting");
  const reply = new Reply(node, text);
  try {
    const options = { method: "POST", headers: headers(), body: JSON.stringify(body()), signal: running.signal };
    const response = await fetch(chats ? "/v1/chat/completions" : "/v1/completions", options);
    if (!response.ok) throw await failure(response);
    for await (const event of events(response.body)) {
      text.classList.remove("waiting");
      const follow = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
      reply.take(event);
      if (follow) talk.scrollTop = talk.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
  } finally {
    text.classList.remove("waiting");
    reply.finish();
    if (reply.content) messages.push({ role: "assistant", content: reply.content });
    else if (!reply.reasoning && !reply.calls.size) {
      node.remove();
      messages.pop(); // the question was not answered: it can be asked again
    }
    running = null;
    busy(false);
  }
}

// One answer while it comes.
class Reply {
  constructor(node, text) {
    Object.assign(this, { node, text, content: "", reasoning: "", calls: new Map(), usage: null, reason: null });
    this.record = { request: null, tokens: [], spans: [] };
    this.start = performance.now();
  }

  take(event) {
    if (event.usage) this.usage = event.usage;
    if (event.foveal) this.record.request = event.foveal;
    for (const choice of event.choices) {
      const delta = choice.delta ?? { content: choice.text };
      this.reason = choice.finish_reason ?? this.reason;
      if (delta.reasoning_content) this.think(delta.reasoning_content);
      if (delta.tool_calls) this.call(delta.tool_calls);
      if (delta.content) this.content += delta.content;
      const tokens = choice.foveal?.tokens ?? [];
      this.record.tokens.push(...tokens);
      if (this.plain) this.write(tokens);
      else if (delta.content) this.text.textContent = this.content;
    }
    if (this.record.request) look.grown(this.record);
  }

  // Whether the tokens are the answer, so that each of them can be picked in it.
  get plain() {
    return this.record.request !== null && !this.reasoning && !this.calls.size;
  }

  write(tokens) {
    for (const token of tokens) {
      const span = token.special ? null : look.span(token.text);
      const at = this.record.spans.push(span) - 1;
      if (!span) continue;
      span.classList.add("pick");
      span.addEventListener("click", () => look.open(this.record, at));
      this.text.append(span);
    }
  }

  think(more) {
    if (!this.reasoning) {
      const details = document.createElement("details");
      const summary = document.createElement("summary");
      summary.textContent = "Reasoning";
      this.thoughts = document.createElement("div");
      details.append(summary, this.thoughts);
      this.text.before(details);
      this.text.textContent = this.content;
      this.record.spans = [];
    }
    this.reasoning += more;
    this.thoughts.textContent = this.reasoning;
  }

  call(deltas) {
    for (const delta of deltas) {
      const call = this.calls.get(delta.index) ?? { name: "", arguments: "" };
      call.name += delta.function?.name ?? "";
      call.arguments += delta.function?.arguments ?? "";
      this.calls.set(delta.index, call);
    }
    this.list ??= this.node.appendChild(Object.assign(document.createElement("div"), { className: "calls" }));
    this.list.textContent = [...this.calls.values()].map((call) => `${call.name}(${call.arguments})`).join("\n");
    this.text.textContent = this.content;
    this.record.spans = [];
  }

  finish() {
    const foot = document.createElement("div");
    foot.className = "foot";
    const facts = [];
    if (this.usage) {
      const seconds = (performance.now() - this.start) / 1000;
      facts.push(`${this.usage.completion_tokens} tokens`, `${(this.usage.completion_tokens / seconds).toFixed(1)} a second`);
    }
    if (this.reason === "length") facts.push("cut at its limit");
    for (const fact of facts) foot.append(Object.assign(document.createElement("span"), { textContent: fact }));
    if (this.record.request && this.record.tokens.length) {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Look inside" });
      button.addEventListener("click", () => look.open(this.record, this.record.tokens.length - 1));
      foot.prepend(button);
    }
    if (foot.children.length) this.node.append(foot);
  }
}

function busy(is) {
  element("send").hidden = is;
  element("stop").hidden = !is;
}

function grow() {
  promptBox.style.height = "auto";
  promptBox.style.height = `${promptBox.scrollHeight}px`;
}

function toggleSettings(shown) {
  element("settings").hidden = !shown;
  element("settings-button").setAttribute("aria-expanded", String(shown));
}

element("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = chats ? promptBox.value.trim() : promptBox.value;
  if (!text.trim() || running) return;
  if (!model) {
    findModel();
    return;
  }
  promptBox.value = "";
  grow();
  const { text: bubble } = message("user");
  bubble.textContent = text;
  talk.scrollTop = talk.scrollHeight;
  const paragraph = !chats && messages.length ? "\n\n" : ""; // what is added to a text begins a new one
  messages.push({ role: "user", content: paragraph + text });
  answer();
});
promptBox.addEventListener("input", grow);
promptBox.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    element("composer").requestSubmit();
  }
});
element("stop").addEventListener("click", () => running?.abort());
element("fresh").addEventListener("click", () => {
  running?.abort();
  look.close();
  messages = [];
  for (const node of talk.querySelectorAll(".message, .wrong")) node.remove();
  element("empty").hidden = false;
  element("fresh").hidden = true;
  promptBox.focus();
});
element("settings").addEventListener("submit", (event) => event.preventDefault());
element("settings-button").addEventListener("click", () => toggleSettings(element("settings").hidden));

findModel();
promptBox.focus();
