"use strict";
// Data comes as scripts that call loaded(NAME, VALUE), because fetch() does not work from a disk.

const KEPT = 24; // files in memory, some 400 kB each
const arrived = new Map(); // values by name, the least recently used first
const awaited = new Map(); // promises by name

function loaded(name, value) {
  arrived.set(name, value);
  for (const old of arrived.keys()) {
    if (arrived.size <= KEPT) break;
    if (old.includes("/") && old !== name) arrived.delete(old);
  }
}

// A promise of the value of data/NAME.js, which is requested once.
function load(name) {
  if (arrived.has(name)) {
    const value = arrived.get(name);
    arrived.delete(name); // and set again, so that it is the last
    arrived.set(name, value);
    return Promise.resolve(value);
  }
  if (!awaited.has(name)) {
    awaited.set(name, new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onload = () => script.remove() ?? (arrived.has(name) ? resolve(arrived.get(name)) : reject(new Error(`data/${name}.js is damaged`)));
      script.onerror = () => reject(new Error(`data/${name}.js cannot be read`));
      document.head.append(script);
    }).finally(() => awaited.delete(name)));
  }
  return awaited.get(name);
}

// All but a feature's page needs the list: it is requested before the other scripts are read. showList() reports a failure.
if (!/[#&](f|feature)=/.test(location.hash)) load("table").catch(() => {});

// Views by name. The address #NAME=... shows one in the element NAME of main; without a name: the first.
// `render(state)` is a promise of a function that fills the element. One without a label has no link in the header.
const views = new Map();
const addView = (name, label, render) => views.set(name, { label, render });

// Parts of a feature's page that other files add: (number, own, texts) => element or null.
const featurePanels = [];

const padded = (number) => String(number).padStart(3, "0");

// An element. Children that are no elements become text, so nothing foreign becomes markup.
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children) {
    if (child === null || child === undefined) continue;
    element.append(child instanceof Node ? child : String(child));
  }
  return element;
}

// A token's text; of a token that is part of a character its bytes.
const textOf = (text) => (typeof text === "string" ? text : text.map((byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`).join(""));

// A token in a box. Outer spaces are drawn as dots.
function word(text) {
  const [, before, inner, after] = /^( *)(.*?)( *)$/s.exec(textOf(text));
  const space = (spaces) => (spaces ? el("span", { class: "space" }, spaces) : null);
  return el("span", { class: typeof text === "string" ? "word" : "word byte" }, space(before), inner, space(after));
}

function formatted(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2);
  return Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(3);
}

function percent(share) {
  if (share === null || share === undefined) return "–";
  if (share === 0) return "0%";
  const percents = 100 * share;
  return `${share < 1e-4 ? percents.toExponential(1) : percents.toPrecision(3)}%`;
}

const figure = (key, value) => (key === "density" ? percent(value) : formatted(value));

// The address of a state.
const hashOf = (state) => `#${new URLSearchParams(state)}`;

const featureLink = (number, text = number) => el("a", { href: hashOf({ f: number }) }, text);
