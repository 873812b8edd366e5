// The last ten minutes, drawn by uPlot; one moment is under the pointer in all charts at once.
/* global uPlot */
import { at, bytes, count, el, percent, quality, rate, say, seconds } from "./elements.js";

const LEAST = 60; // seconds that are shown at least, when little has been seen yet
const GAP = 6; // seconds without a point that break a line
const share = (x) => (x === null || x === undefined ? "\u2013" : percent(x));

// lines: [column, words, colour, dashed]; bound(model): what the goal asks for, drawn dashed.
const CHARTS = [
  { key: "standing", title: "Where it stood", spell: (x) => `rung ${count(x)}`, axis: (x) => (Number.isInteger(x) ? `${x}` : ""),
    lines: [["standing", "rung", "--accent"]], stepped: true, span: (low, high, m) => [-0.4, Math.max(1, m.status.rungs.length - 1) + 0.4] },
  { key: "rows", title: "Rows per second", spell: rate, axis: rate,
    lines: [["arriving", "arriving", "--middle"], ["answered", "answered", "--accent"]], span: (low, high) => [0, Math.max(1, 1.1 * high)],
    bound: (m) => bound(m, ["throughput"]) },
  { key: "share", title: "Requests in time", spell: share, axis: share,
    lines: [["share", "in time", "--good"]], span: (low) => [Math.max(0, Math.min(low, 0.98) - 0.005), 1.0005], bound: (m) => m.goal.needed },
  { key: "quality", title: "Quality of all answers, 0 for missed ones", spell: quality, axis: (x) => `${Number(x.toPrecision(4))}`,
    lines: [["quality", "effective quality", "--rung3"]], span: (low, high) => padded(low, high),
    applies: (m) => m.status.effective_quality !== null }, // missed answers have no error, where less is better
  { key: "latency", title: "Latency", spell: seconds, axis: (x) => seconds(x), log: true,
    lines: [["computed50", "computing, p50", "--accent"], ["computed99", "computing, p99", "--rung4"], ["queued99", "waiting, p99", "--middle", true]],
    span: (low, high) => [0.7 * Math.max(low, 1e-5), Math.max(1.5 * high, 2e-5)], bound: (m) => bound(m, ["latency", "p95", "p99"]) },
  { key: "queue", title: "Rows that wait", spell: count, axis: count,
    lines: [["queue", "waiting", "--rung5"]], span: (low, high) => [0, Math.max(4, 1.1 * high)] },
];

const bound = (model, quantities) => {
  const found = model.goal.bounds.filter((b) => quantities.includes(b.quantity)).map((b) => b.value);
  return found.length ? found[found.length - 1] : null;
};

const padded = (low, high) => {
  const room = Math.max(0.15 * (high - low), 0.004 * Math.max(Math.abs(low), Math.abs(high)), 1e-6);
  return [low - room, high + room];
};

let shown = "";
let plots = [];
let model = null;

export const show = (given, columns, points, window) => {
  model = given;
  const name = `${given.name}/${given.status.rungs.length}`;
  if (name !== shown) { build(); shown = name; }
  const now = points.length ? points[points.length - 1][0] : Date.now() / 1000;
  const times = points.map((p) => p[0]);
  for (const one of plots) {
    one.figure.hidden = Boolean(one.chart.applies && !one.chart.applies(model));
    const data = table(one.chart, columns, points, times);
    one.limits = [Math.max(now - window, Math.min(now - LEAST, times.length ? times[0] : now)), now];
    one.plot.setData(data);
    const key = one.figure.querySelector(".asked");
    if (key) key.hidden = data[data.length - 1].every((y) => y === null);
    tell(one, data);
  }
};

// The columns of a chart, a line broken where nothing was seen for a while, and the goal's bound as a line of its own.
const table = (chart, columns, points, times) => {
  const asked = chart.bound ? chart.bound(model) : null;
  const places = chart.lines.map(([column]) => columns.indexOf(column));
  const rows = [];
  points.forEach((point, i) => {
    if (i && times[i] - times[i - 1] > GAP) rows.push([(times[i] + times[i - 1]) / 2, ...places.map(() => null), null]);
    rows.push([times[i], ...places.map((place) => above(chart, point[place])), asked]);
  });
  return [...Array(places.length + 2).keys()].map((i) => rows.map((row) => row[i]));
};

const above = (chart, value) => (chart.log && value !== null ? Math.max(value, 1e-6) : value);

const tell = ({ chart, now, figure }, data) => {
  const lines = chart.lines.map(([, words], i) => {
    const seen = data[i + 1].filter((x) => x !== null);
    const last = data[i + 1][data[i + 1].length - 1];
    return { words, seen, last: last === undefined ? null : last };
  });
  say(now, lines.map((l) => (l.last === null ? "\u2013" : chart.spell(l.last))).join(" / "));
  figure.setAttribute("aria-label", `${chart.title}, the last ten minutes. ${lines.map((l) => (l.seen.length
    ? `${l.words}: now ${l.last === null ? "none" : chart.spell(l.last)}, between ${chart.spell(Math.min(...l.seen))} and ${chart.spell(Math.max(...l.seen))}`
    : `${l.words}: nothing yet`)).join("; ")}.`);
};

