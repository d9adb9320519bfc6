"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const [layer, search, sort, list, masked] = ["layer", "search", "sort", "units", "masked"].map(get);
  const [height, width] = data.mask;
  let shown = []; // rows of the list, in order
  let current = null;

  // ---- small things

  const number = (v, digits = 3) => (v === null || v === undefined ? "–" : Number(v.toPrecision(digits)).toString()).replace("-", "−");
  const signed = (v, digits = 3) => (v > 0 ? "+" : "") + number(v, digits);
  const percent = (v) => (v === null || v === undefined ? "–" : `${number(100 * v, 3)} %`);
  const named = (c) => data.classes[c] ?? `class ${c}`;
  const spot = (u) => `${data.layers[u.site].site} · ${u.unit}`;
  const told = (u) => (u.fires ? u.text || "no description" : "never fires");

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(properties)) {
      if (key === "class") element.className = value;
      else if (key.startsWith("--")) element.style.setProperty(key, value);
      else if (key in element && key !== "style") element[key] = value;
      else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  /** Masks of a unit, one bit a place, as arrays of 0 and 1. */
  function masksOf(u) {
    const bytes = Uint8Array.from(atob(u.masks), (c) => c.charCodeAt(0));
    const size = height * width;
    return u.exemplars.map((_, j) => Uint8Array.from({ length: size }, (_, i) => (bytes[(j * size + i) >> 3] >> (7 - ((j * size + i) & 7))) & 1));
  }

  /** A veil over the places where the unit does not fire; the browser smooths it when it enlarges it. */
  function veil(mask) {
    const canvas = make("canvas", { width, height, "aria-hidden": "true" });
    const image = new ImageData(width, height);
    mask.forEach((on, i) => image.data.set([14, 11, 20, on ? 0 : 196], 4 * i));
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  function save(name, type, text) {
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // ---- the list

  layer.append(...data.layers.map((l, i) => make("option", { value: String(i), textContent: l.site })));
  if (data.layers.length > 1) layer.append(make("option", { value: "all", textContent: "all layers" }));
  layer.value = String(data.layers.length - 1);

  function matches(u, words) {
    if (!words) return true;
    if (/^\d+$/.test(words)) return String(u.unit).startsWith(words);
    return [u.text, ...u.others.map(([t]) => t)].join("\n").toLowerCase().includes(words);
  }

  const gauge = () => (sort.value === "unit" ? "selectivity" : sort.value);

  function entry(i) {
    const u = data.units[i];
    const key = gauge();
    const top = Math.max(1e-30, ...shown.map((k) => Math.abs(data.units[k][key] ?? 0)));
    const first = u.exemplars[0];
    const where = layer.value === "all" ? data.layers[u.site].site : u.others.length && u.fires ? u.others[0][0] : "";
    const button = make("button", { type: "button", tabIndex: -1, title: `${key}: ${number(u[key])}`, "data-row": String(i), class: u.fires ? "" : "silent" },
      make("span", { class: "n", textContent: String(u.unit) }),
      make("img", { class: "thumb", alt: "", src: data.pictures[first[0]].src, loading: "lazy" }),
      make("span", { class: "says" }, make("span", { textContent: told(u) }), make("span", { class: "where", textContent: where })),
      make("span", { class: "gauge" }, make("i", { "--w": String(Math.abs(u[key] ?? 0) / top) })));
    button.addEventListener("click", () => choose(i));
    return make("li", {}, button);
  }

  function fill() {
    const words = search.value.trim().toLowerCase();
    const rows = data.units.map((_, i) => i).filter((i) => layer.value === "all" || data.units[i].site === Number(layer.value));
    const value = (i) => data.units[i][sort.value] ?? -Infinity;
    shown = rows.filter((i) => matches(data.units[i], words));
    if (sort.value !== "unit") shown.sort((a, b) => value(b) - value(a) || a - b);
    list.replaceChildren(...shown.map(entry));
    const elsewhere = words && layer.value !== "all" ? data.units.filter((u) => u.site !== Number(layer.value) && matches(u, words)).length : 0;
    get("found").textContent = `${shown.length} of ${rows.length} units${elsewhere ? `, ${elsewhere} in other layers` : ""}; bars: ${gauge() === "score" ? "score of the description" : gauge()}`;
    mark();
  }

  function mark() {
    const buttons = [...list.querySelectorAll("button")];
    buttons.forEach((b) => { b.tabIndex = -1; b.removeAttribute("aria-current"); });
    const here = buttons.find((b) => Number(b.dataset.row) === current);
    if (here) here.setAttribute("aria-current", "true");
    if (here || buttons[0]) (here ?? buttons[0]).tabIndex = 0;
    const at = shown.indexOf(current);
    get("previous").disabled = at <= 0;
    get("next").disabled = at >= shown.length - 1;
    return here;
  }

  // ---- the sheet

  function shot(u, [picture, activation], mask) {
    const p = data.pictures[picture];
    const label = p.label === null ? "" : named(p.label);
    return make("figure", {},
      make("span", { class: "shot" }, make("img", { src: p.src, alt: label ? `${p.name}: ${label}` : p.name }), veil(mask)),
      make("figcaption", { title: label ? `${p.name}: ${label}` : p.name }, make("b", { textContent: number(activation) }), ` ${label || p.name}`));
  }

  function exemplars(u) {
    const masks = masksOf(u);
    const facets = [...new Set(u.exemplars.map(([, , f]) => f))].sort((a, b) => (a < 0) - (b < 0) || a - b);
    const several = facets.filter((f) => f >= 0).length > 1;
    const about = get("facets");
    about.hidden = !several;
    if (several) about.textContent = `The images in which it fires fall into ${facets.filter((f) => f >= 0).length} facets, with a mean silhouette of ${number(u.silhouette)}: ${u.silhouette > data.apart ? "they stand apart" : "they do not stand apart"}.`;
    get("shots").replaceChildren(...facets.map((f) => {
      const mine = u.exemplars.map((e, j) => [e, masks[j]]).filter(([e]) => e[2] === f);
      const title = f < 0 ? "It fires nowhere; its largest activations" : several ? `Facet ${f + 1}` : "";
      const grid = make("div", { class: "shots" }, ...mine.map(([e, m]) => shot(u, e, m)));
      if (u.synthesis[f]) grid.prepend(make("figure", { class: "synth" }, make("span", { class: "shot" }, make("img", { src: u.synthesis[f], alt: `Synthetic picture of facet ${f + 1}` })), make("figcaption", { textContent: "synthetic" })));
      if (f < 0 && u.fires) return make("details", { class: "facet" }, make("summary", { textContent: `${mine.length} more in which it does not fire` }), grid);
      return make("div", { class: "facet" }, ...(title ? [make("p", { textContent: title })] : []), grid);
    }));
  }

  function effects(u) {
    const box = get("effects");
    if (!box) return;
    get("off-about").textContent = u.images ? `mean over ${u.images} image${u.images === 1 ? "" : "s"} in which it fires` : "";
    if (!u.changes.length) {
      box.replaceChildren(make("p", { class: "quiet", textContent: u.images ? "No output changes." : "It never fires: there is nothing to switch off." }));
      return;
    }
    const top = Math.max(...u.changes.map(([, v]) => Math.abs(v)));
    const cells = (...texts) => texts.map((t) => make("span", { class: "num", textContent: t }));
    box.replaceChildren(
      make("div", { class: "row head", "aria-hidden": "true" }, make("span", { textContent: "class" }), make("span", { class: "ends" }, make("span", { textContent: "falls without it" }), make("span", { textContent: "rises without it" })), ...cells("output", "probability")),
      ...u.changes.map(([c, v, p]) => make("div", { class: "row" }, make("span", { textContent: named(c), title: named(c) }),
        make("span", { class: "track", "aria-hidden": "true" }, make("i", { class: v < 0 ? "less" : "", "--w": String(Math.abs(v) / top) })),
        ...cells(signed(v), p === null ? "–" : `${signed(100 * p, 2)} pp`))));
  }

  function likes(u) {
    get("likes").replaceChildren(...u.similar.map((s) => {
      const known = s.row === null ? null : data.units[s.row];
      const text = make("span", {}, make("span", { textContent: known ? told(known) : `unit ${s.unit}` }),
        make("span", { class: "soft", textContent: `${data.layers[s.site].site} · ${s.unit}` }),
        make("span", { class: "soft", textContent: `r = ${number(s.r, 2)}${known ? "" : " · not shown"}` }));
      const picture = s.picture !== null ? make("img", { alt: "", src: data.pictures[s.picture].src }) : make("span", { class: "blank" });
      const card = make(known ? "button" : "div", known ? { type: "button" } : {}, picture, text);
      if (known) card.addEventListener("click", () => { choose(s.row); get("sheet").focus({ preventScroll: true }); });
      return card;
    }));
    if (!u.similar.length) get("likes").append(make("p", { class: "quiet", textContent: "None: it answers to all images alike." }));
  }

  function draw() {
    const u = data.units[current];
    get("where").textContent = `${data.layers[u.site].site} · unit ${u.unit}`;
    get("said").textContent = u.fires ? u.text || `Unit ${u.unit}` : "Never fires";
    get("said").className = u.fires && u.text ? "" : "none";
    get("also").textContent = u.others.length ? `Also: ${u.others.map(([t, v]) => `${t} (${number(v, 2)})`).join("; ")}` : "";
    const facts = [["selectivity", number(u.selectivity)], ["fires in exemplars", `${u.images} of ${u.exemplars.length}`], ["fires above", number(u.threshold)],
      ...(u.text ? [["score of the description", number(u.score)]] : []), ...(get("effects") ? [["predicted class without it", u.predicted && u.images ? signed(u.predicted[0]) : "–"], ["another class predicted", percent(u.flips)]] : [])];
    get("figures").replaceChildren(...facts.map(([k, v]) => make("div", {}, make("dt", { textContent: k }), make("dd", { textContent: v }))));
    exemplars(u);
    effects(u);
    likes(u);
  }

  const address = (u) => `#${encodeURIComponent(data.layers[u.site].site)}/${u.unit}`;

  function choose(i, { write = true } = {}) {
    current = i;
    const u = data.units[i];
    if (layer.value !== "all" && Number(layer.value) !== u.site) { layer.value = String(u.site); search.value = ""; fill(); }
    if (!shown.includes(i)) { search.value = ""; fill(); }
    draw();
    mark()?.scrollIntoView({ block: "nearest" });
    if (write) history.replaceState(null, "", address(u));
  }

  function fromAddress() {
    const cut = location.hash.lastIndexOf("/");
    if (cut < 0) return false;
    let site;
    try { site = decodeURIComponent(location.hash.slice(1, cut)); } catch { return false; }
    const found = data.units.findIndex((u) => data.layers[u.site].site === site && String(u.unit) === location.hash.slice(cut + 1));
    if (found < 0) return false;
    choose(found, { write: false });
    return true;
  }

  function step(by) {
    const at = shown.indexOf(current);
    const to = at < 0 ? 0 : Math.min(Math.max(at + by, 0), shown.length - 1);
    if (shown.length) choose(shown[to]);
  }

  // ---- what people do

  layer.addEventListener("change", () => { fill(); if (shown.length) choose(shown[0]); });
  sort.addEventListener("change", fill);
  search.addEventListener("input", fill);
  search.addEventListener("keydown", (event) => { if (event.key === "Enter" && shown.length) choose(shown[0]); });
  masked.addEventListener("change", () => get("sheet").classList.toggle("bare", !masked.checked));
  get("previous").addEventListener("click", () => step(-1));
  get("next").addEventListener("click", () => step(1));
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) return;
    const inList = list.contains(document.activeElement);
    const by = { ArrowDown: 1, ArrowUp: -1, ...(inList ? { Home: -1e9, End: 1e9 } : {}) }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    step(by);
    if (inList) list.querySelector("[aria-current]")?.focus();
  });
  addEventListener("hashchange", fromAddress);

  const quoted = (v) => `"${String(v ?? "").replace(/"/g, '""').replace(/^([=+\-@\t\r])/, "'$1")}"`;
  const bare = (u) => ({ ...u, layer: data.layers[u.site].site, masks: undefined, synthesis: undefined,
    exemplars: u.exemplars.map(([p, a, f]) => ({ image: data.pictures[p].id, name: data.pictures[p].name, activation: a, facet: f < 0 ? null : f + 1 })),
    changes: u.changes.map(([c, v, p]) => ({ class: c, name: named(c), output: v, probability: p })),
    similar: u.similar.map((s) => ({ layer: data.layers[s.site].site, unit: s.unit, r: s.r })) });
  get("save-json").addEventListener("click", () => save(`unit-${data.units[current].unit}.json`, "application/json", JSON.stringify(bare(data.units[current]), null, 1)));
  get("save-csv").addEventListener("click", () => {
    const u = bare(data.units[current]);
    const lines = [["kind", "number", "name", "value", "facet or probability"], ...u.exemplars.map((e) => ["image", e.image, e.name, e.activation, e.facet]),
      ...u.changes.map((c) => ["class", c.class, c.name, c.output, c.probability]), ...u.similar.map((s) => ["similar", s.unit, s.layer, s.r, ""])];
    save(`unit-${u.unit}.csv`, "text/csv", lines.map((l) => l.map((v) => (typeof v === "number" ? v : quoted(v))).join(",")).join("\r\n"));
  });
  get("save-all").addEventListener("click", () => save("units.json", "application/json", JSON.stringify({ model: data.model, n_images: data.n_images, layers: data.layers, units: data.units.map(bare) })));

  const ranges = (numbers) => {
    const parts = [];
    numbers.forEach((n) => { const last = parts[parts.length - 1]; if (last && n === last[1] + 1) last[1] = n; else parts.push([n, n]); });
    return parts.map(([a, b]) => (a === b ? a : `${a}–${b}`)).join(", ");
  };
  get("rest").textContent = data.layers.map((l, s) => {
    const here = new Set(data.units.filter((u) => u.site === s).map((u) => u.unit));
    const rest = [...Array(l.total).keys()].filter((n) => !here.has(n));
    return `${l.site}: ${rest.length ? `${rest.length} of ${l.total} (${ranges(rest)})` : "none"}${l.silent.length ? `; ${l.silent.length} never fire (${ranges(l.silent)})` : ""}`;
  }).join("\n");

  const theme = get("theme");
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

  const picture = new Image();
  picture.addEventListener("load", () => root.style.setProperty("--ratio", `${picture.naturalWidth} / ${picture.naturalHeight}`));
  picture.src = data.pictures[0].src;
  get("room").hidden = false;
  get("save-all").hidden = false;
  fill();
  if (!fromAddress() && shown.length) choose(shown[0], { write: false });
})();
