"use strict";
// Stretches of text in which a feature fires: on its page, and searched over all features.

const LENGTHS = { short: [5, 3], line: null, whole: [Infinity, Infinity] }; // tokens before the peak and behind it
const reading = { length: Object.hasOwn(LENGTHS, stored("length")) ? stored("length") : "whole", query: "" };
const HITS = 50; // features that a search finds before it waits

const isBreak = (text) => typeof text === "string" && text.includes("⏎");

// The first token of a context that is shown, and the one behind the last.
function bounds([, , peak, tokens], texts, length) {
  if (LENGTHS[length]) {
    const [before, after] = LENGTHS[length];
    return [Math.max(0, peak - before), Math.min(tokens.length, peak + after + 1)];
  }
  let [from, to] = [peak, peak];
  while (from > 0 && !isBreak(texts[tokens[from - 1]])) from -= 1;
  while (to < tokens.length && !isBreak(texts[tokens[to]])) to += 1;
  return [from, Math.min(to + 1, tokens.length)];
}

const UTF8 = new TextDecoder("utf-8", { fatal: true });
const OBEYED = /(?![\u200c\u200d])[\p{Cc}\p{Cf}\u2028\u2029]/u; // a page must not obey text; the study has escaped it elsewhere

// The text of bytes; null if they are no whole characters that can be shown.
function decoded(bytes) {
  try {
    const text = UTF8.decode(new Uint8Array(bytes));
    return OBEYED.test(text) ? null : text;
  } catch {
    return null;
  }
}

// What is shown of tokens: [text, its first token, the one behind its last, whether it is a byte]. Bytes that make up characters are one.
function cells(tokens, texts, from, to) {
  const shown = [];
  for (let index = from; index < to; index += 1) {
    const text = texts[tokens[index]];
    let next = index + 1;
    let whole = typeof text === "string" ? text : null;
    for (let bytes = text; whole === null && next < to && next < index + 8 && typeof texts[tokens[next]] !== "string"; next += 1) {
      bytes = [...bytes, ...texts[tokens[next]]];
      whole = decoded(bytes);
    }
    if (whole === null) next = index + 1;
    shown.push([whole ?? textOf(text), index, next, whole === null]);
    index = next - 1;
  }
  return shown;
}

const textIn = (tokens, texts) => cells(tokens, texts, 0, tokens.length).map(([text]) => text).join("");

// A context. The darker a token, the larger its activation; the number is shown under the pointer, and of all in the line that has the focus.
function context(shown, texts, largest, length, ...before) {
  const [documentNumber, position, peak, tokens, pairs] = shown;
  const values = new Map();
  for (let index = 0; index < pairs.length; index += 2) values.set(pairs[index], pairs[index + 1]);
  const [from, to] = bounds(shown, texts, length);
  const cut = `${from > 0 ? " cut-before" : ""}${to < tokens.length ? " cut-after" : ""}`;
  const line = el("div", { class: `context${cut}`, dir: "auto", tabindex: 0 });
  let plain = "";
  for (const [text, first, last, isByte] of cells(tokens, texts, from, to)) {
    let value = 0;
    for (let token = first; token < last; token += 1) value = Math.max(value, values.get(token) ?? 0);
    if (!value && !isByte) {
      plain += text;
      continue;
    }
    line.append(plain);
    plain = "";
    const kind = `${first <= peak && peak < last ? "peak" : ""}${isByte ? " byte" : ""}`;
    const token = el("span", { class: kind.trim() || null, "data-value": value ? formatted(value) : null }, text);
    if (value) token.style.setProperty("--shade", (0.1 + 0.5 * Math.min(1, value / largest)).toFixed(2));
    line.append(token);
  }
  line.append(plain);
  const where = el("div", { class: "value" }, ...before, el("strong", {}, formatted(values.get(peak))), " ", el("span", {}, `document ${documentNumber}, token ${position}`));
  return el("li", {}, where, line);
}

const largestOf = (own) => own.figures[meta().columns.findIndex(({ key }) => key === "max")] || 1;

