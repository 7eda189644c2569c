"""An audit of a page in Chromium for those who read by ear, by keyboard or with weak eyes."""

from __future__ import annotations

from typing import Literal

from tests.analyze.chromium import Chromium

# Contrast of text and background by WCAG 2.2, 1.4.3: 4.5 to 1, large text 3 to 1. CSS filters are
# left out.
_AUDIT = r"""
(() => {
  const wrong = [];
  const report = (element, what) => wrong.push(`${what}: ${element.outerHTML.slice(0, 120)}`);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const shown = (element) => element.checkVisibility({ visibilityProperty: true });
  const named = (element) => {
    const ids = element.getAttribute("aria-labelledby")?.split(" ") ?? [];
    const texts = [element.getAttribute("aria-label"), element.title, element.textContent];
    texts.push(...ids.map((id) => document.getElementById(id)?.textContent));
    texts.push(...[...(element.labels ?? [])].map((label) => label.textContent));
    return texts.some((text) => text?.trim());
  };

  // names
  if (!document.documentElement.lang) wrong.push("the page has no language");
  if (!document.title.trim()) wrong.push("the page has no title");
  if (all("main").filter(shown).length !== 1) wrong.push("there is not one main");
  const controls = "a[href], button, input, select, summary, [role=region], [role=img], nav";
  for (const control of all(controls))
    if (!named(control) && shown(control)) report(control, "no name");
  for (const image of all("img:not([alt])")) report(image, "no alternative");
  for (const svg of all("svg"))
    if (!svg.closest("[role=img], [aria-hidden=true]")) report(svg, "a picture without a name");

  // structure
  for (const table of all("table"))
    if (shown(table) && !table.querySelector("th[scope]")) report(table, "a table without headers");
  for (const header of all("th:not([scope])")) report(header, "a header without scope");
  const levels = all("h1, h2, h3, h4").filter(shown).map((heading) => Number(heading.tagName[1]));
  if (levels.filter((level) => level === 1).length !== 1) wrong.push(`h1 ${levels}`);
  for (const [index, level] of levels.entries())
    if (index && level > levels[index - 1] + 1) wrong.push(`a heading is skipped ${levels}`);
  const ids = all("[id]").map((element) => element.id);
  for (const id of new Set(ids))
    if (ids.filter((other) => other === id).length > 1) wrong.push(`id ${id} is there twice`);

  // keyboard
  for (const element of all("[tabindex]"))
    if (element.tabIndex > 0) report(element, "out of the order");
  for (const element of all("body *")) {
    const style = getComputedStyle(element);
    const overflows = element.scrollWidth > element.clientWidth + 1;
    const scrolls = ["auto", "scroll"].includes(style.overflowX) && overflows;
    const within = element.querySelector("a[href], button, input, [tabindex='0']");
    if (shown(element) && scrolls && element.tabIndex < 0 && !within)
      report(element, "it scrolls, but not by keys");
  }

  // contrast
  const rgba = (text) => {
    const numbers = text.match(/[\d.]+/g).map(Number);
    return [numbers[0], numbers[1], numbers[2], numbers[3] ?? 1];
  };
  const linear = (c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const over = (top, under) => [0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * under[i]);
  const behind = (element) => {
    const layers = [];
    for (let parent = element; parent; parent = parent.parentElement)
      layers.push(rgba(getComputedStyle(parent).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !shown(element) || element.closest("svg")) continue;
    const style = getComputedStyle(element);
    const size = parseFloat(style.fontSize);
    const paper = behind(element);
    const ink = over(rgba(style.color), paper);
    const [low, high] = [light(ink), light(paper)].sort((a, b) => a - b);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < (large ? 3 : 4.5) && !element.disabled)
      report(element, `contrast ${ratio.toFixed(2)}`);
  }
  return [...new Set(wrong)];
})()
"""


def audit(chrome: Chromium, scheme: Literal["light", "dark"] = "light") -> list[str]:
    """What is wrong with the page that is open, a line each."""
    chrome.media(scheme=scheme)
    lines: list[str] = chrome.js(_AUDIT)
    if (chrome.js("matchMedia('(prefers-color-scheme: dark)').matches")) != (scheme == "dark"):
        lines.append(f"the page is not {scheme}")
    return lines
