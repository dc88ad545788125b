/** One tooltip for the page. What it says is also in the page's text: it is for eyes and pointers. */

const tip = document.getElementById("tip");

/** Show `lines()` beside the pointer while it is over `element`. */
export function attach(element, lines) {
  const follow = (event) => showAt(event.clientX, event.clientY, lines());
  element.addEventListener("pointerenter", follow);
  element.addEventListener("pointermove", follow);
  element.addEventListener("pointerleave", hide);
}

/** Show `lines` at a place of the window; the first one stands out. */
export function showAt(x, y, lines) {
  tip.replaceChildren(
    ...lines.map((line, index) => {
      const row = document.createElement(index ? "div" : "strong");
      row.textContent = line;
      return row;
    }),
  );
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth ? x - 14 - width : x + 14;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, Math.min(y + 14, innerHeight - height - 8))}px`;
}

/** Hide it. */
export function hide() {
  tip.hidden = true;
}