function lengthChoice(again) {
  const [before, after] = meta().around;
  const labels = { short: "short: 5 tokens before the peak, 3 after", line: "the line of text", whole: `all that is stored: up to ${before} before, ${after} after` };
  const options = Object.entries(labels).map(([name, label]) => el("option", { value: name, selected: name === reading.length }, label));
  const select = el("select", { "data-length": true }, ...options);
  select.addEventListener("change", () => {
    reading.length = select.value;
    store("length", select.value);
    again();
  });
  return el("label", {}, "Length ", select);
}

// All contexts of a feature, with the choice of their length and a search.
function contextsOf(own, texts) {
  const places = el("div");
  const found = el("span", { role: "status" });
  const groups = [["Strongest contexts, one per document", own.top]];
  groups.push(...own.quantiles.map(([quantile, contexts]) => [`Sampled from part ${quantile + 1} of its activations (1 is the lowest)`, contexts]));
  const show = () => {
    const query = reading.query.toLowerCase();
    let [all, hits] = [0, 0];
    const sections = groups.map(([title, contexts]) => {
      const wanted = contexts.filter((shown) => !query || textIn(shown[3], texts).toLowerCase().includes(query));
      all += contexts.length;
      hits += wanted.length;
      return wanted.length ? section(title, el("ul", { class: "places" }, ...wanted.map((shown) => context(shown, texts, largestOf(own), reading.length)))) : null;
    });
    found.textContent = query ? `${hits} of ${all} contexts` : `${all} contexts`;
    places.replaceChildren(...sections.filter(Boolean));
  };
  const input = el("input", { type: "search", autocomplete: "off", spellcheck: "false", placeholder: "text" });
  input.value = reading.query = "";
  input.addEventListener("input", later(() => {
    reading.query = input.value;
    show();
  }));
  show();
  const legend = el("p", { class: "soft" }, "Beside each text: the activation at its peak, which is underlined, and where it stands. The darker a token, the larger its activation. Point at a token, or select a text, to read the numbers.");
  return [el("div", { class: "controls" }, lengthChoice(show), el("label", {}, "Search these contexts ", input), found), legend, places];
}

// -- search over all features ----------------------------------------------------------------------

const search = { query: null, next: 0, hits: 0, run: 0 };

// Reads file after file, until HITS more features are found, another search begins or the view is left.
async function searchOn() {
  const run = ++search.run;
  const { features, chunk } = meta();
  const status = document.getElementById("contexts-found");
  const more = document.getElementById("contexts-more");
  const until = search.hits + HITS;
  more.hidden = true;
  while (search.next * chunk < features && search.hits < until) {
    const page = await load(`features/${padded(search.next)}`);
    if (run !== search.run) return;
    page.features.forEach((own, index) => {
      const holds = (shown) => textIn(shown[3], page.words).toLowerCase().includes(search.query.toLowerCase());
      const hit = own.top.find(holds) ?? own.quantiles.flatMap(([, contexts]) => contexts).find(holds);
      if (!hit) return;
      search.hits += 1;
      const link = featureLink(search.next * chunk + index);
      document.getElementById("contexts-hits").append(context(hit, page.words, largestOf(own), "whole", link));
    });
    search.next += 1;
    const read = Math.min(search.next * chunk, features);
    status.textContent = `${formatted(search.hits)} found; ${read === features ? "all" : formatted(read)} of ${formatted(features)} features are searched`;
    if (viewOf(stateNow()) !== "contexts") break;
  }
  more.hidden = search.next * chunk >= features;
}

const fail = (failure) => {
  document.getElementById("contexts-found").textContent = failure.message;
};

async function showContexts(state) {
  const query = state.get("contexts");
  return () => {
    const input = document.getElementById("contexts-q");
    if (input !== document.activeElement) input.value = query;
    if (query === search.query) return;
    Object.assign(search, { query, next: 0, hits: 0, run: search.run + 1 });
    document.getElementById("contexts-hits").replaceChildren();
    document.getElementById("contexts-found").textContent = "";
    document.getElementById("contexts-more").hidden = true;
    if (query) searchOn().catch(fail);
  };
}

addView("contexts", "Contexts", showContexts);
