// Normal noise that is the same on every machine and in every language: Philox 4x32-10, then Box-Muller.
//
// The rule, as in dcompile's runtime/random.py: element e of one sample takes the counter (block's low word, its high
// word, draw, 0), block = e // 4, and the key (low word, high word) of the seed. ln, sqrt, cos, sin and products are
// float64, rounded to float32 once.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.2.

import { sizeOf } from "./arrays.js";

const ROUNDS = 10;
const [MULTIPLIER_0, MULTIPLIER_1] = [0xd2511f53, 0xcd9e8d57];
const [WEYL_0, WEYL_1] = [0x9e3779b9, 0xbb67ae85];

/** Philox 4x32-10: a counter of 4 words and a key of 2 -> 4 random words, all from 0 to 2**32 - 1. */
export function philox([c0, c1, c2, c3], [k0, k1]) {
  for (let round = 0; round < ROUNDS; round++) {
    const [high0, low0] = [highWord(MULTIPLIER_0, c0), Math.imul(MULTIPLIER_0, c0)];
    const [high1, low1] = [highWord(MULTIPLIER_1, c2), Math.imul(MULTIPLIER_1, c2)];
    [c0, c1, c2, c3] = [high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0];
    [k0, k1] = [(k0 + WEYL_0) | 0, (k1 + WEYL_1) | 0];
  }
  return [c0 >>> 0, c1 >>> 0, c2 >>> 0, c3 >>> 0];
}

/** Standard normal noise [seeds.length, ...shape]; sample i depends on seeds[i], a BigInt, and `draw` alone. */
export function normal(seeds, draw, shape) {
  const size = sizeOf(shape);
  const data = new Float32Array(seeds.length * size);
  seeds.forEach((seed, i) => {
    const key = [Number(seed & 0xffffffffn), Number(seed >> 32n)];
    const sample = data.subarray(i * size, (i + 1) * size);
    for (let first = 0; first < size; first += 4) {
      const block = first / 4;
      const [a, b, c, d] = philox([block >>> 0, Math.floor(block / 2 ** 32), draw, 0], key);
      const pairs = [...boxMuller(a, b), ...boxMuller(c, d)];
      for (let j = 0; j < 4 && first + j < size; j++) sample[first + j] = pairs[j];
    }
  });
  return { dtype: "float32", shape: [seeds.length, ...shape], data };
}

function boxMuller(a, b) {
  const radius = Math.sqrt(-2 * Math.log(uniform(a)));
  const angle = 2 * Math.PI * uniform(b);
  return [radius * Math.cos(angle), radius * Math.sin(angle)];
}

/** A word as a number in (0, 1], exact in float32. */
const uniform = (word) => ((word >>> 8) + 1) * 2 ** -24;

/** The upper word of the product of two 32-bit words, from 16-bit halves: no partial sum exceeds 2**53. */
function highWord(a, b) {
  const [aHigh, aLow, bHigh, bLow] = [a >>> 16, a & 0xffff, b >>> 16, b & 0xffff];
  const middle = aHigh * bLow + Math.floor((aLow * bLow) / 0x10000);
  return (aHigh * bHigh + Math.floor((middle + aLow * bHigh) / 0x10000)) | 0;
}
