// ONNX Runtime compiled to WebAssembly: one .onnx file of a bundle each.

import * as ort from "../node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { EngineError, didYouMean } from "./errors.js";
import { isTable, shapeAt, slotsOf } from "./manifest.js";

export class OnnxEngine {
  /**
   * The engine in the .onnx file `bytes`, which messages call `path`.
   *
   * `external`: the files beside it that its weights may lie in, bytes by name.
   * `threads`: of one operator; undefined lets ONNX Runtime decide.
   */
  static async open(path, bytes, external, { threads } = {}) {
    if (threads !== undefined) ort.env.wasm.numThreads = threads;
    try {
      const session = await ort.InferenceSession.create(bytes, {
        executionProviders: ["wasm"],
        externalData: Object.entries(external).map(([name, data]) => ({ path: name, data })),
        logSeverityLevel: 4, // errors are thrown; ONNX Runtime need not print them as well
      });
      return new OnnxEngine(path, session);
    } catch (error) {
      throw new EngineError(`${path}: ONNX Runtime ${ort.env.versions.web} does not load it: ${firstLine(error)}`);
    }
  }

  constructor(path, session) {
    this.path = path;
    this.session = session;
    this.inputs = portsOf(session.inputMetadata);
    this.outputs = portsOf(session.outputMetadata);
  }

  /** Arrays by input name -> arrays by output name; those given back stay valid when it runs again. */
  async run(inputs) {
    const feeds = Object.fromEntries(
      Object.entries(inputs).map(([name, { dtype, shape, data }]) => [name, new ort.Tensor(dtype, data, shape)]),
    );
    let outputs;
    try {
      outputs = await this.session.run(feeds);
    } catch (error) {
      throw new EngineError(`${this.path}: ONNX Runtime failed: ${firstLine(error)}`);
    }
    return Object.fromEntries(
      Object.entries(outputs).map(([name, { type, dims, data }]) => [name, { dtype: type, shape: dims, data }]),
    );
  }

  close() {
    return this.session.release();
  }
}

/** What runs the engines, in words; the number of threads is known once the first engine is open. */
export function describe() {
  const { wasm, versions } = ort.env;
  const threads = wasm.numThreads === 1 ? "1 thread" : `${wasm.numThreads} threads`;
  return `ONNX Runtime ${versions.web} in WebAssembly, ${threads}`;
}

/** Throws EngineError unless the engine's inputs and outputs are those the manifest describes. */
export function checkPorts(name, engine, manifest, tables) {
  const spec = manifest.engines[name];
  for (const [role, said, found] of [
    ["input", spec.inputs, engine.inputs],
    ["output", spec.outputs, engine.outputs],
  ]) {
    for (const port of Object.keys({ ...said, ...found })) {
      if (Object.hasOwn(said, port) && Object.hasOwn(found, port)) continue;
      const where = Object.hasOwn(said, port) ? "in the manifest only" : "in the file only";
      const hint = didYouMean(port, Object.keys(found));
      throw new EngineError(`${spec.file}: ${role} '${port}' is ${where}; ${hint}; compile again`);
    }
    for (const [port, { dtype, shape }] of Object.entries(found)) {
      for (const [neededDtype, needed] of neededBy(said[port], manifest, tables)) {
        if (dtype === neededDtype && accepts(shape, needed)) continue;
        const says = `the manifest says ${neededDtype} ${spelled(needed)}; compile again`;
        throw new EngineError(`${spec.file}: ${role} '${port}' is ${dtype} ${spelled(shape)}, ${says}`);
      }
    }
  }
}

/** What the source holds at the least and the largest batch; nothing if only engines know its shape. */
function neededBy(source, manifest, tables) {
  if (isTable(source)) {
    const { dtype, shape } = tables[source.table];
    return [[dtype, shape.slice(1)]];
  }
  const { batch } = manifest.contract;
  const slots = slotsOf(manifest);
  if (!Object.hasOwn(slots, source.slot)) return [];
  const spec = slots[source.slot];
  return [batch.min, batch.max].map((size) => [spec.dtype, shapeAt(spec, size)]);
}

/** Ports by name: dtype, and shape with null where any size goes. */
const portsOf = (metadata) =>
  Object.fromEntries(
    metadata.map(({ name, type, shape }) => [
      name,
      { dtype: type, shape: shape.map((size) => (typeof size === "number" ? size : null)) },
    ]),
  );

const accepts = (port, shape) =>
  port.length === shape.length && port.every((size, i) => size === null || size === shape[i]);
const spelled = (shape) => `[${shape.map((size) => size ?? "?").join(", ")}]`;
const firstLine = (error) => String(error?.message ?? error).split("\n")[0];
