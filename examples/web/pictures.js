// Pixels on canvases.

/** Draws picture `index` of pixels [B, H, W, 1 or 3] on `canvas`, one canvas pixel each. */
export function paint(canvas, { shape: [, height, width, channels], data }, index = 0) {
  const image = new ImageData(width, height);
  const first = index * height * width * channels;
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = data[first + i * channels + (channels === 3 ? c : 0)];
    image.data[4 * i + 3] = 255;
  }
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Whether `paint` can draw samples of this shape, without the batch, once session.images has made them pixels. */
export const isPaintable = (shape, valueRange) =>
  shape.length === 3 && (valueRange === null || shape[0] === 1 || shape[0] === 3);

/** The canvas as a PNG file for the user to keep. */
export function save(canvas, name) {
  const link = Object.assign(document.createElement("a"), { href: canvas.toDataURL("image/png"), download: name });
  link.click();
}
