"use strict";
// Data comes as scripts that call loaded(NAME, VALUE): that works from a disk, where fetch() does not.

const KEPT = 24; // files in memory, some 400 kB each
const arrived = new Map();
const awaited = new Map();

function loaded(name, value) {
  arrived.set(name, value);
  for (const old of arrived.keys()) {
    if (arrived.size <= KEPT) break;
    if (old.includes("/") && old !== name) arrived.delete(old);
  }
}

// The value of data/NAME.js, asked for once.
function load(name) {
  if (arrived.has(name)) {
    const value = arrived.get(name);
    arrived.delete(name); // behind the others: the least recently used goes first
    arrived.set(name, value);
    return Promise.resolve(value);
  }
  if (!awaited.has(name)) {
    awaited.set(name, new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onload = () => (arrived.has(name) ? resolve(arrived.get(name)) : reject(new Error(`data/${name}.js is damaged`)));
      script.onerror = () => reject(new Error(`data/${name}.js cannot be read`));
      document.head.append(script);
    }).finally(() => awaited.delete(name)));
  }
  return awaited.get(name);
}

// A feature's page does without the list; everything else begins with it, before the other scripts are read.
if (!location.hash.includes("feature=")) load("table").catch(() => {}); // which says so when it is needed

const padded = (number) => String(number).padStart(3, "0");

// An element; children that are no elements become text, and nothing is ever markup.
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined).map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

const word = (text) => el("span", { class: "word" }, text);

function said(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2);
  return Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(3);
}

const percent = (share) => (share === null || share === undefined ? "–" : share === 0 ? "0 %" : `${share < 1e-4 ? (100 * share).toExponential(1) : (100 * share).toPrecision(3)} %`);

const figure = (key, value) => (key === "density" ? percent(value) : said(value));

const where = (state) => `#${new URLSearchParams(state)}`;

const featureLink = (number, text = number) => el("a", { href: where({ feature: number }) }, text);
