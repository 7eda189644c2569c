"use strict";
// One feature: what it says of itself, where it fires, what is like it.

const SVG = "http://www.w3.org/2000/svg";

function drawn(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function histogram([first, ...counts]) {
  const { edges } = meta();
  const [width, height, base] = [560, 140, 120];
  const step = width / counts.length;
  const most = Math.max(...counts);
  const label = `Histogram of activations from ${said(edges[first])} to ${said(edges[first + counts.length])}, at most ${said(most)} in a bin`;
  const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  counts.forEach((count, at) => {
    const tall = (count / most) * (base - 5);
    const bar = drawn("rect", { x: at * step, y: base - tall, width: Math.max(step - 1, 0.5), height: tall });
    bar.append(drawn("title", {}, `${said(edges[first + at])} to ${said(edges[first + at + 1])}: ${said(count)}`));
    picture.append(bar);
  });
  picture.append(drawn("line", { x1: 0, y1: base, x2: width, y2: base }));
  picture.append(drawn("text", { x: 0, y: height - 4 }, said(edges[first])));
  picture.append(drawn("text", { x: width, y: height - 4, "text-anchor": "end" }, said(edges[first + counts.length])));
  return picture;
}

// A stretch of text; the darker a token, the larger the activation, which is its title.
function context([documentNumber, position, peak, tokens, pairs], texts, largest) {
  const values = new Map();
  for (let at = 0; at < pairs.length; at += 2) values.set(pairs[at], pairs[at + 1]);
  const line = el("div", { class: "context", dir: "auto" });
  let plain = "";
  tokens.forEach((at, number) => {
    const value = values.get(number);
    if (value === undefined) {
      plain += texts[at];
      return;
    }
    line.append(plain);
    plain = "";
    const token = el("span", { title: said(value), class: number === peak ? "peak" : null }, texts[at]);
    token.style.setProperty("--shade", (0.1 + 0.5 * Math.min(1, value / largest)).toFixed(2));
    line.append(token);
  });
  line.append(plain);
  const value = el("div", { class: "value", title: `document ${documentNumber}, position ${position}` }, said(values.get(peak)));
  return el("li", {}, value, line);
}

function section(title, ...children) {
  return el("div", {}, el("h3", {}, title), ...children);
}

function pairsTable(caption, heads, rows) {
  if (!rows.length) return section(caption, el("p", { class: "soft" }, "none"));
  const [of, score] = heads.map((text, at) => el("th", { scope: "col", class: at ? "number" : null }, text));
  return section(caption, el("table", {}, el("thead", {}, el("tr", {}, of, score)), el("tbody", {}, ...rows)));
}

function scored(cell, value) {
  return el("tr", {}, el("td", {}, cell), el("td", { class: "number" }, said(value)));
}

function likeIt(own) {
  const tables = [pairsTable("Nearest directions", ["feature", "cosine"], own.neighbours.map(([feature, cosine]) => scored(featureLink(feature), cosine)))];
  meta().others.forEach((other, at) => {
    const rows = own.others[at].map(([feature, cosine]) => {
      // Other runs' pages lie outside this folder: a server that has this folder alone does not have them.
      const link = other.page && location.protocol === "file:" ? el("a", { href: `${other.page}${where({ feature })}` }, feature) : feature;
      return scored(link, cosine);
    });
    tables.push(pairsTable(`Fires like it in ${other.name}, layer ${other.layer}`, ["feature", "cosine"], rows));
  });
  return tables;
}

function logits(own, texts) {
  const kinds = [["Raises", own.raised], ["Lowers", own.lowered]];
  return kinds.filter(([, found]) => found).map(([name, found]) => pairsTable(name, ["token", "logit"], found.map(([at, value]) => scored(word(texts[at]), value))));
}

function facts(own) {
  const figures = meta().columns.map(({ key, label, about }, at) => [label, figure(key, own.figures[at]), about]);
  figures.push(["fires in", `${said(own.count)} of ${said(meta().rows)} rows`, "rows of the catalogue"]);
  figures.push(["mean ± std", `${said(own.mean)} ± ${said(own.std)}`, "of its activations where it fires"]);
  return el("dl", { class: "facts" }, ...figures.map(([name, value, about]) => el("div", { title: about }, el("dt", {}, name), el("dd", {}, value))));
}

// The feature before or after this one, as the list is sorted and filtered if it is in it.
function beside(number, step) {
  const at = list.order ? list.order.indexOf(number) : -1;
  const next = at < 0 ? number + step : list.order[at + step];
  return next >= 0 && next < meta().features ? next : null;
}

function steps(number) {
  const link = (label, step) => {
    const next = beside(number, step);
    return el("button", { type: "button", disabled: next === null, "data-feature": next }, label);
  };
  return el("nav", { class: "pages", "aria-label": "Features" }, link("← Previous", -1), link("Next →", 1));
}

async function showFeature(state) {
  const number = Number(state.get("feature"));
  if (!Number.isInteger(number) || number < 0 || number >= meta().features) throw new Error(`there is no feature ${state.get("feature")}`);
  if (table()) arrange(new URLSearchParams(lastList.slice(1))); // not waited for: a feature's page needs its own file alone
  const { chunk, columns } = meta();
  const page = await load(`features/${padded(Math.floor(number / chunk))}`);
  const own = page.features[number % chunk];
  const largest = own.figures[columns.findIndex(({ key }) => key === "max")] || 1;
  const lines = (contexts) => el("ul", { class: "places" }, ...contexts.map((one) => context(one, page.words, largest)));
  const parts = [steps(number), el("h2", { id: "feature-title", tabindex: "-1" }, `Feature ${number}`), facts(own)];
  if (own.count) {
    parts.push(section("Activations, four bins an octave", histogram(own.histogram)));
    parts.push(el("div", { class: "side" }, ...logits(own, page.words), ...likeIt(own)));
    parts.push(section("Strongest contexts, one per document", lines(own.top)));
    parts.push(...own.quantiles.map(([quantile, contexts]) => section(`Sampled from part ${quantile + 1} of its activations (1 is the lowest)`, lines(contexts))));
  } else {
    parts.push(el("p", {}, "It never fires in these rows."), el("div", { class: "side" }, ...logits(own, page.words), ...likeIt(own)));
  }
  return () => document.getElementById("feature").replaceChildren(...parts);
}
