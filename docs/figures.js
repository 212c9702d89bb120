// Draws the figures stored in a page, in the colours of the page's theme, and again when the theme changes.
addEventListener("DOMContentLoaded", () => {
  const figures = [...document.querySelectorAll(".plotly-figure")].map(div =>
    [div, JSON.parse(div.querySelector("script").textContent)])

  const themed = (layout, room) => {
    const ink = getComputedStyle(document.body).color
    const faint = ink.replace(/^rgba?\((\d+), (\d+), (\d+).*/, "rgba($1, $2, $3, 0.15)")
    const out = structuredClone(layout), base = (out.template ??= {}).layout ??= {}
    Object.assign(base, {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {...base.font, color: ink}})
    for (const axis of ["xaxis", "yaxis"])
      base[axis] = {...base[axis], gridcolor: faint, linecolor: faint, zerolinecolor: faint}
    if (out.width > room) out.width = Math.max(room, 480)
    return out
  }

  const draw = () => { for (const [div, f] of figures)
    Plotly.react(div.lastElementChild, {data: f.data, layout: themed(f.layout || {}, div.clientWidth), frames: f.frames, config: {displaylogo: false}}) }
  draw()
  new MutationObserver(draw).observe(document.documentElement, {attributeFilter: ["class", "data-bs-theme"]})
  new MutationObserver(draw).observe(document.body, {attributeFilter: ["class"]})
})
