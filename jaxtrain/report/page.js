"use strict";
// The charts of a report. Tables are HTML that the server side has escaped; texts are set as text, and what Plotly
// reads as HTML is escaped here.

const byId = (id) => document.getElementById(id);
const page = JSON.parse(byId("data").textContent);
let data = page.data;
const DASH = { train: "solid", valid: "dash", test: "dot" };
const PALETTE = {
  light: ["#0072b2", "#d55e00", "#009e73", "#a8459a", "#8a6d00", "#2b7fa8", "#b3261e", "#5b5fc7", "#4d7a1f", "#6b6b6b"],
  dark: ["#56b4e9", "#ff9a4d", "#2fc79a", "#e08fc9", "#e3c84b", "#8fd3f4", "#ff8f85", "#a6a9ff", "#a4d36b", "#b5b5b5"],
};
const BUTTONS = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
const CONFIG = { displaylogo: false, responsive: true, displayModeBar: "hover", modeBarButtons: BUTTONS };
const scheme = matchMedia("(prefers-color-scheme: dark)");
const hidden = new Set(); // labels of what is switched off

const escapeHtml = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const shorten = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
const number = (y) => (y === null || y === undefined ? "–" : Number(y.toPrecision(6)).toString());

function colour(place) {
  const colours = PALETTE[scheme.matches ? "dark" : "light"];
  if (place < colours.length) return colours[place];
  return `hsl(${Math.round((place * 137.508) % 360)}, ${scheme.matches ? "70%, 70%" : "65%, 38%"})`;
}

function translucent(place, alpha) {
  const probe = document.createElement("i");
  probe.style.color = colour(place);
  document.body.append(probe);
  const rgb = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3);
  probe.remove();
  return `rgba(${rgb.join(", ")}, ${alpha})`;
}

// What the list of runs shows: groups of seeds, or each run.
function entries() {
  const groups = data.group_runs.map((runs, place) => ({ label: data.group_labels[place], place, runs }));
  if (byId("seeds").value === "mean" && groups.some((one) => one.runs.length > 1)) return groups;
  return data.labels.map((label, place) => ({ label, place, runs: [place] }));
}

function drawNames() {
  const names = byId("names"), focused = document.activeElement?.dataset?.label;
  const shown = entries();
  byId("seeds-row").hidden = !data.group_runs.some((runs) => runs.length > 1);
  names.replaceChildren(...shown.map((entry) => {
    const label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox";
    box.checked = !hidden.has(entry.label);
    box.dataset.label = entry.label;
    box.addEventListener("change", () => {
      box.checked ? hidden.delete(entry.label) : hidden.add(entry.label);
      drawCharts();
    });
    const mark = document.createElement("i"), text = document.createElement("span");
    mark.style.setProperty("--colour", colour(entry.place));
    text.textContent = entry.runs.length > 1 ? `${entry.label} (n = ${entry.runs.length})` : entry.label;
    label.append(box, mark, text);
    return label;
  }));
  if (focused !== undefined) [...names.querySelectorAll("input")].find((one) => one.dataset.label === focused)?.focus();
}

function interpolate(scale, x) {
  let place = scale.x.findIndex((one) => one >= x);
  if (place < 0) place = scale.x.length - 1;
  if (place === 0) return scale.y[0];
  const [x0, x1, y0, y1] = [scale.x[place - 1], scale.x[place], scale.y[place - 1], scale.y[place]];
  return x1 === x0 ? y1 : y0 + ((x - x0) / (x1 - x0)) * (y1 - y0);
}

function xValues(runs, steps) {
  const kind = byId("x").value;
  if (kind === "step") return steps;
  const scale = data.runs[runs[0]][kind];
  return scale === undefined ? null : steps.map((step) => interpolate(scale, step));
}

// An exponential moving average that starts without bias: Kingma and Ba, Adam, 2015, section 3.
function smooth(values, weight) {
  let sum = 0, norm = 0;
  return values.map((y) => {
    if (y === null) return null;
    sum = weight * sum + (1 - weight) * y;
    norm = weight * norm + 1 - weight;
    return sum / norm;
  });
}

function lineOf(entry, name, x, y, extra) {
  const split = name.split("/")[0], few = split !== "train" && split in DASH;
  return {
    type: "scatter", x, y, mode: x.length === 1 || (few && x.length <= 100) ? "lines+markers" : "lines",
    name: escapeHtml(`${split in DASH ? `${split} ` : ""}${shorten(entry.label, 18)}`),
    line: { color: colour(entry.place), dash: DASH[split] ?? "solid", width: 1.8 },
    marker: { size: 5 }, hovertemplate: "%{y:.5~g}", meta: { label: entry.label, name }, ...extra,
  };
}

