// The dashboard: follows the server, and shows the model that the reader picked.
import * as charts from "./charts.js";
import { at, clock, count, el, keep, many, mark, percent, quality, range, rate, say, seconds, times } from "./elements.js";
import * as goal from "./goal.js";
import * as ladder from "./ladder.js";
import { follow, token } from "./stream.js";

const OUTCOMES = {
  met: ["met", "meets its goal"], "not met": ["missed", "misses its goal"],
  "cannot tell": ["unsure", "can't be told"], quiet: ["quiet", "no requests"],
};
const MARKS = { met: "met", "not met": "missed", "cannot tell": "unsure", quiet: "quiet" };
const DECISIONS = 12;

let latest = null;
const points = new Map(); // by model: what the charts draw

const picked = () => {
  const asked = decodeURIComponent(location.hash.slice(1));
  return latest.models.find((m) => m.name === asked) || latest.models[0] || null;
};

const gather = (state, first) => {
  if (first) points.clear();
  for (const model of state.models) {
    const kept = points.get(model.name) || [];
    const fresh = model.points || [];
    kept.push(...(kept.length ? fresh.filter((p) => p[0] > kept[kept.length - 1][0]) : fresh));
    while (kept.length && kept[0][0] < state.at - state.span) kept.shift();
    points.set(model.name, kept);
  }
};

const show = () => {
  pick();
  say(at("foot"), `accelerando ${latest.version}.  Figures without a time are of the last minute; `
    + "latencies are read off a histogram and as rough as its buckets.  Prometheus reads /metrics.");
  const model = picked();
  const ready = model !== null && model.state === "READY";
  at("loaded").hidden = !ready;
  alarm(!ready ? "" : latest.ready ? model.reason : "The server is not ready: it is loading or draining.");
  if (!ready) { showAbsent(model); return; }
  document.title = `${OUTCOMES[model.outlook.outcome][1]} \u2013 ${model.name}`;
  showVerdict(model);
  showCards(model);
  ladder.show(model.status);
  goal.show(model);
  charts.show(model, latest.columns, points.get(model.name) || [], latest.span);
  charts.memory(model.status);
  showStands(model.status);
  showWatch(model.status);
};

const pick = () => {
  const names = latest.models.map((m) => m.name);
  const box = at("model");
  if ([...box.options].map((o) => o.value).join("\n") !== names.join("\n")) {
    box.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  }
  const model = picked();
  if (model && box.value !== model.name) box.value = model.name;
  box.disabled = names.length < 2;
};

const showAbsent = (model) => {
  document.title = "accelerando";
  badge("quiet", model ? model.state.toLowerCase() : "empty");
  say(at("headline"), model ? (model.state === "LOADING" ? "Loading" : "Not loaded") : "No model");
  say(at("under"), model ? model.reason || "the server gave no reason" : "The server has no model; start it with a bundle, or load one.");
  at("sights").replaceChildren();
  at("cards").replaceChildren();
};

const badge = (tone, words) => { at("badge").className = `badge ${tone}`; say(at("badge"), words); };

const showVerdict = ({ outlook, recent, status }) => {
  badge(...OUTCOMES[outlook.outcome]);
  const when = recent.seconds > 55 ? "the last minute" : `the last ${many(Math.max(1, Math.round(recent.seconds)), "second")}`;
  if (recent.share === null) {
    say(at("headline"), "No requests");
    say(at("under"), `Nothing came in ${when}${status.answered ? `; ${many(status.answered, "request")} answered since it was loaded` : ""}.`);
  } else {
    say(at("headline"), `${percent(recent.share)} in time`);
    const missed = ["late", "refused", "expired", "failed"].filter((k) => recent[k]).map((k) => `${count(recent[k])} ${k}`);
    say(at("under"), `of ${many(recent.requests, "request")} in ${when}${missed.length ? `; ${missed.join(", ")}` : ""}.`);
  }
  keep(at("sights"), outlook.sights, (s) => s.bound,
    (s) => el("li", {}, el("span", { class: "tick", "aria-hidden": "true" }), el("code", {}, s.bound), el("b"), el("span", { class: "said" })),
    (node, s) => {
      mark(node, "class", MARKS[s.outcome]);
      say(node.children[2], s.outcome === "quiet" ? "" : s.outcome);
      say(node.children[3], s.said);
    });
};

