"use strict";
// The page is whole without this: choosing a sentence, other bars and arcs, and the theme are all that is added.
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const list = document.getElementById("list");
  const buttons = [...list.querySelectorAll("button")];
  const panel = document.getElementById("panel");
  const own = document.getElementById("own");
  const measure = document.getElementById("measure");
  const matrix = document.getElementById("matrix");
  let kept = null;

  const number = (v) => (v === null ? "–" : v.toPrecision(3)).replace("-", "−");

  function arc(i, j, share, negative) {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const reach = 10 + (data.width - 20) * (Math.abs(j - i) / data.texts.length) ** 0.6;
    const [a, b, edge] = [(i + 0.5) * data.row, (j + 0.5) * data.row, data.width - 4];
    path.setAttribute("d", `M${edge} ${a}C${edge - reach} ${a} ${edge - reach} ${b} ${edge} ${b}`);
    path.setAttribute("class", negative ? "own neg" : "own");
    path.style.setProperty("--s", share);
    return path;
  }

  function line(words, found) {
    const p = document.createElement("p");
    p.textContent = found.length ? `${words} ${found.map(([k, v]) => `${k} (${number(v)})`).join(", ")}` : `${words} none`;
    return p;
  }

  function show(i) {
    buttons.forEach((b) => { b.removeAttribute("aria-current"); b.classList.remove("less"); b.style.removeProperty("--t"); });
    own.replaceChildren();
    list.classList.toggle("chosen", i !== null);
    const p = document.createElement("p");
    if (i === null) {
      p.className = "quiet";
      p.textContent = "No sentence is chosen.";
      panel.replaceChildren(p);
      return;
    }
    buttons[i].setAttribute("aria-current", "true");
    p.className = "whole";
    p.textContent = `${i}  ${data.texts[i]}`;
    panel.replaceChildren(p);
    const scores = document.createElement("p");
    scores.className = "quiet";
    scores.textContent = [...measure.options].map((o) => `${o.textContent}: ${number(data.values[o.value][i])}`).join(" · ");
    panel.append(scores);
    if (!matrix) return;
    const rows = data.matrices[matrix.value];
    const top = Math.max(1e-12, ...rows.flat().map((v) => Math.abs(v ?? 0)));
    const later = rows[i].map((v, j) => [j, v]).filter(([, v]) => v !== null && v !== 0);
    later.forEach(([j, v]) => {
      const share = Math.abs(v) / top;
      if (share > 0.02) own.append(arc(i, j, share, v < 0));
      buttons[j].style.setProperty("--t", share);
      buttons[j].classList.toggle("less", v < 0);
    });
    const strongest = (pairs) => pairs.filter(([, v]) => v > 0).sort((a, b) => b[1] - a[1]).slice(0, 5);
    panel.append(line("Moves most:", strongest(later)));
    panel.append(line("Is moved most by:", strongest(rows.map((r, k) => [k, r[i]]).filter(([, v]) => v !== null))));
  }

  function go(i) {
    buttons.forEach((b, k) => { b.tabIndex = k === i ? 0 : -1; });
    buttons[i].focus();
  }

  buttons.forEach((b, i) => {
    b.addEventListener("mouseenter", () => { if (kept === null) show(i); });
    b.addEventListener("focus", () => { if (kept === null) show(i); });
    b.addEventListener("click", () => { kept = kept === i ? null : i; show(i); });
  });
  list.addEventListener("mouseleave", () => { if (kept === null && !list.contains(document.activeElement)) show(null); });
  list.addEventListener("keydown", (event) => {
    const i = buttons.indexOf(document.activeElement);
    const to = { ArrowDown: i + 1, ArrowUp: i - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (event.key === "Escape") { kept = null; show(null); } else if (i >= 0 && to !== undefined) {
      event.preventDefault();
      kept = null;
      go(Math.min(Math.max(to, 0), buttons.length - 1));
    }
  });

  const chosen = () => buttons.findIndex((b) => b.hasAttribute("aria-current"));
  measure.addEventListener("change", () => {
    buttons.forEach((b, i) => {
      b.querySelector("i").style.setProperty("--w", data.bars[measure.value][i]);
      b.querySelector(".bar").title = number(data.values[measure.value][i]);
    });
  });
  if (matrix) matrix.addEventListener("change", () => {
    list.querySelectorAll("g[data-matrix]").forEach((g) => { g.style.display = g.dataset.matrix === matrix.value ? "" : "none"; });
    if (chosen() >= 0) show(chosen());
  });
  document.getElementById("choices").hidden = false;
  panel.hidden = false;

  const theme = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const label = () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
    theme.textContent = isDark ? "Light" : "Dark";
    theme.setAttribute("aria-label", `Switch to the ${isDark ? "light" : "dark"} theme`);
  };
  theme.addEventListener("click", () => { root.dataset.theme = theme.textContent.toLowerCase(); label(); });
  dark.addEventListener("change", label);
  theme.hidden = false;
  label();
})();
