  // Axes and curves, as uPlot takes them. Part of report.js.

{% include "axes.js" %}

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
      return { ...plain, width: 2, dash: [undefined, [7, 5], [2, 4]][series.dashed], points: marks(series) };
    }
    if (kind === "seed") return { ...plain, width: 1, alpha: 0.55, show: false };
    return { ...plain, stroke: "transparent", width: 0 };
  }
