// manifest.json: what a bundle is. The kinds below are the schema; the Python runtime reads the same one.

import {
  boolean,
  decode,
  either,
  float,
  integer,
  list,
  literal,
  mapping,
  nothing,
  record,
  text,
  tuple,
} from "./decode.js";
import { BundleError, didYouMean, repr } from "./errors.js";

export const SCHEMA = 1;
export const FILE = "manifest.json";
const DTYPES = ["float32", "float16", "float64", "int64", "int32", "int8", "uint8", "bool"];

const dim = either(integer, tuple(literal("batch"), integer)); // ["batch", k] is k times the batch
const slot = record("Slot", { slot: text });
const table = record("Table", { table: text });
const condition = record(
  "Condition",
  {
    // `classes`: its values are 0..classes-1, called `labels` if those are given
    name: text,
    dtype: text,
    shape: list(integer), // without the batch
    classes: either(integer, nothing),
    labels: either(list(text), nothing),
  },
  { classes: null, labels: null },
);
const contract = record("Contract", {
  sample: record("SampleSpec", { shape: list(integer), dtype: text }),
  value_range: either(tuple(float, float), nothing), // of a finished sample; null: a latent
  predicts: text,
  steps: integer,
  guidance: float,
  initial_scale: float, // a sample starts as this times normal noise
  stochastic: boolean, // slot "noise" holds fresh normal noise at every step
  batch: record("Batch", { min: integer, max: integer }),
  conditions: list(condition),
});
const call = record("Call", { call: text, row: integer }); // an engine; the row of every table it reads
// Go to script row `jump` (the script's length: finish) if the one float in `slot` is less than `below`.
const jump = record("Jump", { jump: integer, slot: text, below: float });
const manifestKind = record("Manifest", {
  schema: integer,
  dcompile: text,
  name: text,
  target: text,
  tools: mapping(text),
  contract,
  states: mapping(record("StateSpec", { shape: list(dim), dtype: text })), // zero when a request starts
  engines: mapping(record("EngineSpec", { file: text, inputs: mapping(either(slot, table)), outputs: mapping(slot) })),
  script: list(either(call, jump)),
  tables: text,
  files: mapping(record("FileSpec", { bytes: integer, sha256: text })),
});

export const isCall = (row) => Object.hasOwn(row, "call");
export const isTable = (source) => Object.hasOwn(source, "table");

/** The manifest written in `json`; throws BundleError, naming `source`, unless it is sound. */
export function parse(json, source = FILE) {
  let value;
  try {
    value = JSON.parse(json);
  } catch (error) {
    throw new BundleError(`${source}: not JSON (${error.message}); the file is damaged: copy the bundle again`);
  }
  const schema = value?.schema;
  if (!Number.isSafeInteger(schema) || schema < 1) {
    throw new BundleError(
      `${source}: schema: expected a number from 1, found ${repr(schema)}; is this a dcompile bundle?`,
    );
  }
  if (schema > SCHEMA) {
    const newer = `written by a newer dcompile: schema ${schema}, this runtime reads up to ${SCHEMA}`;
    throw new BundleError(`${source}: ${newer}; upgrade dcompile`);
  }
  try {
    const manifest = decode(manifestKind, value);
    check(manifest);
    return manifest;
  } catch (error) {
    if (error instanceof BundleError) throw new BundleError(`${source}: ${error.message}`);
    throw error;
  }
}

/** The slots whose shape is known before anything runs: sample, noise, conditions, states. */
export function slotsOf({ contract, states }) {
  const batched = ({ shape, dtype }) => ({ shape: [["batch", 1], ...shape], dtype });
  const sample = batched(contract.sample);
  const given = Object.fromEntries(contract.conditions.map((each) => [each.name, batched(each)]));
  return { sample, ...(contract.stochastic ? { noise: sample } : {}), ...given, ...states };
}

/** A slot's shape at this batch. */
export const shapeAt = (spec, batch) => spec.shape.map((size) => (Array.isArray(size) ? size[1] * batch : size));

/** The facts that no single field shows: every name refers to something, every number is in range. */
function check(manifest) {
  const { contract, engines, files, script } = manifest;
  const { min, max } = contract.batch;
  need(1 <= min && min <= max, `contract.batch: expected 1 <= min <= max, found ${min} and ${max}`);
  need(contract.steps >= 1, `contract.steps: expected 1 or more, found ${contract.steps}`);
  for (const { name, labels, classes } of contract.conditions) {
    if (labels === null) continue;
    const found = `${labels.length} labels for ${repr(classes)} classes`;
    need(labels.length === classes, `contract.conditions: ${repr(name)} has ${found}`);
  }
  const slots = slotsOf(manifest);
  for (const [name, spec] of Object.entries(slots)) needKnown(`dtype of ${repr(name)}`, spec.dtype, DTYPES);
  for (const name of Object.keys(files)) {
    need(!name.startsWith("/") && !name.split("/").includes(".."), `files: ${repr(name)} is outside the bundle`);
  }
  needKnown("tables", manifest.tables, Object.keys(files));
  const outputs = Object.values(engines).flatMap((engine) => Object.values(engine.outputs));
  const written = [...Object.keys(slots), ...outputs.map((target) => target.slot)];
  for (const [name, engine] of Object.entries(engines)) {
    needKnown(`engines.${name}.file`, engine.file, Object.keys(files));
    for (const [port, source] of Object.entries(engine.inputs)) {
      if (!isTable(source)) needKnown(`engines.${name}.inputs.${port}.slot`, source.slot, written);
    }
  }
  need(script.length > 0, "script: expected a call or more, found none");
  script.forEach((row, index) => {
    if (isCall(row)) {
      needKnown(`script[${index}].call`, row.call, Object.keys(engines));
      need(row.row >= 0, `script[${index}].row: expected 0 or more, found ${row.row}`);
    } else {
      needKnown(`script[${index}].slot`, row.slot, written);
      const within = 0 <= row.jump && row.jump <= script.length;
      need(within, `script[${index}].jump: ${row.jump} is outside the script (0..${script.length})`);
    }
  });
}

function need(truth, otherwise) {
  if (!truth) throw new BundleError(otherwise);
}

function needKnown(where, name, known) {
  if (!known.includes(name)) throw new BundleError(`${where}: there is no ${repr(name)}; ${didYouMean(name, known)}`);
}
