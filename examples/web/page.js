// The page: what the user chooses goes to worker.js, what comes back is shown.

import { stepChart } from "./chart.js";
import { isPaintable, paint, save } from "./pictures.js";

const MOST_TILES = 100;
const TILES_AT_ONCE = 6; // a larger batch is no quicker on a few threads, and its steps follow each other slowly
const $ = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
const chart = stepChart($("chart"), $("legend"));

let manifest;
let downloadBytes = 0;
let condition; // the one that has classes, or undefined
let names = [""]; // what its classes are called
let request = null; // the running one: { id, kind, step, done, stopped }
let frames = []; // of the one picture, after each step
let requests = 0;

// --- loading ---

const bundle = new URLSearchParams(location.search).get("bundle") ?? "bundle";
worker.postMessage({ type: "load", bundle: new URL(bundle, location.href).href.replace(/\/$/, "") });
worker.addEventListener("message", ({ data }) => handlers[data.type](data));
worker.addEventListener("error", ({ message }) =>
  showError(message ?? "worker.js does not start; is onnxruntime-web installed? Run npm ci beside this page"),
);

/** By type of what worker.js says. */
const handlers = {
  progress({ loaded, total }) {
    downloadBytes = total;
    $("progress").value = loaded / total;
    $("loading-text").textContent =
      loaded < total ? `Reading the bundle, ${megabytes(loaded)} of ${megabytes(total)}` : "Preparing the engines";
  },
  loaded(message) {
    ({ manifest } = message);
    const problem = whyNotShown(manifest.contract);
    if (problem) return showError(problem);
    condition = manifest.contract.conditions.find((each) => each.classes !== null);
    if (condition) names = condition.labels ?? Array.from({ length: condition.classes }, (_, i) => String(i));
    showModel(message);
    readAddress();
    drawOne();
  },
  step: (message) => message.id === request?.id && request.step(message),
  done: (message) => message.id === request?.id && request.done(message),
  error({ id, message }) {
    if (id !== undefined && id !== request?.id) return;
    stop();
    showError(message);
  },
};

/** Why this page, which draws pictures of one labelled condition, cannot show a bundle; undefined if it can. */
function whyNotShown({ sample, value_range, conditions }) {
  if (!isPaintable(sample.shape, value_range)) {
    return `this page draws grey and coloured pictures; samples of this bundle have shape [${sample.shape.join(", ")}]`;
  }
  if (conditions.length > 1 || conditions.some((each) => each.classes === null)) {
    const found = conditions.map((each) => each.name).join(", ");
    return `this page takes one condition with classes, this bundle has ${found}; give it a page of its own`;
  }
}

function showModel({ ms, runsOn }) {
  const { contract, name } = manifest;
  const engines = Object.keys(manifest.engines);
  const facts = {
    Model: name,
    Download: megabytes(downloadBytes),
    Steps: String(contract.steps),
    Engines: engines.length <= 3 ? engines.join(", ") : String(engines.length),
    "Ready in": seconds(ms),
  };
  $("facts").replaceChildren(
    ...Object.entries(facts).map(([term, text]) => {
      const pair = document.createElement("div");
      pair.append(element("dt", term), element("dd", text));
      return pair;
    }),
  );
  $("runs-on").textContent = `Runs on ${runsOn}.`;
  $("labels").style.setProperty("--letters", Math.max(...names.map((name) => name.length)));
  $("labels").append(...names.map(labelChoice));
  $("labels").hidden = !condition;
  $("grid").replaceChildren(...names.map(tile));
  Object.assign($("step"), { max: contract.steps, value: contract.steps });
  $("loading").hidden = true;
  $("studio").hidden = false;
  $("all").hidden = !condition || names.length > MOST_TILES;
}

function labelChoice(name, index) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), {
    type: "radio",
    name: "label",
    value: index,
    checked: index === 0,
  });
  label.append(input, element("span", name));
  return label;
}

function tile(name, index) {
  const button = Object.assign(document.createElement("button"), {
    type: "button",
    title: `Look at ${name} step by step`,
  });
  const canvas = document.createElement("canvas");
  const [, height, width] = manifest.contract.sample.shape;
  Object.assign(canvas, { width, height });
  button.append(canvas, element("span", name));
  button.addEventListener("click", () => {
    choose(index);
    drawOne();
    $("studio").scrollIntoView({ behavior: "smooth", block: "start" });
  });
  return button;
}

// --- one picture ---

const chosen = () => Number(new FormData($("controls")).get("label") ?? 0);
const seed = () => BigInt($("seed").value);
const title = () => [names[chosen()], `seed ${seed()}`].filter(Boolean).join(", ");

