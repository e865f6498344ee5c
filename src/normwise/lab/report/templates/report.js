// Makes the curves of the report interactive: each figure's JSON is drawn by uPlot in the place of its SVG.
"use strict";
(() => {
  const style = getComputedStyle(document.documentElement); // live: follows light and dark
  const shapes = JSON.parse(document.getElementById("shapes").textContent).map((d) => new Path2D(d));
  const charts = []; // everything that was drawn
  const HELP = "Plot. Plus and minus keys zoom, 0 shows all, left and right keys go from point to point.";
  const ink = (name) => style.getPropertyValue(`--${name}`).trim();

  function element(name, properties = {}, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

  // ---- axes -------------------------------------------------------------------------------------------
  const scales = {
    false: { to: (v) => v, from: (v) => v },
    true: { to: Math.log10, from: (v) => 10 ** v },
  };

  // The ends of an axis that shows all values, with some air.
  function extent(values, log) {
    let low = Infinity, high = -Infinity;
    for (const v of values) if (v != null) { low = Math.min(low, v); high = Math.max(high, v); }
    if (low > high) return log ? [0.1, 10] : [0, 1];
    const { to, from } = scales[log];
    [low, high] = [to(low), to(high)];
    const air = 0.04 * (high - low) || (log ? 0.5 : 0.1 * Math.abs(low) || 0.5);
    return [from(low - air), from(high + air)];
  }

  // About `most` round numbers; on a log axis powers of ten if it has two.
  function ticks(low, high, log, most) {
    if (log) {
      const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
      const step = Math.max(1, Math.ceil((last - first + 1) / most));
      let found = [];
      for (let k = first; k <= last; k++) if (k % step === 0) found.push(10 ** k);
      if (found.length > 1) return found;
      found = [];
      for (let k = first - 1; k <= last; k++) for (const digit of [1, 2, 5]) found.push(digit * 10 ** k);
      found = found.filter((v) => low <= v && v <= high);
      if (found.length > 1) return found;
    }
    const rough = (high - low) / most, size = 10 ** Math.floor(Math.log10(rough));
    const step = size * [1, 2, 5, 10].find((m) => m * size >= rough);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k <= high / step + 1e-9; k++) found.push(+(k * step).toPrecision(12));
    return found;
  }

  function tickLabel(value, log) {
    if (!log || (value * (1 + 1e-9) >= 1e-3 && value < 9e3)) return String(+value.toPrecision(6));
    const exponent = Math.floor(Math.log10(value) + 1e-9), digit = Math.round(value / 10 ** exponent);
    const power = "10" + [...String(exponent)].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("");
    return digit === 1 ? power : `${digit}·${power}`;
  }

  const number = (v) => (v == null ? "–" : String(+v.toPrecision(4)));

  function axis(log, across) {
    const colour = () => ink("quiet");
    const line = () => `${ink("quiet")}33`;
    return {
      stroke: colour,
      font: "12px system-ui, sans-serif",
      grid: { stroke: line, width: 1 },
      ticks: { stroke: line, width: 1, size: 4 },
      gap: 4,
      splits: (u, _, low, high) => ticks(low, high, log, across ? Math.max(3, u.width / 80) : 6),
      filter: (u, splits) => splits,
      values: (u, splits) => splits.map((v) => tickLabel(v, log)),
      size: across ? 28 : (u, labels) => 14 + 7 * Math.max(1, ...(labels ?? []).map((text) => text.length)),
    };
  }

  // ---- curves -----------------------------------------------------------------------------------------
  // Every series becomes columns over one x: its mean, the ends of its interval, the values of each seed.
  function columns(plot) {
    const tables = [], columns = [];
    const placed = (v, log) => (v != null && (!log || v > 0) ? v : null);
    plot.series.forEach((series, k) => {
      const order = series.x.map((_, i) => i).filter((i) => placed(series.x[i], plot.log_x) !== null);
      order.sort((a, b) => series.x[a] - series.x[b]);
      const column = (values) => order.map((i) => placed(values[i], plot.log_y));
      const table = [order.map((i) => series.x[i]), column(series.y)];
      columns.push({ k, kind: "mean" });
      if (series.low && series.high) {
        table.push(column(series.low), column(series.high));
        columns.push({ k, kind: "low" }, { k, kind: "high" });
      }
      (series.by_seed ?? []).forEach((values, seed) => {
        table.push(column(values));
        columns.push({ k, kind: "seed", seed });
      });
      tables.push(table);
    });
    return { columns, data: uPlot.join(tables) };
  }

  // Marks at the points of a series; a curve without marks still shows a point that stands between gaps.
  function marks(series) {
    const colour = () => ink(`series-${series.color}`);
    const dense = series.shape == null;
    const alone = (u, column) => {
      const there = u.data[column].map((v, i) => [v, i]).filter(([v]) => v !== undefined);
      return there.filter(([v], n) => v !== null && there[n - 1]?.[0] == null && there[n + 1]?.[0] == null)
        .map(([, i]) => i);
    };
    return {
      show: true,
      stroke: colour,
      fill: colour,
      filter: (u, column) => (dense ? alone(u, column) : null),
      paths: (u, column, first, last, chosen) => {
        const path = new Path2D(), shape = shapes[series.shape ?? 0], size = devicePixelRatio * (dense ? 0.5 : 1);
        const [xs, ys] = [u.data[0], u.data[column]];
        for (const i of chosen ?? xs.keys()) {
          if (ys[i] == null) continue;
          const [x, y] = [u.valToPos(xs[i], "x", true), u.valToPos(ys[i], "y", true)];
          const { left, top, width, height } = u.bbox, air = 5 * devicePixelRatio;
          const outside = x < left - air || x > left + width + air || y < top - air || y > top + height + air;
          if (!outside) path.addPath(shape, new DOMMatrix([size, 0, 0, size, x, y]));
        }
        return { stroke: null, fill: path, clip: null, flags: 3 };
      },
    };
  }

  function curve(plot, { k, kind }) {
    const series = plot.series[k];
    const colour = () => ink(`series-${series.color}`);
    const plain = { label: series.label, stroke: colour, points: { show: false } };
    if (kind === "mean") {
      return { ...plain, width: 2, dash: series.dashed ? [7, 5] : undefined, points: marks(series) };
    }
    if (kind === "seed") return { ...plain, width: 1, alpha: 0.55, show: false };
    return { ...plain, stroke: "transparent", width: 0 };
  }

  // ---- a chart ----------------------------------------------------------------------------------------
  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.claim = figure.closest("[data-claim]").dataset.claim;
      this.plot = JSON.parse(figure.querySelector("script").textContent);
      Object.assign(this, columns(this.plot));
      this.view = null; // {x: [low, high], y: [low, high]} where zoomed
      this.off = new Set(); // series that are switched off
      this.seeds = false;
      this.box = figure.querySelector(".canvas");
      this.at = figure.querySelector(".at");
      figure.classList.add("live");
      this.box.hidden = this.at.hidden = false;
      this.u = new uPlot(this.options(), this.data, this.box);
      this.legend();
      this.tools();
      this.points();
      this.keys();
      new ResizeObserver(() => this.u.setSize(this.size())).observe(this.box);
    }

    size() {
      const width = Math.max(200, this.box.clientWidth);
      return { width, height: Math.round(Math.min(340, Math.max(220, width * 0.5))) };
    }

    options() {
      const { plot } = this;
      const scale = (which, log) => ({ time: false, distr: log ? 3 : 1, range: () => this.ends(which) });
      const position = (kind, k) => 1 + this.columns.findIndex((c) => c.kind === kind && c.k === k);
      const banded = plot.series.map((_, k) => k).filter((k) => position("low", k) > 0);
      return {
        ...this.size(),
        legend: { show: false },
        padding: [10, 12, 0, 0],
        scales: { x: scale("x", plot.log_x), y: scale("y", plot.log_y) },
        axes: [axis(plot.log_x, true), axis(plot.log_y, false)],
        series: [{}, ...this.columns.map((column) => curve(plot, column))],
        bands: banded.map((k) => ({
          series: [position("high", k), position("low", k)],
          fill: () => `${ink(`series-${plot.series[k].color}`)}24`,
        })),
        cursor: {
          y: false,
          drag: { x: true, y: true, uni: 20, dist: 4, setScale: false },
          hover: { skip: [undefined] }, // curves need not have the same points
          points: { size: (u, i) => (this.columns[i - 1].kind === "mean" ? 9 : 0) },
          bind: { dblclick: () => () => this.zoom(null) },
        },
        hooks: { setCursor: [() => this.read()], setSelect: [() => this.select()] },
      };
    }

    // The ends of an axis: of the view, else of all that is switched on.
    ends(which) {
      if (this.view) return this.view[which];
      if (which === "x") return extent(this.data[0], this.plot.log_x);
      return extent(this.data.slice(1).filter((_, n) => this.shown(this.columns[n])).flat(), this.plot.log_y);
    }

    shown({ k, kind }) {
      return !this.off.has(k) && (kind !== "seed" || this.seeds);
    }

    // Zooms to a view; null: shows all.
    zoom(view) {
      this.view = view;
      this.u.batch(() => ["x", "y"].forEach((which) => {
        const [min, max] = this.ends(which);
        this.u.setScale(which, { min, max });
      }));
      this.reset.disabled = view === null;
      this.figure.dataset.zoomed = view !== null;
    }

    now(which) {
      const { min, max } = this.u.scales[which];
      return [min, max];
    }

    select() {
      const { left, top, width, height } = this.u.select;
      if (!width && !height) return;
      const whole = (size, all) => size >= all - 1; // a drag along one axis leaves the other as it is
      const value = (pixels, which) => this.u.posToVal(pixels, which);
      this.zoom({
        x: whole(width, this.u.over.clientWidth) ? this.now("x") : [value(left, "x"), value(left + width, "x")],
        y: whole(height, this.u.over.clientHeight) ? this.now("y") : [value(top + height, "y"), value(top, "y")],
      });
      this.u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    }

    // Zooms about the middle: factor below 1 goes in.
    step(factor) {
      const part = (which, log) => {
        const { to, from } = scales[log], [low, high] = this.now(which).map(to);
        const middle = (low + high) / 2, half = (factor * (high - low)) / 2;
        return [from(middle - half), from(middle + half)];
      };
      this.zoom({ x: part("x", this.plot.log_x), y: part("y", this.plot.log_y) });
    }

    show() {
      this.u.batch(() => this.columns.forEach((column, n) => {
        const show = this.shown(column);
        if (this.u.series[n + 1].show !== show) this.u.setSeries(n + 1, { show });
      }));
      this.zoom(this.view);
    }

    legend() {
      this.values = [];
      this.figure.querySelectorAll(".legend li").forEach((item, k) => {
        const button = element("button", { type: "button" }, ...item.childNodes);
        this.values[k] = element("span", { className: "value" });
        button.append(this.values[k]);
        button.setAttribute("aria-pressed", "true");
        button.addEventListener("click", () => {
          const pressed = this.off.delete(k) || !this.off.add(k);
          button.setAttribute("aria-pressed", String(pressed));
          this.show();
        });
        item.replaceChildren(button);
      });
    }

    tools() {
      const button = (text, label, act) => {
        const made = element("button", { type: "button", textContent: text });
        if (label) made.setAttribute("aria-label", label);
        made.addEventListener("click", () => act(made));
        return made;
      };
      const tools = element("div", { className: "tools" });
      this.reset = button("reset zoom", "", () => this.zoom(null));
      this.reset.disabled = true;
      tools.append(button("−", "zoom out", () => this.step(2)), button("+", "zoom in", () => this.step(0.5)), this.reset);
      if (this.columns.some(({ kind }) => kind === "seed")) {
        const seeds = button("seeds", "", (made) => {
          this.seeds = !this.seeds;
          made.setAttribute("aria-pressed", String(this.seeds));
          this.show();
        });
        seeds.setAttribute("aria-pressed", "false");
        tools.append(seeds);
      }
      tools.append(element("span", {
        className: "help",
        textContent: "Drag to zoom, click a name to hide it; keys\u00a0+\u00a0−\u00a00\u00a0←\u00a0→",
      }));
      this.figure.querySelector(".legend").after(tools);
    }

    // Writes the values at the cursor into the legend, and marks the seed that is nearest.
    read() {
      const { u } = this, { idx, idxs, top, left } = u.cursor;
      const there = idx != null && left >= 0;
      const near = (i) => Math.abs(u.valToPos(u.data[0][i], "x") - u.valToPos(u.data[0][idx], "x")) < 20;
      const value = (i) => (there && u.series[i].show && idxs[i] != null && near(idxs[i]) ? u.data[i][idxs[i]] : undefined);
      this.values.forEach((span) => (span.textContent = ""));
      let nearest = null, distance = 18;
      this.columns.forEach(({ k, kind, seed }, n) => {
        const found = value(n + 1);
        if (found === undefined) return;
        if (kind === "mean") this.values[k].textContent = number(found);
        if (kind === "high" && found !== null) this.values[k].textContent += ` [${number(value(n))}, ${number(found)}]`;
        const away = Math.abs(u.valToPos(found ?? 0, "y") - top);
        if (kind === "seed" && found !== null && away < distance) [nearest, distance] = [{ k, seed, found }, away];
      });
      let text = there ? `at ${number(u.data[0][idx])}` : "";
      if (nearest) {
        text += ` · seed ${this.plot.seeds[nearest.seed] ?? nearest.seed} of ${this.plot.series[nearest.k].label}: ${number(nearest.found)}`;
      }
      this.at.textContent = text;
      for (const chart of charts) if (chart.claim === this.claim) chart.emphasize(nearest?.seed ?? null);
    }

    // Draws the curves of one seed bold: the same seed in all plots of the claim.
    emphasize(seed) {
      if (!this.seeds || this.seed === seed) return;
      this.seed = seed;
      this.columns.forEach((column, n) => {
        if (column.kind !== "seed") return;
        this.u.series[n + 1].width = column.seed === seed ? 2.5 : 1;
        this.u.series[n + 1].alpha = column.seed === seed ? 1 : 0.55;
      });
      this.u.redraw(false, false);
    }

    keys() {
      this.box.tabIndex = 0;
      this.box.setAttribute("role", "application");
      this.box.setAttribute("aria-label", `${this.plot.title}; ${this.plot.y_label} over ${this.plot.x_label}. ${HELP}`);
      this.said = element("p", { className: "unseen" });
      this.said.setAttribute("aria-live", "polite");
      this.box.after(this.said);
      const acts = {
        "+": () => this.step(0.5),
        "=": () => this.step(0.5),
        "-": () => this.step(2),
        0: () => this.zoom(null),
        ArrowLeft: () => this.move(-1),
        ArrowRight: () => this.move(1),
      };
      this.box.addEventListener("keydown", (event) => {
        if (!(event.key in acts) || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        acts[event.key]();
      });
    }

    // Moves the cursor to the next point, the view with it.
    move(by) {
      const { u } = this, xs = u.data[0], last = xs.length - 1;
      this.place = Math.min(last, Math.max(0, this.place == null ? (by > 0 ? 0 : last) : this.place + by));
      const x = xs[this.place], [low, high] = this.now("x");
      if (this.view && (x < low || x > high)) {
        const { to, from } = scales[this.plot.log_x], half = (to(high) - to(low)) / 2;
        this.zoom({ x: [from(to(x) - half), from(to(x) + half)], y: this.now("y") });
      }
      requestAnimationFrame(() => {
        u.setCursor({ left: u.valToPos(x, "x"), top: u.over.clientHeight / 2 });
        const shown = this.plot.series.map(({ label }, k) => [label, this.values[k].textContent]);
        this.said.textContent = `${this.at.textContent}: ${shown.filter(([, text]) => text).map((pair) => pair.join(" ")).join("; ")}`;
      });
    }

    // The same points as a table, made when it is asked for.
    points() {
      const details = element("details", {}, element("summary", { textContent: "The plotted points as a table" }));
      details.addEventListener("toggle", () => {
        if (!details.open || details.querySelector("table")) return;
        const { plot } = this;
        const names = { mean: "", low: ", low end", high: ", high end" };
        const name = ({ k, kind, seed }) => plot.series[k].label + (names[kind] ?? `, seed ${plot.seeds[seed] ?? seed}`);
        const cell = (tag, text, scope) => element(tag, { textContent: text, ...(scope && { scope }) });
        const head = element("tr", {}, cell("th", plot.x_label, "col"), ...this.columns.map((c) => cell("th", name(c), "col")));
        const rows = this.data[0].map((x, i) => element("tr", {}, cell("th", number(x), "row"),
          ...this.columns.map((_, n) => cell("td", this.data[n + 1][i] === undefined ? "" : number(this.data[n + 1][i])))));
        const table = element("table", {}, element("caption", { textContent: plot.y_label }),
          element("thead", {}, head), element("tbody", {}, ...rows));
        const scroll = element("div", { className: "scroll", tabIndex: 0 }, table);
        scroll.setAttribute("role", "region");
        scroll.setAttribute("aria-label", `Points of ${plot.title}`);
        details.append(scroll);
      });
      this.figure.append(details);
    }
  }

  // ---- the page ---------------------------------------------------------------------------------------
  const draw = (figure) => charts.push(new Chart(figure));
  const folded = (figure) => figure.closest("details:not([open])");
  document.querySelectorAll("figure.plot").forEach((figure) => folded(figure) || draw(figure));
  document.querySelectorAll("details.traces").forEach((details) => details.addEventListener("toggle", () => {
    if (details.open) details.querySelectorAll("figure.plot:not(.live)").forEach(draw);
  }));

  const redraw = () => charts.forEach((chart) => chart.u.redraw(false, true));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // On paper everything is said: how each claim was judged, and how to repeat it.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.repeat:not([open])")];
    opened.forEach((details) => (details.open = true));
  });
  addEventListener("afterprint", () => opened.forEach((details) => (details.open = false)));

  // The contents show where the reader is.
  const links = new Map([...document.querySelectorAll(".contents a")].map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      links.forEach((a) => a.removeAttribute("aria-current"));
      links.get(target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -75% 0px" });
  document.querySelectorAll("section[data-claim], header").forEach((section) => seen.observe(section));
})();
