// The page: the form's settings go to the worker, and its steps become frames, which the scrubber shows afterwards.

import { noise, sizeOf, toPixels } from "./sampler.js";

const $ = (id) => document.getElementById(id);
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const waiting = [];
const FRAMES = 256e6; // bytes of frames that are kept; of more, every second or third one, and so on
const GAP = 2; // pixels between two images

let model = null;
let run = null; // { count, columns, steps, seconds, frames: [{ step, t, x, x0 }] }
let player = 0;

worker.onmessage = ({ data }) => waiting.shift()(data);
worker.onerror = () => fail("The model cannot be loaded: this browser is too old, or a file is missing.");

/** The worker's answer to a question. It answers in order. */
function ask(question) {
  return new Promise((resolve) => {
    waiting.push(resolve);
    worker.postMessage(question);
  });
}

function fail(message) {
  $("loading").replaceChildren(message);
  $("loading").hidden = false;
}

async function begin() {
  const answer = await ask({});
  if (answer.error) return fail(`The model cannot be loaded: ${answer.error}`);
  model = answer.model;
  const [C, H, W] = model.shape;
  document.title = `${model.name}: images out of noise`;
  $("about").textContent =
    `The model ${model.name} makes ${C === 1 ? "grey" : "colour"} images of ${W} × ${H} pixels. ` +
    "The model runs in your browser, and sends nothing anywhere.";
  const classes = model.classes.map((name, i) => new Option(name, i));
  if (!model.always_labelled) classes.unshift(new Option("none", ""));
  if (model.classes.length > 1) classes.unshift(new Option("all, in turn", "all"));
  $("class").replaceChildren(...classes);
  $("class-field").hidden = !model.classes.length;
  $("guidance").value = model.guidance;
  if (columnsOf(model.classes.length)) $("count").value = 2 * model.classes.length;
  for (const id of ["form", "stage"]) $(id).hidden = false;
  $("loading").hidden = true;
  choose();
}

/** Show the settings that the chosen sampler and class have, and the noise that sampling would begin with. */
function choose({ target } = {}) {
  const ddim = $("sampler").value === "ddim";
  const everyLevel = !ddim && (model.predict === "mu" || model.variance === "learned");
  $("eta-field").hidden = !ddim;
  $("guidance-field").hidden = model.guidance === 1 || $("class").value === "" || !model.classes.length;
  $("steps").min = everyLevel ? model.T : 1;
  $("steps").max = model.T;
  if (!target || target === $("sampler")) $("steps").value = model.samplers[$("sampler").value];
  if (!run?.going && $("form").checkValidity()) {
    stop();
    prepare();
  }
}

/** The settings of the form, and a new run with the frame of pure noise. */
function prepare() {
  const count = Number($("count").value), steps = Number($("steps").value), chosen = $("class").value;
  const names = chosen === "all" ? model.classes.map((_, i) => i) : [Number(chosen)];
  const seeds = Array.from({ length: count }, (_, i) => Number($("seed").value) + i);
  const settings = {
    sampler: $("sampler").value,
    steps,
    eta: Number($("eta").value),
    guidance: model.guidance === 1 ? 1 : Number($("guidance").value),
    seeds,
    labels: model.classes.length && chosen !== "" ? seeds.map((_, i) => names[i % names.length]) : null,
  };
  const columns = Math.min(count, columnsOf(chosen === "all" ? names.length : 0) || Math.ceil(Math.sqrt(count)));
  const x = toPixels(noise(model, seeds, model.T)), x0 = x.slice().fill(128); // there is no estimate yet
  run = { count, columns, steps, seconds: 0, frames: [{ step: 0, t: model.T, x, x0 }], going: false };
  $("status").textContent = "";
  controls();
  show(run.frames[0]);
  return settings;
}

/** The columns of a grid that cycles over classes: one per class if there are 2 to 16. */
function columnsOf(classes) {
  return classes > 1 && classes <= 16 ? classes : 0;
}

async function start(event) {
  event.preventDefault();
  stop();
  const settings = prepare(), job = run, { count, steps } = run;
  job.going = true;
  const every = Math.ceil((2 * steps * count * sizeOf(model)) / FRAMES);
  const begun = performance.now();
  controls();
  $("status").textContent = "Sampling.";
  for (let step = 1; step <= steps; step++) {
    const answer = await ask(step === 1 ? { begin: settings } : { next: true });
    if (run !== job || !job.going) return; // cancelled
    if (answer.error) {
      job.going = false;
      $("status").textContent = answer.error;
      return controls();
    }
    job.seconds = (performance.now() - begun) / 1000;
    const frame = { step, ...answer };
    if (step % every === 0 || step === steps) job.frames.push(frame);
    show(frame);
    $("progress").value = step / steps;
  }
  job.going = false;
  $("status").textContent = `${count} image${count > 1 ? "s" : ""} in ${job.seconds.toFixed(1)} seconds.`;
  controls();
}

