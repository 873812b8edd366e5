// The control of the goal: a slider for its speed, a text for all of it.
import { at, rate, say, seconds } from "./elements.js";
import { headers, token } from "./stream.js";

const LATENCY = ["latency", "p95", "p99"];
const STEPS = 1000;
const WORDS = { latency: "Half of the answers within", p95: "95 % of the answers within", p99: "99 % of the answers within", throughput: "Rows per second, at least" };

let model = null; // as the server last told it
let edited = false; // the reader has changed something that is not in force

export const show = (given) => {
  if (model && model.name !== given.name) { edited = false; answer(""); }
  model = given;
  if (!edited) {
    if (at("goal").value !== given.goal.text) at("goal").value = given.goal.text;
    place();
  }
  buttons();
};

const speedBound = () => model.goal.bounds.find((b) => LATENCY.includes(b.quantity))
  || model.goal.bounds.find((b) => b.quantity === "throughput") || null;

// What the slider spans: what the rungs can do, and room on both sides of what is asked for.
const reach = (bound) => {
  const costs = model.status.rungs.map((r) => r.seconds).filter((s) => s > 0);
  const [fast, slow] = costs.length ? [Math.min(...costs), Math.max(...costs)] : [1e-4, 1e-2];
  const ends = bound && bound.quantity === "throughput" ? [0.02 / slow, 2 / fast] : [fast, 50 * slow];
  return bound ? [Math.min(ends[0], bound.value / 4), Math.max(ends[1], 4 * bound.value)] : ends;
};

const place = () => {
  const bound = speedBound();
  const [low, high] = reach(bound);
  const value = bound ? bound.value : high;
  at("slider").value = Math.round(STEPS * Math.log(value / low) / Math.log(high / low));
  say(at("slider-label"), WORDS[bound ? bound.quantity : "p99"]);
  say(at("slider-low"), spelt(bound, low));
  say(at("slider-high"), spelt(bound, high));
  tellSlider(bound ? value : null, bound);
};

const spelt = (bound, value) => (bound && bound.quantity === "throughput" ? `${rate(value)}/s` : seconds(value));

const tellSlider = (value, bound) => {
  const words = value === null ? "no bound" : spelt(bound, value);
  say(at("slider-value"), words);
  at("slider").setAttribute("aria-valuetext", words);
};

// The goal's text with its speed bound moved, or with one more bound.
const moved = () => {
  const bound = speedBound();
  const [low, high] = reach(bound);
  const value = Number((low * (high / low) ** (at("slider").value / STEPS)).toPrecision(2));
  tellSlider(value, bound);
  const text = bound && bound.quantity === "throughput" ? `throughput >= ${value}/s`
    : `${bound ? bound.quantity : "p99"} <= ${seconds(value, "").replaceAll(",", "")}`;
  const { bounds, batch, prefer } = model.goal;
  const all = bound ? bounds.map((b) => (b === bound ? text : b.text)) : [...bounds.map((b) => b.text), text];
  return all.join(", ") + (batch === 1 ? "" : ` @ batch ${batch}`) + (prefer === "quality" ? "" : `, prefer ${prefer}`);
};

const buttons = () => {
  at("goal-set").disabled = !edited || !at("goal").value.trim();
  at("goal").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) { event.preventDefault(); at("goal-form").requestSubmit(); }
  });
  at("goal-undo").hidden = !edited;
};

const answer = (words, bad = false) => {
  const node = at("goal-answer");
  node.hidden = !words;
  say(node, words);
  node.classList.toggle("bad", bad);
  at("goal").setAttribute("aria-invalid", bad ? "true" : "false");
};

const send = async (asked) => {
  const text = at("goal").value.trim();
  const path = `v2/models/${encodeURIComponent(model.name)}/goal`;
  at("goal-set").disabled = true;
  try {
    const reply = await fetch(path, { method: "PUT", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify({ goal: text }) });
    if (reply.status === 401) {
      token.drop();
      answer("The server asks for a token first; the goal was not changed.", true);
      await asked();
      await send(asked);
      return;
    }
    if (reply.ok) { edited = false; answer("In force from the next batch on."); }
    else answer(await refusal(reply), true);
  } catch (error) {
    answer(`The goal was not changed: ${error.message || error}`, true);
  }
  buttons();
};

const refusal = async (reply) => {
  try {
    const { error } = await reply.json();
    if (typeof error === "string") return error;
  } catch { /* not JSON: its status tells */ }
  return `The goal was not changed: the server answered ${reply.status}.`;
};

export const start = (asked) => {
  at("slider").addEventListener("input", () => { if (model) { at("goal").value = moved(); edited = true; answer(""); buttons(); } });
  at("goal").addEventListener("input", () => { edited = true; answer(""); buttons(); });
  at("goal-undo").addEventListener("click", () => { edited = false; answer(""); if (model) show(model); at("goal").focus(); });
  at("goal-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (model && edited && at("goal").value.trim()) send(asked);
  });
};
