  // Axes of plots, as uPlot takes them. Included by the scripts of pages; needs ink(name), the colours.

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
