// What a caller asks for -> arrays the engines take, or one line that says what to change.

import { kindOf } from "./arrays.js";
import { RequestError, didYouMean, repr } from "./errors.js";

/**
 * Every condition of the contract as an array [B, ...shape] of its dtype; one B for all.
 *
 * `labels`: names or numbers for the one condition that has classes. `conditions`: arrays by name for the others.
 */
export function readConditions(contract, labels, conditions = {}) {
  const given = { ...conditions };
  const names = contract.conditions.map((each) => each.name);
  if (labels !== undefined) {
    const labelled = contract.conditions.filter((each) => each.classes !== null && !Object.hasOwn(given, each.name));
    if (labelled.length !== 1) {
      const hint = `needed 1; use conditions={name: values}, ${didYouMean("", names)}`;
      throw new RequestError(`labels: ${labelled.length} conditions that are not given otherwise take labels, ${hint}`);
    }
    const [condition] = labelled;
    const numbers = [labels].flat().map((label) => classNumber(condition, label));
    const data = kindOf(condition.dtype).from(numbers, condition.dtype === "int64" ? BigInt : Number);
    given[condition.name] = { dtype: condition.dtype, shape: [numbers.length], data };
  }
  for (const name of Object.keys(given)) {
    if (!names.includes(name))
      throw new RequestError(`no condition is called ${repr(name)}; ${didYouMean(name, names)}`);
  }
  for (const condition of contract.conditions) {
    const { name, classes } = condition;
    if (!Object.hasOwn(given, name)) {
      const also = classes === null ? "" : " or labels=[...]";
      throw new RequestError(`condition ${repr(name)} is missing: give conditions={${repr(name)}: ...}${also}`);
    }
    checkValues(condition, given[name]);
  }
  const batches = Object.entries(given).map(([name, { shape }]) => [name, shape[0]]);
  if (new Set(batches.map(([, batch]) => batch)).size > 1) {
    const sizes = batches.map(([name, batch]) => `${name} has ${batch}`).join(", ");
    throw new RequestError(`conditions of one request must have one batch: ${sizes}`);
  }
  return given;
}

/** One BigInt a sample: `seed`, `seed` + 1, ..., or the list given, whose length is B where no condition sets it. */
export function readSeeds(contract, seed, conditions) {
  const [condition] = Object.values(conditions);
  const first = Array.isArray(seed) ? null : wholeNumber(seed);
  const seeds =
    first === null
      ? seed.map(wholeNumber)
      : Array.from({ length: condition ? condition.shape[0] : 1 }, (_, i) => first + BigInt(i));
  const batch = condition ? condition.shape[0] : seeds.length;
  const { min, max } = contract.batch;
  if (batch < min || batch > max) {
    const hint = batch > max ? "split the request, or compile for a larger batch" : "ask for more samples at once";
    throw new RequestError(`batch ${batch}: this bundle takes ${min}..${max}; ${hint}`);
  }
  if (seeds.length !== batch) {
    throw new RequestError(
      `${seeds.length} seeds for a batch of ${batch}: give one seed for each sample, or a single int`,
    );
  }
  const wrong = seeds.find((each) => each < 0n || each >= 2n ** 64n);
  if (wrong !== undefined) throw new RequestError(`seed ${wrong} is outside 0..2**64 - 1`);
  return seeds;
}

function wholeNumber(seed) {
  if (typeof seed === "bigint") return seed;
  if (Number.isSafeInteger(seed)) return BigInt(seed);
  throw new RequestError(`seed ${repr(seed)}: needed a whole number, as a BigInt from 2**53 on`);
}

function classNumber(condition, label) {
  const name = repr(condition.name);
  if (Number.isSafeInteger(label)) return label;
  if (typeof label !== "string")
    throw new RequestError(`label ${repr(label)} of ${name}: needed a name or a whole number`);
  if (condition.labels === null) {
    const hint = `give a number below ${condition.classes}`;
    throw new RequestError(`label ${repr(label)}: ${name} has no label names in this bundle; ${hint}`);
  }
  if (!condition.labels.includes(label)) {
    throw new RequestError(`no label of ${name} is called ${repr(label)}; ${didYouMean(label, condition.labels)}`);
  }
  return condition.labels.indexOf(label);
}

function checkValues({ name, dtype, shape, classes }, array) {
  if (array.dtype !== dtype) throw new RequestError(`condition ${repr(name)}: dtype ${array.dtype}, needed ${dtype}`);
  if (array.shape.length === 0 || String(array.shape.slice(1)) !== String(shape)) {
    const needed = ["batch", ...shape].join(", ");
    throw new RequestError(`condition ${repr(name)}: shape ${repr(array.shape)}, needed [${needed}]`);
  }
  if (classes === null) return;
  const wrong = array.data.find((each) => each < 0 || each >= classes);
  if (wrong !== undefined) {
    throw new RequestError(`label ${wrong} of ${repr(name)}: this bundle knows ${classes}, 0..${classes - 1}`);
  }
}
