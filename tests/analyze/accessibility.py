"""What every page owes those who read it by ear, by keyboard or with weak eyes: an audit of a page
in Chromium.
"""

from __future__ import annotations

from typing import Literal

from tests.analyze.chromium import Chromium

# Of text on what is behind it, WCAG 2.2, 1.4.3: 4.5 to 1, large text 3 to 1. What a CSS filter
# changes is left out.
_AUDIT = r"""
(() => {
  const found = [];
  const say = (one, what) => found.push(`${what}: ${one.outerHTML.slice(0, 120)}`);
  const every = (selector) => [...document.querySelectorAll(selector)];
  const shown = (one) => one.checkVisibility({ visibilityProperty: true });
  const named = (one) => {
    const by = one.getAttribute("aria-labelledby")?.split(" ").map((id) => document.getElementById(id)?.textContent);
    const said = [one.getAttribute("aria-label"), one.title, one.textContent, ...(by ?? [])];
    said.push(...[...(one.labels ?? [])].map((label) => label.textContent));
    return said.some((text) => text?.trim());
  };
  if (!document.documentElement.lang) found.push("the page has no language");
  if (!document.title.trim()) found.push("the page has no title");
  if (every("main").filter(shown).length !== 1) found.push("there is not one main");
  for (const one of every("a[href], button, input, select, summary, [role=region], [role=img], nav"))
    if (!named(one) && shown(one)) say(one, "it has no name");
  for (const one of every("img:not([alt])")) say(one, "it has no alternative");
  for (const one of every("svg"))
    if (!one.closest("[role=img], [aria-hidden=true]")) say(one, "a picture without a name");
  for (const one of every("table"))
    if (shown(one) && !one.querySelector("th[scope]")) say(one, "a table without headers");
  for (const one of every("th:not([scope])")) say(one, "a header of what");
  for (const one of every("[tabindex]")) if (one.tabIndex > 0) say(one, "it is out of the order");
  const levels = every("h1, h2, h3, h4").filter(shown).map((one) => Number(one.tagName[1]));
  if (levels.filter((level) => level === 1).length !== 1) found.push(`h1 ${levels}`);
  for (const [at, level] of levels.entries())
    if (at && level > levels[at - 1] + 1) found.push(`a heading is skipped ${levels}`);
  const ids = every("[id]").map((one) => one.id);
  for (const id of new Set(ids)) if (ids.filter((one) => one === id).length > 1) found.push(`id ${id} is there twice`);
  for (const one of every("body *")) {
    const style = getComputedStyle(one);
    const scrolls = ["auto", "scroll"].includes(style.overflowX) && one.scrollWidth > one.clientWidth + 1;
    const within = one.querySelector("a[href], button, input, [tabindex='0']");
    if (shown(one) && scrolls && one.tabIndex < 0 && !within) say(one, "it scrolls, but not by keys");
  }
  const rgba = (text) => { const n = text.match(/[\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const linear = (c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const over = (top, under) => [0, 1, 2].map((at) => top[3] * top[at] + (1 - top[3]) * under[at]);
  const behind = (one) => {
    const layers = [];
    for (let at = one; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const one = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !shown(one) || one.closest("svg")) continue;
    const style = getComputedStyle(one), size = parseFloat(style.fontSize), paper = behind(one);
    const ink = over(rgba(style.color), paper);
    const [low, high] = [light(ink), light(paper)].sort((a, b) => a - b);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < (large ? 3 : 4.5) && !one.disabled) say(one, `contrast ${ratio.toFixed(2)}`);
  }
  return [...new Set(found)];
})()
"""


def audit(chrome: Chromium, scheme: Literal["light", "dark"] = "light") -> list[str]:
    """What is wrong with the page that is open, a line each."""
    chrome.media(scheme=scheme)
    lines: list[str] = chrome.js(_AUDIT)
    if (chrome.js("matchMedia('(prefers-color-scheme: dark)').matches")) != (scheme == "dark"):
        lines.append(f"the page is not {scheme}")
    return lines
