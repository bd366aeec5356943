// Features to go on to. A plain click goes there within the page; with a modifier, or by the
// middle button, the link opens a page of its own. Everything from data is set as text.

function row(each, send) {
  const link = document.createElement("a")
  link.className = "row"
  link.href = each.href
  link.title = each.about
  const number = document.createElement("span")
  number.className = "number"
  number.textContent = String(each.feature)
  const tokens = document.createElement("span")
  tokens.className = "tokens"
  tokens.setAttribute("dir", "ltr")
  tokens.textContent = each.text
  const bar = document.createElement("span")
  bar.className = "bar"
  bar.style.setProperty("--share", String(each.share))
  bar.textContent = each.said
  link.append(number, tokens, bar)
  link.addEventListener("click", event => {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return
    event.preventDefault()
    send(each.feature)
  })
  return link
}

export default function ({ data, parentElement, setTriggerValue }) {
  const list = parentElement.querySelector(".links")
  list.setAttribute("aria-label", data.label)
  const drawn = JSON.stringify(data)
  if (list.drawn === drawn) return
  list.drawn = drawn
  list.replaceChildren(...data.rows.map(each => {
    const item = document.createElement("li")
    item.append(row(each, number => setTriggerValue("picked", number)))
    return item
  }))
}
