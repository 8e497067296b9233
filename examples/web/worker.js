// Runs the bundle beside the page, so that the page stays responsive. Messages:
//
//   in    { type: "load", bundle }                  { type: "generate", id, labels, seeds }    { type: "stop" }
//   out   { type: "progress", loaded, total }       { type: "loaded", manifest, ms, runsOn }
//         { type: "step", id, step, steps, engines, ms, pixels }    { type: "done", id, timing }
//         { type: "error", id, message }            (id only where a request failed, and not the loading)

import { describe } from "./runtime/engine.js";
import { DcompileError } from "./runtime/errors.js";
import { load } from "./runtime/session.js";

class Stopped extends Error {}

let session;
let latest = null; // the request that is wanted; another one ends at its next step

self.addEventListener("message", async ({ data }) => {
  const { type, id } = data;
  latest = type === "generate" ? id : null;
  try {
    if (type === "load") await open(data.bundle);
    if (type === "generate") await generate(data);
  } catch (error) {
    if (error instanceof Stopped) return;
    const message = error instanceof DcompileError ? error.message : `this is a mistake in the page: ${error.message}`;
    self.postMessage({ type: "error", id, message });
    if (!(error instanceof DcompileError)) throw error;
  }
});

async function open(bundle) {
  const started = performance.now();
  session = await load(bundle, {
    onProgress: (loaded, total) => self.postMessage({ type: "progress", loaded, total }),
  });
  self.postMessage({ type: "loaded", manifest: session.manifest, ms: performance.now() - started, runsOn: describe() });
}

async function generate({ id, labels, seeds }) {
  let began = performance.now();
  await session.generate({
    labels,
    seed: seeds,
    async callback(step, steps, sample, engines) {
      const ms = performance.now() - began;
      const pixels = session.images(sample);
      self.postMessage({ type: "step", id, step, steps, engines, ms, pixels }, [pixels.data.buffer]);
      await pause();
      if (latest !== id) throw new Stopped();
      began = performance.now();
    },
  });
  self.postMessage({ type: "done", id, timing: session.lastTiming });
}

/** Lets messages that wait be handled first. A timeout would do it too, but takes 4 ms at the least. */
function pause() {
  return new Promise((resolve) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });
}