function tracesOf(entry, name) {
  const weight = name.startsWith("train/") ? Number(byId("smoothing").value) : 0;
  const band = entry.runs.length > 1 ? data.groups[entry.place][name] : undefined;
  if (band !== undefined) {
    const x = xValues(entry.runs, band.x);
    if (x === null) return [];
    const side = (sign) => smooth(band.mean.map((mean, i) => mean + sign * band.std[i]), weight);
    const edge = { mode: "lines", line: { width: 0 }, hoverinfo: "skip", hovertemplate: null, meta: { edge: true } };
    const text = smooth(band.std, weight).map((std) => Number(std.toPrecision(3)).toString());
    return [
      lineOf(entry, name, x, side(-1), edge),
      lineOf(entry, name, x, side(1), { ...edge, fill: "tonexty", fillcolor: translucent(entry.place, 0.2) }),
      lineOf(entry, name, x, smooth(band.mean, weight), { text, hovertemplate: "%{y:.5~g} ± %{text}" }),
    ];
  }
  return entry.runs.flatMap((run) => {
    const series = data.runs[run].series[name];
    if (series === undefined) return [];
    const x = xValues([run], series.x);
    if (x === null) return [];
    if (weight === 0) return [lineOf(entry, name, x, series.y)];
    const base = series.mean ?? series;
    const faint = { opacity: 0.25, hoverinfo: "skip", hovertemplate: null, meta: { edge: true }, mode: "lines" };
    return [
      lineOf(entry, name, x, series.y, faint),
      lineOf(entry, name, xValues([run], base.x), smooth(base.y, weight)),
    ];
  });
}

