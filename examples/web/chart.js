// A bar for each step, as high as the step took time, coloured by the engines that it called.

const HEADROOM = 1.5; // the chart is this much higher than the costliest kind of step usually takes; outliers are cut

/** A chart in the element `bars`, with what its colours mean in `legend`. */
export function stepChart(bars, legend) {
  let times = []; // { kind, ms } of each step
  let kinds = []; // what distinct steps call, "full" or "first + rest"

  return {
    /** Empties the chart, for this many steps. */
    clear(steps) {
      [times, kinds] = [[], []];
      bars.replaceChildren(...Array.from({ length: steps }, () => document.createElement("i")));
      legend.replaceChildren();
    },
    /** The next step called these engines and took this time. */
    add(engines, ms) {
      const kind = engines.join(" + ");
      if (!kinds.includes(kind)) kinds.push(kind);
      times.push({ kind, ms });
      const most = HEADROOM * Math.max(...kinds.map((each) => median(times, each)));
      times.forEach((each, i) => {
        bars.children[i].style.height = `${Math.min(Math.max((100 * each.ms) / most, 4), 100)}%`;
        bars.children[i].dataset.kind = kinds.indexOf(each.kind);
      });
      legend.replaceChildren(...kinds.map(legendEntry));
    },
    /** Marks the step that is shown, from 1. */
    mark(step) {
      [...bars.children].forEach((bar, i) => bar.classList.toggle("shown", i < step));
    },
  };

  function legendEntry(kind, index) {
    const entry = document.createElement("span");
    entry.dataset.kind = index;
    const count = times.filter((each) => each.kind === kind).length;
    entry.textContent = `${kind}: ${count} × ${median(times, kind).toFixed(0)} ms`;
    return entry;
  }
}

function median(times, kind) {
  const taken = times
    .filter((each) => each.kind === kind)
    .map((each) => each.ms)
    .sort((a, b) => a - b);
  return taken[Math.floor(taken.length / 2)];
}
