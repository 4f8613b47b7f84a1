// The tab Sample: settings, a stage for each of one or two settings, and a scrubber over what came.
import { commandLine, draw, el, field, getJSON, modelPicker, number, picture, queueLine, say, select, stream } from "./common.js";

export const title = "Sample";
export const explain = [
  "The forward process adds noise to an image in T steps until nothing is left of it: q(x<sub>t</sub> | x<sub>0</sub>), Eq. 4.",
  "The model learned to go back, one step at a time: p<sub>θ</sub>(x<sub>t−1</sub> | x<sub>t</sub>), Eq. 1 and Algorithm 2.",
  "At each step the network estimates the image itself, x̂<sub>0</sub> (Eq. 15): first its coarse form, then its details.",
];

/** One setting: its inputs, and values() for the server. */
function setting(name) {
  const inputs = {
    sampler: select([]), steps: number("", 1, 1000), spacing: select([]), class: select([]), guide: select([]),
    guidance: number("1.5", 0, 20, 0.1),
  };
  const box = el("fieldset", {}, el("legend", {}, name),
    el("div", { class: "pair" }, field("Class", inputs.class), field("Guidance", inputs.guidance, "1 is none")),
    field("Guide", inputs.guide, "a weaker model, to steer away from"),
    field("Sampler", inputs.sampler, " "),
    el("div", { class: "pair" }, field("Steps", inputs.steps), field("Spacing", inputs.spacing)));
  const adapt = () => {
    inputs.guidance.disabled = !inputs.guide.value && (!inputs.class.value || inputs.guided === false);
  };
  let samplers = {};
  const sampler = () => {
    const [meaning, steps] = samplers[inputs.sampler.value];
    inputs.sampler.nextElementSibling.textContent = meaning;
    inputs.steps.placeholder = steps ?? "all";
  };
  for (const input of [inputs.class, inputs.guide]) input.addEventListener("change", adapt);
  inputs.sampler.addEventListener("change", sampler);

  box.offer = (choices, chosen, steps) => {
    samplers = choices.samplers;
    const fill = (input, pairs, value) => { // the value stays if the model has it
      const [values, before] = [pairs.map(([v]) => v), input.value];
      input.replaceChildren(...select(pairs).children);
      input.value = [before, value, values[0]].find((v) => values.includes(v));
    };
    const was = inputs.sampler.value;
    fill(inputs.sampler, Object.keys(samplers).map((v) => [v, v]), chosen);
    if (inputs.sampler.value !== was) inputs.steps.value = inputs.sampler.value === chosen ? steps : "";
    fill(inputs.spacing, [["", "default"], ...Object.keys(choices.spacings).map((v) => [v, v])]);
    const none = choices.always_labelled ? [] : [["", "none"]];
    const all = choices.classes.length ? [["all", "all in turn"]] : [];
    fill(inputs.class, [...none, ...all, ...choices.classes.map((v) => [v, v])]);
    inputs.class.disabled = !choices.classes.length;
    fill(inputs.guide, [["", "none"], ...choices.guides.map((v) => [v, v])]);
    inputs.guide.disabled = !choices.guides.length;
    inputs.guided = choices.guided;
    inputs.steps.max = choices.T;
    adapt();
    sampler();
  };
  box.values = () => ({
    classes: inputs.class.value ? [inputs.class.value] : [], sampler: inputs.sampler.value,
    steps: inputs.steps.value ? Number(inputs.steps.value) : null, spacing: inputs.spacing.value || null,
    guide: inputs.guide.value || null,
    guidance: inputs.guidance.disabled || !inputs.guidance.value ? null : Number(inputs.guidance.value),
  });
  return box;
}

/** Where the images of one setting come to be seen. */
function stage(name) {
  const canvas = el("canvas", { role: "img", "aria-label": "no images yet", width: 512, height: 512 });
  const caption = el("figcaption", {}, "Press Sample.");
  const progress = el("progress", { max: 1, value: 0, "aria-label": `progress of ${name}` });
  const command = commandLine();
  const files = el("div", { class: "row" });
  const box = el("div", { class: "stage" }, el("figure", {}, canvas, caption), progress, files, command);
  box.frames = [];

  box.show = (t, estimate) => { // the frame whose level is nearest to t
    if (!box.frames.length) return;
    const frame = box.frames.reduce((a, b) => (Math.abs(b.t - t) <= Math.abs(a.t - t) ? b : a));
    draw(canvas, estimate ? frame.x0 : frame.x, box.count);
    const what = frame.t === 0 ? "x₀, the images" : estimate ? `x̂₀, the estimate at t = ${frame.t}` : `xₜ at t = ${frame.t}`;
    caption.textContent = what;
    canvas.setAttribute("aria-label", `${box.count} images: ${what}`);
  };
  box.run = async (body, signal, changed) => {
    Object.assign(box, { frames: [], count: body.count });
    files.replaceChildren();
    command.set("");
    progress.value = 0;
    await stream("/api/sample/start", body, async (event) => {
      if (event.kind === "queue") caption.textContent = queueLine(event.place);
      if (event.kind === "about") command.set(event.command);
      if (event.kind === "step") {
        const [x, x0] = await Promise.all([picture(event.x), picture(event.x0)]);
        box.frames.push({ t: event.t, x, x0 });
        progress.value = event.index / event.of;
        changed();
      }
      if (event.kind === "done") {
        for (const kind of ["png", "gif"]) {
          files.append(el("a", { class: "button", href: event[kind].url, download: `samples.${kind}` }, `Save ${kind.toUpperCase()}`));
        }
      }
    }, signal);
  };
  return box;
}

