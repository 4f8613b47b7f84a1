// The tab Edit: one picture redrawn under a mask, or redrawn from a noise level, or two pictures mixed.
import { commandLine, draw, el, field, getJSON, modelPicker, number, picture, queueLine, say, select, stream } from "./common.js";
import { painter } from "./painter.js";
import { pictureSlot, ready, trying } from "./pictures.js";

export const title = "Edit";
export const explain = [
  "Redraw what you paint: at each level the painted part comes from p<sub>θ</sub>(x<sub>t−1</sub> | x<sub>t</sub>) (Eq. 1), the rest from q(x<sub>t−1</sub> | x<sub>0</sub>) (Eq. 4). This is RePaint.",
  "Redraw all: the picture gets noise up to level t (Eq. 4), and the model takes it away again (Algorithm 2). This is SDEdit. A higher t gives more freedom.",
  "Mix two: x̄<sub>t</sub> = (1 − λ) x<sub>t</sub> + λ x′<sub>t</sub>, decoded by p(x<sub>0</sub> | x̄<sub>t</sub>). This is the interpolation of Section 4.4 and Figure 8.",
];

/** What can be done: its name, its settings at first (t is a share of T), and whether it paints or has a second picture. */
const WAYS = {
  inpaint: { name: "Redraw what you paint", sampler: "ancestral", steps: 50, n: 4, paints: true },
  redraw: { name: "Redraw all, from level t", sampler: "ddim", steps: 50, n: 4, t: 0.4 },
  interpolate: { name: "Mix two pictures", sampler: "ancestral", steps: 50, n: 7, t: 0.5, mixes: true },
};

/** Put options into a select. The value stays if it is one of them, and is the first otherwise. */
function offer(input, options) {
  const before = input.value;
  input.replaceChildren(...select(options).children);
  input.value = before;
  if (input.selectedIndex < 0) input.selectedIndex = 0;
}

