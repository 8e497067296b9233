// The script: calls of engines, and jumps on one float. The whole instruction set of a bundle.

import { rowOf } from "./arrays.js";
import { EngineError } from "./errors.js";
import { isCall, isTable } from "./manifest.js";

const ROWS_BOUND = 10; // times the script's length: more than that is an endless loop

/**
 * Runs the rows on `slots`, in place; tells how many calls and steps that were and what time the engines took.
 *
 * `stages`: engine name -> { spec, engine }, the manifest's wiring and what runs it.
 * `beforeStep` is told the number of steps so far, before the first call of each; it may refill slots.
 * `afterStep` is told the number of steps so far and the engines that this step called, and is awaited; a step ends
 * with the call that writes slot "sample".
 */
export async function run(script, stages, tables, slots, { beforeStep, afterStep } = {}) {
  let position = 0,
    rows = 0,
    calls = 0,
    steps = 0,
    begun = -1,
    enginesMs = 0;
  let called = [];
  while (position < script.length) {
    const row = script[position];
    rows += 1;
    if (rows > ROWS_BOUND * script.length) {
      throw new EngineError(`script: ${rows} rows run of a script of ${script.length}: its jumps loop; compile again`);
    }
    if (!isCall(row)) {
      position = scalarIn(slots, row.slot) < Math.fround(row.below) ? row.jump : position + 1;
      continue;
    }
    if (beforeStep && begun !== steps) {
      beforeStep(steps);
      begun = steps;
    }
    const { spec, engine } = stages[row.call];
    const inputs = Object.entries(spec.inputs).map(([name, source]) => [
      name,
      isTable(source) ? rowOf(tables[source.table], row.row) : inSlot(slots, source.slot),
    ]);
    const started = performance.now();
    const outputs = await engine.run(Object.fromEntries(inputs));
    enginesMs += performance.now() - started;
    for (const [name, target] of Object.entries(spec.outputs)) slots[target.slot] = outputs[name];
    position += 1;
    calls += 1;
    called.push(row.call);
    if (Object.values(spec.outputs).some((target) => target.slot === "sample")) {
      steps += 1;
      await afterStep?.(steps, called);
      called = [];
    }
  }
  return { calls, steps, enginesMs };
}

function scalarIn(slots, name) {
  const { shape, data } = inSlot(slots, name);
  if (data.length !== 1) {
    throw new EngineError(`script: a jump needs one float in slot '${name}', found shape [${shape.join(", ")}]`);
  }
  return Math.fround(Number(data[0]));
}

function inSlot(slots, name) {
  if (Object.hasOwn(slots, name)) return slots[name];
  throw new EngineError(`script: slot '${name}' is read before any engine has written it; compile again`);
}