export async function build(section) {
  const settings = [setting("Setting"), setting("Second setting")];
  const stages = [stage("the first setting"), stage("the second setting")];
  const second = el("input", { type: "checkbox" });
  const seed = number(0, 0, 2 ** 31);
  const count = number(4, 1, 64);
  const estimate = el("input", { type: "checkbox" });
  const scrubber = el("input", { type: "range", min: 0, max: 0, value: 0 });
  const play = el("button", { type: "button", disabled: true }, "Play");
  const go = el("button", { class: "main", type: "submit" }, "Sample");
  const cancel = el("button", { type: "button", disabled: true }, "Cancel");
  const status = el("p", { class: "status", role: "status" });
  let controller, timer;

  const used = () => (second.checked ? [0, 1] : [0]);
  const longest = () => used().map((i) => stages[i].frames).reduce((a, b) => (b.length > a.length ? b : a));
  const show = (t) => {
    for (const i of used()) stages[i].show(t, estimate.checked);
    scrubber.setAttribute("aria-valuetext", `t = ${t}`);
  };
  const paint = () => show(longest()[Number(scrubber.value)]?.t ?? 0);
  const follow = () => {
    scrubber.max = longest().length - 1;
    scrubber.value = scrubber.max;
    show(0);
  };
  const pause = () => { clearInterval(timer); timer = undefined; play.textContent = "Play"; };
  const layout = () => {
    for (const part of [settings[1], stages[1]]) part.hidden = !second.checked;
  };

  play.addEventListener("click", () => {
    if (timer) { pause(); return; }
    if (scrubber.value === scrubber.max) scrubber.value = 0;
    paint();
    play.textContent = "Pause";
    timer = setInterval(() => {
      if (scrubber.value === scrubber.max) { pause(); return; }
      scrubber.value = Number(scrubber.value) + 1;
      paint();
    }, 120);
  });
  scrubber.addEventListener("input", () => { pause(); paint(); });
  estimate.addEventListener("change", paint);
  second.addEventListener("change", layout);
  cancel.addEventListener("click", () => controller?.abort());

  const picker = await modelPicker(async (name) => {
    const choices = await getJSON(`/api/sample/choices?model=${encodeURIComponent(name)}`);
    settings[0].offer(choices, "ddim", 20);
    settings[1].offer(choices, "ancestral", 100);
  });
  const form = el("form", { class: "panel" }, picker,
    el("div", { class: "pair" }, field("Seed", seed), field("Images", count)), settings[0],
    el("p", {}, el("label", {}, second, "Compare with a second setting")), settings[1],
    el("div", { class: "row" }, go, cancel), status);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    pause();
    say();
    controller = new AbortController();
    go.disabled = play.disabled = true;
    cancel.disabled = false;
    status.textContent = "The model makes the images.";
    stagePanel.scrollIntoView({ block: "nearest" });
    const shared = { model: picker.input.value, seed: Number(seed.value), count: Number(count.value) };
    try {
      await Promise.all(used().map((i) => stages[i].run({ ...shared, ...settings[i].values() }, controller.signal, follow)));
      status.textContent = "Done.";
    } catch (error) {
      controller.abort();
      status.textContent = error.name === "AbortError" ? "Cancelled." : "";
      if (error.name !== "AbortError") say(error.message);
    }
    go.disabled = false;
    cancel.disabled = true;
    play.disabled = longest().length < 2;
  });
  const switcher = el("label", {}, estimate, "Show x̂₀, the estimate, in place of xₜ");
  const stagePanel = el("div", { class: "panel" }, field("Noise level t, from T to 0", scrubber),
    el("div", { class: "row" }, play, switcher), el("div", { class: "stages" }, ...stages));
  section.append(el("div", { class: "columns" }, form, stagePanel));
  layout();
}