export async function build(section) {
  const inputs = {
    class: select([]), guidance: number(1.5, 0, 20, 0.1), sampler: select([]), steps: number(50, 1, 1000),
    seed: number(0, 0, 2 ** 31), n: number(4, 1, 16), resample: number(5, 1, 100),
    t: el("input", { type: "range", min: 1, max: 1000, value: 400 }),
  };
  const level = field("Noise level t", inputs.t);
  const resample = field("Passes", inputs.resample, "How often each level is passed, so that both parts match");
  const ways = Object.entries(WAYS).map(([value, way]) =>
    el("label", {}, el("input", { type: "radio", name: "way", value, checked: value === "inpaint" }), way.name));
  const go = el("button", { class: "main", type: "submit" }, "Redraw");
  const cancel = el("button", { type: "button", disabled: true }, "Cancel");
  const status = el("p", { class: "status", role: "status" });
  const mask = painter();
  const canvas = el("canvas", { role: "img", "aria-label": "nothing is made yet" });
  const caption = el("figcaption");
  const progress = el("progress", { max: 1, value: 0, "aria-label": "progress of the edit" });
  const estimate = el("input", { type: "checkbox" });
  const watched = el("div", { class: "stage", hidden: true }, el("figure", {}, canvas, caption), progress,
    el("label", {}, estimate, "Show x̂₀, the estimate, in place of xₜ"));
  const made = el("ol", { class: "made", "aria-label": "What was made" });
  const files = el("div", { class: "row" });
  const command = commandLine();
  let choices, controller, frame;

  const way = () => section.querySelector("[name=way]:checked")?.value ?? "inpaint";
  const classes = () => (inputs.class.value ? [inputs.class.value] : choices?.always_labelled ? ["all"] : []);

  /** The picture as the model takes it: this is what is painted on, and what is saved for the command line. */
  async function fit(slot) {
    if (slot.fitted || !slot.original) return;
    const [model, original] = [picker.input.value, slot.original];
    let fitted;
    await stream("/api/edit/fit", { model, picture: original.id }, (event) => {
      if (event.kind === "picture") fitted = event;
    });
    if (picker.input.value !== model || slot.original !== original) return; // others were chosen meanwhile
    if (slot === one) await mask.show(fitted);
    slot.fitted = fitted.id; // only now can one paint
    slot.set({ ...fitted, notes: [...original.notes ?? [], ...fitted.notes] });
  }
  const slotOf = (name, first) => {
    const slot = pictureSlot(name, { model: () => picker.input.value, classes, first, changed: (given) => {
      if (slot.fitted !== given.id) Object.assign(slot, { fitted: null, original: given });
      layout();
      return fit(slot);
    } });
    return slot;
  };
  const one = slotOf("Picture", true);
  const other = slotOf("Second picture", false);

  const tell = () => { inputs.t.setAttribute("aria-valuetext", `t = ${inputs.t.value}`); level.querySelector("label").textContent = `Noise level t: ${inputs.t.value} of ${inputs.t.max}`; };
  function layout() {
    const chosen = WAYS[way()];
    mask.hidden = !(chosen.paints && one.fitted);
    resample.hidden = !chosen.paints;
    level.hidden = !chosen.t;
    other.hidden = !chosen.mixes;
    go.textContent = chosen.mixes ? "Mix" : "Redraw";
    inputs.guidance.disabled = !inputs.class.value || !choices?.guided;
  }
  function suit() { // the sampler and steps of this way, or the model's own if it has no such sampler
    const chosen = WAYS[way()];
    const samplers = choices?.samplers ?? {};
    const sampler = chosen.sampler in samplers ? chosen.sampler : Object.keys(samplers)[0];
    inputs.sampler.value = sampler;
    inputs.steps.value = sampler === chosen.sampler ? chosen.steps : samplers[sampler]?.[1];
  }
  function begin() {
    const chosen = WAYS[way()];
    suit();
    inputs.n.value = chosen.n;
    if (chosen.t) inputs.t.value = Math.round(chosen.t * inputs.t.max);
    tell();
    layout();
  }
  const picker = await modelPicker(async (name) => {
    choices = await getJSON(`/api/sample/choices?model=${encodeURIComponent(name)}`);
    offer(inputs.class, [...(choices.always_labelled ? [] : [["", "none"]]), ...choices.classes]);
    const sampler = inputs.sampler.value;
    offer(inputs.sampler, Object.keys(choices.samplers));
    if (inputs.sampler.value !== sampler) suit();
    inputs.class.disabled = !choices.classes.length;
    inputs.t.max = inputs.steps.max = choices.T;
  });
  picker.input.addEventListener("change", () => { // the pictures are fitted to the new model
    for (const slot of [one, other]) {
      slot.fitted = null;
      slot.ready = Promise.all([slot.ready, trying(() => fit(slot))]);
    }
  });

  const paint = () => {
    if (!frame) return;
    draw(canvas, estimate.checked ? frame.x0 : frame.x, frame.n, Math.min(frame.n, 4));
    caption.textContent = estimate.checked ? `x̂₀, the estimate at t = ${frame.t}` : `xₜ at t = ${frame.t}`;
    canvas.setAttribute("aria-label", `${frame.n} images: ${caption.textContent}`);
  };
  const link = (url, name, text) => el("a", { class: "button", href: url, download: name }, text);
  function show(pictures) {
    made.replaceChildren(...pictures.map((given, i) => el("li", {},
      el("img", { class: "pixels", src: given.url, alt: `image ${i + 1}` }),
      el("a", { class: "button", href: given.url, download: `edited-${i + 1}.png`, "aria-label": `Save PNG of image ${i + 1}` }, "Save PNG"),
      el("button", { type: "button", "aria-label": `Use this: image ${i + 1} becomes the picture`, onclick: () => {
        Object.assign(one, { fitted: given.id, original: given }).set(given);
        trying(() => mask.show(given));
        one.scrollIntoView({ block: "nearest" });
      } }, "Use this"))));
    watched.hidden = true;
  }

  const form = el("form", { class: "panel" }, picker,
    el("fieldset", { class: "choice" }, el("legend", {}, "What to do"), ...ways),
    level, el("div", { class: "pair" }, field("Class", inputs.class), field("Guidance", inputs.guidance, "1 is none")),
    el("div", { class: "pair" }, field("Sampler", inputs.sampler), field("Steps", inputs.steps)), resample,
    el("div", { class: "pair" }, field("Seed", inputs.seed), field("Images", inputs.n)),
    el("div", { class: "row" }, go, cancel), status);
  const stage = el("div", { class: "panel" }, el("div", { class: "stages" }, one, other, mask), watched, made, files, command);
  section.append(el("div", { class: "columns" }, form, stage));
  form.addEventListener("change", (event) => (event.target.name === "way" ? begin() : layout()));
  inputs.t.addEventListener("input", tell);
  estimate.addEventListener("change", paint);
  cancel.addEventListener("click", () => controller?.abort());

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    say();
    status.textContent = "";
    await ready(go, one, other);
    if (!one.fitted || (WAYS[way()].mixes && !other.fitted)) {
      say(WAYS[way()].mixes ? "Mix two pictures: add both first." : "Add a picture first.");
      return;
    }
    const [value, n] = [way(), Number(inputs.n.value)];
    const t = WAYS[value].t ? Number(inputs.t.value) : choices.T;
    const body = {
      model: picker.input.value, picture: one.fitted, other: other.fitted, classes: inputs.class.value ? [inputs.class.value] : [],
      guidance: inputs.guidance.disabled || !inputs.guidance.value ? null : Number(inputs.guidance.value),
      sampler: inputs.sampler.value, steps: inputs.steps.value ? Math.min(t, inputs.steps.value) : null,
      seed: Number(inputs.seed.value), n, t, resample: Number(inputs.resample.value), mask: mask.bits(),
    };
    const [first, second] = [one.picture, other.picture]; // others may be chosen while the job waits
    controller = new AbortController();
    go.disabled = true;
    cancel.disabled = false;
    frame = null;
    made.replaceChildren();
    files.replaceChildren();
    command.set("");
    status.textContent = "The model draws.";
    const finished = await trying(async () => {
      await stream(`/api/edit/${value}`, body, async (event) => {
        if (event.kind === "queue") status.textContent = queueLine(event.place);
        if (event.kind === "about") {
          command.set(event.command);
          files.append(link(first.url, WAYS[value].mixes ? "a.png" : "picture.png", "Save the picture"));
          if (WAYS[value].mixes) files.append(link(second.url, "b.png", "Save the second picture"));
          if (event.mask) files.append(link(event.mask.url, "mask.png", "Save the mask"));
        }
        if (event.kind === "step") {
          const [x, x0] = await Promise.all([picture(event.x), picture(event.x0)]);
          frame = { t: event.t, n, x, x0 };
          progress.value = event.index / event.of;
          watched.hidden = false;
          paint();
        }
        if (event.kind === "done") {
          show(event.pictures);
          files.prepend(link(event.file.url, `${value}.png`, "Save all in one PNG"));
        }
      }, controller.signal);
      return true;
    });
    status.textContent = finished ? "Done." : controller.signal.aborted ? "Cancelled." : "";
    if (!finished) watched.hidden = true;
    go.disabled = false;
    cancel.disabled = true;
  });
  begin();
}
