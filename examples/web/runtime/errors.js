// Errors a user can act on. Each message is one line: what, where, found, needed, what to do next.

export class DcompileError extends Error {}

/** The bundle is missing, damaged, inconsistent, or written by a newer dcompile. */
export class BundleError extends DcompileError {}

/** The bundle is sound, but cannot serve what was asked of it. */
export class RequestError extends DcompileError {}

/** An engine does not load, does not match the manifest, or failed while running. */
export class EngineError extends DcompileError {}

/** The end of a sentence about an unknown name: the closest known one, else all of them. */
export function didYouMean(name, known) {
  const close = closest(name, known);
  if (close !== undefined) return `did you mean ${repr(close)}?`;
  const shown = known.slice(0, 40).join(", ") + (known.length > 40 ? ", ..." : "");
  return `known: ${shown || "none"}`;
}

/** A JSON value the way the Python runtime prints it, so that both say the same sentence. */
export function repr(value) {
  if (value === undefined || value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "string") return quoted(value);
  if (Array.isArray(value)) return `[${value.map(repr).join(", ")}]`;
  if (typeof value !== "object") return String(value);
  return `{${Object.entries(value)
    .map(([key, each]) => `${repr(key)}: ${repr(each)}`)
    .join(", ")}}`;
}

function quoted(text) {
  const mark = text.includes("'") && !text.includes('"') ? '"' : "'";
  const escapes = { "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", [mark]: `\\${mark}` };
  return mark + [...text].map((letter) => escapes[letter] ?? letter).join("") + mark;
}

/** The known name most like `name`, by the rule of Python's difflib.get_close_matches; undefined if none is close. */
function closest(name, known) {
  let best,
    bestRatio = 0.6;
  for (const each of known) {
    const letters = each.length + name.length;
    const ratio = letters ? (2 * lettersInCommon([...each], [...name])) / letters : 1;
    if (ratio > bestRatio || (ratio === bestRatio && (best === undefined || each > best)))
      [best, bestRatio] = [each, ratio];
  }
  return best;
}

/** Letters in the longest run that both share, and so on to the left and to the right of it. */
function lettersInCommon(a, b) {
  let size = 0,
    aEnd = 0,
    bEnd = 0;
  let runs = [];
  a.forEach((letter, i) => {
    const previous = runs;
    runs = [];
    b.forEach((other, j) => {
      if (letter !== other) return;
      runs[j] = (previous[j - 1] ?? 0) + 1;
      if (runs[j] > size) [size, aEnd, bEnd] = [runs[j], i + 1, j + 1];
    });
  });
  if (size === 0) return 0;
  const left = lettersInCommon(a.slice(0, aEnd - size), b.slice(0, bEnd - size));
  return left + size + lettersInCommon(a.slice(aEnd), b.slice(bEnd));
}
