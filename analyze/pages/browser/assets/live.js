"use strict";
// The sentence box and the steering box: questions to the model of the server; without one, what the store's own tokens say.

let liveAbout = null; // promise of what the server says of its model; {} without one

function live() {
  const asked = () => fetch("live").then((answer) => (answer.ok ? answer.json() : {})).catch(() => ({}));
  liveAbout ??= location.protocol === "file:" ? Promise.resolve({}) : asked();
  return liveAbout;
}

// The command that serves these pages with the model. From the disk the address says where the run lies.
function serveCommand() {
  const run = location.protocol === "file:" ? decodeURIComponent(location.pathname).split("/studies/")[0] : `runs/${meta().name}`;
  const quoted = /^[\w./-]+$/.test(run) ? run : `'${run.replaceAll("'", "'\\''")}'`;
  return `residual-saes analyze study=browser run=${quoted} action=serve`;
}

const noModel = (what) => el("p", { class: "soft" }, `${what} This command, on the machine that has the model, starts a server: `, el("code", {}, serveCommand()));

// Asks the server, and hands over each object of its answer as it comes.
async function ask(name, request, signal, take) {
  const headers = { "Content-Type": "application/json", "X-Residual-SAEs": "1" };
  const answer = await fetch(`live/${name}`, { method: "POST", headers, body: JSON.stringify(request), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    text += done ? "\n" : value;
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines.filter(Boolean)) {
      const part = JSON.parse(line);
      if (part.error) throw new Error(part.error);
      take(part);
    }
    if (done) return;
  }
}

// A button that asks, one that cancels, and a line that says how it stands. `run(signal, say)` is a promise of what is said at the end.
function asking(label, run) {
  const go = el("button", { type: "button" }, label);
  const cancel = el("button", { type: "button", hidden: true }, "Cancel");
  const status = el("span", { role: "status" });
  const say = (text) => { status.textContent = text; };
  let stop = null;
  go.addEventListener("click", async () => {
    stop = new AbortController();
    [go.disabled, cancel.hidden] = [true, false];
    say("reading …");
    try {
      say(await run(stop.signal, say));
    } catch (failure) {
      say(stop.signal.aborted ? "cancelled" : failure instanceof TypeError ? "the server does not answer; start it again" : failure.message);
    }
    [go.disabled, cancel.hidden] = [false, true];
  });
  cancel.addEventListener("click", () => stop.abort());
  return { go, row: el("div", { class: "controls" }, go, cancel, status) };
}

// A box of inputs. Keys that are typed there are no shortcuts of the page; Enter asks, Shift+Enter begins a line.
function box(go, ...children) {
  const made = el("div", { class: "box" }, ...children);
  made.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return;
    event.stopPropagation();
    if (event.key !== "Enter" || event.shiftKey || event.target.tagName === "BUTTON") return;
    event.preventDefault();
    go.click();
  });
  return made;
}

function asTyped(area, chat) {
  if (!area.value) throw new Error("type a text first");
  return chat.checked ? JSON.stringify([{ role: "user", content: area.value }]) : area.value;
}
const checkbox = () => el("input", { type: "checkbox" });
const columnHeads = (heads) => el("thead", {}, el("tr", {}, ...heads.map(([label, about]) => el("th", { scope: "col", title: about }, label))));
const links = (pairs) => pairs.flatMap(([feature, value]) => [featureLink(feature), ` ${formatted(value)}\u2003`]);

// -- the sentence ----------------------------------------------------------------------------------

function coloured({ text, fires }, feature) {
  const values = fires.map((flat) => {
    for (let index = 0; index < flat.length; index += 2) if (flat[index] === feature) return flat[index + 1];
    return 0;
  });
  const largest = Math.max(...values, 1e-9);
  const tokens = text.tokens.map((token, position) => {
    const shown = el("span", { title: values[position] ? formatted(values[position]) : null }, token);
    shown.style.setProperty("--shade", values[position] ? (0.1 + 0.5 * (values[position] / largest)).toFixed(2) : "0");
    return shown;
  });
  return el("div", { class: "context", dir: "auto" }, ...tokens);
}

