"use strict";
// A feature's page: its figures, where it fires, which features are like it.

function section(title, ...children) {
  return el("div", {}, el("h3", {}, title), ...children);
}

// A table of two columns: what, and a number.
function pairsTable(caption, heads, rows) {
  if (!rows.length) return section(caption, el("p", { class: "soft" }, "none"));
  const cells = heads.map((text, index) => el("th", { scope: "col", class: index ? "number" : null }, text));
  return section(caption, el("table", {}, el("thead", {}, el("tr", {}, ...cells)), el("tbody", {}, ...rows)));
}

function scored(cell, ...values) {
  return el("tr", {}, el("td", {}, cell), ...values.map((value) => el("td", { class: "number" }, formatted(value))));
}

// Other runs' pages lie outside this folder, which is all that a server has.
function otherLink(other, feature) {
  return other.page && location.protocol === "file:" ? el("a", { href: `${other.page}${hashOf({ feature })}` }, feature) : feature;
}

function likeIt(own) {
  const heads = ["feature", "cosine"];
  const nearest = own.neighbours.map(([feature, cosine]) => scored(featureLink(feature), cosine));
  const tables = [pairsTable("Nearest directions", heads, nearest), firesTogether(own)];
  meta().others.forEach((other, index) => {
    const rows = own.others[index].map(([feature, cosine]) => scored(otherLink(other, feature), cosine));
    tables.push(pairsTable(`Fires like it in ${other.name}, ${other.where ?? `layer ${other.layer}`}`, heads, rows));
  });
  return tables;
}

// Features that fire on the same rows: phi beside the counts that it is made of.
function firesTogether(own) {
  const rows = own.together.map(([feature, ...figures]) => scored(featureLink(feature), ...figures));
  const table = pairsTable("Fires together with", ["feature", "phi", "tokens", "by chance"], rows);
  const about = "phi is the correlation of firing with firing: 1 if both always fire together, 0 by chance. Tokens are those on which both fire; by chance is how many that would be of two as frequent features that have nothing to do with each other.";
  table.append(el("p", { class: "soft" }, rows.length ? about : "No other feature fires on the same tokens more often than chance, at least ten times."));
  return table;
}

// Features of another layer that predict this one, and those that it predicts: see study=cross_layer.
function ofLayers(own) {
  const heads = ["feature", "r", "P(this | that)", "P(that | this)", "cosine"];
  const tables = (meta().crossings ?? []).map((other, index) => {
    const [classed, pairs] = own.crossings[index];
    const rows = pairs.map(([feature, ...figures]) => scored(otherLink(other, feature), ...figures));
    const title = other.predicts ? "Predicts features" : classed === "new" ? "New: predicted by none" : `Predicted (${classed}) by those`;
    return pairsTable(`${title} of ${other.name}, ${other.where}`, heads, rows);
  });
  return tables.length ? [el("div", { class: "layers" }, ...tables)] : [];
}

// The tokens whose logits it raises and lowers, and how logits are spread.
function logits({ raised, lowered }, texts) {
  const tables = [];
  for (const [name, tokens] of [["Raises", raised], ["Lowers", lowered]]) {
    if (!tokens) continue; // there was no language model
    const rows = tokens.map(([wordNumber, logit]) => scored(word(texts[wordNumber]), logit));
    tables.push(pairsTable(name, ["token", "logit"], rows));
  }
  return tables;
}

const spreadOf = (spread, { raised, lowered }, texts) => (spread && raised ? [section("Logits of the vocabulary", logitChart(spread, raised, lowered, texts))] : []);

// A part of the page beside others like it.
const part = (title, ...children) => el("section", { class: "part" }, el("h3", {}, title), ...children);