function layout(extra) {
  const [ink, grid, card] = [style("--ink"), style("--grid"), style("--card")];
  const axis = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true, exponentformat: "SI" };
  const { xaxis, yaxis, ...rest } = extra;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: "zoom",
    font: { color: ink, family: "system-ui, sans-serif", size: 12 }, margin: { l: 48, r: 12, t: 30, b: 40 },
    hoverlabel: { bgcolor: card, bordercolor: grid, font: { color: ink }, namelength: 40 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--soft"), activecolor: style("--accent") },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

function figureOf(section, chart) {
  const parent = document.querySelector(`[data-charts="${section}"]`);
  let figure = [...parent.children].find((one) => one.dataset.name === chart.name);
  if (figure !== undefined) return figure;
  figure = document.createElement("figure");
  figure.dataset.name = chart.name;
  const caption = document.createElement("figcaption"), plot = document.createElement("div");
  const values = document.createElement("p");
  caption.textContent = chart.name;
  plot.className = "plot";
  plot.tabIndex = 0;
  plot.setAttribute("role", "img");
  values.className = "values";
  values.setAttribute("aria-live", "polite");
  plot.addEventListener("keydown", (event) => walk(event, plot, values));
  figure.append(caption, plot, values);
  parent.append(figure);
  return figure;
}

// Move through the points of a focused chart.
function walk(event, plot, values) {
  const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
  const lines = (plot.data ?? []).map((trace, place) => ({ trace, place })).filter((one) => !one.trace.meta?.edge);
  if (move === undefined || lines.length === 0) return;
  event.preventDefault();
  const xs = [...new Set(lines.flatMap((one) => one.trace.x))].sort((a, b) => a - b);
  plot.at = Math.max(0, Math.min(xs.length - 1, (plot.at ?? (move > 0 ? -1 : xs.length)) + move));
  const x = xs[plot.at];
  const points = lines.map(({ trace, place }) => ({ curveNumber: place, pointNumber: trace.x.indexOf(x) }));
  const there = points.filter((one) => one.pointNumber >= 0);
  Plotly.Fx.hover(plot, there);
  const texts = there.map(({ curveNumber, pointNumber }) => {
    const trace = plot.data[curveNumber], split = trace.meta.name.split("/")[0];
    const std = trace.text === undefined ? "" : ` ± ${trace.text[pointNumber]}`;
    return `${trace.meta.label}${split in DASH ? ` ${split}` : ""}: ${number(trace.y[pointNumber])}${std}`;
  });
  values.textContent = `${byId("x").value} ${number(x)}: ${texts.slice(0, 12).join("; ")}`;
}

function drawChart(chart) {
  const figure = figureOf(chart.section, chart), plot = figure.querySelector(".plot");
  const shown = entries().filter((entry) => !hidden.has(entry.label));
  const traces = shown.flatMap((entry) => chart.series.flatMap((name) => tracesOf(entry, name)));
  const names = { step: "step", epoch: "epoch", seconds: "training seconds" };
  const kind = (box) => (byId(box).checked ? "log" : "linear");
  const drawn = traces.filter((one) => !one.meta.edge).length;
  plot.setAttribute("aria-label", `${chart.name} by ${byId("x").value}, ${drawn} lines; press right for values`);
  plot.at = undefined;
  return Plotly.react(plot, traces, layout({
    hovermode: drawn > 12 ? "closest" : "x unified", uirevision: ["x", "log-x", "log-y"].map((id) => byId(id).value + byId(id).checked).join(),
    xaxis: { title: { text: names[byId("x").value], standoff: 6 }, type: kind("log-x") },
    yaxis: { type: kind("log-y") },
  }), CONFIG);
}

function drawCharts() {
  const known = new Set(data.charts.map((chart) => chart.name));
  for (const figure of document.querySelectorAll("[data-charts] figure")) {
    if (!known.has(figure.dataset.name)) figure.remove();
  }
  const has = (part) => data.charts.some((chart) => chart.section === "resources" && chart.name.includes(part));
  const missing = [["examples_per_second", "speed"], ["bytes", "memory"], ["joules", "energy"]].filter(([part]) => !has(part));
  byId("unrecorded").textContent = missing.length === 0 ? "" :
    `Not recorded by these runs: ${missing.map(([, name]) => name).join(", ")}. Energy and power need an NVIDIA GPU; memory and power are read at most once a second.`;
  return Promise.all(data.charts.map(drawChart));
}

function place(selector) {
  const parent = document.querySelector(selector);
  if (parent === null) return null;
  if (parent.firstElementChild === null) {
    const plot = document.createElement("div");
    plot.className = "plot";
    parent.append(plot);
  }
  return parent.firstElementChild;
}

function drawMatrix({ matrix, names }, position) {
  const plot = place(`[data-matrix="${position}"]`);
  if (matrix === null || plot === null) return;
  const labels = matrix.map((_, i) => escapeHtml(shorten(names?.[i] ?? String(i), 20)));
  const shares = matrix.map((row) => {
    const total = row.reduce((a, b) => a + b, 0);
    return row.map((count) => (count === 0 ? 0 : count / total));
  });
  const ends = scheme.matches ? ["#1d2127", "#7ab4ff"] : ["#ffffff", "#0b62c4"];
  const ticks = { type: "category", automargin: true, showgrid: false, dtick: matrix.length <= 40 ? 1 : undefined };
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `Confusion matrix of ${matrix.length} classes`);
  const keys = matrix.map((_, i) => i), tick = { ...ticks, type: "linear", tickvals: keys, ticktext: labels };
  const axis = matrix.length <= 40 ? tick : { ...ticks, type: "linear", dtick: undefined };
  Plotly.react(plot, [{
    type: "heatmap", z: shares, x: keys, y: keys, customdata: matrix, zmin: 0, zmax: 1, xgap: 1, ygap: 1,
    text: matrix.length <= 15 ? matrix.map((row) => row.map((n) => (n === 0 ? "" : n))) : undefined,
    texttemplate: matrix.length <= 15 ? "%{text}" : undefined, colorscale: [[0, ends[0]], [1, ends[1]]],
    hovertext: matrix.map((_, i) => labels.map((label) => `true ${labels[i]}, predicted ${label}`)),
    hovertemplate: "%{hovertext}<br>%{customdata} examples, %{z:.1%} of the true class<extra></extra>",
    colorbar: { title: { text: "share of the true class", side: "right" }, tickformat: ".0%", thickness: 12 },
  }], layout({
    xaxis: { ...axis, title: { text: "predicted class" } },
    yaxis: { ...axis, title: { text: "true class" }, autorange: "reversed" },
  }), CONFIG);
}

