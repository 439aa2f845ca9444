// The look: which earlier tokens were attended to when a token was chosen. Data: docs/serving-look.md.

const element = (id) => document.getElementById(id);
const panel = element("look");
const room = element("room");

let record = null; // { request: the answer's `foveal`, tokens: those of its choice, spans: theirs in the talk }
let place = 0; // which of record.tokens
let layer = null; // which of record.request.layers; null: all
let spans = []; // of the whole sequence, in the panel

export function isOpen(of) {
  return !panel.hidden && record === of;
}

export function open(of, at) {
  const fresh = record !== of || panel.hidden;
  if (record && record !== of) clear(record.spans);
  record = of;
  place = at;
  if (fresh) {
    if (layer !== null && layer >= of.request.layers.length) layer = null;
    panel.hidden = false;
    room.classList.add("looking");
    drawLayers();
    drawContext();
  }
  show();
}

export function close() {
  if (record) clear(record.spans);
  panel.hidden = true;
  room.classList.remove("looking");
  record = null;
}

// More tokens have come.
export function grown(of) {
  if (!isOpen(of)) return;
  const context = element("context");
  while (spans.length < of.request.prompt.length + of.tokens.length) {
    context.append(contextSpan(of.tokens[spans.length - of.request.prompt.length], spans.length));
  }
  drawPlots();
  element("later").disabled = place >= of.tokens.length - 1;
}

export function span(text) {
  const node = document.createElement("span");
  node.className = "t";
  node.textContent = text;
  return node;
}

// How many of the layers that are looked at attended to each earlier position, from 0 to 1.
function shares(token) {
  const layers = layer === null ? token.layers : [token.layers[layer]];
  const steps = new Float64Array(token.position + 1);
  for (const runs of layers) {
    for (let i = 0; i < runs.length; i += 2) {
      steps[runs[i]] += 1;
      steps[runs[i + 1]] -= 1;
    }
  }
  let sum = 0;
  return steps.subarray(0, token.position).map((step) => (sum += step) / layers.length);
}

const attended = (runs) => runs.reduce((sum, end, i) => sum + (i % 2 ? end : -end), 0);
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const picked = (values) => (layer === null ? values : [values[layer]]);
const portion = (token) => mean(picked(token.layers).map(attended)) / token.position;

function recallOf(token) {
  const known = picked(token.recall).filter((value) => value !== null);
  return known.length ? mean(known) : null;
}

const percent = (value) => {
  const digits = value > 0 && value < 0.1 ? 1 : 0;
  return `${(value * 100).toFixed(digits)} %`;
};

