// A text as tokens, one of which is picked; two SAEs' values on each, above and below the text.
// Controlled from Python: what is picked comes in as data, a choice goes out as a trigger.
// Everything from data is set as text or as an attribute, never as markup.

function build(root, send) {
  const strip = document.createElement("div")
  strip.className = "strip"
  strip.setAttribute("role", "listbox")
  strip.setAttribute("aria-label", "Tokens of the text")
  strip.setAttribute("dir", "ltr")
  const tip = document.createElement("div")
  tip.className = "tip"
  tip.setAttribute("aria-hidden", "true")
  root.append(strip, tip)
  const token = event => event.target.closest("[role=option]")
  const explain = event => show(tip, root, token(event))
  strip.addEventListener("click", event => token(event) && send(token(event)))
  strip.addEventListener("mouseover", explain)
  strip.addEventListener("focusin", explain)
  strip.addEventListener("mouseleave", () => { tip.hidden = true })
  strip.addEventListener("focusout", () => { tip.hidden = true })
  strip.addEventListener("keydown", event => move(event, strip, token(event), send))
  tip.hidden = true
  return { strip, tip }
}

function move(event, strip, here, send) {
  const all = [...strip.querySelectorAll("[role=option]")]
  const at = all.indexOf(here)
  if (at < 0) return
  const next = {
    ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + 1, ArrowUp: at - 1,
    Home: 0, End: all.length - 1,
  }[event.key]
  if (next !== undefined) {
    const there = all[Math.min(Math.max(next, 0), all.length - 1)]
    all.forEach(each => each.setAttribute("tabindex", each === there ? "0" : "-1"))
    there.focus()
  } else if (event.key === " " || event.key === "Enter") {
    send(here)
  } else return
  event.preventDefault()
  event.stopPropagation()
}

function show(tip, root, token) {
  if (!token) return
  tip.textContent = token.dataset.about
  tip.hidden = false
  const box = token.getBoundingClientRect(), frame = root.getBoundingClientRect()
  const left = Math.min(box.left - frame.left, frame.width - tip.offsetWidth - 4)
  tip.style.left = `${Math.max(left, 0)}px`
  tip.style.top = `${box.bottom - frame.top + 4}px`
}

function draw(strip, tokens) {
  strip.replaceChildren()
  for (const { text, about, shade, below, special } of tokens) {
    const cell = document.createElement("span")
    cell.setAttribute("role", "option")
    cell.setAttribute("aria-label", `${text.trim()}: ${about}`)
    cell.dataset.about = about
    cell.textContent = text
    cell.className = special ? "token special" : "token"
    cell.style.setProperty("--above", String(shade))
    cell.style.setProperty("--below", String(below))
    strip.append(cell)
  }
}

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".picker")
  if (!root.parts) {
    root.parts = build(root, token => root.send(token))
  }
  const { strip } = root.parts
  const cells = () => [...strip.querySelectorAll("[role=option]")]
  root.send = token => setTriggerValue("picked", cells().indexOf(token))
  const drawn = JSON.stringify(data.tokens)
  if (root.drawn !== drawn) {
    const focused = cells().indexOf(strip.getRootNode().activeElement)
    draw(strip, data.tokens)
    root.drawn = drawn
    if (focused >= 0) cells()[Math.min(focused, data.tokens.length - 1)]?.focus()
  }
  root.style.setProperty("--two", data.two ? "4px" : "0px")
  cells().forEach((cell, index) => {
    cell.setAttribute("aria-selected", String(index === data.picked))
    cell.setAttribute("tabindex", index === data.picked ? "0" : "-1")
  })
}
