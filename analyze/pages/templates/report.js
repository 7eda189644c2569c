"use strict";
// What a page cannot know when it is made: which studies came after it, and what lies beside it.
// studies/index.js tells; without it the page is alone.
const newer = document.getElementById("newer");
const shown = JSON.parse(newer.dataset.shown);
const others = Object.entries(globalThis.STUDIES ?? {}).filter(([name, digest]) => shown[name] !== digest);
if (others.length) {
  const names = others.map(([name]) => `study=${name}`).join(", ");
  newer.textContent = `Not on this page, because it was done later: ${names}. study=report makes the page anew.`;
  newer.hidden = false;
}
const alone = globalThis.STUDIES === undefined;
document.getElementById("alone").hidden = !alone;
for (const link of document.querySelectorAll("a:not([href^='#'])")) {
  // A server gives the run's folder, and nothing beside it.
  const leads = !alone && !(globalThis.SERVED && link.getAttribute("href").startsWith("../"));
  if (!leads) link.closest(".file")?.remove() ?? link.replaceWith(...link.childNodes);
}
