  // Axes and curves, as uPlot takes them. Part of report.js.

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
