/** Keys: who may come in, and what with. */

import { h, say, template } from "./dom.js";
import { count, date, relative } from "./format.js";
import { callJson } from "./session.js";

/** What a key is by now: "active", "expired" or "revoked". */
function stateOf(key, now) {
  if (key.revoked_at) return "revoked";
  return key.expires_at && key.expires_at <= now ? "expired" : "active";
}

/** @param {import("./session.js").Session} session */
export function keys(session) {
  const element = template("keys-view");
  const find = (selector) => element.querySelector(selector);
  const dialogs = Object.fromEntries(
    [...element.querySelectorAll("dialog")].map((dialog) => [dialog.dataset.dialog, dialog]),
  );
  const said = find("[data-said]");
  let revoking = null;

  async function load() {
    try {
      const { data } = await callJson("admin/keys");
      say(element.querySelector(":scope > [data-fault]"), "");
      const now = Date.now() / 1000;
      const order = { active: 0, expired: 1, revoked: 2 };
      data.sort((a, b) => order[stateOf(a, now)] - order[stateOf(b, now)] || b.created_at - a.created_at);
      find("tbody").replaceChildren(...data.map((key) => row(key, now)));
      if (!data.length)
        find("tbody").append(
          h("tr", {}, h("td", { colspan: "8", class: "empty" }, "There are no keys yet.")),
        );
    } catch (error) {
      say(element.querySelector(":scope > [data-fault]"), error.message);
    }
  }

  function row(key, now) {
    const state = stateOf(key, now);
    const when = (at) => h("td", { class: "when", ...(at ? { title: date(at) } : {}) }, relative(at, now));
    const revoke = h(
      "button",
      {
        type: "button",
        class: "quiet danger",
        "aria-label": `Revoke ${key.name}`,
        onclick: () => confirm(key),
      },
      "Revoke",
    );
    return h(
      "tr",
      { "data-key-id": key.id, "data-state": state },
      h("th", { scope: "row", class: "name" }, key.name, h("span", { class: "sub mono" }, key.id)),
      h(
        "td",
        {},
        h("span", { class: "badge" }, state),
        key.admin ? h("span", { class: "tag" }, "admin") : null,
      ),
      h("td", { class: "name" }, scope(key)),
      h("td", {}, limits(key)),
      when(key.created_at),
      when(key.last_used_at),
      when(key.expires_at),
      h("td", { class: "num" }, state === "active" ? revoke : null),
    );
  }

  function confirm(key) {
    revoking = key;
    say(
      dialogs.revoke.querySelector("[data-what]"),
      `“${key.name}” stops working at once, for good. What it has used stays in the usage.`,
    );
    say(dialogs.revoke.querySelector("[data-fault]"), "");
    dialogs.revoke.showModal();
  }

  async function revoke() {
    await callJson(`admin/keys/${encodeURIComponent(revoking.id)}`, { method: "DELETE" });
    dialogs.revoke.close();
    say(said, `${revoking.name} is revoked.`);
    await load();
    find("[data-create]").focus(); // the button that opened the dialog is gone
  }

  async function create(form) {
    const field = (name) => form.elements.namedItem(name);
    const number = (name) => (field(name).value === "" ? null : field(name).valueAsNumber);
    const ticked = [...form.querySelectorAll("[data-endpoints] input:checked")].map((input) => input.value);
    const models = field("models")
      .value.split(",")
      .map((name) => name.trim())
      .filter(Boolean);
    const days = Number(field("expires").value);
    const made = await callJson("admin/keys", {
      method: "POST",
      body: {
        name: field("name").value.trim(),
        admin: field("admin").checked,
        expires_at: days ? Math.round(Date.now() / 1000) + days * 86_400 : null,
        endpoints: ticked.length ? ticked : null,
        models: models.length ? models : null,
        requests_per_minute: number("requests_per_minute"),
        tokens_per_minute: number("tokens_per_minute"),
      },
    });
    dialogs.create.close();
    dialogs.made.querySelector("[data-key]").value = made.key;
    say(dialogs.made.querySelector("[data-copied]"), "");
    dialogs.made.showModal();
    dialogs.made.querySelector("[data-key]").select();
    await load();
  }

  async function copy() {
    const shown = dialogs.made.querySelector("[data-key]");
    shown.select();
    const copied = dialogs.made.querySelector("[data-copied]");
    try {
      await navigator.clipboard.writeText(shown.value);
      say(copied, "Copied.");
    } catch {
      say(copied, "It is selected: copy it with Ctrl+C."); // there is no clipboard on plain HTTP
    }
  }

  /** Have the form of a dialog do `work`, and say what went wrong in it. */
  function submits(dialog, work) {
    const form = dialog.querySelector("form");
    const [fault, button] = [dialog.querySelector("[data-fault]"), dialog.querySelector("[type=submit]")];
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      button.disabled = true;
      say(fault, "");
      try {
        await work(form);
      } catch (error) {
        say(fault, error.message);
      } finally {
        button.disabled = false;
      }
    });
    dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
  }

  dialogs.create
    .querySelector("[data-endpoints]")
    .append(
      ...session.endpoints.map(({ id }) =>
        h("label", { class: "check" }, h("input", { type: "checkbox", value: id }), ` ${id}`),
      ),
    );
  find("[data-create]").addEventListener("click", () => {
    dialogs.create.querySelector("form").reset();
    say(dialogs.create.querySelector("[data-fault]"), "");
    dialogs.create.showModal();
  });
  submits(dialogs.create, create);
  submits(dialogs.revoke, revoke);
  dialogs.made.addEventListener("close", () => {
    dialogs.made.querySelector("[data-key]").value = ""; // it is shown once
  });
  dialogs.made.querySelector("[data-copy]").addEventListener("click", copy);
  load();
  return { element };
}

function scope({ endpoints, models }) {
  if (!endpoints && !models) return "everything";
  return [...(endpoints ?? []), ...(models ?? [])].join(", ");
}

function limits({ requests_per_minute: requests, tokens_per_minute: tokens }) {
  const parts = [
    requests ? `${count(requests)} requests` : null,
    tokens ? `${count(tokens)} tokens` : null,
  ].filter(Boolean);
  return parts.join(", ") || "none";
}
