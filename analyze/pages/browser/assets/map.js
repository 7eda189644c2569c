"use strict";
// The map of all features: a point each, pixel by pixel, since 32,768 of them move with the finger.

const MAP_SIDE = 9999; // coordinates go from 0 to this
const SILENT = ["#8b93a3", "fires on no token"];
const BY_DENSITY = [
  ["#4a7be0", "under 0.01%", 1e-4],
  ["#2f9dbb", "0.01 to 0.1%", 1e-3],
  ["#3aa673", "0.1 to 1%", 1e-2],
  ["#d98a1f", "1 to 10%", 1e-1],
  ["#d94452", "over 10%", Infinity],
];
const BY_RUN = ["#4a7be0", "#d98a1f", "#3aa673", "#b861d6", "#d94452", "#2f9dbb"];

const atlas = {
  x: null, y: null, // of each point
  run: null, // of each point: 0 is this one
  density: null,
  group: null, // of each point, its entry of the legend
  shown: null, // whether it is in colour; the others are faint
  legend: [], // [colour, label]
  scale: 1, left: 0, top: 0, // pixel = scale * coordinate + left
  faint: 0, // colours as a pixel's 32 bits
  colours: [],
  image: null, // ImageData that is used again
  over: -1, // the point that is named
  waits: false, // for a frame
};

const mapCanvas = () => document.querySelector("#map canvas");
const mapFeature = (point) => point - atlas.run.indexOf(atlas.run[point]);
const mapRuns = () => [meta(), ...meta().map.runs.map((number) => meta().others[number])];
const runName = ({ name, layer, where }) => `${name}, ${where ?? `layer ${layer}`}`;

// A CSS colour as 32 bits of ImageData.
function pixelOf(colour) {
  const context = el("canvas", { width: 1, height: 1 }).getContext("2d");
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return new Uint32Array(context.getImageData(0, 0, 1, 1).data.buffer)[0];
}

function placePoints({ points, density }) {
  if (atlas.x) return;
  [atlas.x, atlas.y] = points.map((column) => Float32Array.from(column));
  const sizes = [meta().features, ...density.map((column) => column.length)];
  atlas.run = sizes.flatMap((size, run) => Array(size).fill(run));
  atlas.density = [table().columns.density, ...density].flat();
}

function colourPoints(state) {
  const byRun = state.get("colour") === "run" && meta().map.runs.length > 0;
  atlas.legend = byRun ? mapRuns().map((run, number) => [BY_RUN[number % BY_RUN.length], runName(run)]) : [SILENT, ...BY_DENSITY];
  const bin = (density) => (density ? 1 + BY_DENSITY.findIndex(([, , below]) => density < below) : 0);
  atlas.group = Uint8Array.from(byRun ? atlas.run : atlas.density.map(bin));
  const hits = new Set(matching(state.get("map") || "", false, state.get("starred") === "1", ""));
  const isAll = hits.size === meta().features;
  atlas.shown = Uint8Array.from(atlas.run, (run, point) => (isAll || (run === 0 && hits.has(point)) ? 1 : 0));
  return hits.size;
}

function fitMap() {
  const { width, height } = mapCanvas();
  atlas.scale = (0.94 * Math.min(width, height)) / MAP_SIDE;
  atlas.left = (width - atlas.scale * Math.max(...atlas.x)) / 2;
  atlas.top = (height - atlas.scale * Math.max(...atlas.y)) / 2;
}

// The canvas at the screen's own resolution; true: its size changed.
function sizeMap() {
  const canvas = mapCanvas();
  const ratio = devicePixelRatio || 1;
  const [width, height] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
  if (!width || (canvas.width === width && canvas.height === height)) return false;
  [canvas.width, canvas.height] = [width, height];
  atlas.image = canvas.getContext("2d").createImageData(width, height);
  return true;
}

