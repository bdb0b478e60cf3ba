// Draws the charts of the page from the numbers in it; values show under the pointer.
"use strict";
(() => {
  const COLOURS = [1, 2, 3, 4, 5, 6].map((i) => `var(--s${i})`);
  const brief = (x) => (Math.abs(x) < 1e-14 ? "0" : Math.abs(x) >= 1e4 || Math.abs(x) < 1e-3 ? x.toExponential(1) : `${+x.toPrecision(3)}`);
  // As many decimals as tell one tick from the next.
  const tick = (x, i, all) => {
    const step = Math.abs(all[1] - all[0]) || Math.abs(x) || 1;
    const top = Math.max(...all.map(Math.abs));
    if (top >= 1e5 || step < 1e-4) return x === 0 ? "0" : x.toExponential(Math.max(0, Math.ceil(Math.log10(top / step)) - (top / step > 1 ? 0 : 1)));
    return x.toFixed(Math.max(0, Math.ceil(-Math.log10(step) - 1e-9)));
  };
  const exact = (x) => (Number.isFinite(x) ? `${+x.toPrecision(5)}` : `${x}`);

  // A few ticks that can be read: powers of ten at both sides of zero, or what d3 proposes.
  const axis = (given, width) => {
    const found = { label: given.label, type: given.type ?? "linear", tickFormat: given.percent ? "%" : given.type ? brief : tick, grid: true, nice: !given.type };
    if (given.constant) found.constant = given.constant;
    if (given.type === "log") found.ticks = 5;
    if (given.type === "symlog") found.ticks = powers(given.domain, given.constant, width);
    if (given.domain) found.domain = given.domain;
    return found;
  };

  const powers = ([low, high], constant, width) => {
    const tens = [];
    for (let e = Math.ceil(Math.log10(constant)); e <= Math.log10(Math.max(-low, high)); e++) tens.push(10 ** e);
    const all = [...tens.map((x) => -x).reverse(), 0, ...tens].filter((x) => low <= x && x <= high);
    const step = Math.ceil(all.length / (width / 70));
    const zero = all.indexOf(0);
    return all.filter((_, i) => (i - zero) % step === 0);
  };

  const drawn = {
    lines(spec, width) {
      const points = spec.series.flatMap((s) => s.points.map(([x, y]) => ({ x, y, name: s.name })));
      const names = spec.series.map((s) => s.name);
      const few = spec.series.filter((s) => s.points.length <= 30).flatMap((s) => s.points.map(([x, y]) => ({ x, y, name: s.name })));
      const title = (p) => `${names.length > 1 ? `${p.name}\n` : ""}${spec.x.label}: ${spec.x.percent ? `${exact(100 * p.x)} %` : exact(p.x)}\n${spec.y.label}: ${exact(p.y)}`;
      return Plot.plot({
        width, height: Math.min(340, Math.max(240, width * 0.42)), marginLeft: 62, marginBottom: 42,
        x: axis(spec.x, width), y: axis(spec.y, width),
        color: { domain: names, range: COLOURS, legend: names.length > 1 },
        marks: [
          ...(spec.marks ?? []).map((m) => Plot.ruleX([m], { x: "x", stroke: "var(--s2)", strokeOpacity: 0.7, title: "title" })),
          ...(spec.filled ? [Plot.areaY(points, { x: "x", y1: spec.y.domain[0], y2: "y", fill: "name", fillOpacity: 0.15 })] : []),
          Plot.line(points, { x: "x", y: "y", stroke: "name", strokeWidth: 1.8, z: "name" }),
          Plot.dot(few, { x: "x", y: "y", fill: "name", r: 3.5 }),
          Plot.tip(points, Plot.pointer({ x: "x", y: "y", title })),
        ],
      });
    },
    dots({ x, rows }, width) {
      const spec = { x, rows: rows.map((r) => ({ ...r, name: r.name ?? "" })) }; // Plot leaves out what has none
      const names = [...new Set(spec.rows.map((r) => r.name))];
      const labels = [...new Set(spec.rows.map((r) => r.label))];
      const wide = Math.min(width * 0.42, 14 + 7 * Math.max(...labels.map((l) => l.length)));
      const most = Math.floor(wide / 7);
      const short = (l) => (l.length > most ? `…${l.slice(1 - most)}` : l);
      const title = (r) => `${r.label}${r.name ? `\n${r.name}` : ""}\n${spec.x.label}: ${exact(r.value)}${r.error != null ? ` ± ${exact(r.error)}` : ""}`;
      return Plot.plot({
        width, height: 62 + 24 * labels.length, marginLeft: wide, marginBottom: 42, marginRight: 24,
        x: axis(spec.x, width), y: { domain: labels, label: null, tickFormat: short },
        color: { domain: names, range: COLOURS, legend: names.length > 1 },
        marks: [
          ...(spec.x.type === "log" ? [] : [Plot.ruleX([0], { strokeOpacity: 0.4 })]),
          ...(names.length > 1 || spec.x.type === "log" ? [] : [Plot.barX(spec.rows, { x1: 0, x2: "value", y: "label", fill: "name", fillOpacity: 0.35 })]),
          Plot.ruleY(spec.rows.filter((r) => r.error != null), { x1: (r) => r.value - 2 * r.error, x2: (r) => r.value + 2 * r.error, y: "label", stroke: "name", strokeWidth: 2 }),
          Plot.dot(spec.rows, { x: "value", y: "label", fill: "name", r: 4 }),
          Plot.tip(spec.rows, Plot.pointerY({ x: "value", y: "label", title, maxRadius: 60 })),
        ],
      });
    },
    map(spec, width) {
      const cells = spec.z.flatMap((row, i) => row.map((z, j) => ({ x: spec.xs[i], y: spec.ys[j], z })));
      const side = Math.min(width, 560);
      const every = Math.ceil(spec.xs.length / 5);
      const ticks = (values) => values.filter((_, i) => (i - (values.length - 1) / 2) % every === 0);
      return Plot.plot({
        width: side, height: side * 0.82, marginLeft: 62, marginBottom: 42, padding: 0,
        x: { domain: spec.xs, ticks: ticks(spec.xs), tickFormat: brief, label: spec.x.label },
        y: { domain: [...spec.ys].reverse(), ticks: ticks(spec.ys), tickFormat: brief, label: spec.y.label },
        color: { scheme: "viridis", type: spec.log ? "log" : "linear", legend: true, label: spec.label, tickFormat: brief, ticks: 3, width: Math.min(side, 360) },
        marks: [
          Plot.cell(cells.filter((c) => Number.isFinite(c.z)), { x: "x", y: "y", fill: "z", inset: -0.3 }),
          Plot.tip(cells, Plot.pointer({ x: "x", y: "y", title: (c) => `${spec.label}: ${exact(c.z)}\n${spec.x.label}: ${exact(c.x)}\n${spec.y.label}: ${exact(c.y)}` })),
        ],
      });
    },
  };

  const charts = JSON.parse(document.getElementById("charts").textContent);
  for (const [id, spec] of Object.entries(charts)) {
    const place = document.getElementById(id);
    let last = 0;
    const draw = () => {
      const width = Math.floor(place.clientWidth);
      if (!width || width === last) return;
      last = width;
      try {
        place.replaceChildren(drawn[spec.kind](spec, width));
      } catch (error) {
        console.error(id, error); // the picture stays
      }
    };
    draw();
    new ResizeObserver(draw).observe(place);
  }
  document.documentElement.dataset.drawn = "yes";
})();
