"use strict";
// Names the studies that this page does not show as they are now. Without studies/index.js it is silent.
const newer = document.getElementById("newer");
const shown = JSON.parse(newer.dataset.shown);
const others = Object.entries(globalThis.STUDIES ?? {}).filter(([name, digest]) => shown[name] !== digest);
if (others.length) {
  const names = others.map(([name]) => `study=${name}`).join(", ");
  newer.textContent = `Done after this page was made: ${names}. study=report makes it anew.`;
  newer.hidden = false;
}
