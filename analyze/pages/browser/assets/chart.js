"use strict";
// Histograms, with counted axes.

const SVG = "http://www.w3.org/2000/svg";

function drawn(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// Bars between two axes. Positions and heights are from 0 to 1.
// span: [left end, right end] of the bars; bars: [[height, title]]; ticks, levels: [[position, text]]; marks: [[position, title]].
function chart({ label, span = [0, 1], bars, ticks, levels, xName, yName, marks = [] }) {
  const [left, top, base, height] = [44, 18, 128, 166];
  const width = Math.max(260, Math.min(520, document.documentElement.clientWidth - 60));
  const x = (position) => left + position * (width - left - 14);
  const y = (tall) => base - tall * (base - top);
  const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, role: "img", "aria-label": label });
  for (const [tall, text] of levels) {
    picture.append(drawn("line", { x1: left, x2: width - 14, y1: y(tall), y2: y(tall) }), drawn("text", { x: left - 5, y: y(tall) + 4, "text-anchor": "end" }, text));
  }
  const step = (x(span[1]) - x(span[0])) / bars.length;
  bars.forEach(([tall, title], index) => {
    const bar = drawn("rect", { x: x(span[0]) + index * step, y: y(tall), width: Math.max(step - 1, 0.5), height: base - y(tall) });
    bar.append(drawn("title", {}, title));
    picture.append(bar);
  });
  for (const [position, title] of marks) {
    const mark = drawn("path", { d: `M${x(position)} ${base + 1}l-4 7h8z`, class: "mark" });
    mark.append(drawn("title", {}, title));
    picture.append(mark);
  }
  for (const [position, text] of ticks) picture.append(drawn("text", { x: x(position), y: base + 20, "text-anchor": "middle" }, text));
  picture.append(drawn("text", { x: x(0.5), y: height - 2, "text-anchor": "middle" }, xName), drawn("text", { x: 0, y: 11 }, yName));
  return picture;
}

// A round number from `value` on, whose half is whole from 4 on.
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 4, 6, 8, 10].map((factor) => factor * power).find((round) => round >= value);
}

// Of activations: a bin is a quarter of an octave, so the axis is logarithmic.
function activationChart([first, ...counts]) {
  const { edges } = meta();
  const most = Math.max(4, roundUp(Math.max(...counts)));
  const title = (count, index) => `${formatted(edges[first + index])} to ${formatted(edges[first + index + 1])}: ${formatted(count)}`;
  const every = Math.max(1, Math.ceil(counts.length / 5));
  const ticks = [...counts.keys()].filter((index) => index % every === 0).map((index) => [index / counts.length, formatted(edges[first + index])]);
  return chart({
    label: `Histogram of activations from ${formatted(edges[first])} to ${formatted(edges[first + counts.length])}, at most ${formatted(Math.max(...counts))} in a bin`,
    bars: counts.map((count, index) => [count / most, title(count, index)]),
    ticks,
    levels: [0, 0.5, 1].map((tall) => [tall, formatted(tall * most)]),
    xName: "activation (log scale)",
    yName: "tokens in a bin",
  });
}

// Of logits: what a unit of activation adds to the logit of each token id. Counts are on a log scale, or single ids would not be seen.
function logitChart([low, high, mean, std, ...counts], raised, lowered, texts) {
  const from = Math.min(low, ...lowered.map(([, logit]) => logit));
  const to = Math.max(high, ...raised.map(([, logit]) => logit));
  const place = (logit) => (to > from ? (logit - from) / (to - from) : 0.5);
  const tall = (count) => Math.log10(1 + count) / Math.log10(1 + Math.max(1, ...counts));
  const step = (high - low) / counts.length;
  const ids = counts.reduce((sum, count) => sum + count, 0);
  const levels = [0, 1, 10, 100, 1000, 10_000].filter((count) => tall(count) <= 1);
  const of = ids < meta().vocabulary ? `${formatted(ids)} of the ${formatted(meta().vocabulary)} token ids, evenly spaced` : `all ${formatted(ids)} token ids`;
  const picture = chart({
    label: `Histogram of logits of ${of}, from ${formatted(low)} to ${formatted(high)}`,
    span: [place(low), place(high)],
    bars: counts.map((count, index) => [tall(count), `${formatted(low + index * step)} to ${formatted(low + (index + 1) * step)}: ${formatted(count)}`]),
    ticks: [0, 0.25, 0.5, 0.75, 1].map((position) => [position, (from + position * (to - from)).toPrecision(2)]),
    levels: levels.map((count) => [tall(count), formatted(count)]),
    xName: "logit per unit of activation",
    yName: "token ids in a bin (log scale)",
    marks: [...raised, ...lowered].map(([number, logit]) => [place(logit), `${textOf(texts[number])}: ${formatted(logit)}`]),
  });
  return el("div", {}, picture, el("p", { class: "soft" }, `Of ${of}; mean ${formatted(mean)}, standard deviation ${formatted(std)}. Triangles: the tokens that it raises and lowers most.`));
}
