"use strict";
// The page is whole without this: sorting, the theme, the photograph slider and saving are all that is added.
(() => {
  const root = document.documentElement;
  const table = document.getElementById("table");
  const heads = [...table.tHead.rows[0].cells];

  // The state is in the address, so a sorted table can be linked: #sort=faithfulness:desc
  function state() {
    const found = /^#sort=(.*):(asc|desc)$/.exec(location.hash);
    if (!found) return null;
    let key = found[1];
    try { key = decodeURIComponent(key); } catch { return null; }
    const column = heads.findIndex((h) => h.dataset.key === key);
    return column < 0 ? null : { column, down: found[2] === "desc" };
  }

  function sort() {
    const wanted = state();
    if (!wanted) return;
    const sign = wanted.down ? -1 : 1;
    const rows = [...table.tBodies[0].rows].map((row) => {
      const cell = row.cells[wanted.column];
      return { row, value: "text" in cell.dataset ? cell.dataset.v : Number(cell.dataset.v) };
    });
    // Missing values go last in both directions.
    rows.sort((a, b) => {
      if (typeof a.value === "string") return sign * a.value.localeCompare(b.value);
      const missing = Number.isNaN(a.value) - Number.isNaN(b.value);
      return missing || (Number.isNaN(a.value) ? 0 : sign * (a.value - b.value));
    });
    table.tBodies[0].append(...rows.map((r) => r.row));
    heads.forEach((h, i) => {
      if (i === wanted.column) h.setAttribute("aria-sort", wanted.down ? "descending" : "ascending");
      else h.removeAttribute("aria-sort");
    });
  }

  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const now = head.getAttribute("aria-sort");
    // Numbers start with the highest, words and verdicts with the first.
    const down = now ? now === "ascending" : head.classList.contains("num");
    location.replace("#sort=" + encodeURIComponent(heads[i].dataset.key) + (down ? ":desc" : ":asc"));
  }));
  addEventListener("hashchange", sort);
  sort();

  const theme = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const label = () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
    theme.textContent = isDark ? "Light" : "Dark";
    theme.setAttribute("aria-label", `Switch to the ${isDark ? "light" : "dark"} theme`);
  };
  theme.addEventListener("click", () => {
    root.dataset.theme = theme.textContent.toLowerCase();
    label();
  });
  dark.addEventListener("change", label);
  theme.hidden = false;
  label();

  const photo = document.getElementById("photo");
  if (photo) photo.addEventListener("input", () => root.style.setProperty("--photo", photo.value / 100));

  const save = document.getElementById("save");
  save.hidden = false;
  save.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([document.getElementById("data").textContent], { type: "application/json" }));
    link.download = "audit.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });

  addEventListener("beforeprint", () => document.querySelectorAll("details:not(.data)").forEach((d) => { d.open = true; }));
})();
