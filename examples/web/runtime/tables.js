// tables.safetensors -> arrays by name.

import { kindOf, sizeOf } from "./arrays.js";
import { BundleError, didYouMean } from "./errors.js";
import { isCall, isTable } from "./manifest.js";

const DTYPES = {
  F64: "float64",
  F32: "float32",
  F16: "float16",
  I64: "int64",
  I32: "int32",
  I8: "int8",
  U8: "uint8",
  BOOL: "bool",
};

/** The tables in `bytes`, once every row that a call asks for is known to be there. */
export function readTables(bytes, manifest, path) {
  let tables;
  try {
    tables = parseSafetensors(bytes);
  } catch (error) {
    throw new BundleError(`${path}: cannot be read (${error.message}); copy the bundle again`);
  }
  for (const [name, spec] of Object.entries(manifest.engines)) {
    for (const { table } of Object.values(spec.inputs).filter(isTable)) {
      if (!Object.hasOwn(tables, table) || tables[table].shape.length === 0) {
        throw new BundleError(
          `${path}: engine '${name}' reads rows of '${table}'; ${didYouMean(table, Object.keys(tables))}`,
        );
      }
      const [rows] = tables[table].shape;
      manifest.script.forEach((row, index) => {
        if (!isCall(row) || row.call !== name || row.row < rows) return;
        const found = `table '${table}' has ${rows} rows`;
        throw new BundleError(`${path}: ${found}, script[${index}] asks for row ${row.row}; compile again`);
      });
    }
  }
  return tables;
}

/** Layout: header's length as a 64-bit integer, header as JSON { name: { dtype, shape, data_offsets } }, values. */
function parseSafetensors(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const headerBytes = Number(view.getBigUint64(0, true));
  if (8 + headerBytes > bytes.length) throw new Error("its header is cut off");
  const { __metadata__: _, ...header } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + headerBytes)));
  return Object.fromEntries(
    Object.entries(header).map(
      ([
        name,
        {
          dtype: code,
          shape,
          data_offsets: [begin, end],
        },
      ]) => {
        const dtype = DTYPES[code];
        if (!dtype) throw new Error(`${name} has dtype ${code}`);
        const kind = kindOf(dtype);
        const values = bytes.slice(8 + headerBytes + begin, 8 + headerBytes + end); // a copy, and so aligned
        if (values.length !== sizeOf(shape) * kind.BYTES_PER_ELEMENT)
          throw new Error(`${name} does not fill its shape`);
        return [name, { dtype, shape, data: new kind(values.buffer) }];
      },
    ),
  );
}
