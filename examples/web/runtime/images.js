// Samples as pixels.

import { sizeOf } from "./arrays.js";
import { RequestError } from "./errors.js";

const { fround } = Math; // every step is rounded to float32, as in the Python runtime
const TINY = 2 ** -126; // the smallest normal float32

/**
 * Samples [B, C, H, W] -> pixels [B, H, W, C], uint8: floor(255 * x + 0.5), valueRange mapped to x in 0..1.
 *
 * Without a valueRange (a latent), the first three channels (the first, if there are fewer) are stretched between each
 * sample's own minimum and maximum: for looking at, not for measuring.
 */
export function toPixels({ shape, data }, valueRange) {
  if (shape.length !== 4) {
    throw new RequestError(`images: samples have shape [${shape.join(", ")}], needed [B, C, H, W]`);
  }
  const [batch, channels, height, width] = shape;
  const shown = valueRange !== null ? channels : channels >= 3 ? 3 : 1;
  const area = height * width;
  const pixels = new Uint8Array(sizeOf([batch, height, width, shown]));
  for (let i = 0; i < batch; i++) {
    const sample = data.subarray(i * channels * area, (i * channels + shown) * area);
    const [low, high] = (valueRange ?? bounds(sample)).map(fround);
    const span = Math.max(fround(high - low), TINY);
    sample.forEach((value, at) => {
      const unit = Math.min(Math.max(fround(fround(value - low) / span), 0), 1);
      const place = (i * area + (at % area)) * shown + Math.floor(at / area);
      pixels[place] = Math.floor(fround(fround(unit * 255) + 0.5));
    });
  }
  return { dtype: "uint8", shape: [batch, height, width, shown], data: pixels };
}

const bounds = (values) =>
  values.reduce(([low, high], each) => [Math.min(low, each), Math.max(high, each)], [Infinity, -Infinity]);
