// A loaded bundle, ready to generate samples:
//
//     const session = await load("bundle");
//     const images = session.images(await session.generate({ labels: ["A", "B"], seed: 7 }));

import { kindOf, zeros } from "./arrays.js";
import { OnnxEngine, checkPorts } from "./engine.js";
import { EngineError, RequestError, didYouMean } from "./errors.js";
import { fetchFile, fetchText } from "./files.js";
import { toPixels } from "./images.js";
import { FILE, parse, shapeAt } from "./manifest.js";
import { normal } from "./random.js";
import { readConditions, readSeeds } from "./request.js";
import { run } from "./script.js";
import { readTables } from "./tables.js";

/**
 * Opens the bundle at the address `bundle`; schema, files, tables and shapes are checked before anything runs.
 *
 * `verify`: compare the sha256 of every file with the manifest.
 * `threads`: of one operator; undefined lets the engine decide.
 * `onProgress` is called with (bytes so far, bytes in all).
 */
export async function load(bundle, { verify = true, threads, onProgress = () => {} } = {}) {
  const path = `${bundle}/${FILE}`;
  const missing = "not found; a bundle is the directory that `dcompile MODEL -o DIRECTORY` writes";
  const manifest = parse(await fetchText(path, missing), path);
  if (manifest.target !== "onnx") {
    throw new EngineError(
      `this runtime has no engine for target '${manifest.target}'; ${didYouMean(manifest.target, ["onnx"])}`,
    );
  }
  const files = await fetchFiles(bundle, manifest, verify, onProgress);
  const tables = readTables(files[manifest.tables], manifest, `${bundle}/${manifest.tables}`);
  const stages = {};
  for (const [name, spec] of Object.entries(manifest.engines)) {
    const external = Object.fromEntries(
      besideEngine(manifest, spec.file).map((file) => [nameIn(spec.file, file), files[file]]),
    );
    const engine = await OnnxEngine.open(`${bundle}/${spec.file}`, files[spec.file], external, { threads });
    checkPorts(name, engine, manifest, tables);
    stages[name] = { spec, engine };
  }
  return new Session(manifest, tables, stages);
}

/** Every request starts from zero states, so none depends on the ones before it. */
export class Session {
  constructor(manifest, tables, stages) {
    this.manifest = manifest;
    this.lastTiming = null; // { totalMs, enginesMs, calls, steps } of the last `generate`
    this.tables = tables;
    this.stages = stages;
  }

  /**
   * Samples [B, ...sample shape], float32. A sample depends on its own seed and conditions, not on its batch.
   *
   * `labels`: names or numbers for the one condition that has classes. `conditions`: arrays [B, ...] by condition name.
   * `seed`: sample i starts from seed + i; or one seed for each sample. From 2**53 on: as a BigInt.
   * `callback` is called with (step, steps, sample, names of the engines that ran) after every step, from 1, and is
   * awaited; what it throws ends the request.
   */
  async generate({ labels, conditions, seed = 0, callback } = {}) {
    if (!this.stages) throw new RequestError("the session is closed; load the bundle again");
    const started = performance.now();
    const { contract, states, script } = this.manifest;
    const given = readConditions(contract, labels, conditions);
    const seeds = readSeeds(contract, seed, given);
    const noise = (draw, scale = 1) => {
      const { shape, data } = normal(seeds, draw, contract.sample.shape);
      const kind = kindOf(contract.sample.dtype);
      const [rounded] = kind.of(scale);
      return { dtype: contract.sample.dtype, shape, data: kind.from(data, (value) => value * rounded) };
    };

    const slots = { sample: noise(0, contract.initial_scale) };
    for (const [name, spec] of Object.entries(states)) slots[name] = zeros(spec.dtype, shapeAt(spec, seeds.length));
    Object.assign(slots, given);

    const spent = await run(script, this.stages, this.tables, slots, {
      beforeStep: contract.stochastic
        ? (step) => {
            slots.noise = noise(step + 1);
          }
        : undefined,
      afterStep: callback && ((step, engines) => callback(step, contract.steps, slots.sample, engines)),
    });
    this.lastTiming = { totalMs: performance.now() - started, ...spent };
    return { dtype: "float32", shape: slots.sample.shape, data: Float32Array.from(slots.sample.data) };
  }

  /** Samples [B, C, H, W] -> pixels [B, H, W, C], uint8. */
  images(samples) {
    return toPixels(samples, this.manifest.contract.value_range);
  }

  /** Releases the engines and their memory. */
  async close() {
    for (const { engine } of Object.values(this.stages ?? {})) await engine.close();
    this.stages = this.tables = null;
  }
}

/** What running needs, bytes by name: engines, the weights beside them, tables. */
async function fetchFiles(bundle, manifest, verify, onProgress) {
  const engines = Object.values(manifest.engines).map((spec) => spec.file);
  const names = [...new Set([...engines, ...engines.flatMap((file) => besideEngine(manifest, file)), manifest.tables])];
  const total = names.reduce((sum, name) => sum + manifest.files[name].bytes, 0);
  let loaded = 0;
  const onBytes = (bytes) => onProgress((loaded += bytes), total);
  return Object.fromEntries(
    await Promise.all(
      names.map(async (name) => [
        name,
        await fetchFile(`${bundle}/${name}`, manifest.files[name], { verify, onBytes }),
      ]),
    ),
  );
}

/** The other files in an engine's folder, which hold its weights. */
function besideEngine(manifest, engine) {
  const engines = Object.values(manifest.engines).map((spec) => spec.file);
  const folder = engine.slice(0, engine.lastIndexOf("/") + 1);
  return Object.keys(manifest.files).filter((file) => file.startsWith(folder) && !engines.includes(file));
}

const nameIn = (engine, file) => file.slice(engine.lastIndexOf("/") + 1);
