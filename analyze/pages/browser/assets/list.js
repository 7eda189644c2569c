"use strict";
// The list of all features: searched, sorted, a hundred at a time.

const ROWS = 100;

const list = {
  order: null, // numbers of the features, filtered and sorted
  key: null, // the state by which they are
  haystacks: null, // by feature its words in small letters
};

function sortOf(state) {
  const text = state.get("sort") || "feature";
  const descending = text.startsWith("-");
  const key = descending ? text.slice(1) : text;
  const known = key === "feature" || meta().columns.some((column) => column.key === key);
  return known ? { key, descending } : { key: "feature", descending: false };
}

const meta = () => arrived.get("meta");
const table = () => arrived.get("table");

function words(feature) {
  const { words: texts, strongest, raised } = table();
  const text = (number) => texts[number];
  return { strongest: strongest[feature].map(text), raised: raised[feature].map(text) };
}

// `classed` is the number of a class of a crosscoder's latents, as text; null or empty: all.
function matching(query, alive, classed) {
  const density = table().columns.density;
  const { classes } = table();
  const inClass = (feature) => !classed || !classes || classes[feature] === Number(classed);
  const every = [...density.keys()].filter((feature) => (!alive || density[feature] > 0) && inClass(feature));
  const text = query.trim().toLowerCase();
  if (!text) return every;
  list.haystacks ??= density.map((_, feature) => Object.values(words(feature)).flat().join("\n").toLowerCase());
  const number = /^\d+$/.test(text) ? Number(text) : -1;
  return every.filter((feature) => feature === number || list.haystacks[feature].includes(text));
}

// Features without a figure come last in both directions. Of equals the lower number comes first.
function ordered(features, { key, descending }) {
  if (key === "feature") return descending ? features.reverse() : features;
  const values = table().columns[key];
  const sign = descending ? -1 : 1;
  return features.sort((a, b) => {
    if (values[a] === null || values[b] === null) return (values[a] === null) - (values[b] === null) || a - b;
    return sign * (values[a] - values[b]) || a - b;
  });
}

function arrange(state) {
  const sort = sortOf(state);
  const query = state.get("q") || "";
  const key = JSON.stringify([sort, query, state.get("alive"), state.get("class")]);
  if (list.key === key) return;
  list.order = ordered(matching(query, state.get("alive") === "1", state.get("class")), sort);
  // The feature whose number is searched for comes first.
  const exact = /^\d+$/.test(query.trim()) ? list.order.indexOf(Number(query)) : -1;
  if (exact > 0) list.order.unshift(...list.order.splice(exact, 1));
  list.key = key;
}

function heads(state) {
  const sort = sortOf(state);
  const sortable = [{ key: "feature", label: "feature", about: "its number" }, ...meta().columns];
  const cells = sortable.map(({ key, label, about }) => {
    const active = key === sort.key;
    // A click sorts in the other direction. The first one sorts figures from the largest, features from 0.
    const descends = active ? !sort.descending : key !== "feature";
    const next = descends ? `-${key}` : key;
    const button = el("button", { type: "button", title: about, "data-sort": next }, label, active ? (sort.descending ? " ↓" : " ↑") : "");
    return el("th", { scope: "col", class: "number", "aria-sort": active ? (sort.descending ? "descending" : "ascending") : "none" }, button);
  });
  cells.splice(1, 0, el("th", { scope: "col" }, "strongest at"));
  cells.push(el("th", { scope: "col" }, "raises"));
  return cells;
}

function row(feature) {
  const { strongest, raised } = words(feature);
  const cells = meta().columns.map(({ key }) => el("td", { class: "number" }, figure(key, table().columns[key][feature])));
  return el(
    "tr",
    {},
    el("td", { class: "number" }, featureLink(feature)),
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
  document.getElementById("alive").checked = state.get("alive") === "1";
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