// What fires in a sentence: the text in a feature's colours, the strongest features, and token by token.
function sentencePart(answer) {
  const { text } = answer;
  const line = el("div");
  const number = el("input", { type: "number", min: 0, max: meta().features - 1 });
  const colour = (feature) => {
    number.value = feature;
    line.replaceChildren(coloured(answer, Number(feature)));
  };
  number.addEventListener("input", () => colour(number.value));
  const rows = text.latents.map((latent) => {
    const button = el("button", { type: "button", "aria-label": `colour the text by feature ${latent.feature}` }, "colour");
    button.addEventListener("click", () => colour(latent.feature));
    const figures = [formatted(latent.max), formatted(latent.mean), formatted(latent.usual), percent(latent.density)].map((value) => el("td", { class: "number" }, value));
    return el("tr", {}, el("td", {}, featureLink(latent.feature)), el("td", {}, button), ...figures, el("td", { class: "words" }, latent.words), el("td", { class: "words" }, ...(latent.peaks ?? []).map(word)));
  });
  const heads = [["feature"], ["text"], ["max", "largest activation in the sentence"], ["mean", "where it fires in the sentence"], ["usual", "mean where it fires in the store"], ["density", "share of the store's rows in which it fires"], ["fires on"], ["elsewhere on", "tokens at its largest activations"]];
  const each = text.tokens.map((token, position) => el("tr", {}, el("td", {}, word(token)), el("td", { class: "number" }, formatted(answer.fires[position].length / 2)), el("td", {}, ...links(text.strongest[position]))));
  if (rows.length) colour(text.latents[0].feature);
  return [
    el("label", {}, "Colour by feature ", number), line,
    section("Strongest features", el("div", { class: "scroll" }, el("table", {}, columnHeads(heads), el("tbody", {}, ...rows)))),
    section("Token by token", el("div", { class: "scroll" }, el("table", {}, columnHeads([["token"], ["fire", "features that fire on it"], ["strongest, with activation"]]), el("tbody", {}, ...each)))),
  ];
}

function sentenceBox(about) {
  const area = el("textarea", { rows: 2, maxlength: 20000, placeholder: "Type a sentence." });
  const chat = checkbox();
  const result = el("div");
  const { go, row } = asking("Which features fire?", async (signal, say) => {
    let found = "";
    await ask("features", { text: asTyped(area, chat) }, signal, (part) => {
      if (part.note) return say(part.note);
      result.replaceChildren(...sentencePart(part));
      found = `${formatted(part.text.fire)} features fire on ${formatted(part.text.tokens.length - 1)} tokens`;
    });
    return found;
  });
  const reason = about.no_features && el("p", {}, about.no_features);
  return el("div", {}, el("h2", {}, "Which features fire on your sentence"), reason, box(go, el("label", {}, "Sentence ", area), el("label", {}, chat, " as a chat message"), row), result);
}

// Without a model: the tokens of the store that the words of the sentence are, and what fires on them there.
function storeBox() {
  const area = el("textarea", { rows: 2, placeholder: "Type some words." });
  const result = el("tbody");
  const { go, row } = asking("Look the words up", async () => {
    const every = await load("tokens");
    const places = new Map(); // of each text in small letters the most frequent token
    every.texts.forEach((text, place) => places.has(textOf(text).trim().toLowerCase()) || places.set(textOf(text).trim().toLowerCase(), place));
    const typed = area.value.toLowerCase().match(/[\p{L}\p{N}]+|[^\s\p{L}\p{N}]/gu) ?? [];
    const rows = await Promise.all(typed.map(async (text) => {
      const place = places.get(text);
      if (place === undefined) return el("tr", {}, el("td", {}, word(text)), el("td", { class: "soft" }, "no token of the store is just this"));
      const flat = (await load(`tokens/${padded(Math.floor(place / meta().shard))}`))[place % meta().shard];
      const first = [0, 4, 8, 12, 16].filter((at) => at < flat.length).map((at) => [flat[at], flat[at + 1]]);
      return el("tr", {}, el("td", {}, word(every.texts[place])), el("td", {}, ...links(first)));
    }));
    result.replaceChildren(...rows);
    return `${formatted(typed.length)} words`;
  });
  const heads = [["token"], ["features, with their mean activation on it in the store"]];
  return el("div", {}, el("h2", {}, "Which features fire on words"), el("p", {}, "There is no model here to run a sentence. Each word is looked up by itself, in the texts of these pages, whatever stands around it there."), noModel("With the model whole sentences are read."), box(go, el("label", {}, "Words ", area), row), el("div", { class: "scroll" }, el("table", {}, columnHeads(heads), result)));
}

