// Puts the parts that the server sends into their places. Everything is rendered, and escaped, by the server.
"use strict";

const connection = document.getElementById("connection");

// Keyboard focus, opened details and scrolled tables outlive a new version of their part.
function replace(place, html) {
  const focused = place.contains(document.activeElement) ? document.activeElement.id : "";
  const scrolled = [...place.querySelectorAll(".scroll[id]")].map((e) => [e.id, e.scrollLeft]);
  const template = document.createElement("template");
  template.innerHTML = html;
  place.replaceChildren(template.content);
  for (const [id, left] of scrolled) {
    const element = document.getElementById(id);
    if (element) element.scrollLeft = left;
  }
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

function listen(address) {
  const source = new EventSource(address);
  source.addEventListener("open", () => { connection.textContent = "live"; });
  source.addEventListener("part", (event) => {
    const part = JSON.parse(event.data);
    const place = document.getElementById(part.id);
    if (place) replace(place, part.html);
  });
  source.addEventListener("error", () => {
    const ended = source.readyState === EventSource.CLOSED;
    connection.textContent = ended ? "ended: run shelora dashboard again" : "connection lost, trying again";
  });
}

if (document.body.dataset.events) listen(document.body.dataset.events);

const copy = document.getElementById("copy");
copy?.addEventListener("click", async () => {
  await navigator.clipboard.writeText(document.getElementById(copy.dataset.copies).textContent);
  copy.textContent = "Copied";
});