function drawOne() {
  if (!checkSeed()) return;
  writeAddress();
  const { steps } = manifest.contract;
  const about = title();
  frames = [];
  chart.clear(steps);
  $("caption").textContent = `Step 0 of ${steps}`;
  $("picture").setAttribute("aria-label", `${about}, being drawn`);
  start(
    { labels: condition && [chosen()], seeds: [seed()] },
    {
      kind: "one",
      step({ step, engines, ms, pixels }) {
        frames.push(pixels);
        chart.add(engines, ms);
        showStep(step);
        $("caption").textContent = `Step ${step} of ${steps}`;
      },
      done({ timing }) {
        const share = percent(timing.enginesMs / timing.totalMs);
        $("caption").textContent = `${timing.steps} steps in ${seconds(timing.totalMs)}, ${share} of it in the engines`;
        $("picture").setAttribute("aria-label", about);
      },
      stopped() {
        $("caption").textContent = `Stopped after step ${frames.length} of ${steps}`;
        $("picture").setAttribute("aria-label", `${about}, not finished`);
      },
    },
  );
}

function showStep(step) {
  if (!frames[step - 1]) return;
  paint($("picture"), frames[step - 1]);
  $("step").value = step;
  $("step-number").textContent = `${step} of ${manifest.contract.steps}`;
  chart.mark(step);
}

// --- every label ---

/** Draws all labels from one seed, a few at a time. */
function drawAll() {
  if (checkSeed()) drawFrom(0, seed(), performance.now());
}

function drawFrom(from, seed, began) {
  const batch = Math.min(TILES_AT_ONCE, manifest.contract.batch.max, names.length - from);
  const labels = Array.from({ length: batch }, (_, i) => from + i);
  const tiles = [...$("grid").children];
  $("draw-all").textContent = "Stop";
  start(
    { labels, seeds: labels.map(() => seed) },
    {
      kind: "all",
      step({ step, steps, pixels }) {
        labels.forEach((label, i) => {
          paint(tiles[label].querySelector("canvas"), pixels, i);
          tiles[label].classList.add("drawn");
        });
        const last = names[from + batch - 1];
        $("all-status").textContent = `${names[from]} to ${last}: step ${step} of ${steps}`;
      },
      done() {
        if (from + batch < names.length) return drawFrom(from + batch, seed, began);
        const taken = seconds(performance.now() - began);
        $("all-status").textContent = `${names.length} pictures from seed ${seed} in ${taken}`;
        $("draw-all").textContent = "Draw all";
      },
      stopped() {
        $("all-status").textContent = "Stopped";
        $("draw-all").textContent = "Draw all";
      },
    },
  );
}

// --- requests ---

/** Sends a request, and ends the one that runs. */
function start(what, { kind, step, done, stopped }) {
  request?.stopped();
  $("error").hidden = true;
  requests += 1;
  request = {
    id: requests,
    kind,
    step,
    stopped,
    done: (message) => {
      request = null;
      done(message);
    },
  };
  worker.postMessage({ type: "generate", id: requests, ...what });
}

function stop() {
  worker.postMessage({ type: "stop" });
  request?.stopped();
  request = null;
}

// --- what the user does ---

$("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  drawOne();
});
$("labels").addEventListener("change", drawOne);
$("random-seed").addEventListener("click", () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 100000; // short enough to tell someone
  drawOne();
});
$("step").addEventListener("input", () => showStep(Number($("step").value)));
$("save").addEventListener("click", () => save($("picture"), `${title().replace(/\W+/g, "_")}.png`));
$("share").addEventListener("click", async () => {
  await navigator.clipboard.writeText(location.href);
  $("caption").textContent = "Link copied: it gives this very picture";
});
$("draw-all").addEventListener("click", () => (request?.kind === "all" ? stop() : drawAll()));
window.addEventListener("hashchange", () => {
  if (!manifest) return;
  readAddress();
  drawOne();
});

function checkSeed() {
  const field = $("seed");
  const isSeed = /^[0-9]{1,20}$/.test(field.value) && seed() < 2n ** 64n;
  field.setCustomValidity(isSeed ? "" : "Any whole number from 0 to 18446744073709551615");
  return field.reportValidity();
}
$("seed").addEventListener("input", () => $("seed").setCustomValidity(""));

// --- the address: #label=A&seed=7 ---

function readAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (names.includes(wanted.get("label"))) choose(names.indexOf(wanted.get("label")));
  if (/^[0-9]{1,20}$/.test(wanted.get("seed") ?? "")) $("seed").value = wanted.get("seed");
}

function writeAddress() {
  const now = new URLSearchParams({ ...(condition ? { label: names[chosen()] } : {}), seed: String(seed()) });
  history.replaceState(null, "", `#${now}`);
}

const choose = (index) => {
  $("labels").querySelectorAll("input")[index].checked = true;
};

// --- words ---

function showError(message) {
  $("loading").hidden = true;
  $("error").textContent = message;
  $("error").hidden = false;
}

const element = (tag, text, className = "") =>
  Object.assign(document.createElement(tag), { textContent: text, className });
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const percent = (frac) => `${(100 * frac).toFixed(0)} %`;
