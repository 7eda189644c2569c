"use strict";
// The view of tokens: which features fire on each.

const MATCHES = 60;

// Positions of the tokens that equal the query, then of those that begin with it, then of those that hold it.
// Each group keeps the order of `texts`: the frequent ones first.
function tokensLike(query, texts) {
  const wanted = query.toLowerCase();
  const groups = [[], [], []];
  texts.forEach((text, position) => {
    const small = textOf(text).toLowerCase();
    const bare = small.trim();
    if (small === wanted || bare === wanted.trim()) groups[0].push(position);
    else if (small.startsWith(wanted) || bare.startsWith(wanted)) groups[1].push(position);
    else if (small.includes(wanted)) groups[2].push(position);
  });
  return groups.flat();
}

async function showTokens(state) {
  const [every] = await Promise.all([load("tokens"), load("table")]);
  const query = state.get("tokens") || "";
  const matches = query ? tokensLike(query, every.texts) : [...every.texts.keys()].slice(0, MATCHES);
  let chosen = state.get("id") === null ? -1 : every.ids.indexOf(Number(state.get("id")));
  if (chosen < 0 && query && matches.length) chosen = matches[0];
  const { shard } = meta();
  const fires = chosen < 0 ? null : (await load(`tokens/${padded(Math.floor(chosen / shard))}`))[chosen % shard];
  const links = matches.slice(0, MATCHES).map((position) => {
    const id = every.ids[position];
    const title = `token ${id}, ${formatted(every.occurrences[position])} times`;
    const attributes = { href: hashOf({ tokens: query, id }), "aria-current": position === chosen ? "true" : null, title };
    return el("li", {}, el("a", attributes, word(every.texts[position])));
  });
  return () => {
    const input = document.getElementById("token-q");
    if (input !== document.activeElement) input.value = query;
    document.getElementById("tokens-found").textContent = query ? `${formatted(matches.length)} ${matches.length === 1 ? "token" : "tokens"}` : `${formatted(every.ids.length)} tokens; the most frequent:`;
    document.getElementById("matches").replaceChildren(...links);
    document.getElementById("token").replaceChildren(...(fires ? tokenPart(chosen, every, fires) : []));
  };
}

// The features that fire on the token at a position of the list.
function tokenPart(position, every, fires) {
  const rows = [];
  for (let from = 0; from < fires.length; from += 4) {
    const [feature, mean, share, ofFeature] = fires.slice(from, from + 4);
    const cells = [formatted(mean), percent(share), percent(ofFeature)].map((text) => el("td", { class: "number" }, text));
    rows.push(el("tr", {}, el("td", { class: "number" }, featureLink(feature)), ...cells, el("td", { class: "words" }, ...words(feature).strongest.map(word))));
  }
  const heads = [
    ["feature", "its number"],
    ["mean activation", "over all occurrences of the token"],
    ["fires on", "share of the token's occurrences"],
    ["of its activation", "share of all of the feature's activation that is on this token"],
  ].map(([label, about]) => el("th", { scope: "col", class: "number", title: about }, label));
  heads.push(el("th", { scope: "col" }, "strongest at"));
  return [
    el("h2", { tabindex: "-1" }, "Features that fire on ", word(every.texts[position])),
    el("p", { class: "soft" }, `Token ${every.ids[position]}, ${formatted(every.occurrences[position])} times in the texts of these pages; the ${rows.length} largest mean activations.`),
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows))),
  ];
}

addView("tokens", "Tokens", showTokens);