function drawParallel(sweep, position) {
  const plot = place(`[data-parallel="${position}"]`);
  if (sweep === null || plot === null) return;
  const { axes, scores } = sweep, last = axes[axes.length - 1];
  const hover = scores.map((_, i) => axes.map((axis) => `${escapeHtml(axis.name)}: ${escapeHtml(shorten(axis.texts[i], 60))}`).join("<br>"));
  const [cold, hot] = scheme.matches ? ["#3b5573", "#ffd166"] : ["#c3d3e6", "#a4250c"];
  const mix = (share) => {
    const part = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
    return `rgb(${[0, 1, 2].map((i) => Math.round(part(cold, i) + share * (part(hot, i) - part(cold, i)))).join(", ")})`;
  };
  const goodness = (i) => (sweep.higher ? last.at[i] : 1 - last.at[i]);
  const order = scores.map((_, i) => i).sort((a, b) => goodness(a) - goodness(b)); // the best on top
  const lines = order.map((i) => ({
    type: "scatter", mode: "lines+markers", x: axes.map((_, j) => j), y: axes.map((axis) => axis.at[i]),
    line: { color: mix(goodness(i)), width: 1 + 2 * goodness(i) }, marker: { size: 6 },
    hovertemplate: `${hover[i]}<extra></extra>`,
  }));
  const ticks = axes.flatMap((axis, j) => axis.ticks.map(([at, text]) => ({
    x: j, y: at, text: escapeHtml(shorten(text, 18)), showarrow: false, xanchor: j === axes.length - 1 ? "right" : "left",
    xshift: j === axes.length - 1 ? -8 : 8, font: { size: 11 }, bgcolor: style("--card"), opacity: 0.85,
  })));
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `Parallel coordinates of ${scores.length} settings; the table below has the same values`);
  Plotly.react(plot, lines, layout({
    hovermode: "closest", annotations: ticks, margin: { l: 24, r: 24, t: 30, b: 48 },
    shapes: axes.map((_, j) => ({ type: "line", x0: j, x1: j, y0: 0, y1: 1, line: { color: style("--soft"), width: 1 } })),
    xaxis: { tickvals: axes.map((_, j) => j), ticktext: axes.map((axis) => escapeHtml(shorten(axis.name, 26)) + (axis.log ? "<br>(log)" : "")), showgrid: false, zeroline: false, range: [-0.12, axes.length - 0.88], fixedrange: true },
    yaxis: { visible: false, range: [-0.06, 1.06], fixedrange: true },
  }), CONFIG);
}

function drawImportance(losses, position) {
  const plot = place(`[data-importance="${position}"]`);
  const rows = Object.entries(losses).sort((a, b) => a[1] - b[1]);
  if (plot === null || rows.length === 0) return;
  plot.style.height = `${90 + 34 * rows.length}px`;
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `Importance: ${rows.slice().reverse().map(([name, fall]) => `${name} ${number(fall)}`).join(", ")}`);
  Plotly.react(plot, [{
    type: "bar", orientation: "h", x: rows.map((row) => row[1]), y: rows.map((_, i) => i), marker: { color: colour(0) },
    hovertext: rows.map((row) => escapeHtml(row[0])), hovertemplate: "%{hovertext}: R² falls by %{x:.3f}<extra></extra>",
  }], layout({
    xaxis: { title: { text: "fall of R² when shuffled" }, rangemode: "tozero" },
    yaxis: { tickvals: rows.map((_, i) => i), ticktext: rows.map((row) => escapeHtml(shorten(row[0], 40))) },
  }), CONFIG);
}

function drawAll() {
  drawNames();
  data.matrices.forEach(drawMatrix);
  data.sweeps.forEach(drawParallel);
  data.importance.forEach(drawImportance);
  return drawCharts();
}

function setUp() {
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["x", "log-x", "log-y"]) byId(id).addEventListener("change", drawCharts);
  byId("seeds").addEventListener("change", () => { drawNames(); drawCharts(); });
  byId("smoothing").addEventListener("input", () => {
    byId("smoothing-value").textContent = byId("smoothing").value;
    drawCharts();
  });
  byId("all").addEventListener("click", () => { hidden.clear(); drawNames(); drawCharts(); });
  byId("none").addEventListener("click", () => {
    for (const entry of entries()) hidden.add(entry.label);
    drawNames();
    drawCharts();
  });
  scheme.addEventListener("change", drawAll);
}

// Ask the server that the page came from, and replace what has changed.
let version = page.live?.version;
async function refresh() {
  const status = byId("live");
  try {
    const answer = await fetch(`data?version=${encodeURIComponent(version)}`, { cache: "no-store" });
    if (!answer.ok) throw new Error((await answer.json()).error);
    if (answer.status !== 204) {
      const next = await answer.json();
      version = next.version;
      data = next.data;
      for (const [name, text] of Object.entries(next.parts)) {
        const part = document.querySelector(`[data-part="${name}"]`);
        if (part !== null && part.dataset.version !== text) {
          part.dataset.version = text;
          part.innerHTML = text;
        }
      }
      document.getElementById("sweeps").hidden = next.parts.sweeps === "";
      await drawAll();
    }
    status.textContent = "Following the runs.";
  } catch (error) {
    status.textContent = `Not refreshed: ${error.message ?? error}`;
  }
  setTimeout(refresh, 1000 * page.live.every);
}

setUp();
drawAll().then(() => {
  document.documentElement.dataset.ready = "yes";
  if (page.live) {
    byId("live").hidden = false;
    setTimeout(refresh, 1000 * page.live.every);
  }
});
