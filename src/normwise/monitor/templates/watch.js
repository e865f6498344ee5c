// Draws the log of a monitor: the loss, a heat map of layers over steps, and the curves of each opened layer.
"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("script");
  const style = getComputedStyle(root); // live: follows light, dark and paper
  const ink = (name) => style.getPropertyValue(`--${name}`).trim();
  const data = JSON.parse(document.getElementById("data").textContent);
  const { steps, names } = data, count = steps.length;
  const plots = [];

  function element(name, properties = {}, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

{% include "axes.js" %}

  // ---- the numbers --------------------------------------------------------------------------------------
  const tables = {};
  for (const [quantity, { low, span, codes }] of Object.entries(data.quantities)) {
    const bytes = Uint8Array.from(atob(codes), (c) => c.charCodeAt(0));
    const words = new DataView(bytes.buffer);
    const at = (layer, k) => (codes ? words.getUint16(2 * (layer * count + k), true) : 0);
    tables[quantity] = (layer, k) => {
      const code = at(layer, k);
      return code ? 10 ** (low + (span * (code - 1)) / 65534) : null;
    };
  }
  const column = (quantity, layer) => steps.map((_, k) => tables[quantity](layer, k));
  const some = (values) => values.some((v) => v !== null);

  // ---- curves -------------------------------------------------------------------------------------------
  // One plot: what was measured, and where there is one the equilibrium with a band of 20 % around it.
  function plot(box, title, values, settled, log) {
    const at = element("span", { className: "at" });
    const caption = element("figcaption", {}, title, " ", at);
    const canvas = element("div", { className: "plot" });
    box.append(element("figure", {}, caption, canvas));
    const positive = values.map((v) => (log && !(v > 0) ? null : v));
    const rows = [steps, positive], series = [{}];
    const line = (name, dash) => ({ stroke: () => ink(name), width: 2, dash, points: { show: count < 3 } });
    series.push(line("series-0"));
    const bands = [];
    if (settled && some(settled)) {
      const times = (f) => settled.map((v) => (v === null ? null : v * f));
      rows.push(settled, times(1.2), times(0.8));
      const edge = { stroke: "transparent", width: 0, points: { show: false } };
      series.push(line("series-1", [6, 4]), edge, edge);
      bands.push({ series: [3, 4], fill: () => `${ink("series-1")}2e` });
    }
    const range = (u, low, high) => extent(rows.slice(1).flat(), log);
    const size = () => ({ width: Math.max(180, canvas.clientWidth), height: 190 });
    const u = new uPlot({
      ...size(),
      legend: { show: false },
      padding: [8, 10, 0, 0],
      scales: { x: { time: false }, y: { distr: log ? 3 : 1, range } },
      axes: [axis(false, true), axis(log, false)],
      series,
      bands,
      cursor: { y: false, drag: { x: true, y: false } },
      hooks: {
        setCursor: [(u) => {
          const k = u.cursor.idx;
          const there = k != null && u.cursor.left >= 0;
          const wanted = there && rows[2] ? `, equilibrium ${number(rows[2][k])}` : "";
          at.textContent = there ? `${number(rows[1][k])}${wanted} at ${steps[k]}` : "";
        }],
      },
    }, rows, canvas);
    plots.push(u);
    new ResizeObserver(() => u.setSize(size())).observe(canvas);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${title} over steps, at the end ${number(values[count - 1])}`);
    return u;
  }

  function draw(details) {
    const box = details.querySelector(".plots"), k = Number(details.dataset.number);
    if (box.childElementCount || !count) return;
    plot(box, "norm", column("norm", k), column("equilibrium_norm", k), true);
    const turn = column("rotation", k);
    if (some(turn)) {
      plot(box, "turn per step", turn, column("equilibrium_rotation", k), true);
      plot(box, "effective rate", column("effective_lr", k), null, true);
    }
  }

  const layers = [...document.querySelectorAll("details.layer")];
  layers.forEach((details) => details.addEventListener("toggle", () => details.open && draw(details)));

  function open(number) {
    const details = document.getElementById(`layer-${number}`);
    if (!details) return;
    details.closest(".group").hidden = details.hidden = false;
    const fold = details.closest(".fold");
    if (fold) fold.open = true;
    details.open = true;
    draw(details);
    details.scrollIntoView({ block: "center" });
    details.querySelector("summary").focus({ preventScroll: true });
  }
  const jump = () => {
    const found = /^#layer-(\d+)$/.exec(location.hash);
    if (found) open(found[1]);
  };
  addEventListener("hashchange", jump);
  document.querySelectorAll(".where a").forEach((a) => a.addEventListener("click", () => setTimeout(jump)));

  const lossBox = document.getElementById("loss-plot");
  if (lossBox && count) plot(lossBox, "mean since the row before", data.loss, null, false);

  // ---- filter -------------------------------------------------------------------------------------------
  const filter = document.getElementById("filter"), shown = document.getElementById("shown");
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    let left = 0;
    layers.forEach((details) => {
      details.hidden = !details.dataset.name.toLowerCase().includes(wanted);
      left += !details.hidden;
    });
    document.querySelectorAll(".group").forEach((group) => {
      group.hidden = [...group.querySelectorAll(".layer")].every((details) => details.hidden);
      const fold = group.querySelector(".fold");
      if (fold && wanted && !group.hidden) fold.open = true;
    });
    shown.textContent = wanted ? `${left} of ${layers.length} layers` : `${layers.length} layers`;
  });

  // ---- heat map -----------------------------------------------------------------------------------------
  const heat = document.getElementById("heat"), said = document.getElementById("heat-at");
  const WORDS = { rotation: "turn per step", norm: "norm", effective_lr: "effective rate" };
  let quantity = "rotation", place = null, rows = [], box = null;

  function paint() {
    rows = names.map((_, k) => k).filter((k) => some(column(quantity, k)));
    const width = heat.clientWidth, tall = Math.max(3, Math.min(18, Math.floor(560 / Math.max(1, rows.length))));
    const height = Math.max(24, tall * rows.length), ratio = devicePixelRatio || 1;
    heat.style.height = `${height + 18}px`;
    [heat.width, heat.height] = [width * ratio, (height + 18) * ratio];
    const pen = heat.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = "11px system-ui, sans-serif";
    const room = Math.min(width * 0.32, Math.max(40, ...rows.map((k) => pen.measureText(names[k]).width + 8)));
    box = { left: room, width: width - room, height, tall };
    let [low, high] = [Infinity, -Infinity];
    for (const k of rows) for (const v of column(quantity, k)) if (v !== null) {
      low = Math.min(low, Math.log10(v)); high = Math.max(high, Math.log10(v));
    }
    const last = data.colors.length - 1;
    rows.forEach((k, r) => column(quantity, k).forEach((v, n) => {
      if (v === null) return;
      pen.fillStyle = data.colors[high > low ? Math.round((last * (Math.log10(v) - low)) / (high - low)) : last >> 1];
      const x = Math.floor(box.left + (n * box.width) / count), end = Math.ceil(box.left + ((n + 1) * box.width) / count);
      pen.fillRect(x, r * tall, end - x, tall > 5 ? tall - 1 : tall);
    }));
    pen.fillStyle = ink("ink");
    pen.textBaseline = "middle";
    const every = Math.ceil(12 / tall); // as many names as there is room for
    rows.forEach((k, r) => {
      if (r % every) return;
      let text = names[k];
      while (text.length > 3 && pen.measureText(text).width > room - 8) text = `…${text.slice(2)}`;
      pen.fillText(text, 0, r * tall + Math.max(6, tall / 2));
    });
    pen.fillStyle = ink("quiet");
    pen.textBaseline = "top";
    if (count) {
      pen.fillText(String(steps[0]), box.left, height + 4);
      const end = `step ${steps[count - 1]}`;
      pen.fillText(end, width - pen.measureText(end).width, height + 4);
    }
    if (place) {
      pen.strokeStyle = ink("link");
      pen.lineWidth = 2;
      pen.strokeRect(box.left + (place.n * box.width) / count, place.r * tall, Math.max(3, box.width / count), tall);
    }
    document.getElementById("heat-low").textContent = rows.length ? number(10 ** low) : "";
    document.getElementById("heat-high").textContent = rows.length ? `${number(10 ** high)} ${WORDS[quantity]}` : "";
    document.getElementById("heat-bar").style.background = `linear-gradient(to right,${data.colors.join(",")})`;
  }

  function say(r, n) {
    if (r < 0 || r >= rows.length || n < 0 || n >= count) return;
    said.textContent = `${names[rows[r]]}, step ${steps[n]}: ${WORDS[quantity]} ${number(tables[quantity](rows[r], n))}`;
  }
  const under = (event) => {
    const inside = heat.getBoundingClientRect();
    const n = Math.floor(((event.clientX - inside.left - box.left) * count) / box.width);
    return { r: Math.floor((event.clientY - inside.top) / box.tall), n: Math.max(0, n) };
  };
  heat.addEventListener("mousemove", (event) => { const { r, n } = under(event); say(r, n); });
  heat.addEventListener("click", (event) => { const { r } = under(event); if (r in rows) open(rows[r]); });
  heat.addEventListener("keydown", (event) => {
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Enter" && place) {
      event.preventDefault(); // the key would close the layer again, which has the focus then
      open(rows[place.r]);
    }
    if (!by || !rows.length) return;
    event.preventDefault();
    const clamp = (v, most) => Math.min(most, Math.max(0, v));
    place = place ?? { r: 0, n: count - 1 };
    place = { r: clamp(place.r + by[0], rows.length - 1), n: clamp(place.n + by[1], count - 1) };
    paint();
    say(place.r, place.n);
  });
  document.querySelectorAll("[data-quantity]").forEach((button) => button.addEventListener("click", () => {
    quantity = button.dataset.quantity;
    document.querySelectorAll("[data-quantity]").forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
    place = null;
    paint();
  }));
  new ResizeObserver(paint).observe(heat.parentElement);

  // ---- the page -----------------------------------------------------------------------------------------
  const redraw = () => { plots.forEach((u) => u.redraw(false, true)); paint(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => { root.classList.add("paper"); redraw(); });
  addEventListener("afterprint", () => { root.classList.remove("paper"); redraw(); });
  if (data.per_point > 1) {
    document.getElementById("per-point").textContent = ` Each point is the mean of about ${data.per_point} rows.`;
  }
  paint();
  jump();
})();
