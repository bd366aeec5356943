// One entry of the browser's history for each page that is looked at.
//
// Streamlit adds an entry whenever a script changes the address, and a change of page begins with
// one: the page that is left, with the parameters of the next. Back then showed the page that was
// left without its run, its text and its choices. Here a change of the address of the page that is
// shown replaces its entry, and what is meant for another page, which `page` names, waits for the
// entry of that page. `page` itself is never in the address.

function without(url) {
  const search = url.search.replace(/([?&])page=[^&]*&?/, "$1").replace(/[?&]$/, "")
  return url.pathname + search + url.hash
}

function install(pages) {
  const push = history.pushState.bind(history)
  const replace = history.replaceState.bind(history)
  const shown = () => {
    const last = location.pathname.split("/").filter(Boolean).pop()
    return pages.includes(last) ? last : "Home"
  }
  history.pushState = (state, title, address) => {
    const url = new URL(address ?? location.href, location.href)
    if (url.pathname !== location.pathname) return push(state, title, without(url))
    const meant = url.searchParams.get("page")
    if (meant === null || meant === shown()) replace(state, title, without(url))
  }
  history.replaceState = (state, title, address) =>
    replace(state, title, without(new URL(address ?? location.href, location.href)))
}

// What Streamlit added for this page before this script was here is taken back, where the browser
// tells which entries these are; then `done` is called.
function takeBack(done) {
  const { navigation } = window
  const entries = navigation?.entries() ?? []
  const last = navigation?.currentEntry?.index ?? 0
  const ours = entry => entry?.sameDocument && new URL(entry.url).pathname === location.pathname
  let first = last
  while (ours(entries[first - 1])) first -= 1
  if (first === last) return done()
  // Streamlit runs the page again for every step in the history but one to a place in the page.
  const arrive = event => {
    if (event.navigationType !== "traverse") return
    navigation.removeEventListener("currententrychange", arrive)
    const address = event.from.url
    history.replaceState(history.state, "", `${address}#here`)
    const settle = () => {
      history.replaceState(history.state, "", address)
      done()
    }
    window.addEventListener("popstate", settle, { once: true })
  }
  navigation.addEventListener("currententrychange", arrive)
  history.go(first - last)
}

export default function ({ data }) {
  if (window.gsaeHistory) return
  window.gsaeHistory = "begun"
  install(data.pages)
  history.replaceState(history.state, "", location.href) // a copied link may name its page
  takeBack(() => { window.gsaeHistory = "settled" })
}