function drawMap() {
  const canvas = mapCanvas();
  const { width, height } = canvas;
  const pixels = new Uint32Array(atlas.image.data.buffer);
  pixels.fill(0); // transparent: the page's own paper
  const { x, y, scale, left, top, group, shown, colours } = atlas;
  const zoom = (scale * MAP_SIDE) / Math.min(width, height);
  const radius = Math.round(Math.min(7, (devicePixelRatio || 1) * (1 + zoom / 3) * (x.length > 5000 ? 0.8 : 2.4)));
  const disc = []; // the pixels of a point, from its middle
  for (let dy = -radius; dy <= radius; dy++) for (let dx = -radius; dx <= radius; dx++) if (dx * dx + dy * dy <= radius * radius) disc.push(dy * width + dx);
  for (const layer of [0, 1]) {
    for (let point = 0; point < x.length; point++) {
      const px = Math.round(scale * x[point] + left);
      const py = Math.round(scale * y[point] + top);
      if (shown[point] !== layer || px < radius || py < radius || px >= width - radius || py >= height - radius) continue;
      const colour = layer ? colours[group[point]] : atlas.faint;
      const middle = py * width + px;
      for (let part = 0; part < disc.length; part++) pixels[middle + disc[part]] = colour;
    }
  }
  const context = canvas.getContext("2d");
  context.putImageData(atlas.image, 0, 0);
  if (atlas.over < 0) return;
  context.strokeStyle = getComputedStyle(canvas).color;
  context.lineWidth = 2;
  context.beginPath();
  context.arc(scale * x[atlas.over] + left, scale * y[atlas.over] + top, radius + 4, 0, 7);
  context.stroke();
}

function redrawMap() {
  if (atlas.waits) return;
  atlas.waits = true;
  requestAnimationFrame(() => {
    atlas.waits = false;
    if (!mapCanvas()?.clientWidth) return; // another view is shown
    if (sizeMap()) fitMap();
    drawMap();
  });
}

// Changes some of the map's state.
function changeMap(changes) {
  const state = stateNow();
  for (const [key, value] of Object.entries(changes)) state.set(key, value);
  location.replace(`#${state}`);
}

// Zooms about a place of the canvas, in its pixels.
function zoomMap(factor, px, py) {
  const canvas = mapCanvas();
  const fit = (0.94 * Math.min(canvas.width, canvas.height)) / MAP_SIDE;
  const scale = Math.min(Math.max(atlas.scale * factor, fit / 2), fit * 200);
  const by = scale / atlas.scale;
  atlas.left = px - by * (px - atlas.left);
  atlas.top = py - by * (py - atlas.top);
  atlas.scale = scale;
  redrawMap();
}

function panMap(dx, dy) {
  atlas.left += dx;
  atlas.top += dy;
  redrawMap();
}

// The nearest point in colour within a finger's width of a place; -1: there is none.
function pointAt(px, py) {
  let [best, least] = [-1, (14 * (devicePixelRatio || 1)) ** 2];
  for (let point = 0; point < atlas.x.length; point++) {
    const far = (atlas.scale * atlas.x[point] + atlas.left - px) ** 2 + (atlas.scale * atlas.y[point] + atlas.top - py) ** 2;
    if (far < least && atlas.shown[point]) [best, least] = [point, far];
  }
  return best;
}

function namePoint(point) {
  if (point === atlas.over) return;
  atlas.over = point;
  document.getElementById("map-name").replaceChildren(...(point < 0 ? ["Point at a feature to see what it is."] : nameOf(point)));
  redrawMap();
}

function nameOf(point) {
  const feature = mapFeature(point);
  const density = ` fires on ${percent(atlas.density[point])} of tokens `;
  const run = mapRuns()[atlas.run[point]];
  if (atlas.run[point]) return [otherLink(run, feature), ` of ${runName(run)},${density}`];
  return [featureLink(feature, `Feature ${feature}`), density, ...words(feature).strongest.map(word)];
}

function openPoint(point) {
  if (point >= 0) [...document.querySelectorAll("#map-name a")][0]?.click();
}

// Mouse, pen and fingers: one drags, two zoom, a click opens. A finger's first tap names the feature.
function watchPointers(canvas) {
  const down = new Map(); // places by pointer
  let moved = 0;
  const place = (event) => [event.offsetX * (canvas.width / canvas.clientWidth), event.offsetY * (canvas.height / canvas.clientHeight)];
  canvas.addEventListener("pointerdown", (event) => {
    if (!down.size) moved = 0;
    down.set(event.pointerId, place(event));
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const now = place(event);
    const before = down.get(event.pointerId);
    if (!before) return namePoint(pointAt(...now));
    const other = [...down].find(([id]) => id !== event.pointerId)?.[1];
    moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
    if (other) zoomMap(Math.hypot(now[0] - other[0], now[1] - other[1]) / (Math.hypot(before[0] - other[0], before[1] - other[1]) || 1), ...other);
    else panMap(now[0] - before[0], now[1] - before[1]);
    down.set(event.pointerId, now);
  });
  canvas.addEventListener("pointerup", (event) => {
    const isClick = down.delete(event.pointerId) && moved < 6 * (devicePixelRatio || 1);
    if (!isClick) return;
    const point = pointAt(...place(event));
    const named = atlas.over;
    namePoint(point);
    if (event.pointerType === "mouse" || point === named) openPoint(point);
  });
  canvas.addEventListener("pointercancel", (event) => down.delete(event.pointerId));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomMap(Math.exp(-event.deltaY / 400), ...place(event));
  }, { passive: false });
}

