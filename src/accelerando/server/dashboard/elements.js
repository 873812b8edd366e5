// Elements and figures.  What comes from elsewhere only ever becomes the text of a node, never HTML.

export const at = (id) => document.getElementById(id);

export const el = (tag, given = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined).map((c) => (c instanceof Node ? c : String(c))));
  return node;
};

export const svg = (tag, given = {}, ...children) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(given)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

// Only what changed is touched: a reader's selection, focus and screen reader stay undisturbed.
export const say = (node, words) => { if (node.textContent !== words) node.textContent = words; };
export const mark = (node, name, value) => {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
};

// A list whose items are kept by key: `make` once for each, `fill` each time.
export const keep = (list, items, key, make, fill) => {
  const there = new Map([...list.children].map((node) => [node.dataset.key, node]));
  items.forEach((item, index) => {
    const name = String(key(item));
    let node = there.get(name);
    if (!node) { node = make(item); node.dataset.key = name; }
    there.delete(name);
    if (list.children[index] !== node) list.insertBefore(node, list.children[index] || null);
    fill(node, item);
  });
  for (const node of there.values()) node.remove();
};

const NARROW = "\u202f"; // a narrow space between a figure and its unit, which does not break
const number = (x, digits = 3) => Number(x.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 9 });
const known = (x) => typeof x === "number" && Number.isFinite(x);

export const count = (x) => (known(x) ? Math.round(x).toLocaleString("en") : "\u2013");
export const brief = (x) => (!known(x) ? "\u2013" : x < 10000 ? count(x)
  : x < 1e6 ? `${number(x / 1e3)}k` : x < 1e9 ? `${number(x / 1e6)}M` : `${number(x / 1e9)}G`);
export const times = (x) => (known(x) ? `${number(x)}${NARROW}\u00d7` : "\u2013");
export const rate = (x) => (!known(x) ? "\u2013" : x >= 100 || x < 0.005 ? count(x) : number(x, x < 1 ? 2 : 3));
export const seconds = (s, space = NARROW) => (!known(s) ? "\u2013" : s >= 1 ? `${number(s)}${space}s`
  : s >= 1e-3 ? `${number(s * 1e3)}${space}ms` : `${number(s * 1e6)}${space}${space ? "\u00b5" : "u"}s`);
export const bytes = (b) => (!known(b) ? "\u2013" : b >= 1e9 ? `${number(b / 1e9)}${NARROW}GB`
  : b >= 1e6 ? `${number(b / 1e6)}${NARROW}MB` : b >= 1e3 ? `${number(b / 1e3)}${NARROW}KB` : `${count(b)}${NARROW}B`);
export const quality = (x) => (!known(x) ? "\u2013" : Math.abs(x) <= 1 ? x.toFixed(4) : number(x, 5));
// Cut, not rounded: what is not all is never told as 100 %.
export const percent = (x) => (known(x) ? `${Math.floor(x * 10000 + 1e-9) / 100}${NARROW}%` : "\u2013");
export const clock = (epoch) => new Date(epoch * 1000).toLocaleTimeString("en-GB");
export const range = (i, spell) => (i.low === i.high ? spell(i.mid) : `${spell(i.low)} to ${spell(i.high)}`);
export const many = (n, one, more = `${one}s`) => `${count(n)} ${n === 1 ? one : more}`;
