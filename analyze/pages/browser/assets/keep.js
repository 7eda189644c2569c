"use strict";
// Stars and notes of this SAE's features. They stay in this browser, under the SAE's digest, and travel as a JSON file.

const NOTE_LENGTH = 10_000; // characters
const kept = {
  features: {}, // by number {star, note}
  lasts: true, // false: the browser refuses to store, as some do for pages from the disk
  version: 0, // counts changes: the list is filtered anew
};

const storedAs = (what) => `residual-saes ${what}`;

function stored(what) {
  try {
    return localStorage.getItem(storedAs(what));
  } catch {
    kept.lasts = false;
    return null;
  }
}

function store(what, text) {
  try {
    localStorage.setItem(storedAs(what), text);
  } catch {
    kept.lasts = false;
  }
}

// Of a stranger's object what can be stars and notes of this SAE.
function checkedNotes(features) {
  const good = {};
  for (const [number, own] of Object.entries(features ?? {})) {
    const { star, note } = own ?? {};
    if (!/^\d+$/.test(number) || Number(number) >= meta().features) continue;
    const text = typeof note === "string" ? note.slice(0, NOTE_LENGTH) : "";
    if (star === true || text) good[Number(number)] = { star: star === true, note: text };
  }
  return good;
}

// Reads what other tabs may have changed.
function readNotes() {
  const text = stored(meta().identity);
  if (!kept.lasts) return;
  try {
    kept.features = checkedNotes(JSON.parse(text ?? "{}"));
  } catch {
    kept.features = {}; // not ours
  }
  kept.version += 1;
}

const noteOf = (feature) => kept.features[feature] ?? { star: false, note: "" };

function keepNote(feature, changes) {
  readNotes();
  kept.features = checkedNotes({ ...kept.features, [feature]: { ...noteOf(feature), ...changes } });
  kept.version += 1;
  store(meta().identity, JSON.stringify(kept.features));
}

function starButton(feature) {
  const button = el("button", { type: "button", class: "star", "aria-label": `star of feature ${feature}`, "aria-pressed": String(noteOf(feature).star), "data-star": feature });
  button.append(noteOf(feature).star ? "★" : "☆");
  return button;
}

function toggleStar(button) {
  keepNote(button.dataset.star, { star: !noteOf(button.dataset.star).star });
  const fresh = starButton(button.dataset.star);
  button.replaceWith(fresh);
  fresh.focus();
}

function noteBox(feature) {
  const box = el("textarea", { rows: 2, maxlength: NOTE_LENGTH, placeholder: "What is it? Notes stay in this browser." }, noteOf(feature).note);
  box.addEventListener("change", () => keepNote(feature, { note: box.value }));
  const refused = el("p", { class: "soft" }, "This browser stores nothing for this page: export your notes before you close it.");
  return el("div", { class: "note" }, el("label", {}, "Note ", box), kept.lasts ? null : refused);
}

function exportNotes() {
  const content = JSON.stringify({ sae: meta().identity, name: meta().name, features: kept.features }, null, 1);
  const link = el("a", { href: URL.createObjectURL(new Blob([content], { type: "application/json" })), download: "notes.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Adds the stars and notes of a file; returns what is to be said of it.
async function importNotes(file) {
  let content;
  try {
    content = JSON.parse(await file.text());
  } catch {
    return `${file.name} is not a JSON file`;
  }
  if (content?.sae !== meta().identity) return `${file.name} is not of this SAE`;
  readNotes();
  const read = checkedNotes(content.features);
  kept.features = { ...kept.features, ...read };
  kept.version += 1;
  store(meta().identity, JSON.stringify(kept.features));
  return `${formatted(Object.keys(read).length)} features read from ${file.name}`;
}
