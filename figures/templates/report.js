"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 700px)");
  const printing = () => root.classList.contains("printing");

  // --- theme: figures are stored in the light palette; every light colour has one dark partner
  const isDark = () => !printing() && (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const triple = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)).join(",");
  const partner = new Map(Object.entries(data.dark).map(([light, dark]) => [triple(light), triple(dark)]));
  const repaint = text => {
    if (/^#[0-9a-f]{6}$/i.test(text)) return partner.has(triple(text)) ? `rgb(${partner.get(triple(text))})` : text;
    const found = /^rgba\((\d+,\d+,\d+),([\d.]+)\)$/.exec(text);
    return found && partner.has(found[1]) ? `rgba(${partner.get(found[1])},${found[2]})` : text;
  };
  const copy = (value, dark, coloured) => {
    if (typeof value === "string") return dark && coloured ? repaint(value) : value;
    if (Array.isArray(value)) return value.map(item => copy(item, dark, coloured));
    if (value === null || typeof value !== "object") return value;
    const out = {};
    for (const [name, item] of Object.entries(value)) {
      const inside = coloured || /color$|colorscale$/.test(name);
      out[name] = name === "bdata" ? item : copy(item, dark, inside);
    }
    return out;
  };

  // --- plots: drawn when first shown, and again when the theme or the width class changes
  const state = section => (section.state ??= {});
  const fits = (wanted, chosen) => Object.entries(wanted || {}).every(([key, value]) => !(key in chosen) || chosen[key] === value);
  const draw = plot => {
    const figure = copy(data.figures[plot.dataset.figure], isDark(), false);
    const chosen = state(plot.closest("section"));
    for (const trace of figure.data) if (trace.meta) trace.visible = fits(trace.meta, chosen);
    const ranges = figure.layout.meta?.ranges;
    if (ranges?.[chosen.layer]) figure.layout.yaxis.range = ranges[chosen.layer];
    // Role names do not fit side by side on a phone: they stand upright there, in a taller head room.
    const roles = (figure.layout.annotations || []).filter(note => note.name === "role");
    if (roles.length && narrow.matches) {
      figure.layout.margin.t += 48;
      figure.layout.height += 48;
      for (const note of roles) Object.assign(note, {textangle: -90, yshift: 2});
    }
    return Plotly.react(plot, figure.data, figure.layout, data.config);
  };
  const shown = plot => !plot.closest(".panel").hidden;
  const plots = [...document.querySelectorAll(".plot")];
  const refresh = () => plots.filter(shown).forEach(draw);

  const apply = section => {
    const chosen = state(section);
    for (const item of section.querySelectorAll("[data-view]")) item.hidden = !fits(JSON.parse(item.dataset.view), chosen);
    for (const plot of section.querySelectorAll(".plot")) if (shown(plot)) draw(plot);
    if (section.id === "tokens") paint(section);
  };
  const read = (section, input) => {
    if (input.type === "radio" && !input.checked) return;
    let value = input.value;
    if (input.type === "range") {
      value = JSON.parse(input.dataset.values)[+input.value];
      const label = JSON.parse(input.dataset.labels)[+input.value];
      input.nextElementSibling.textContent = label;
      input.setAttribute("aria-valuetext", label);
    }
    state(section)[input.dataset.key] = value;
  };

  // --- tokens
  const floats = text => {
    const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  };
  const make = (tag, name, text) => Object.assign(document.createElement(tag), {className: name || "", textContent: text || ""});
  const form = value => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(2);
  let cells = [], current = -1, shownRun = null;
  const paint = section => {
    const chosen = state(section), prompt = data.tokens.prompts[+(chosen.prompt || 0)];
    for (const input of section.querySelectorAll("input[name=tokens-arm]")) {
      input.disabled = !(input.value in prompt.arms);
      input.parentElement.style.opacity = input.disabled ? 0.4 : 1;
    }
    const arm = chosen.arm in prompt.arms ? chosen.arm : Object.keys(prompt.arms)[0];
    const wanted = section.querySelector(`input[name=tokens-arm][value="${CSS.escape(arm)}"]`);
    if (wanted) wanted.checked = true;
    const run = prompt.arms[arm], layer = chosen.layer ?? data.tokens.layers.at(-1);
    const logits = run.logits[layer] ? floats(run.logits[layer]) : new Float32Array(run.tokens.length).fill(NaN);
    const scale = data.tokens.scale[layer] || 1;
    document.getElementById("scale-low").textContent = form(-scale);
    document.getElementById("scale-high").textContent = form(scale);
    const text = document.getElementById("text");
    if (run !== shownRun) {
      text.replaceChildren();
      cells = [];
      let role = null, line = null;
      run.tokens.forEach((word, index) => {
        if (run.roles[index] !== role) {
          const row = make("div", "run");
          row.append(make("h4", "", (role = run.roles[index])), (line = make("div")));
          text.append(row);
        }
        const cell = make("span", "token");
        word.split(/(\n)/).forEach(piece => {
          if (piece === "\n") cell.append(make("span", "sign", "\u21b5"), "\n");
          else cell.append(piece);
        });
        cell.dataset.index = index;
        cells.push(cell);
        line.append(cell);
      });
      shownRun = run;
      current = -1;
    }
    cells.forEach((cell, index) => {
      const value = logits[index];
      cell.logit = value;
      cell.classList.toggle("harm", value > 0);
      cell.classList.toggle("safe", value < 0);
      cell.classList.toggle("none", Number.isNaN(value));
      cell.style.setProperty("--w", `${Math.min(Math.abs(value) / scale, 1) * 60 || 0}%`);
    });
    if (current >= 0) tell(current);
  };
  const tell = index => {
    if (!cells[index]) return;
    cells[current]?.classList.remove("now");
    current = index;
    cells[index].classList.add("now");
    const value = cells[index].logit;
    const word = shownRun.tokens[index].replace(/\n/g, "\u21b5");
    const code = make("code", "", word.length > 60 ? word.slice(0, 59) + "\u2026" : word);
    const logit = make("b", "", Number.isNaN(value) ? "no value" : form(value));
    document.getElementById("readout").replaceChildren(code, "  ", logit, `  ${shownRun.roles[index]}, token ${index + 1} of ${cells.length}`);
  };
  const text = document.getElementById("text");
  if (text) {
    const touch = event => {
      const cell = event.target.closest(".token");
      if (cell) tell(+cell.dataset.index);
    };
    text.addEventListener("pointerover", touch);
    text.addEventListener("click", touch);
    text.addEventListener("keydown", event => {
      const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10}[event.key];
      if (!step) return;
      event.preventDefault();
      tell(Math.max(0, Math.min(cells.length - 1, current + step)));
      cells[current]?.scrollIntoView({block: "nearest"});
    });
  }

  // --- wiring
  for (const section of document.querySelectorAll("section[data-section]")) {
    for (const input of section.querySelectorAll("[data-key]")) {
      read(section, input);
      input.addEventListener("input", () => { read(section, input); apply(section); });
    }
  }
  const button = document.getElementById("theme");
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  const asked = new URLSearchParams(location.search).get("theme");
  if (asked === "dark" || asked === "light") root.dataset.theme = asked;
  button.hidden = false;
  name();
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); refresh(); });
  system.addEventListener("change", () => { name(); refresh(); });
  narrow.addEventListener("change", refresh);
  // Plots are measured when they are drawn: lay the page out at paper width first.
  const print = on => () => { root.classList.toggle("printing", on); refresh(); };
  addEventListener("beforeprint", print(true));
  addEventListener("afterprint", print(false));

  // One section at a time, so that the page answers while the later figures are still being drawn.
  const queue = [...document.querySelectorAll("section[data-section]")];
  const next = () => { const section = queue.shift(); if (section) { apply(section); setTimeout(next); } else root.dataset.ready = "yes"; };
  next();

  const links = new Map([...document.querySelectorAll("nav a")].map(link => [link.hash.slice(1), link]));
  const spy = new IntersectionObserver(entries => {
    for (const entry of entries) if (entry.isIntersecting) {
      links.forEach(link => link.classList.remove("here"));
      links.get(entry.target.id)?.classList.add("here");
    }
  }, {rootMargin: "-10% 0px -75% 0px"});
  links.forEach((_, id) => { const target = document.getElementById(id); if (target) spy.observe(target); });
})();
