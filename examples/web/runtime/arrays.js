// Arrays: { dtype, shape, data }, data being a typed array in C order. Dtypes have numpy's names.

import { EngineError } from "./errors.js";

const KINDS = {
  float32: Float32Array,
  float64: Float64Array,
  float16: globalThis.Float16Array, // not in every browser yet
  int64: BigInt64Array,
  int32: Int32Array,
  int8: Int8Array,
  uint8: Uint8Array,
  bool: Uint8Array,
};

export const sizeOf = (shape) => shape.reduce((product, size) => product * size, 1);

/** The typed array class of a dtype. */
export function kindOf(dtype) {
  if (KINDS[dtype]) return KINDS[dtype];
  throw new EngineError(`this browser has no arrays of ${dtype}; use a newer one, or compile to float32`);
}

export const zeros = (dtype, shape) => ({ dtype, shape, data: new (kindOf(dtype))(sizeOf(shape)) });

/** Row `index` along the first axis, over the same memory. */
export function rowOf({ dtype, shape: [, ...shape], data }, index) {
  const size = sizeOf(shape);
  return { dtype, shape, data: data.subarray(index * size, (index + 1) * size) };
}
