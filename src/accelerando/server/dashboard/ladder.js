// The ladder: the fastest rung on top, the rung that is stood on lit.
import { at, brief, bytes, el, keep, mark, quality, range, say, seconds, svg, times } from "./elements.js";

const LONG = 96; // characters of a recipe that are shown before it is opened
const STATES = { ready: "ready", loading: "loading", out: "not loaded", quarantined: "quarantined", failed: "failed" };
const MOST = { wide: 7, narrow: 4 }; // rungs that are shown with every detail unasked
const narrow = matchMedia("(max-width: 680px)");
const FIGURES = ["Speed", "Quality", "Memory", "Answered"];

export const show = (status) => {
  const rungs = [...status.rungs].sort((a, b) => b.number - a.number);
  const scale = span(rungs);
  say(at("scale-low"), scale ? quality(scale.low) : "");
  say(at("scale-high"), scale ? quality(scale.high) : "");
  const crowd = rungs.length > (narrow.matches ? MOST.narrow : MOST.wide);
  at("details").hidden = !crowd;
  at("ladder").classList.toggle("dense", crowd && at("details").getAttribute("aria-pressed") !== "true");
  const whole = rungs.reduce((sum, rung) => sum + rung.answered, 0);
  keep(at("ladder"), rungs, (r) => `${status.name}/${status.version}/${r.number}/${r.recipe}`, make,
    (node, rung) => fill(node, rung, rung.number === status.standing, scale, whole));
  say(at("ladder-note"), `Quality is ${status.metric}, certified on data that no choice was made on; whiskers are its interval. `
    + "Speed is times faster than the original.");
};

const tenths = (x) => `${Math.floor(1000 * x + 1e-9) / 10}\u202f%`;

at("details").addEventListener("click", () => {
  const all = at("details").getAttribute("aria-pressed") !== "true";
  mark(at("details"), "aria-pressed", String(all));
  at("ladder").classList.toggle("dense", !all);
});

// Ends of the axis that all rungs share.
const span = (rungs) => {
  const ends = rungs.flatMap((r) => [r.quality.low, r.quality.high]).filter((x) => x !== null);
  if (!ends.length) return null;
  const low = Math.min(...ends), high = Math.max(...ends);
  return high > low ? { low, high } : { low: low - 0.01 * (Math.abs(low) || 1), high: high + 0.01 * (Math.abs(high) || 1) };
};

const make = (rung) => {
  const name = rung.number ? `Rung ${rung.number}` : "Rung 0, the original";
  const recipe = rung.recipe.length <= LONG ? el("code", { class: "recipe" }, rung.recipe)
    : el("details", { class: "recipe" }, el("summary", {}, el("code", {}, `${rung.recipe.slice(0, LONG - 1)}\u2026`)),
      el("code", {}, rung.recipe));
  return el("li", { class: "rung", value: rung.number },
    el("span", { class: "rails", "aria-hidden": "true" }, el("span", { class: "bar" })),
    el("div", { class: "what" },
      el("p", { class: "name" }, el("b", {}, name), " ", el("span", { class: "here" }), " ", el("span", { class: "state" })),
      recipe, el("p", { class: "agreed" }), el("p", { class: "why" })),
    el("dl", { class: "figures" }, ...FIGURES.map((words, i) => el("div", { class: `f${i}` }, el("dt", {}, words),
      el("dd", {}, el("span", { class: "main" }), i === 1 ? whisker() : null, i === 3 ? el("span", { class: "share" }, el("span")) : null,
        el("small"))))));
};

const whisker = () => svg("svg", { class: "whisker", "aria-hidden": "true" },
  svg("line", { class: "axis", x1: "0", x2: "100%", y1: "7", y2: "7" }),
  svg("line", { class: "reach", y1: "7", y2: "7" }), svg("circle", { r: "4", cy: "7" }));

const fill = (node, rung, here, scale, whole) => {
  mark(node, "aria-current", here ? "true" : null);
  mark(node, "data-state", rung.state);
  say(node.querySelector(".here"), here ? "stands here" : "");
  say(node.querySelector(".state"), here && rung.state === "ready" ? "" : STATES[rung.state] || rung.state);
  say(node.querySelector(".why"), rung.why);
  const share = whole ? rung.answered / whole : 0;
  say(node.querySelector(".agreed"), rung.agreement && rung.agreement.mid !== null
    ? `agrees with the best rung in ${tenths(rung.agreement.mid)} (${range(rung.agreement, tenths)})` : "");
  const figures = [
    [times(rung.speedup.mid), rung.seconds ? `${seconds(rung.seconds)} a row` : ""], // one that failed was not timed
    [quality(rung.quality.mid), [range(rung.quality, quality), loss(rung)].filter(Boolean).join("; ")],
    [rung.bytes ? bytes(rung.bytes) : "\u2013", ""],
    [`${brief(rung.answered)} ${rung.answered === 1 ? "row" : "rows"}`, whole ? `${tenths(share)} of all` : ""],
  ];
  figures.forEach(([main, small], i) => {
    const place = node.querySelector(`.f${i} dd`);
    say(place.querySelector(".main"), main);
    say(place.querySelector("small"), small);
  });
  node.querySelector(".share span").style.width = `${100 * share}%`;
  draw(node.querySelector(".whisker"), rung.quality, scale);
};

const loss = (rung) => {
  if (!rung.number || rung.drop.mid === null) return "";
  const figure = quality(Math.abs(rung.drop.mid));
  return Number(figure) === 0 ? "as the original" : `${figure} ${rung.drop.mid > 0 ? "worse" : "better"}`;
};

const draw = (picture, { low, mid, high }, scale) => {
  const known = scale && [low, mid, high].every((x) => x !== null);
  mark(picture, "class", known ? "whisker" : "whisker unknown");
  if (!known) return;
  const place = (x) => `${(4 + 92 * (x - scale.low) / (scale.high - scale.low)).toFixed(2)}%`;
  const [, reach, dot] = picture.children;
  mark(reach, "x1", place(low));
  mark(reach, "x2", place(high));
  mark(dot, "cx", place(mid));
};

export const standing = (status) => status.rungs.find((r) => r.number === status.standing) || null;