const build = () => {
  plots.forEach((one) => one.plot.destroy());
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  at("charts").replaceChildren();
  plots = CHARTS.map((chart) => {
    const now = el("b");
    const place = el("div", { class: "plot" });
    const keys = chart.lines.length < 2 && !chart.bound ? null : el("p", { class: "keys", "aria-hidden": "true" },
      ...chart.lines.map(([, words, tone, dashed]) => el("span", { class: `key tone${tone}${dashed ? " dashed" : ""}` }, words)),
      chart.bound ? el("span", { class: "key tone--bad dashed asked" }, "asked for") : null);
    const figure = el("figure", { role: "img", tabindex: "-1" }, el("figcaption", {}, el("span", {}, chart.title), now), place, keys);
    at("charts").append(figure);
    const one = { chart, now, figure, limits: [0, 1], plot: null, place };
    one.plot = new uPlot(options(one, place.clientWidth || 320, colour), [[], ...chart.lines.map(() => []), []], place);
    return one;
  });
};

const options = (one, width, colour) => {
  const { chart } = one;
  const axis = { stroke: colour("--soft"), font: "11px system-ui, sans-serif", ticks: { show: false }, grid: { stroke: colour("--line"), width: 1 } };
  return {
    width, height: 150, legend: { show: false }, padding: [8, 6, 0, 0],
    cursor: { sync: { key: "accelerando" }, drag: { x: false, y: false }, points: { size: 7 } },
    scales: {
      x: { time: true, range: () => one.limits },
      y: { distr: chart.log ? 3 : 1, log: 10, range: (plot, low, high) => limits(chart, low, high) },
    },
    axes: [
      { ...axis, space: 70, size: 26, values: (plot, splits, i, space, step) => splits.map((t) => moment(t, step < 60 ? 8 : 5, one.limits)),
        incrs: [5, 10, 20, 30, 60, 120, 300] },
      { ...axis, size: 58, space: 30, splits: chart.log ? decades : undefined, filter: (plot, splits) => splits, values: (plot, splits) => splits.map((y) => (y === null ? "" : chart.axis(y))) },
    ],
    series: [{}, ...chart.lines.map(([, , tone, dashed], i) => ({
      stroke: colour(tone), width: 1.75, dash: dashed ? [5, 4] : undefined, points: { show: false },
      fill: i === chart.lines.length - 1 && !chart.log && chart.lines.length === 1 ? faint(colour(tone)) : undefined,
      paths: chart.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
    })), { stroke: colour("--bad"), width: 1.25, dash: [3, 4], points: { show: false } }],
    hooks: { setCursor: [() => point(one)] },
  };
};

// A time of day; none at the very edge, where it would be cut.
const moment = (t, length, [from, to]) => (to - t < 0.06 * (to - from) ? "" : new Date(t * 1000).toLocaleTimeString("en-GB").slice(0, length));

// 1, 10, 100 of a logarithmic axis; with 2 and 5 between them where it is short.
const decades = (plot, axis, low, high) => {
  const steps = high / low < 300 ? [1, 2, 5] : [1];
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) found.push(...steps.map((s) => s * 10 ** e));
  return found.filter((y) => y >= low && y <= high);
};

const faint = (hex) => (/^#[0-9a-f]{6}$/i.test(hex) ? `${hex}1c` : "transparent");

// uPlot gives null where there is nothing to show.
const limits = (chart, low, high) => {
  const [from, to] = chart.span(low === null ? 0 : low, high === null ? 1 : high, model);
  return to > from ? [from, to] : [from - 1, from + 1];
};

// Under the pointer, the figures of that moment in place of the present ones.
const point = ({ chart, now, plot }) => {
  const i = plot && plot.cursor.idx;
  if (i === null || i === undefined || !plot.data[0].length) return;
  const moment = new Date(plot.data[0][i] * 1000).toLocaleTimeString("en-GB");
  say(now, `${moment}  ${chart.lines.map((l, n) => { const y = plot.data[n + 1][i]; return y === null || y === undefined ? "\u2013" : chart.spell(y); }).join(" / ")}`);
};

const resize = () => plots.forEach(({ plot, place }) => {
  if (place.clientWidth && place.clientWidth !== plot.width) plot.setSize({ width: place.clientWidth, height: 150 });
});
new ResizeObserver(resize).observe(at("charts"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { shown = ""; });

export const memory = (status) => {
  const cap = status.memory_cap;
  say(at("memory"), bytes(status.memory_bytes));
  say(at("memory-cap"), cap === null ? "held by the loaded rungs; no cap is set" : `of ${bytes(cap)} allowed`);
  at("memory-bar").parentElement.hidden = cap === null;
  at("memory-bar").style.width = `${cap ? Math.min(100, 100 * status.memory_bytes / cap) : 0}%`;
  const out = status.rungs.filter((r) => r.state === "out").length;
  say(at("memory-note"), out ? `${out === 1 ? "One rung is" : `${out} rungs are`} not loaded just now.` : "");
};
