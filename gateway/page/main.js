/** The page: who is signed in, which view is shown, which theme. */

import { chat } from "./chat.js";
import { say, show, template } from "./dom.js";
import { keys } from "./keys.js";
import { current, listen, resume, signIn, signOut } from "./session.js";
import { forget, watch } from "./status.js";
import { usage } from "./usage.js";
import { hide } from "./tip.js";
import { workers } from "./workers.js";

const VIEWS = {
  chat: { open: chat, title: "Chat" },
  workers: { open: workers, title: "Workers", admin: true },
  usage: { open: usage, title: "Usage", admin: true },
  keys: { open: keys, title: "Keys", admin: true },
};
const THEMES = ["auto", "light", "dark"];

const main = document.getElementById("main");
const views = document.getElementById("views");
const linkState = document.getElementById("link-state");
const theme = document.getElementById("theme");

/** What ends the view that is shown. */
let close = () => {};
let unwatch = () => {};

function route() {
  const session = current();
  if (!session) return;
  const asked = location.hash.replace(/^#\//, "");
  const name = VIEWS[asked] && (session.admin || !VIEWS[asked].admin) ? asked : "chat";
  for (const link of views.querySelectorAll("a")) {
    const here = link.getAttribute("href") === `#/${name}`;
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  open(VIEWS[name].title, VIEWS[name].open(session));
}

/** Put a view in place of the one before. Focus goes to its title, or where `focus` says. */
function open(title, { element, close: closing = () => {}, focus = null }) {
  const first = main.dataset.view === undefined;
  close();
  hide();
  close = closing;
  main.replaceChildren(element);
  main.dataset.view = title;
  document.title = `${title} · firsttoken`;
  if (focus) focus.focus();
  else if (!first) element.querySelector("h1").focus();
}

function signInView(reason) {
  const element = template("sign-in-view");
  const [form, input, button] = ["form", "#key", "button"].map((which) => element.querySelector(which));
  const fault = element.querySelector(".fault");
  say(fault, reason);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const key = input.value.trim();
    if (!key) {
      say(fault, "Enter a key.");
      input.focus();
      return;
    }
    button.disabled = true;
    say(fault, "");
    try {
      await signIn(key);
    } catch (error) {
      say(fault, error.message);
      input.setAttribute("aria-invalid", "true");
      input.select();
    } finally {
      button.disabled = false;
    }
  });
  return { element, focus: input };
}

function welcome(session, reason) {
  unwatch();
  forget();
  show(views, session !== null);
  show(document.getElementById("sign-out"), session !== null);
  const who = document.getElementById("who");
  show(who, session !== null);
  say(who, session?.name ?? "");
  say(linkState, "");
  for (const link of views.querySelectorAll("[data-admin]")) show(link, session?.admin ?? false);
  if (!session) {
    open("Sign in", signInView(reason));
    return;
  }
  if (session.admin) unwatch = watch(({ fault }) => say(linkState, fault ? fault.message : ""));
  route();
}

function dress(name) {
  document.documentElement.dataset.theme = name;
  say(theme, `Theme: ${name}`);
  dispatchEvent(new Event("themechange"));
}

theme.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  dress(next);
  try {
    localStorage.setItem("theme", next);
  } catch {
    // storage is switched off: it holds until the page is left
  }
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  dispatchEvent(new Event("themechange")),
);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the hash is the view's
  main.focus();
});
document.getElementById("sign-out").addEventListener("click", () => signOut());
addEventListener("hashchange", route);

listen(welcome);
dress(document.documentElement.dataset.theme);
try {
  if (!(await resume())) welcome(null, "");
} catch (error) {
  welcome(null, error.message);
}