const showCards = ({ status, recent }) => {
  const rung = ladder.standing(status);
  const answers = recent.answers || (rung && rung.quality);
  const over = (x, most) => (x !== null && x >= most ? `over ${seconds(most)}` : seconds(x));
  const cards = [
    ["Quality of the answers", answers ? quality(answers.mid) : "\u2013",
      `${status.metric}${answers ? `, ${range(answers, quality)}` : ""}${recent.quality !== null ? `; at least ${quality(recent.quality)} with missed ones as 0` : ""}`],
    ["Stands on", rung ? (rung.number ? `Rung ${rung.number} of ${status.rungs.length - 1}` : "The original") : "\u2013",
      !rung ? "" : rung.number ? `${times(rung.speedup.mid)} faster than the original` : `rung 0 of ${status.rungs.length - 1}`],
    ["Computing, p99", over(recent.computed.p99, recent.computed.most),
      recent.computed.p50 === null ? "" : `half within ${seconds(recent.computed.p50)}; waiting before it, p99 ${over(recent.queued.p99, recent.queued.most)}`],
    ["Load", `${rate(status.rate)} rows/s`,
      `${Math.round(100 * status.utilisation)}\u202f% busy, ${many(status.queue_rows, "row")} waiting`
      + (status.slowdown > 1.05 ? `; the machine is ${times(status.slowdown)} slower than usual` : "")],
  ];
  keep(at("cards"), cards, (c) => c[0], (c) => el("div", {}, el("dt", {}, c[0]), el("dd"), el("dd", { class: "was" })),
    (node, c) => { say(node.children[1], c[1]); say(node.children[2], c[2]); });
};

const showStands = (status) => {
  const all = status.stands.map((s, i) => ({ ...s, from: i ? status.stands[i - 1].rung : null })).reverse();
  say(at("stands-lead"), `${many(status.switches, "change")} of rung since it was loaded.`);
  keep(at("stands"), all.slice(0, DECISIONS), (s) => `${s.at}/${s.rung}/${s.why}`,
    (s) => el("li", {}, el("time", { datetime: new Date(s.at * 1000).toISOString() }, clock(s.at)),
      el("b", {}, s.from === null ? `rung ${s.rung}` : `rung ${s.from} \u2192 ${s.rung}`), el("span", {}, s.why)), () => {});
};

const showWatch = (status) => {
  const bad = status.rungs.filter((r) => r.state === "quarantined");
  say(at("watch-lead"), `${status.audited ? `${many(status.audited, "request")} answered again by the best rung, to compare.` : "Nothing was compared yet."}`
    + `${bad.length ? ` ${many(bad.length, "rung")} in quarantine.` : ""}${status.drift.length ? " The inputs have drifted:" : " No drift of the inputs."}`);
  keep(at("drift"), status.drift, (d) => d, (d) => el("li", {}, d), () => {});
};

const alarm = (words) => { at("alarm").hidden = !words; say(at("alarm"), words); };

const line = (state, words) => { at("link").dataset.state = state; say(at("link-words"), words); };

// A promise of the token, which the reader types.
let asking = null;
const asked = () => {
  line("lost", "a token is needed");
  at("token-form").hidden = false;
  at("token").focus();
  asking = asking || new Promise((done) => {
    at("token-form").addEventListener("submit", (event) => {
      event.preventDefault();
      token.set(at("token").value.trim());
      at("token").value = "";
      at("token-form").hidden = true;
      asking = null;
      done();
    }, { once: true });
  });
  return asking;
};

at("model").addEventListener("change", () => { location.hash = encodeURIComponent(at("model").value); });
addEventListener("hashchange", () => { if (latest) show(); });
goal.start(asked);
follow({
  told: (state, first) => { latest = state; gather(state, first); line("live", "live"); document.body.classList.remove("stale"); show(); },
  lost: (words) => { line("lost", `not live: ${words}`); document.body.classList.add("stale"); },
  asked,
});
