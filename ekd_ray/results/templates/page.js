"use strict";
(function () {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const config = { displaylogo: false, responsive: true, displayModeBar: false };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // Charts take their ink from the style sheet, so that light, dark and print agree.
  function template() {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim();
    const soft = style.getPropertyValue("--soft").trim();
    const grid = style.getPropertyValue("--grid").trim();
    const axis = {
      gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true,
      tickfont: { color: soft, size: 12 }, title: { font: { color: soft, size: 13 }, standoff: 8 },
    };
    return {
      layout: {
        font: { family: getComputedStyle(document.body).fontFamily, color: ink, size: 13 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        xaxis: axis, yaxis: axis, hovermode: "closest",
        hoverlabel: { font: { size: 13 } }, modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink },
        annotationdefaults: { font: { color: soft, size: 12 }, showarrow: false },
        coloraxis: { colorbar: { outlinewidth: 0, thickness: 10, tickfont: { color: soft } } },
      },
    };
  }

  function layoutOf(chart, node) {
    const narrow = node.clientWidth < 480;
    const width = printing ? node.clientWidth : undefined;
    const legend = { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: 12 } };
    const margin = { l: narrow ? 44 : 56, r: narrow ? 12 : 20, t: chart.layout.showlegend === false ? 10 : 40, b: 48 };
    return Object.assign({ margin, legend, dragmode: narrow ? false : "zoom" }, chart.layout, { width, template: template() });
  }

  let printing = false;
  const drawn = new Set();
  function draw(name) {
    const node = document.getElementById(name);
    drawn.add(name);
    node.replaceChildren();
    const fixed = Object.assign({}, config, { responsive: !printing });
    return Plotly.newPlot(node, charts[name].data, layoutOf(charts[name], node), fixed);
  }
  function drawAll() { return Promise.all(Object.keys(charts).filter((name) => !drawn.has(name)).map(draw)); }
  function restyle() {
    for (const name of drawn) {
      const node = document.getElementById(name);
      Plotly.relayout(node, { template: template() });
    }
  }
  // A chart keeps the width that it was drawn at, so that paper needs a new one; the sheet's
  // widths are taken before the browser lays the sheet out.
  function toPaper(on) {
    printing = on;
    document.documentElement.classList.toggle("paper", on);
    drawn.clear();
    return drawAll();
  }

  // A stream unpacks plotly, as browsers do since 2023; others show the figures in words.
  async function unpack() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (sign) => sign.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }
  function describe() {
    for (const name of Object.keys(charts)) {
      const node = document.getElementById(name);
      node.textContent = node.getAttribute("aria-label");
    }
  }

  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !drawn.has(entry.target.id)) draw(entry.target.id);
    }
  }, { rootMargin: "800px" });
  function start() {
    for (const name of Object.keys(charts)) watch.observe(document.getElementById(name));
    dark.addEventListener("change", restyle);
    window.addEventListener("beforeprint", () => toPaper(true));
    window.addEventListener("afterprint", () => toPaper(false));
  }
  const ready = unpack().then(start, describe);
  window.chartsReady = ready;
  window.drawAllCharts = () => ready.then(drawAll);
})();
