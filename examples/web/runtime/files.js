// The files of a bundle, fetched and checked against the manifest.

import { BundleError } from "./errors.js";

/** The file at `path` as text. */
export async function fetchText(path, otherwise) {
  return (await fetchResponse(path, otherwise)).text();
}

/**
 * The file at `path`, which must be, byte for byte, what was written.
 *
 * `expected`: its { bytes, sha256 } in the manifest. `verify`: compare the sha256 as well as the size.
 * `onBytes` is told the number of bytes of each piece that arrives.
 */
export async function fetchFile(path, expected, { verify = true, onBytes = () => {} } = {}) {
  const response = await fetchResponse(path, "missing; the bundle is incomplete: copy it again");
  const pieces = [];
  try {
    for (const reader = response.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) break;
      pieces.push(value);
      onBytes(value.length);
    }
  } catch (error) {
    throw new BundleError(`${path}: the connection broke (${error.message}); load the page again`);
  }
  const bytes = new Uint8Array(await new Blob(pieces).arrayBuffer());
  if (bytes.length !== expected.bytes) {
    throw new BundleError(`${path}: ${bytes.length} bytes, expected ${expected.bytes}; damaged: copy the bundle again`);
  }
  if (verify && (await sha256(bytes)) !== expected.sha256) {
    throw new BundleError(`${path}: its sha256 is not the manifest's; damaged or edited: copy the bundle again`);
  }
  return bytes;
}

async function fetchResponse(path, ifMissing) {
  let response;
  try {
    response = await fetch(path);
  } catch (error) {
    throw new BundleError(`${path}: cannot be fetched (${error.message}); is the server running?`);
  }
  if (response.status === 404) throw new BundleError(`${path}: ${ifMissing}`);
  if (!response.ok)
    throw new BundleError(`${path}: the server answered ${response.status}; check how it serves the bundle`);
  return response;
}

async function sha256(bytes) {
  if (!crypto.subtle) {
    throw new BundleError(
      "browsers check sha256 on https:// and localhost alone; serve the page so, or load with verify: false",
    );
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
