"use strict";
// Which features fire on a token.

const MATCHES = 60;

// Tokens that are the query, then those that begin with it, then those that hold it; the frequent ones first in each.
function tokensLike(query, texts) {
  const wanted = query.toLowerCase();
  const groups = [[], [], []];
  texts.forEach((text, at) => {
    const small = text.toLowerCase();
    const bare = small.trim();
    if (small === wanted || bare === wanted.trim()) groups[0].push(at);
    else if (small.startsWith(wanted) || bare.startsWith(wanted)) groups[1].push(at);
    else if (small.includes(wanted)) groups[2].push(at);
  });
  return groups.flat();
}

async function showTokens(state) {
  const [every] = await Promise.all([load("tokens"), load("table")]);
  const query = state.get("tokens") || "";
  const found = query ? tokensLike(query, every.texts) : [...every.texts.keys()].slice(0, MATCHES);
  const asked = state.get("id") === null ? -1 : every.ids.indexOf(Number(state.get("id")));
  const chosen = asked >= 0 ? asked : query && found.length ? found[0] : -1;
  const fires = chosen < 0 ? null : (await load(`tokens/${padded(Math.floor(chosen / meta().shard))}`))[chosen % meta().shard];
  const links = found.slice(0, MATCHES).map((at) => {
    const to = where({ tokens: query, id: every.ids[at] });
    return el("li", {}, el("a", { href: to, "aria-current": at === chosen ? "true" : null, title: `token ${every.ids[at]}, ${said(every.occurrences[at])} times` }, word(every.texts[at])));
  });
  return () => {
    const input = document.getElementById("token-q");
    if (input !== document.activeElement) input.value = query;
    document.getElementById("tokens-found").textContent = query ? `${said(found.length)} ${found.length === 1 ? "token" : "tokens"}` : `${said(every.ids.length)} tokens; the most frequent:`;
    document.getElementById("matches").replaceChildren(...links);
    document.getElementById("token").replaceChildren(...(fires ? tokenPart(chosen, every, fires) : []));
  };
}

function tokenPart(at, every, fires) {
  const rows = [];
  for (let from = 0; from < fires.length; from += 4) {
    const [feature, mean, share, ofFeature] = fires.slice(from, from + 4);
    const cells = [said(mean), percent(share), percent(ofFeature)].map((text) => el("td", { class: "number" }, text));
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
    el("h2", { tabindex: "-1" }, "Features that fire on ", word(every.texts[at])),
    el("p", { class: "soft" }, `Token ${every.ids[at]}, ${said(every.occurrences[at])} times in the catalogue's rows; the ${rows.length} largest mean activations.`),
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows))),
  ];
}
