/** Making and changing elements. Text is only ever text: nothing here parses HTML. */

/**
 * An element. `on…` properties are listeners, `data…` and `aria…` go to attributes, null and false are left out.
 * @param {string} tag
 * @param {Record<string, unknown>} [properties]
 * @param {...(Node|string|number|null|undefined)} children
 * @returns {HTMLElement}
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined).map(asNode));
  return element;
}

/** @param {Node|string|number} child */
function asNode(child) {
  return child instanceof Node ? child : String(child);
}

/** A copy of what the template `id` holds: its first element. */
export function template(id) {
  return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

/** Set the text of `element`, unless it has it: what is selected or read stays so. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Show `element` or not. */
export function show(element, shown) {
  element.hidden = !shown;
}

/** What `reconcile` has made: by parent, then by key. */
const parts = new WeakMap();

/**
 * Have `parent` hold one child for each of `items`, in their order: children are made once and then changed,
 * so that focus, open details and scroll positions outlive an update. One that goes is told so by its `remove`.
 * @template Item
 * @param {Element} parent
 * @param {Item[]} items
 * @param {(item: Item) => string} keyOf
 * @param {(item: Item) => {element: Element, update: (item: Item) => void, remove?: () => void}} make
 */
export function reconcile(parent, items, keyOf, make) {
  if (!parts.has(parent)) parts.set(parent, new Map());
  const known = parts.get(parent);
  const wanted = new Set(items.map(keyOf));
  for (const [key, part] of known) {
    if (wanted.has(key)) continue;
    part.element.remove();
    part.remove?.();
    known.delete(key);
  }
  items.forEach((item, index) => {
    const key = keyOf(item);
    if (!known.has(key)) known.set(key, make(item));
    const part = known.get(key);
    part.update(item);
    if (parent.children[index] !== part.element)
      parent.insertBefore(part.element, parent.children[index] ?? null);
  });
}
