"use strict";
// The address behind # says what is shown: #feature=12, #tokens=wait&id=7, else the list, #q=...&sort=-density&page=2.

let lastList = "#";
let turn = 0;
let wantedFocus = null; // an input, once its view is shown
let lastFeature = null;

const stateNow = () => new URLSearchParams(location.hash.slice(1));

async function show() {
  const mine = ++turn;
  const began = performance.now();
  const state = stateNow();
  const view = state.has("feature") ? "feature" : state.has("tokens") ? "tokens" : "list";
  const root = document.documentElement;
  const error = document.getElementById("error");
  try {
    if (!meta()) throw new Error("data/meta.js cannot be read");
    const render = await { list: showList, feature: showFeature, tokens: showTokens }[view](state);
    if (mine !== turn) return; // something else was asked for meanwhile
    error.hidden = true;
    render();
    if (view === "list") lastList = location.hash || "#";
  } catch (failure) {
    if (mine !== turn) return;
    error.textContent = failure.message;
    error.hidden = false;
  }
  for (const one of ["list", "feature", "tokens"]) document.getElementById(one).hidden = one !== view || !error.hidden;
  const moved = root.dataset.view && root.dataset.view !== view;
  root.dataset.view = error.hidden ? view : "error";
  document.getElementById("to-list").setAttribute("href", lastList);
  for (const [id, one] of [["to-list", "list"], ["to-tokens", "tokens"]]) {
    if (one === view) document.getElementById(id).setAttribute("aria-current", "page");
    else document.getElementById(id).removeAttribute("aria-current");
  }
  document.title = `${view === "feature" ? `Feature ${state.get("feature")} · ` : view === "tokens" ? "Tokens · " : ""}${meta()?.name ?? "SAE"} features`;
  if (view === "feature") {
    lastFeature = state.get("feature");
    if (error.hidden) document.getElementById("feature-title").focus({ preventScroll: true });
    scrollTo(0, 0);
  } else if (wantedFocus) document.getElementById(wantedFocus).select();
  else if (moved && view === "list") rowLinks().find((link) => link.textContent === lastFeature)?.focus();
  wantedFocus = null;
  // What was shown, after how long: `shown` since it was asked for, `first` since the page was opened.
  root.dataset.shown = (performance.now() - began).toFixed(1);
  root.dataset.first ??= performance.now().toFixed(1);
}

// Changes some of the list's state, from its first page on unless told otherwise.
function change(changes) {
  const state = stateNow();
  state.delete("page");
  for (const [key, value] of Object.entries(changes)) {
    if (value) state.set(key, value);
    else state.delete(key);
  }
  location.replace(`#${state}`);
}

function later(act) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, 120);
  };
}

const rowLinks = () => [...document.querySelectorAll("#features tbody a, #matches a")].filter((link) => link.offsetParent);

// Moves among the rows.
function focusRow(step) {
  const links = rowLinks();
  const at = links.indexOf(document.activeElement);
  links[Math.min(Math.max(at + step, 0), links.length - 1)]?.focus();
}

function step(by) {
  const state = stateNow();
  if (!state.has("feature")) return focusRow(by);
  const next = beside(Number(state.get("feature")), by);
  if (next !== null) location.hash = where({ feature: next });
}

const KEYS = {
  "/": () => (stateNow().has("tokens") ? "token-q" : "q"),
  t: () => "token-q",
};

function focusInput(id) {
  const view = id === "q" ? "list" : "tokens";
  if (document.documentElement.dataset.view === view) return document.getElementById(id).select();
  wantedFocus = id;
  location.hash = id === "q" ? lastList : where({ tokens: "" });
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    document.activeElement?.blur();
    location.hash = lastList;
    return;
  }
  if (event.target.matches("input[type=search]")) {
    if (event.key === "Enter") focusRow(1);
    return;
  }
  if (KEYS[event.key]) focusInput(KEYS[event.key]());
  else if (event.key === "j" || event.key === "ArrowRight") step(1);
  else if (event.key === "k" || event.key === "ArrowLeft") step(-1);
  else return;
  event.preventDefault();
}

function begin() {
  const found = meta();
  if (found) {
    document.getElementById("title").textContent = `Features of ${found.name}`;
    const ids = found.as_ids ? " Tokens are shown as ids: the tokenizer was not at hand." : "";
    document.getElementById("about").textContent = `Layer ${found.layer} of ${found.model}, ${said(found.features)} features on ${said(found.rows)} rows.${ids}`;
  }
  const q = document.getElementById("q");
  q.addEventListener("input", later(() => change({ q: q.value })));
  document.getElementById("alive").addEventListener("change", (event) => change({ alive: event.target.checked ? "1" : "" }));
  const token = document.getElementById("token-q");
  token.addEventListener("input", later(() => location.replace(where({ tokens: token.value }))));
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.sort) change({ sort: button.dataset.sort === "feature" ? "" : button.dataset.sort });
    if (button.dataset.page) change({ page: button.dataset.page });
    if (button.dataset.feature) location.hash = where({ feature: button.dataset.feature });
  });
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", show);
  show();
}

begin();
