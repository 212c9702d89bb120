// Draws the figures stored in a page, in the colours of the page's theme, and again when the theme changes.
// plotly.js starts when the text is there: it is most of what a page loads.
const plotly = new URL("plotly.min.js", document.currentScript.src)

addEventListener("DOMContentLoaded", () => {
  const figures = [...document.querySelectorAll(".plotly-figure")].map(div =>
    [div, JSON.parse(div.querySelector("script").textContent)])

  // What a figure draws in black or nearly so is drawn in the page's ink, or it could not be seen on dark pages.
  const black = /^(black|#000|#111|#222|#333|#444|#([0-4])[\da-f]([0-4])[\da-f]([0-4])[\da-f]|#2a3f5f)$/i
  const inked = (x, ink, key = "") => typeof x === "string" ? (key.endsWith("color") && black.test(x) ? ink : x) :
    Array.isArray(x) ? x.map(v => inked(v, ink, key)) : x && typeof x === "object" ? Object.fromEntries(Object.entries(x).map(([k, v]) => [k, inked(v, ink, k)])) : x

  const themed = (layout, room, ink) => {
    const faint = ink.replace(/^rgba?\((\d+), (\d+), (\d+).*/, "rgba($1, $2, $3, 0.15)")
    const out = inked(layout, ink), base = (out.template ??= {}).layout ??= {}
    Object.assign(base, {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {...base.font, color: ink}})
    for (const axis of ["xaxis", "yaxis"])
      base[axis] = {...base[axis], gridcolor: faint, linecolor: faint, zerolinecolor: faint}
    if (out.width > room) out.width = Math.max(room, 480)
    return out
  }

  // A control changes the data it is given: each drawing begins with what the page stores.
  const draw = () => { const ink = getComputedStyle(document.body).color; for (const [div, f] of figures)
    Plotly.newPlot(div.lastElementChild, {data: inked(f.data, ink), layout: themed(f.layout || {}, div.clientWidth, ink), frames: inked(f.frames, ink), config: {displaylogo: false}}) }

  document.head.append(Object.assign(document.createElement("script"), {src: plotly, onload: () => {
    draw()
    new MutationObserver(draw).observe(document.documentElement, {attributeFilter: ["class", "data-bs-theme"]})
    new MutationObserver(draw).observe(document.body, {attributeFilter: ["class"]})
  }}))
})