function cancel() {
  run.going = false;
  $("status").textContent = `Cancelled after ${run.frames.at(-1).step} of ${run.steps} steps.`;
  controls();
  $("start").focus();
}

/** Enable what can be used now. */
function controls() {
  const frames = run.frames.length;
  $("cancel").disabled = !run.going;
  $("save").disabled = run.going;
  for (const id of ["scrubber", "play"]) $(id).disabled = run.going || frames === 1;
  $("scrubber").max = frames - 1;
  $("scrubber").value = frames - 1;
  $("scrubber").hidden = run.going;
  $("progress").hidden = !run.going;
  $("progress").value = 0;
}

/** Draw a frame on the page, and say what it is. */
function show(frame) {
  const shown = document.querySelector("[name=shown]:checked").value;
  const [, H, W] = model.shape, room = $("figure").clientWidth;
  let columns = run.columns; // a narrow page has fewer, so that images stay large enough to see
  while (columns % 2 === 0 && room < 40 * columns) columns /= 2;
  const width = (room - GAP) / columns - GAP, height = (0.6 * innerHeight - GAP) / Math.ceil(run.count / columns) - GAP;
  draw($("canvas"), frame[shown], columns, Math.max(1, Math.floor(Math.min(width / W, height / H))));
  const where = `Step ${frame.step} of ${run.steps}, t = ${frame.t}`;
  $("caption").textContent = frame.step ? `${where}, ${run.seconds.toFixed(1)} s` : where;
  $("scrubber").setAttribute("aria-valuetext", where);
  const what = frame.t === 0 ? "the result" : shown === "x" ? `with noise, at level ${frame.t}` : "the model's estimate";
  $("canvas").setAttribute("aria-label", `${run.count} image${run.count > 1 ? "s" : ""}, ${what}`);
}

/** Draw the images of a frame as a grid; each pixel becomes a square of `factor` pixels of the canvas. */
function draw(canvas, pixels, columns, factor, background) {
  const [C, H, W] = model.shape, right = W * factor + GAP, down = H * factor + GAP;
  canvas.width = columns * right + GAP;
  canvas.height = Math.ceil(run.count / columns) * down + GAP;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  if (background) {
    context.fillStyle = background;
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
  const tile = new OffscreenCanvas(W, H), brush = tile.getContext("2d"), image = new ImageData(W, H);
  for (let i = 0; i < run.count; i++) {
    for (let j = 0; j < H * W; j++) {
      for (let c = 0; c < 3; c++) image.data[4 * j + c] = pixels[(i * C + (C === 1 ? 0 : c)) * H * W + j];
      image.data[4 * j + 3] = 255;
    }
    brush.putImageData(image, 0, 0);
    const x = (i % columns) * right + GAP, y = Math.floor(i / columns) * down + GAP;
    context.drawImage(tile, x, y, W * factor, H * factor);
  }
}

function scrub() {
  if (run) show(run.frames[run.going ? run.frames.length - 1 : $("scrubber").value]);
}

function play() {
  if (player) return stop();
  const scrubber = $("scrubber"), frames = run.frames.length;
  if (Number(scrubber.value) === frames - 1) scrubber.value = 0;
  $("play").textContent = "Pause";
  player = setInterval(() => {
    if (Number(scrubber.value) === frames - 1) return stop();
    scrubber.value = Number(scrubber.value) + Math.ceil(frames / 200);
    scrub();
  }, Math.max(30, Math.min(150, 4000 / frames)));
  scrub();
}

function stop() {
  clearInterval(player);
  player = 0;
  $("play").textContent = "Play";
}

/** Save the frame as a picture, in the layout of `ddpm sample`. */
function save() {
  const canvas = document.createElement("canvas"), frame = run.frames[$("scrubber").value];
  const shown = document.querySelector("[name=shown]:checked").value, [, H, W] = model.shape;
  draw(canvas, frame[shown], run.columns, Math.max(1, Math.ceil(32 / Math.min(H, W))), "white");
  canvas.toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${model.name}-${frame.t}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}

$("form").addEventListener("submit", start);
$("cancel").addEventListener("click", cancel);
$("form").addEventListener("change", choose);
$("scrubber").addEventListener("input", () => { stop(); scrub(); });
$("play").addEventListener("click", play);
$("save").addEventListener("click", save);
for (const radio of document.getElementsByName("shown")) radio.addEventListener("change", scrub);
addEventListener("resize", scrub);
begin();
