// Puts the parts that the server sends into their places. Everything is rendered, and escaped, by the server.
"use strict";

const connection = document.getElementById("connection");

const LIVE = document.body.dataset.events;
const ENDED = "not live: load the page again, or run shelora dashboard again";
let source = null;

// Changes only what differs, so that a click, a selection, focus and scrolling outlive a new version of a part.
function patch(place, wanted) {
  const old = [...place.childNodes];
  const next = [...wanted.childNodes];
  next.forEach((node, i) => {
    if (i >= old.length) place.append(node);
    else if (old[i].nodeName !== node.nodeName || old[i].id !== node.id) old[i].replaceWith(node);
    else if (!old[i].isEqualNode(node)) update(old[i], node);
  });
  old.slice(next.length).forEach((node) => node.remove());
}

function update(to, from) {
  if (from.nodeType !== Node.ELEMENT_NODE) {
    to.nodeValue = from.nodeValue;
    return;
  }
  for (const { name } of [...to.attributes]) if (!from.hasAttribute(name)) to.removeAttribute(name);
  for (const { name, value } of from.attributes) if (to.getAttribute(name) !== value) to.setAttribute(name, value);
  patch(to, from);
}

function show(place, html) {
  const focused = place.contains(document.activeElement) ? document.activeElement.id : "";
  const template = document.createElement("template");
  template.innerHTML = html;
  patch(place, template.content);
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

function listen() {
  source = new EventSource(LIVE);
  source.addEventListener("open", () => { connection.textContent = "live"; });
  source.addEventListener("part", (event) => {
    const part = JSON.parse(event.data);
    const place = document.getElementById(part.id);
    if (place) show(place, part.html);
  });
  source.addEventListener("error", () => {
    const ended = source.readyState === EventSource.CLOSED;
    connection.textContent = ended ? ENDED : "connection lost, trying again";
  });
}

// A browser keeps six connections to a server, for all its tabs: those out of sight hold none.
function follow() {
  source?.close();
  source = null;
  if (!document.hidden) listen();
}

if (LIVE) {
  document.addEventListener("visibilitychange", follow);
  window.addEventListener("pagehide", () => source?.close());
  window.addEventListener("pageshow", follow);
}

const copy = document.getElementById("copy");
copy?.addEventListener("click", async () => {
  await navigator.clipboard.writeText(document.getElementById(copy.dataset.copies).textContent);
  copy.textContent = "Copied";
});
