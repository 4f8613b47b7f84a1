// The tab Runs: curves, grids of samples and files of a run, read again every few seconds while the tab is open.
import { el, field, getJSON, quoted, say, select } from "./common.js";

export const title = "Runs";
export const explain = [
  "Training minimises the error of the predicted noise at a random level t: L<sub>simple</sub>, Eq. 14 and Algorithm 1.",
  "The held-out loss is the same error on images that are not trained on. Low levels t are details, high ones the coarse form.",
  "The grids show samples (Algorithm 2) of the averaged weights. The page only reads what a run writes.",
];

const PERIOD = 3000; // milliseconds between two looks at a run

const NAMES = {
  loss: ["Training loss", "loss", true], held_out: ["Held-out loss", "L simple", true],
  held_out_by_level: ["Held-out loss by level", "L simple", true], images_per_second: ["Speed", "images/s", false],
};

const svg = (tag, attributes, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

const short = (value) => (Math.abs(value) >= 10000 ? `${+(value / 1000).toPrecision(3)}k` : `${+value.toPrecision(3)}`);

/** Round numbers from low to high, a few of them. */
function ticks(low, high, log) {
  const found = [];
  if (log && high / low > 3) {
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const factor of high / low > 200 ? [1] : high / low > 20 ? [1, 2, 5] : [1, 2, 3, 5, 7]) found.push(factor * 10 ** power);
    }
  } else {
    const rough = (high - low) / 4 || 1;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((f) => f * unit).find((s) => s >= rough);
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
  }
  return found.filter((value) => value >= low && value <= high);
}

/** The mean over 4% of the values on each side, and over fewer near the ends. */
function smooth(values) {
  return values.map((_, i) => {
    const reach = Math.min(i, values.length - 1 - i, Math.ceil(values.length / 25));
    const near = values.slice(i - reach, i + reach + 1);
    return near.reduce((sum, value) => sum + value, 0) / near.length;
  });
}

