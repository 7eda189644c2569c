"use strict";
// The chosen feature's activation as the colour of each token, and in its title.
for (const section of document.querySelectorAll("section")) {
  const tokens = [...section.querySelectorAll(".strip span")];
  const titles = tokens.map((token) => token.title);
  const buttons = [...section.querySelectorAll("button")];
  const status = section.querySelector(".chosen");
  const largest = (values) => Math.max(...values);

  function choose(button) {
    const values = new Map();
    const own = JSON.parse(button.dataset.values);
    JSON.parse(button.dataset.tokens).forEach((token, index) => values.set(token, own[index]));
    tokens.forEach((token, index) => {
      const value = values.get(index) ?? 0;
      token.style.setProperty("--shade", value ? (0.1 + 0.6 * (value / largest(own))).toFixed(3) : 0);
      token.title = index ? `feature ${button.dataset.feature}: ${Number(value.toPrecision(4))}\n${titles[index]}` : titles[0];
    });
    for (const other of buttons) other.setAttribute("aria-pressed", other === button);
    status.textContent = `Coloured by feature ${button.dataset.feature}, up to ${Number(largest(own).toPrecision(4))}.`;
  }

  // Where nothing can point at a token, a click tells the same.
  for (const token of tokens) token.addEventListener("click", () => (status.textContent = `${token.textContent.trim()}: ${token.title}`));
  for (const button of buttons) button.addEventListener("click", () => choose(button));
  if (buttons.length) choose(buttons[0]);
}
