(() => {
  "use strict";
  const page = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const config = { responsive: true, displayModeBar: false, displaylogo: false };
  const drawn = new Map(); // name of a figure -> its element
  const bytes = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  const numbers = (text) => new Uint16Array(bytes(text).buffer);

  // -- colours follow the page ------------------------------------------------------------------------------

  function colours(layout) {
    const style = getComputedStyle(root);
    const ink = style.getPropertyValue("--ink").trim();
    const grid = style.getPropertyValue("--grid").trim();
    const panel = style.getPropertyValue("--panel").trim();
    const found = { "font.color": ink, "hoverlabel.bgcolor": panel, "hoverlabel.font.color": ink };
    for (const axis of ["xaxis", "yaxis"].filter((name) => name in layout)) {
      found[`${axis}.gridcolor`] = grid;
      found[`${axis}.linecolor`] = grid;
      found[`${axis}.zerolinecolor`] = ink;
    }
    return found;
  }
  function recolour() {
    for (const element of drawn.values()) Plotly.relayout(element, colours(element.layout));
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", recolour);
  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    recolour();
  });

  // -- figures ----------------------------------------------------------------------------------------------

  for (const element of document.querySelectorAll("[data-figure]")) {
    const figure = page.figures[element.dataset.figure];
    for (const [path, value] of Object.entries(colours(figure.layout))) {
      const keys = path.split("."), last = keys.pop();
      keys.reduce((inner, key) => (inner[key] ??= {}), figure.layout)[last] = value;
    }
    Plotly.newPlot(element, figure.data, figure.layout, config);
    drawn.set(element.dataset.figure, element);
  }

  // -- layers -----------------------------------------------------------------------------------------------

  const choices = {
    coactivation(layer) {
      const { experts, step, pairs, order, edges } = page.coactivation;
      const above = bytes(pairs[layer]); // the triangle above the diagonal, row by row
      const share = (one, other) => {
        if (one === other) return null;
        const low = Math.min(one, other), high = Math.max(one, other);
        return 100 * step * above[(low * (2 * experts - low - 1)) / 2 + high - low - 1];
      };
      for (const which of ["baseline", "report"]) {
        const element = drawn.get(`coactivation_${which}`);
        const held = order[which][layer];
        const line = { type: "line", line: { color: "#9a9a9a", width: 1 } };
        const shapes = edges[which][layer].flatMap((at) => [
          { ...line, x0: at - 0.5, x1: at - 0.5, y0: 0, y1: 1, yref: "paper" },
          { ...line, y0: at - 0.5, y1: at - 0.5, x0: 0, x1: 1, xref: "paper" },
        ]);
        const rows = held.map((one) => held.map((other) => share(one, other)));
        Plotly.update(element, { z: [rows] }, { shapes });
      }
    },
    load(layer) {
      const { ranks, server, layers } = page.load;
      const one = (values, at) => {
        if (at >= 0) return Array.from(values.subarray(at * ranks, (at + 1) * ranks), (value) => value / 1000);
        const rows = Array.from({ length: layers }, (_, row) => one(values, row));
        return rows[0].map((_, rank) => rows.reduce((sum, row) => sum + row[rank], 0) / layers);
      };
      const percent = (values) => values.map((value) => 100 * (value - 1));
      const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
      const known = ["baseline", "report"].map((which) => one(numbers(page.load[which]), layer));
      Plotly.restyle(drawn.get("load_gpu"), { y: known.map(percent) });
      if (!drawn.has("load_server")) return;
      const servers = known.map((values) =>
        Array.from({ length: ranks / server }, (_, at) => mean(values.slice(at * server, (at + 1) * server))));
      Plotly.restyle(drawn.get("load_server"), { y: servers.map(percent) });
    },
  };
  for (const select of document.querySelectorAll("[data-layers]")) {
    const choose = () => choices[select.dataset.layers](Number(select.value));
    select.addEventListener("change", choose);
    choose();
  }
  root.dataset.drawn = "yes";
})();