/** A chart of lines {name: [steps, values]} as a figure. A single line of many points is faint below its mean. */
function chart(heading, unit, wantsLog, lines) {
  const drawn = Object.entries(lines).filter(([, [steps]]) => steps.length);
  if (!drawn.length) return null;
  const [width, height, left, bottom] = [400, 240, 48, 26];
  const xs = drawn.flatMap(([, [steps]]) => steps);
  const ys = drawn.flatMap(([, [, values]]) => values);
  const log = wantsLog && Math.min(...ys) > 0;
  const span = (values) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    return low === high ? [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2] : [low, high];
  };
  const [x0, x1] = span(xs);
  const [y0, y1] = span(ys);
  const scale = log ? Math.log : (v) => v;
  const place = (x, y) => [
    left + ((x - x0) / (x1 - x0)) * (width - left - 18),
    height - bottom - ((scale(y) - scale(y0)) / (scale(y1) - scale(y0))) * (height - bottom - 10),
  ];
  const summary = drawn.map(([name, [steps, values]]) =>
    `${name}: ${short(values[0])} at step ${steps[0]}, ${short(values.at(-1))} at step ${steps.at(-1)}`).join("; ");
  const id = `chart-${heading.replaceAll(" ", "-")}`;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": `${id}-title ${id}-text` },
    svg("title", { id: `${id}-title` }, heading), svg("desc", { id: `${id}-text` }, `${unit} against the step. ${summary}.`));
  for (const y of ticks(y0, y1, log)) {
    const [, at] = place(x0, y);
    picture.append(svg("line", { class: "tick", x1: left, x2: width - 18, y1: at, y2: at }),
      svg("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, short(y)));
  }
  for (const x of ticks(x0, x1, false)) {
    picture.append(svg("text", { x: place(x, y0)[0], y: height - 8, "text-anchor": "middle" }, short(x)));
  }
  drawn.forEach(([, [steps, values]], i) => {
    const points = (ys) => steps.map((step, j) => place(step, ys[j]).map((v) => v.toFixed(1)).join(",")).join(" ");
    const noisy = drawn.length === 1 && steps.length >= 50;
    const colour = `line-${drawn.length === 1 ? 0 : Math.round((i * 9) / (drawn.length - 1))}`;
    picture.append(steps.length === 1
      ? svg("circle", { class: `dot ${colour}`, cx: place(steps[0], values[0])[0], cy: place(steps[0], values[0])[1], r: 3 })
      : svg("polyline", { class: `line ${noisy ? "faint" : ""} ${colour}`, points: points(values) }));
    if (noisy) picture.append(svg("polyline", { class: `line ${colour}`, points: points(smooth(values)) }));
  });
  const legend = drawn.length < 2 ? [] : drawn.map(([name], i) =>
    el("span", { class: "key" }, el("i", { class: `swatch line-${Math.round((i * 9) / (drawn.length - 1))}` }), name));
  return el("figure", { class: "panel" }, el("h2", {}, heading, el("small", {}, ` ${unit}`)), picture,
    legend.length ? el("figcaption", { class: "legend" }, ...legend) : null);
}

export async function build(section) {
  const picker = field("Run", select([]));
  const facts = el("dl", { class: "facts" });
  const status = el("p", { class: "status", role: "status" });
  const charts = el("div", { class: "charts" });
  const step = el("input", { type: "range", min: 0, max: 0, value: 0 });
  const image = el("img", { class: "pixels", alt: "" });
  const caption = el("figcaption");
  const grids = el("div", { class: "panel grids", hidden: true }, el("h2", {}, "Samples over the steps of training"),
    el("figure", {}, image, caption), field("Step", step));
  const files = el("div", { class: "panel files" });
  const run = el("div", { hidden: true }, facts, charts, grids, files);
  const empty = el("p", { class: "panel", hidden: true });
  section.append(el("div", { class: "row" }, picker), empty, status, run);
  let seen = "";
  let pictures = [];

  const address = (file) => `/api/runs/file?run=${encodeURIComponent(picker.input.value)}&file=${encodeURIComponent(file)}`;
  const number = (file) => Number(file.match(/(\d+)\.png$/)[1]);
  const showGrid = () => {
    const file = pictures[Number(step.value)];
    if (!file) return;
    image.src = address(file);
    image.alt = `grid of samples at step ${number(file)}`;
    caption.textContent = `step ${number(file).toLocaleString("en")}`;
    step.setAttribute("aria-valuetext", caption.textContent);
  };
  step.addEventListener("input", showGrid);

  const show = (about) => {
    const loss = about.curves.loss.loss[1].at(-1);
    const [, heldOut] = about.curves.held_out["held out"];
    const speed = about.curves.images_per_second["images/s"][1].at(-1);
    const hours = about.seconds == null ? null : `${Math.floor(about.seconds / 3600)}:${String(Math.floor(about.seconds / 60) % 60).padStart(2, "0")}`;
    const known = [
      ["step", about.step == null ? null : about.step.toLocaleString("en") + (about.steps ? ` of ${about.steps.toLocaleString("en")}` : "")],
      ["last loss", loss == null ? null : short(loss)], ["best held-out loss", heldOut.length ? short(Math.min(...heldOut)) : null],
      ["images/s", speed == null ? null : short(speed)], ["training time, h:min", hours],
    ];
    facts.replaceChildren(...known.filter(([, value]) => value != null).map(([name, value]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, value))));
    charts.replaceChildren(...Object.entries(NAMES).map(([key, [heading, unit, log]]) =>
      chart(heading, unit, log, about.curves[key])).filter(Boolean));
    const atEnd = step.value === step.max;
    pictures = about.files.filter((file) => /^samples\/\d+\.png$/.test(file));
    step.max = Math.max(0, pictures.length - 1);
    step.disabled = pictures.length < 2;
    if (atEnd) step.value = step.max;
    grids.hidden = !pictures.length;
    showGrid();
    const others = about.files.filter((file) => !pictures.includes(file));
    files.replaceChildren(el("h2", {}, "Files"),
      el("ul", {}, ...others.map((file) => el("li", {}, el("a", { href: address(file), target: "_blank", rel: "noopener" }, file)))),
      others.includes("report.html") ? "" : el("p", {},
        el("code", {}, `ddpm report ${quoted(picker.input.value)}`), " writes a report of this run."));
  };

  const look = async () => {
    if (section.hidden || document.hidden) return;
    const { runs, folder } = await getJSON("/api/runs");
    const before = picker.input.value;
    if (runs.join("\n") !== [...picker.input.options].map((option) => option.value).join("\n")) {
      picker.input.replaceChildren(...runs.map((name) => el("option", { value: name }, name)));
      picker.input.value = runs.includes(before) ? before : runs[0];
    }
    picker.hidden = run.hidden = !runs.length;
    empty.hidden = Boolean(runs.length);
    empty.replaceChildren(`There is no run under ${folder}. `, el("code", {}, "ddpm train digits"), " starts one, and this page shows it then.");
    if (!runs.length) return;
    const name = picker.input.value;
    const about = await getJSON(`/api/runs/one?run=${encodeURIComponent(name)}&seen=${encodeURIComponent(seen)}`);
    if (name !== picker.input.value) return;
    status.textContent = about.age < 90 ? "The run wrote to its log in the last 90 seconds." : "The run wrote nothing to its log in the last 90 seconds.";
    if (about.stamp !== seen) show(about);
    seen = about.stamp;
  };
  const again = () => look().catch((error) => say(error.message));
  picker.input.addEventListener("change", () => { seen = ""; step.value = step.max; again(); });
  document.addEventListener("shown", again);
  document.addEventListener("visibilitychange", again);
  setInterval(again, PERIOD);
}
