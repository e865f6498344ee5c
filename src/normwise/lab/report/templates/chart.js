  // A figure that is alive: zoom, legend, seeds, keys, the points as a table. Part of report.js.
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