const MAP_KEYS = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };

function onMapKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (MAP_KEYS[event.key]) panMap(...MAP_KEYS[event.key]);
  else if (event.key === "+" || event.key === "-") zoomMap(event.key === "+" ? 1.5 : 1 / 1.5, mapCanvas().width / 2, mapCanvas().height / 2);
  else if (event.key === "0") whole();
  else return;
  event.preventDefault();
  event.stopPropagation(); // arrows are the page's own keys, too
}

function whole() {
  fitMap();
  redrawMap();
}

function buildMap() {
  const { kept, by_chance, among, runs } = meta().map;
  const search = el("input", { id: "map-q", type: "search", autocomplete: "off", spellcheck: "false", placeholder: "number or token" });
  search.addEventListener("input", later(() => changeMap({ map: search.value })));
  const starred = el("input", { id: "map-starred", type: "checkbox" });
  starred.addEventListener("change", () => changeMap({ starred: starred.checked ? "1" : "" }));
  const colour = el("select", { id: "map-colour" }, el("option", { value: "" }, "density"), el("option", { value: "run" }, "run"));
  colour.addEventListener("change", () => changeMap({ colour: colour.value }));
  const button = (text, label, act) => {
    const made = el("button", { type: "button", "aria-label": label }, text);
    made.addEventListener("click", act);
    return made;
  };
  const middle = (factor) => () => zoomMap(factor, mapCanvas().width / 2, mapCanvas().height / 2);
  const canvas = el("canvas", { tabindex: 0, role: "img", "aria-label": "Map of all features by decoder direction. The list has the same features." });
  watchPointers(canvas);
  canvas.addEventListener("keydown", onMapKey);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  addEventListener("resize", redrawMap);
  document.getElementById("map").replaceChildren(
    el("div", { class: "controls" }, el("label", {}, "Search ", search), el("label", {}, starred, " only starred"), el("label", { hidden: !runs.length }, "Colour by ", colour), button("+", "zoom in", middle(1.5)), button("−", "zoom out", middle(1 / 1.5)), button("Whole map", null, whole), el("span", { id: "map-found", role: "status" }), el("a", { id: "map-list" }, "as a list")),
    canvas,
    el("p", { id: "map-name" }, "Point at a feature to see what it is."),
    el("ul", { id: "map-legend" }),
    el("p", {}, "A point is a feature. Features whose decoder directions are similar lie near each other. ", el("strong", {}, "Nothing else can be read off"), ": the distance between far groups, the size of a group and its shape mean nothing. (t-SNE of the cosines.)"),
    el("p", {}, `Of a feature's ten most similar directions ${percent(kept)} are among its ${among} nearest points here. Of points placed at random it would be ${percent(Math.min(1, by_chance))}.`),
    el("p", { class: "soft" }, "Drag to move, turn the wheel or pinch to zoom, click to open. Keys: arrows, + and −, 0 for the whole map."),
  );
}

async function showMap(state) {
  if (!meta().map) return () => document.getElementById("map").replaceChildren(el("h2", {}, "No map"), el("p", {}, `${meta().no_map}.`));
  const [data] = await Promise.all([load("map"), load("table")]);
  return () => {
    placePoints(data);
    if (!mapCanvas()) buildMap();
    const found = colourPoints(state);
    const style = getComputedStyle(document.documentElement);
    atlas.faint = pixelOf(style.getPropertyValue("--line").trim());
    atlas.colours = atlas.legend.map(([colour]) => pixelOf(colour));
    const query = (state.get("map") || "").trim();
    const input = document.getElementById("map-q");
    if (input !== document.activeElement) input.value = query;
    document.getElementById("map-starred").checked = state.get("starred") === "1";
    document.getElementById("map-colour").value = state.get("colour") === "run" ? "run" : "";
    document.getElementById("map-found").textContent = `${found.toLocaleString("en")} of ${meta().features.toLocaleString("en")} features in colour`;
    document.getElementById("map-list").setAttribute("href", hashOf({ q: query, ...(state.get("starred") === "1" ? { starred: "1" } : {}) }));
    const entries = atlas.legend.map(([colour, label]) => {
      const swatch = el("span", { class: "swatch" });
      swatch.style.setProperty("--colour", colour);
      return el("li", {}, swatch, label);
    });
    document.getElementById("map-legend").replaceChildren(...entries);
    atlas.over = -1;
    redrawMap();
  };
}

addView("map", "Map", showMap);