function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${count >= 100 || unit === 0 ? count.toFixed(0) : count.toPrecision(3)} ${units[unit]}`;
}

const visible = (text) => (text === "" ? "·" : text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣"));

function show() {
  const { request, tokens } = record;
  const token = tokens[place];
  const narrow = request.layers.length > 0;
  element("chosen").textContent = visible(token.text);
  element("seen").textContent = token.position.toLocaleString("en");
  element("earlier").disabled = place === 0;
  element("later").disabled = place === tokens.length - 1;
  for (const id of ["layers", "legend"]) element(id).hidden = !narrow;
  verdict(request);
  figures(token, narrow);
  recallBars(token);
  element("legend-text").textContent =
    layer === null ? "share of layers attending to it" : `layer ${request.layers[layer].layer} attended to it`;
  element("legend-most").textContent = layer === null ? "all" : "yes";
  element("legend-least").textContent = layer === null ? "none" : "no";
  drawPlots();
  shade(token, narrow ? shares(token) : new Float64Array(token.position)); // last: it scrolls to the token
}

function verdict(request) {
  const windows = request.layers.filter((one) => one.kind === "window");
  const text = [];
  if (!request.layers.length && request.dense_layers) {
    text.push("Every layer of this model that attends at all attends to every earlier token: there is no selection to show.");
  } else if (!request.layers.length) {
    text.push("This model keeps a state instead of a cache: it has no tokens to attend to.");
  } else if (windows.length === request.layers.length) {
    text.push("This model has no indexer. Its layers attend to a window of the latest tokens, shown here.");
  } else if (request.dense_layers) {
    text.push(`${request.dense_layers} more layers attend to every earlier token.`);
  }
  if (request.recurrent_layers && text.length) text.push(`${request.recurrent_layers} layers keep a state and attend to nothing.`);
  element("verdict").textContent = text.join(" ");
  element("verdict").hidden = !text.length;
}

function figures(token, narrow) {
  const recall = narrow ? recallOf(token) : null;
  const share = narrow ? portion(token) : 1;
  element("share").textContent = percent(share);
  const count = share * token.position;
  const number = count.toFixed(Number.isInteger(+count.toFixed(6)) ? 0 : 1);
  element("share-note").textContent = `${number} of ${token.position} tokens${narrow && layer === null && token.layers.length > 1 ? " a layer" : ""}`;
  element("recall").textContent = recall === null ? "–" : percent(recall);
  element("recall-note").textContent = recall === null ? "not known here" : "of dense attention is on them";
  element("cache").textContent = bytes(token.cache_bytes);
  element("cache-note").textContent = "of this sequence";
}

// Under each layer's number its recall.
function recallBars(token) {
  [...element("layers").children].slice(1).forEach((button, index) => {
    const recall = token.recall[index];
    button.style.setProperty("--r", recall ?? 0);
    button.title = recall === null ? "" : `recall ${percent(recall)}`;
  });
}

function shade(token, values) {
  const mine = spans;
  for (let i = 0; i < mine.length; i++) paint(mine[i], i, token.position, values);
  const start = record.request.prompt.length;
  record.spans.forEach((node, i) => node && paint(node, start + i, token.position, values));
  const here = mine[token.position];
  const box = element("context");
  const top = here.offsetTop - box.offsetTop;
  if (top < box.scrollTop + 20 || top > box.scrollTop + box.clientHeight - 40) box.scrollTop = top - box.clientHeight * 0.6;
}

function paint(node, at, position, values) {
  node.style.setProperty("--s", at < position ? values[at].toFixed(3) : "0");
  node.classList.toggle("here", at === position);
  node.classList.toggle("after", at > position);
}

function clear(nodes) {
  for (const node of nodes) {
    node?.style.removeProperty("--s");
    node?.classList.remove("here", "after");
  }
}

function drawLayers() {
  const box = element("layers");
  const names = [null, ...record.request.layers.keys()];
  box.replaceChildren(
    ...names.map((index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("role", "radio");
      button.setAttribute("aria-checked", String(index === layer));
      button.textContent = index === null ? "All layers" : record.request.layers[index].layer;
      button.addEventListener("click", () => {
        layer = index;
        for (const other of box.children) other.setAttribute("aria-checked", String(other === button));
        show();
      });
      return button;
    }),
  );
}

function contextSpan(token, at) {
  const node = span(token.special ? token.text : token.text.replaceAll("\n", "↵\n"));
  node.dataset.at = at;
  node.classList.toggle("special", token.special);
  node.classList.toggle("pick", at >= record.request.prompt.length);
  return node;
}

function drawContext() {
  const { request, tokens } = record;
  spans = [...request.prompt, ...tokens].map(contextSpan);
  const end = document.createElement("span");
  end.className = "prompt-end";
  const parts = [...spans];
  parts.splice(request.prompt.length, 0, end);
  element("context").replaceChildren(...parts);
}

function drawPlots() {
  const { request, tokens } = record;
  const plots = [plot("cache", tokens.map((token) => token.cache_bytes), bytes, null)];
  if (request.layers.length) plots.push(plot("attended to", tokens.map(portion), percent, 1));
  element("span").textContent = `tokens ${tokens[0].position} to ${tokens.at(-1).position}`;
  element("plots").replaceChildren(...plots);
}

const SVG = "http://www.w3.org/2000/svg";

function shape(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// A line over the tokens of the answer, 0 at its foot, `most` (or the largest value) at its top.
function plot(name, values, format, most) {
  const top = most ?? Math.max(...values) * 1.08;
  const last = Math.max(1, values.length - 1);
  const stride = Math.max(1, Math.floor(values.length / 500));
  const points = values
    .map((value, i) => [(i / last) * 100, 40 - (value / top) * 40])
    .filter((_, i) => i % stride === 0 || i === values.length - 1)
    .map(([x, y]) => `${x.toFixed(2)},${y.toFixed(2)}`);
  if (points.length === 1) points.push(`100,${points[0].split(",")[1]}`);
  const box = document.createElement("div");
  box.className = "plot";
  const caption = document.createElement("p");
  const value = document.createElement("b");
  value.textContent = format(values[place]);
  caption.append(`${name}`, value);
  const svg = shape("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img", "aria-label": `${name} by token` });
  const x = (place / last) * 100;
  svg.append(
    shape("polygon", { class: "area", points: `0,40 ${points.join(" ")} 100,40` }),
    shape("line", { class: "base", x1: 0, x2: 100, y1: 40, y2: 40 }),
    shape("polyline", { class: "line", points: points.join(" ") }),
    shape("line", { class: "cursor", x1: x, x2: x, y1: 0, y2: 40 }),
  );
  box.append(caption, svg);
  box.addEventListener("click", (event) => {
    const frame = svg.getBoundingClientRect();
    move(Math.round(((event.clientX - frame.left) / frame.width) * last));
  });
  return box;
}

function move(to) {
  place = Math.min(Math.max(to, 0), record.tokens.length - 1);
  show();
}

element("close").addEventListener("click", close);
element("earlier").addEventListener("click", () => move(place - 1));
element("later").addEventListener("click", () => move(place + 1));
element("context").addEventListener("click", (event) => {
  const at = event.target.closest(".pick")?.dataset.at;
  if (at !== undefined) move(at - record.request.prompt.length);
});
panel.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape") close();
  else if (step && event.target.closest(".context")) {
    event.preventDefault();
    move(place + step);
  }
});