function ofTranscoder(own, texts) {
  const { reads, writes } = meta();
  const near = (pairs) => pairs.map(([feature, cosine]) => scored(featureLink(feature), cosine));
  const fires = own.tokens.map(([wordNumber, share]) => el("tr", {}, el("td", {}, word(texts[wordNumber])), el("td", { class: "number" }, percent(share))));
  return [
    part(`Reads ${reads}`, pairsTable("Fires on", ["token", "of its activation"], fires), pairsTable("Reads the same", ["feature", "cosine"], near(own.readers))),
    part(`Writes ${writes}`, ...spreadOf(own.spreads[0], own, texts), ...logits(own, texts), pairsTable("Writes the same", ["feature", "cosine"], near(own.neighbours))),
  ];
}

function ofCrosscoder(own, texts) {
  return own.targets.map(([share, energy, raised, lowered], number) => {
    const figures = el(
      "dl",
      { class: "facts" },
      el("div", { title: "share of this target in the norms of its directions" }, el("dt", {}, "share of norms"), el("dd", {}, formatted(share))),
      el("div", { title: "mean square of what it writes here, over the variance of the rows" }, el("dt", {}, "energy"), el("dd", {}, percent(energy))),
    );
    const bar = el("progress", { value: share, "aria-label": `share of norms at ${meta().targets[number]}` });
    return part(meta().targets[number], bar, figures, ...spreadOf(own.spreads[number], { raised, lowered }, texts), ...(raised ? logits({ raised, lowered }, texts) : [el("p", { class: "soft" }, "no logits: study=catalogue says why")]));
  });
}

function facts(own) {
  const figures = meta().columns.map(({ key, label, about }, index) => [label, figure(key, own.figures[index]), about]);
  figures.push(["fires in", `${formatted(own.count)} of ${formatted(meta().rows)} tokens`, "tokens that study=catalogue read"]);
  figures.push(["mean ± std", `${formatted(own.mean)} ± ${formatted(own.std)}`, "of its activations where it fires"]);
  if (own.targets) figures.unshift(["class", meta().classes[own.class], "by the norms of its directions; study=diff tests own ones"]);
  return el("dl", { class: "facts" }, ...figures.map(([name, value, about]) => el("div", { title: about }, el("dt", {}, name), el("dd", {}, value))));
}

// What it reads and writes, and which features are like it.
function sides(own, texts) {
  const side = (children) => el("div", { class: "side" }, ...children);
  const parts = (children) => el("div", { class: "parts" }, ...children);
  if (own.readers) return [parts(ofTranscoder(own, texts)), side(likeIt(own).slice(1))];
  if (own.targets) return [parts(ofCrosscoder(own, texts)), side(likeIt(own))];
  return [side([...logits(own, texts), ...likeIt(own)])];
}

// The feature before or after this one: in the list's order if the list has it, else by number. null: there is none.
function beside(number, step) {
  const position = list.order ? list.order.indexOf(number) : -1;
  const next = position < 0 ? number + step : list.order[position + step];
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
  const number = Number(state.get("f"));
  if (!Number.isInteger(number) || number < 0 || number >= meta().features) throw new Error(`there is no feature ${state.get("f")}`);
  if (table()) arrange(new URLSearchParams(lastList.slice(1))); // the list's order; its file is not waited for
  const { chunk } = meta();
  const page = await load(`features/${padded(Math.floor(number / chunk))}`);
  const own = page.features[number % chunk];
  const title = el("div", { class: "title" }, el("h2", { id: "feature-title", tabindex: "-1" }, `Feature ${number}`), starButton(number));
  const parts = [steps(number), title, facts(own), noteBox(number)];
  const side = [...sides(own, page.words), ...ofLayers(own)];
  if (own.count) {
    const spread = own.readers || own.targets ? [] : spreadOf(own.spreads[0], own, page.words);
    parts.push(el("div", { class: "charts" }, section("How strongly it fires", activationChart(own.histogram)), ...spread), ...side);
    parts.push(...contextsOf(own, page.words));
  } else {
    parts.push(el("p", {}, "It never fires on these tokens."), ...side);
  }
  parts.push(...featurePanels.map((panel) => panel(number, own, page.words)).filter(Boolean));
  return () => document.getElementById("f").replaceChildren(...parts);
}

addView("f", null, showFeature);
