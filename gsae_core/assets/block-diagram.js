// A transformer block in which a site is clicked, and the row of blocks it is one of.
// Controlled from Python: what is chosen comes in as data, a choice goes out as a trigger.
// Everything from data is set as text or as an attribute, never as markup.

const SVG = "http://www.w3.org/2000/svg"
const STREAM = 64
const SITES = [
  { id: "resid_pre", x: STREAM, y: 286, label: [20, 5, "start"] },
  { id: "attn_z", x: 392, y: 200, label: [0, -16, "middle"] },
  { id: "attn_out", x: 168, y: 200, label: [0, -16, "middle"] },
  { id: "mlp_hidden", x: 392, y: 98, label: [0, -16, "middle"] },
  { id: "mlp_out", x: 168, y: 98, label: [0, -16, "middle"] },
  { id: "resid_post", x: STREAM, y: 32, label: [20, 5, "start"] },
]
// A sub-layer leaves the stream along its lower line and comes back along its upper one.
const SUBLAYERS = [
  { lower: 248, upper: 200, inner: "attention", outer: "W_O" },
  { lower: 146, upper: 98, inner: "W_in, activation", outer: "W_out" },
]

function make(name, attributes, parent, text) {
  const node = document.createElementNS(SVG, name)
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value)
  if (text !== undefined) node.textContent = text
  parent.append(node)
  return node
}

function box(parent, x, y, width, text) {
  make("rect", { class: "box", x, y: y - 14, width, height: 28, rx: 6 }, parent)
  make("text", { class: "inside", x: x + width / 2, y: y + 5 }, parent, text)
}

function wire(parent, d, arrow = false) {
  make("path", { class: "wire", d, ...(arrow ? { "marker-end": "url(#arrow)" } : {}) }, parent)
}

function drawBlock(svg, parallel) {
  const defs = make("defs", {}, svg)
  const marker = make("marker", {
    id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 8, markerHeight: 8,
    orient: "auto", markerUnits: "userSpaceOnUse",
  }, defs)
  make("path", { class: "tip", d: "M0 0 L8 4 L0 8 z" }, marker)
  wire(svg, `M${STREAM} 314 V8`, true)
  SUBLAYERS.forEach(({ lower, upper, inner, outer }, index) => {
    const beside = parallel && index === 1
    // In a parallel block both sub-layers read what comes into the block.
    wire(svg, beside ? `M${STREAM} 264 H28 V${lower} H104` : `M${STREAM} ${lower} H104`, true)
    make("circle", { class: "node", cx: STREAM, cy: beside ? 264 : lower, r: 3 }, svg)
    wire(svg, `M158 ${lower} H184`, true)
    wire(svg, `M316 ${lower} H436 V${upper} H352`, true)
    wire(svg, `M280 ${upper} H${STREAM + 12}`, true)
    box(svg, 106, lower, 52, "norm")
    box(svg, 186, lower, 130, inner)
    box(svg, 280, upper, 70, outer)
    make("circle", { class: "plus", cx: STREAM, cy: upper, r: 11 }, svg)
    make("path", { class: "sign", d: `M${STREAM - 5} ${upper} h10 M${STREAM} ${upper - 5} v10` }, svg)
  })
}

function drawSite(svg, { id, x, y, label: [dx, dy, anchor] }) {
  const group = make("g", { class: "site", role: "radio", "data-site": id }, svg)
  const wide = anchor === "start" ? { x: x - 16, width: 126 } : { x: x - 42, width: 84 }
  make("rect", { class: "target", y: anchor === "start" ? y - 16 : y - 34, height: anchor === "start" ? 32 : 50, rx: 8, ...wide }, group)
  make("circle", { class: "point", cx: x, cy: y, r: 9 }, group)
  make("text", { class: "name", x: x + dx, y: y + dy, "text-anchor": anchor }, group, id)
  make("title", {}, group)
  return group
}

function choosable(container, items, pick) {
  // The keys of a radio group: arrows move and choose, space and return choose.
  container.addEventListener("click", event => {
    const item = event.target.closest("[role=radio]")
    if (item) pick(item)
  })
  container.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key]
    const all = items()
    const here = all.indexOf(event.target.closest("[role=radio]"))
    if (here < 0) return
    if (step) {
      const next = all[(here + step + all.length) % all.length]
      next.focus()
      pick(next)
    } else if (event.key === " " || event.key === "Enter") {
      pick(all[here])
    } else return
    event.preventDefault()
    event.stopPropagation()
  })
}

function mark(items, isChosen) {
  const chosen = items.findIndex(isChosen)
  items.forEach((item, index) => {
    item.setAttribute("aria-checked", String(index === chosen))
    item.setAttribute("tabindex", index === Math.max(chosen, 0) ? "0" : "-1")
  })
}

function build(root, send) {
  const layers = document.createElement("div")
  layers.className = "layers"
  layers.setAttribute("role", "radiogroup")
  layers.setAttribute("aria-label", "Block")
  const svg = make("svg", {
    viewBox: "16 0 444 320", role: "radiogroup", "aria-label": "Site in the block",
  }, root)
  root.prepend(layers)
  choosable(layers, () => [...layers.children], item => send(`layer ${item.dataset.layer}`))
  choosable(svg, () => [...svg.querySelectorAll(".site")], item => send(`site ${item.dataset.site}`))
  return { layers, svg }
}

function showLayers(layers, count, chosen) {
  if (layers.children.length !== count) {
    layers.replaceChildren(...Array.from({ length: count }, (_, index) => {
      const cell = document.createElement("span")
      cell.setAttribute("role", "radio")
      cell.setAttribute("aria-label", `block ${index}`)
      cell.dataset.layer = String(index)
      cell.textContent = String(index)
      return cell
    }))
  }
  mark([...layers.children], cell => Number(cell.dataset.layer) === chosen)
}

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".block")
  root.send = choice => setTriggerValue("picked", choice)
  if (!root.parts) root.parts = build(root, choice => root.send(choice))
  const { layers, svg } = root.parts
  if (svg.dataset.parallel !== String(data.parallel)) {
    svg.dataset.parallel = String(data.parallel)
    svg.replaceChildren()
    drawBlock(svg, data.parallel)
    SITES.forEach(site => drawSite(svg, site))
  }
  showLayers(layers, data.n_layers, data.layer)
  const sites = [...svg.querySelectorAll(".site")]
  mark(sites, item => item.dataset.site === data.site)
  for (const item of sites) {
    const about = data.about[item.dataset.site]
    item.setAttribute("aria-label", `${item.dataset.site}: ${about}`)
    item.querySelector("title").textContent = about
  }
}