async function showSentence(state) {
  const about = await live();
  return () => {
    const view = document.getElementById("sentence");
    if (view.childElementCount) return; // what is written there stays
    if (!about.model) return view.replaceChildren(storeBox());
    view.replaceChildren(sentenceBox(about), steeringBox(about, state.get("steer") ?? list.order?.[0] ?? 0));
  };
}

// -- steering --------------------------------------------------------------------------------------

function steeringBox(about, feature) {
  if (about.no_steer) return section("Steer", el("p", {}, about.no_steer));
  const area = el("textarea", { rows: 2, maxlength: 20000, placeholder: "Type the beginning of a text." });
  const number = el("input", { type: "number", min: 0, max: meta().features - 1, value: feature });
  const scales = el("input", { type: "text", value: "-5, 2, 5", size: 14 });
  const slider = el("input", { type: "range", min: 0.5, max: 20, step: 0.5, value: 5 });
  slider.addEventListener("input", () => { scales.value = `${-slider.value}, ${slider.value / 2}, ${slider.value}`; });
  const tokens = el("input", { type: "number", min: 1, max: about.new_tokens, value: 40 });
  const chat = checkbox();
  const rows = el("tbody");
  const add = (scale, ...texts) => {
    const cells = texts.map(([text, note, span]) => el("td", { colspan: span, class: "written" }, text, el("p", { class: "soft" }, note)));
    rows.append(el("tr", {}, el("td", { class: "number" }, scale), ...cells));
  };
  const { go, row } = asking("Write", async (signal, say) => {
    const scale = scales.value.split(/[,\s]+/).filter(Boolean).map(Number);
    if (!scale.length || !scale.every(Number.isFinite)) throw new Error("scales must be numbers, such as -5, 2, 5");
    const request = { prompt: asTyped(area, chat), feature: Number(number.value), scale, new_tokens: Number(tokens.value) };
    rows.replaceChildren();
    let [chosen, random] = [null, []];
    const note = ({ kl, added }) => `adds ${added.map(formatted).join(" and ")}; KL ${formatted(kl)}`;
    await ask("steer", request, signal, (part) => {
      if (part.note) return say(part.note);
      say("writing …");
      if (part.untouched !== undefined) {
        random = part.random;
        return add("none", [part.untouched, "untouched", 2]);
      }
      if (part.of === "chosen") chosen = part.dose;
      else add(formatted(chosen.scale), [chosen.text, note(chosen)], [part.dose.text, `feature ${random.join(" and ")}, as long; KL ${formatted(part.dose.kl)}`]);
    });
    return "done";
  });
  const field = (label, ...inputs) => el("label", {}, `${label} `, ...inputs);
  return section(
    "Steer",
    el("p", {}, "What the model writes while a feature is pushed. Scale 1 adds the feature's direction by its mean activation where it fires, at every position. Beside it stands a random feature of equal density, pushed as far: what it changes, too, is not the feature's own."),
    box(go, field("Prompt", area), field("Feature", number), field("Scales", scales), field("Strength", slider), field("New tokens", tokens), el("label", {}, chat, " as a chat message"), row),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "What was written" }, el("table", {}, columnHeads([["scale"], ["feature"], ["random feature of equal density"]]), rows)),
  );
}

featurePanels.push((number) => {
  const panel = el("div");
  live().then((about) => panel.append(about.model ? steeringBox(about, number) : section("Steer", noModel("There is no model here."))));
  return panel;
});

addView("sentence", "Sentence", showSentence);
