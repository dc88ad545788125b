/** Who is signed in. The key lives in this tab's sessionStorage and nowhere else. */

import { ApiError, json, request } from "./api.js";

const STORED = "firsttoken.key";

/**
 * @typedef {{id: string, model: string}} Endpoint
 * @typedef {{key: string, name: string, admin: boolean, models: string[]|null, endpoints: Endpoint[]}} Session
 */

/** @type {Session|null} */
let session = null;
const listeners = new Set();

/** The session, or null. */
export const current = () => session;

/** Hear of each sign-in and sign-out, the latter with its reason, a sentence or "". */
export const listen = (listener) => listeners.add(listener);

/** Sign in with `key`. Throws an `ApiError` whose message is for people. */
export async function signIn(key) {
  try {
    const { key: own, endpoints } = await json("page/session", { key });
    session = { key, name: own.name, admin: own.admin, models: own.models, endpoints };
  } catch (error) {
    if (error.status === 401) error.message = "The gateway does not know this key.";
    throw error;
  }
  store(key);
  tell("");
}

/** Forget the key. */
export function signOut(reason = "") {
  session = null;
  store(null);
  tell(reason);
}

/** Sign in again with what the tab has kept; returns whether that went well. */
export async function resume() {
  const key = stored();
  if (!key) return false;
  try {
    await signIn(key);
    return true;
  } catch (error) {
    if (error.status === 401) store(null);
    throw error;
  }
}

/** A request of the session. A key that is refused by now ends it. */
export const call = (path, options = {}) => guarded(request, path, options);

/** As `call`; returns what the JSON says. */
export const callJson = (path, options = {}) => guarded(json, path, options);

async function guarded(how, path, options) {
  const asked = session;
  if (!asked) throw new ApiError("Signed out.");
  try {
    return await how(path, { ...options, key: asked.key });
  } catch (error) {
    expired(error, asked);
    throw error;
  }
}

/** End the session if `error` says that its key is no longer good. */
export function expired(error, asked = session) {
  if (error.status === 401 && session && session === asked) {
    signOut("This key is no longer good: it was revoked, or it has expired.");
  }
}

function tell(reason) {
  for (const listener of listeners) listener(session, reason);
}

function stored() {
  try {
    return sessionStorage.getItem(STORED);
  } catch {
    return null; // storage is switched off: a reload signs out
  }
}

function store(key) {
  try {
    if (key === null) sessionStorage.removeItem(STORED);
    else sessionStorage.setItem(STORED, key);
  } catch {
    // as above
  }
}
