"use strict";
// Draws every plot in the reader's theme, and again when the theme, the width or the medium changes.
(() => {
  const root = document.documentElement;
  const figures = [...document.querySelectorAll("figure[data-plot]")].map((holder) => {
    const name = holder.dataset.plot;
    return {
      place: document.getElementById(`${name}-plot`),
      figure: JSON.parse(document.getElementById(`${name}-data`).textContent),
    };
  });

  // Colours are written var(--name) in the data; plotly needs their values.
  const themed = (value, style) => {
    if (typeof value === "string") {
      const name = /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((v) => themed(v, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v, style)]));
    }
    return value;
  };

  const axis = (own) => ({
    gridcolor: "var(--line)", zerolinecolor: "var(--middle)", linecolor: "var(--line)", tickfont: { color: "var(--soft)" },
    zeroline: false, automargin: true, fixedrange: false, ...own,
    title: { font: { color: "var(--soft)", size: 13 }, standoff: 10, ...(own || {}).title },
  });

  const draw = (width) => {
    const style = getComputedStyle(root);
    for (const { place, figure } of figures) {
      const wide = width || place.clientWidth;
      const narrow = wide < 520;
      const layout = {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: style.fontFamily, color: "var(--text)", size: narrow ? 11 : 13 },
        margin: { l: narrow ? 42 : 60, r: narrow ? 8 : 20, t: 12, b: 50 },
        hoverlabel: { bgcolor: "var(--card)", bordercolor: "var(--line)", font: { color: "var(--text)" }, align: "left" },
        dragmode: false, ...figure.layout, width: wide, height: figure.height + (narrow ? 70 : 0),
        legend: { orientation: "h", y: -0.22, yanchor: "top", x: 0, ...figure.layout.legend },
        xaxis: axis(figure.layout.xaxis), yaxis: axis(figure.layout.yaxis),
      };
      if (narrow && layout.xaxis.tickvals && layout.xaxis.tickvals.length > 6) {
        layout.xaxis.tickvals = layout.xaxis.tickvals.filter((_, i) => i % 2 === 0);
        layout.xaxis.ticktext = layout.xaxis.ticktext.filter((_, i) => i % 2 === 0);
      }
      if (narrow && layout.annotations) {  // the bounds are in the table
        layout.annotations = layout.annotations.map((a) => ({ ...a, text: a.text.replace(/ \(.*$/, "") }));
      }
      place.style.height = `${layout.height}px`;
      Plotly.react(place, themed(figure.data, style), themed(layout, style), { displayModeBar: false, scrollZoom: false });
    }
  };

  draw();
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => draw(), 120); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", () => {
    root.classList.add("paper");
    document.querySelectorAll("details").forEach((d) => { d.dataset.was = d.open; d.open = true; });
    draw(680);
  });
  addEventListener("afterprint", () => {
    root.classList.remove("paper");
    document.querySelectorAll("details").forEach((d) => { d.open = d.dataset.was === "true"; });
    draw();
  });
})();
