// JSON values checked against kinds, with errors that say where.

import { BundleError, didYouMean, repr } from "./errors.js";

// --- kinds: how one is spelled in a message, whether a value's outermost layer is one, and how to decode it ---

const plain = (spelled, fits) => ({ spelled, fits, decode: (value) => value });
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

export const integer = plain("int", Number.isSafeInteger);
export const float = plain("float", (value) => typeof value === "number");
export const text = plain("str", (value) => typeof value === "string");
export const boolean = plain("bool", (value) => typeof value === "boolean");
export const nothing = plain("None", (value) => value === null);
export const literal = (word) => plain(`Literal[${repr(word)}]`, (value) => value === word);

/** A list of any length. */
export const list = (kind) => ({
  spelled: `tuple[${kind.spelled}, ...]`,
  fits: Array.isArray,
  decode: (values, where) => values.map((each, i) => decode(kind, each, `${where}[${i}]`)),
});

/** A list of these, in this order. */
export const tuple = (...kinds) => ({
  spelled: `tuple[${kinds.map((each) => each.spelled).join(", ")}]`,
  fits: (value) => Array.isArray(value) && value.length === kinds.length,
  decode: (values, where) => values.map((each, i) => decode(kinds[i], each, `${where}[${i}]`)),
});

/** An object whose values are all of one kind. */
export const mapping = (kind) => ({
  spelled: `Mapping[str, ${kind.spelled}]`,
  fits: isObject,
  decode: (value, where) =>
    Object.fromEntries(
      Object.entries(value).map(([name, each]) => [name, decode(kind, each, where ? `${where}.${name}` : name)]),
    ),
});

/** An object with exactly these fields; those in `defaults` may be left out. */
export const record = (spelled, fields, defaults = {}) => ({
  spelled,
  fits: isObject,
  firstField: Object.keys(fields)[0],
  decode(value, where) {
    const at = where ? `${where}.` : "";
    for (const name of Object.keys(value)) {
      if (!Object.hasOwn(fields, name)) {
        throw new BundleError(`${at}${name}: unknown field; ${didYouMean(name, Object.keys(fields))}`);
      }
    }
    return Object.fromEntries(
      Object.entries(fields).map(([name, kind]) => {
        if (Object.hasOwn(value, name)) return [name, decode(kind, value[name], at + name)];
        if (!Object.hasOwn(defaults, name)) throw new BundleError(`${at}${name}: missing`);
        return [name, defaults[name]];
      }),
    );
  },
});

/** One of these; of several records, the one whose first field the object has. */
export const either = (...kinds) => ({
  spelled: kinds.map((each) => each.spelled).join(" | "),
  fits: (value) => kinds.some((each) => suits(each, value)),
  decode: (value, where) => kinds.find((each) => suits(each, value)).decode(value, where),
});

const suits = (kind, value) => kind.fits(value) && (!kind.firstField || Object.hasOwn(value, kind.firstField));

/** `value` as `kind`; throws BundleError naming the field that is not. */
export function decode(kind, value, where = "") {
  if (!kind.fits(value)) throw new BundleError(`${where}: expected ${kind.spelled}, found ${shortened(value)}`);
  return kind.decode(value, where);
}

function shortened(value) {
  const written = repr(value);
  return written.length <= 60 ? written : `${written.slice(0, 57)}...`;
}
