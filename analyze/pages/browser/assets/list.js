"use strict";
// The list of all features: searched, sorted, a hundred at a time.

const ROWS = 100;

const list = {
  order: null, // numbers of the features, filtered and sorted
  key: null, // the state by which they are
  haystacks: null, // by feature its words in small letters
};

// By key the columns that are no figures, as [label, what it is].
const FIXED = {
  feature: ["feature", "its number in the SAE; leads to its page"],
  star: ["★", "your stars, which stay in this browser"],
  strongest: ["strongest at", "tokens at its largest activations; a dot is a space, ⏎ a line break"],
  raised: ["raises", "tokens whose logits it raises most, where the language model was at hand"],
};

function sortOf(state) {
  const known = (key) => Object.hasOwn(FIXED, key) || meta().columns.some((column) => column.key === key);
  const text = state.get("sort") || "-interest";
  const descending = text.startsWith("-");
  const key = descending ? text.slice(1) : text;
  return known(key) ? { key, descending } : { key: "feature", descending: false };
}

// What the list is sorted by: of each feature a number or a text; null is last either way.
function valuesOf(key) {
  const every = [...table().columns.density.keys()];
  if (key === "feature") return every;
  if (key === "star") return every.map((feature) => (noteOf(feature).star ? 1 : null));
  if (key in FIXED) return table()[key].map(([first]) => (first === undefined ? null : textOf(table().words[first]).trim().toLowerCase()));
  return table().columns[key];
}

const meta = () => arrived.get("meta");
const table = () => arrived.get("table");

function words(feature) {
  const { words: texts, strongest, raised } = table();
  const text = (number) => texts[number];
  return { strongest: strongest[feature].map(text), raised: raised[feature].map(text) };
}

// `classed` is the number of a class of a crosscoder's latents, as text; null or empty: all.
function matching(query, alive, starred, classed) {
  const density = table().columns.density;
  const { classes } = table();
  const text = query.trim().toLowerCase();
  if (!text && !alive && !starred && !classed) return [...density.keys()];
  const inClass = (feature) => !classed || !classes || classes[feature] === Number(classed);
  const every = [...density.keys()].filter((feature) => (!alive || density[feature] > 0) && (!starred || noteOf(feature).star) && inClass(feature));
  if (!text) return every;
  list.haystacks ??= density.map((_, feature) => Object.values(words(feature)).flat().map(textOf).join("\n").toLowerCase());
  const number = /^\d+$/.test(text) ? Number(text) : -1;
  return every.filter((feature) => feature === number || list.haystacks[feature].includes(text));
}

// Features without a figure come last in both directions. Of equals the lower number comes first.
function ordered(features, { key, descending }) {
  if (key === "feature") return descending ? features.reverse() : features;
  const values = valuesOf(key);
  const sign = descending ? -1 : 1;
  return features.sort((a, b) => {
    if (values[a] === values[b]) return a - b;
    if (values[a] === null || values[b] === null) return values[a] === null ? 1 : -1;
    return values[a] < values[b] ? -sign : sign;
  });
}

function arrange(state) {
  const sort = sortOf(state);
  const query = state.get("q") || "";
  const key = JSON.stringify([sort, query, state.get("alive"), state.get("starred"), state.get("class"), kept.version]);
  if (list.key === key) return;
  list.order = ordered(matching(query, state.get("alive") === "1", state.get("starred") === "1", state.get("class")), sort);
  // The feature whose number is searched for comes first.
  const exact = /^\d+$/.test(query.trim()) ? list.order.indexOf(Number(query)) : -1;
  if (exact > 0) list.order.unshift(...list.order.splice(exact, 1));
  list.key = key;
}

// The columns as [key, label, what it is], in order.
const fixed = (key) => [key, ...FIXED[key]];
const columnsShown = () => [fixed("feature"), fixed("star"), fixed("strongest"), ...meta().columns.map(({ key, label, about }) => [key, label, about]), fixed("raised")];
const isFigure = (key) => !(key in FIXED) || key === "feature";

function heads(state) {
  const sort = sortOf(state);
  return columnsShown().map(([key, label, about]) => {
    const active = key === sort.key;
    // A click sorts in the other direction. The first one sorts figures and stars from the largest, numbers and texts from the smallest.
    const descends = active ? !sort.descending : key === "star" || !(key in FIXED);
    const next = descends ? `-${key}` : key;
    const name = key === "star" ? "stars" : null;
    const button = el("button", { type: "button", title: about, "aria-label": name, "data-sort": next }, label, active ? (sort.descending ? " ↓" : " ↑") : "");
    return el("th", { scope: "col", class: isFigure(key) ? "number" : null, "aria-sort": active ? (sort.descending ? "descending" : "ascending") : "none" }, button);
  });
}

// What each column says, in words that are always on the page.
function legend() {
  const entries = columnsShown().map(([, label, about]) => el("div", {}, el("dt", {}, label), el("dd", {}, about)));
  document.querySelector("#legend dl").replaceChildren(...entries);
}

function row(feature) {
  const { strongest, raised } = words(feature);
  const cells = meta().columns.map(({ key }) => el("td", { class: "number" }, figure(key, table().columns[key][feature])));
  return el(
    "tr",
    {},
    el("td", { class: "number" }, featureLink(feature)),
    el("td", {}, starButton(feature)),
    el("td", { class: "words" }, ...strongest.map(word)),
    ...cells,
    el("td", { class: "words" }, ...raised.map(word)),
  );
}

async function showList(state) {
  await load("table");
  return () => renderList(state);
}

function renderList(state) {
  arrange(state);
  const last = Math.max(0, Math.ceil(list.order.length / ROWS) - 1);
  const page = Math.min(Math.max(0, Number.parseInt(state.get("page") || "1", 10) - 1 || 0), last);
  const from = page * ROWS;
  const shown = list.order.slice(from, from + ROWS);
  const head = document.querySelector("#features thead tr");
  const focused = document.activeElement?.closest("#features th");
  const focusedColumn = focused ? [...head.children].indexOf(focused) : -1;
  head.replaceChildren(...heads(state));
  if (focusedColumn >= 0) head.children[focusedColumn].querySelector("button")?.focus();
  document.querySelector("#features tbody").replaceChildren(...shown.map(row));
  const input = document.getElementById("q");
  if (input !== document.activeElement) input.value = state.get("q") || "";
  for (const id of ["alive", "starred"]) document.getElementById(id).checked = state.get(id) === "1";
  document.getElementById("class").value = state.get("class") || "";
  document.getElementById("found").textContent = `${list.order.length.toLocaleString("en")} of ${meta().features.toLocaleString("en")} features`;
  document.getElementById("page").textContent = shown.length ? `${(from + 1).toLocaleString("en")} to ${(from + shown.length).toLocaleString("en")}` : "none";
  for (const [id, target, off] of [["before", page, page === 0], ["after", page + 2, page === last]]) {
    const button = document.getElementById(id);
    button.disabled = off;
    button.dataset.page = target;
  }
}

addView("list", "List", showList);
