/** The gateway's API. Addresses are relative to the page's own, so that a proxy may put both below a folder. */

/** What the API said no with. `status` is 0 where nothing answered. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, requestId = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.requestId = requestId;
    this.retryAfter = retryAfter;
  }
}

/**
 * One request. Returns the response if its status is below 400, else throws an `ApiError`.
 * @param {string} path below the page's folder, as in "admin/keys"
 * @param {{key: string, method?: string, body?: unknown, signal?: AbortSignal}} options
 */
export async function request(path, { key, method = "GET", body, signal }) {
  const headers = { authorization: `Bearer ${key}` };
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The gateway can't be reached.", { code: "connection_failed" });
  }
  if (response.status >= 400) throw await refusal(response);
  return response;
}

/** As `request`; returns what its JSON says. */
export async function json(path, options) {
  const response = await request(path, options);
  return response.status === 204 ? null : response.json();
}

/** The error of a response, as the API put it. */
async function refusal(response) {
  const text = await response.text();
  let fault = {};
  try {
    fault = JSON.parse(text).error ?? {};
  } catch {
    // a proxy's own page
  }
  return new ApiError(fault.message ?? `The answer was ${response.status} ${response.statusText}`.trim(), {
    status: response.status,
    code: fault.code ?? null,
    requestId: response.headers.get("x-request-id"),
    retryAfter: response.headers.get("retry-after"),
  });
}
