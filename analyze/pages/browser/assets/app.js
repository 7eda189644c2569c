"use strict";
// The part of the address behind # is the state: #f=12, #tokens=wait&id=7, else the list: #q=...&sort=-density&page=2.

let lastList = "#";
let turn = 0; // counts calls of show(): only the last one renders
let wantedFocus = null; // id of an input that gets the focus once its view is shown
let lastFeature = null;

// The state; #feature=12 is what #f=12 was called before.
function stateNow() {
  const state = new URLSearchParams(location.hash.slice(1));
  if (state.has("feature")) state.set("f", state.get("feature"));
  return state;
}

const viewOf = (state) => [...views.keys()].find((name) => state.has(name)) ?? "list";

async function show() {
  const mine = ++turn;
  const began = performance.now();
  const state = stateNow();
  const view = viewOf(state);
  const root = document.documentElement;
  const error = document.getElementById("error");
  try {
    if (!meta()) throw new Error("data/meta.js cannot be read");
    const render = await views.get(view).render(state);
    if (mine !== turn) return; // the address has changed meanwhile
    error.hidden = true;
    render();
    if (view === "list") lastList = location.hash || "#";
  } catch (failure) {
    if (mine !== turn) return;
    error.textContent = failure.message;
    error.hidden = false;
  }
  for (const name of views.keys()) document.getElementById(name).hidden = name !== view || !error.hidden;
  const moved = root.dataset.view && root.dataset.view !== view;
  root.dataset.view = error.hidden ? view : "error";
  for (const link of document.querySelectorAll("#views a[data-view]")) {
    if (link.dataset.view === "list") link.setAttribute("href", lastList);
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const heading = view === "f" ? `Feature ${state.get("f")} · ` : view === "list" ? "" : `${views.get(view).label} · `;
  document.title = `${heading}${meta()?.name ?? "SAE"} features`;
  if (view === "f") {
    lastFeature = state.get("f");
    if (error.hidden) document.getElementById("feature-title").focus({ preventScroll: true });
    scrollTo(0, 0);
  } else if (wantedFocus) document.getElementById(wantedFocus).select();
  else if (moved && view === "list") rowLinks().find((link) => link.textContent === lastFeature)?.focus();
  wantedFocus = null;
  // Milliseconds: `shown` from the change of the address, `first` from the opening of the page.
  root.dataset.shown = (performance.now() - began).toFixed(1);
  root.dataset.first ??= performance.now().toFixed(1);
}

// The header's links, and an element for each view that has none.
function addLinks() {
  const nav = document.getElementById("views");
  for (const [name, { label }] of views) {
    if (!document.getElementById(name)) document.querySelector("main").append(el("section", { id: name, "aria-label": label, hidden: true }));
    if (label) nav.append(el("a", { href: `#${name}=`, "data-view": name }, label));
  }
  if (meta()) nav.append(el("a", { href: meta().report, title: "What was found about this SAE, in words and figures. Not there yet? study=report makes it." }, "Report"));
}

// Changes some of the list's state; the list starts at its first page again, unless `changes` has a page.
function change(changes) {
  const state = stateNow();
  state.delete("page");
  for (const [key, value] of Object.entries(changes)) {
    if (value) state.set(key, value);
    else state.delete(key);
  }
  location.replace(`#${state}`);
}

// `act`, once 120 ms have passed without another call.
function later(act) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, 120);
  };
}

// The links that j and k go through.
const rowLinks = () => [...document.querySelectorAll("#features tbody a, #matches a, #contexts-hits a")].filter((link) => link.offsetParent);

// Moves the focus by some rows.
function focusRow(step) {
  const links = rowLinks();
  const current = links.indexOf(document.activeElement);
  links[Math.min(Math.max(current + step, 0), links.length - 1)]?.focus();
}

// The next row of the list, or the next feature.
function step(by) {
  const state = stateNow();
  if (!state.has("f")) return focusRow(by);
  const next = beside(Number(state.get("f")), by);
  if (next !== null) location.hash = hashOf({ f: next });
}

// By view the input that searches it, and by key the view.
const INPUTS = { list: "q", tokens: "token-q", contexts: "contexts-q" };
const KEYS = { "/": () => (viewOf(stateNow()) in INPUTS ? viewOf(stateNow()) : "list"), t: () => "tokens", c: () => "contexts" };

function focusInput(view) {
  if (document.documentElement.dataset.view === view) return document.getElementById(INPUTS[view]).select();
  wantedFocus = INPUTS[view];
  location.hash = view === "list" ? lastList : hashOf({ [view]: "" });
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    document.activeElement?.blur();
    location.hash = lastList;
    return;
  }
  if (event.target.matches("input[type=search], textarea, select")) {
    if (event.key === "Enter" && event.target.type === "search") focusRow(1);
    return;
  }
  if (KEYS[event.key]) focusInput(KEYS[event.key]());
  else if (event.key === "j" || event.key === "ArrowRight") step(1);
  else if (event.key === "k" || event.key === "ArrowLeft") step(-1);
  else if (event.key === "s") (document.activeElement?.closest("tr") ?? document.getElementById("f")).querySelector("[data-star]")?.click();
  else return;
  event.preventDefault();
}

// Where a run's rows are: a layer's output, or its hook points.
const placed = ({ layer, where, model }) => (where === undefined ? `Layer ${layer} of ${model}` : `${where.replace(/^l/, "L")} (${model})`);

function begin() {
  addLinks();
  if (meta()) {
    readNotes();
    legend();
    const { name, features, rows, as_ids } = meta();
    document.getElementById("title").textContent = `Features of ${name}`;
    const ids = as_ids ? " Tokens are shown as ids: the tokenizer was not at hand." : "";
    document.getElementById("about").textContent = `${placed(meta())}, ${formatted(features)} features on ${formatted(rows)} tokens.${ids}`;
  }
  const q = document.getElementById("q");
  q.addEventListener("input", later(() => change({ q: q.value })));
  for (const id of ["alive", "starred"]) document.getElementById(id).addEventListener("change", (event) => change({ [id]: event.target.checked ? "1" : "" }));
  document.getElementById("import").addEventListener("change", async (event) => {
    document.getElementById("imported").textContent = await importNotes(event.target.files[0]);
    show();
  });
  document.getElementById("legend").open = document.documentElement.clientWidth > 600;
  const filter = document.getElementById("class");
  document.getElementById("classes").hidden = !meta()?.classes;
  filter.append(...(meta()?.classes ?? []).map((name, number) => el("option", { value: number }, name)));
  filter.addEventListener("change", () => change({ class: filter.value }));
  const token = document.getElementById("token-q");
  token.addEventListener("input", later(() => location.replace(hashOf({ tokens: token.value }))));
  const held = document.getElementById("contexts-q");
  held.addEventListener("input", later(() => location.replace(hashOf({ contexts: held.value }))));
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.sort) change({ sort: button.dataset.sort === "-interest" ? "" : button.dataset.sort });
    if (button.dataset.star) toggleStar(button);
    if (button.id === "export") exportNotes();
    if (button.id === "contexts-more") searchOn().catch(fail);
    if (button.dataset.page) change({ page: button.dataset.page });
    if (button.dataset.feature) location.hash = hashOf({ f: button.dataset.feature });
  });
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", show);
  show();
}

begin();
