// The tab Compress: a picture becomes a file, and a handle over the bytes of the file shows what they hold.
import {
  commandLine, draw, el, field, modelPicker, picture, queueLine, quoted, say, select, stream, upload,
} from "./common.js";
import { duration, pictureSlot, ready, trying } from "./pictures.js";

export const title = "Compress";
export const explain = [
  "The sender draws x<sub>t−1</sub> from q(x<sub>t−1</sub> | x<sub>t</sub>, x<sub>0</sub>) (Eq. 6) and sends which shared candidate it was: Algorithm 3. The receiver follows: Algorithm 4.",
  "After any number of bytes the receiver knows some x<sub>t</sub>, and so the estimate x̂<sub>0</sub> (Eq. 15): Section 4.3 and Figure 10. The last bytes code the pixels themselves.",
  "The bound L (Eq. 5) is what an ideal coder with this model would need: its terms are the costs of the steps.",
];

const whole = (value) => value.toLocaleString("en");

export async function build(section) {
  const bits = select([["", "smallest file"], ["12", "faster (K = 12)"], ["8", "fastest (K = 8)"]]);
  const go = el("button", { class: "main", type: "submit" }, "Compress");
  const cancel = el("button", { type: "button", disabled: true }, "Cancel");
  const chosen = el("input", { type: "file", accept: ".ddpm", hidden: true, "aria-label": "A file to open" });
  const open = el("button", { type: "button", onclick: () => chosen.click() }, "Open a .ddpm file");
  const status = el("p", { class: "status", role: "status" });
  const progress = el("progress", { max: 1, value: 0, "aria-label": "progress" });
  const ask = el("div", { class: "ask", role: "alertdialog", "aria-label": "This takes long", tabindex: -1, hidden: true });
  const canvas = el("canvas", { role: "img", "aria-label": "no file yet", width: 512, height: 512 });
  const caption = el("figcaption", { "aria-live": "polite" }, "Add a picture and press Compress, or open a file.");
  const handle = el("input", { type: "range", min: 0, max: 0, value: 0, disabled: true });
  const bytes = field("The first bytes of the file", handle);
  const table = el("tbody");
  const sizes = el("table", { hidden: true }, el("caption", {}, "Without loss"),
    el("thead", {}, el("tr", {}, ...["Format", "Bytes", "Bits/dim"].map((name) => el("th", { scope: "col" }, name)))), table);
  const note = el("p", { role: "status" });
  const files = el("div", { class: "row" });
  const [encode, decode] = [commandLine(), commandLine()];
  const save = el("a", { class: "button", download: "picture.png" }, "Save what is shown");
  const stops = new Map();
  let controller, about, last;

  const slot = pictureSlot("Picture", { model: () => picker.input.value, url: "/api/pictures/exact" });
  slot.classList.add("compressed");
  const picker = await modelPicker();

  const row = (name, size, rate) => table.append(el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, size), el("td", {}, rate)));
  async function paint(shown) {
    last = shown;
    const image = await picture(shown.image);
    if (last === shown) draw(canvas, image); // a later one may have been decoded meanwhile
  }
  /** Show the stored picture of the longest prefix that is no longer than the handle says. */
  function look() {
    const at = Math.max(...[...stops.keys()].filter((place) => place <= handle.value));
    const shown = stops.get(at);
    if (!shown) return;
    const held = shown.exact ? "the exact picture" : shown.pixels
      ? `x̂₀ with ${whole(shown.pixels)} of ${whole(about.values)} pixel values exact`
      : shown.groups ? `x̂₀ after ${shown.groups} of ${about.groups} groups` : "x̂₀ of noise alone";
    const share = Math.round((100 * at) / about.bytes);
    caption.textContent = `The first ${whole(at)} of ${whole(about.bytes)} bytes (${share}%) show ${held}.`;
    handle.setAttribute("aria-valuetext", caption.textContent);
    canvas.setAttribute("aria-label", caption.textContent);
    save.href = shown.image;
    decode.set(`ddpm decompress ${quoted(about.model)} picture.ddpm --at ${at} --out picture.png`);
    paint(shown);
  }

  /** Run a job: its events go to `act`, and the buttons and the line of progress follow. True if it ended by itself. */
  async function run(job, body, act) {
    controller = new AbortController();
    for (const button of [go, open, measure]) button.disabled = true;
    cancel.disabled = false;
    const ended = await trying(async () => {
      await stream(`/api/compress/${job}`, body, async (event) => {
        if (event.kind === "queue") status.textContent = queueLine(event.place);
        if (event.kind === "work") {
          status.textContent = event.done < event.of ? `${event.what}: about ${duration(event.seconds)} left.` : `${event.what}: nearly done.`;
          progress.value = event.done / event.of;
        }
        await act(event);
      }, controller.signal);
      return true;
    });
    status.textContent = ended ? "" : controller.signal.aborted ? "Cancelled." : "";
    progress.value = 0;
    for (const button of [go, open, measure]) button.disabled = false;
    cancel.disabled = true;
    return ended;
  }

  /** Say how long it takes, and ask if the picture is large. */
  async function agreed(body) {
    let told;
    status.textContent = "Measures how long a tile takes.";
    if (!await run("forecast", body, (event) => { if (event.kind === "about") told = event; })) return null;
    const time = told.seconds ? `about ${duration(told.seconds)}` : "a moment";
    status.textContent = `${whole(told.pixels)} pixels in ${whole(told.tiles)} tile${told.tiles > 1 ? "s" : ""} take ${time}.`;
    if (!told.ask) return { confirmed: false };
    return new Promise((resolve) => {
      const answered = (value) => { ask.hidden = true; resolve(value); };
      ask.replaceChildren(el("p", {}, `${status.textContent} Pictures above ${whole(told.most)} pixels are asked for first.`),
        el("div", { class: "row" },
          el("button", { type: "button", class: "main", onclick: () => answered({ confirmed: true }) }, "Go on"),
          el("button", { type: "button", onclick: () => answered(null) }, "Leave it")));
      ask.hidden = false;
      ask.focus();
    });
  }

  async function work(job, given) {
    const body = { model: picker.input.value, ...given }; // another one may be chosen later
    say();
    const answer = await agreed(body);
    if (!answer) return;
    stops.clear();
    about = null;
    for (const part of [files, table]) part.replaceChildren();
    sizes.hidden = handle.disabled = true;
    note.textContent = "";
    encode.set("");
    decode.set("");
    caption.textContent = "The pictures come.";
    const ended = await run(job, { ...body, ...answer }, async (event) => {
      if (event.kind === "about") encode.set(event.command);
      if (event.kind === "note") note.textContent = event.line;
      if (event.kind === "file") files.append(el("a", { class: "button", href: event.url, download: "picture.ddpm" }, "Save the file"));
      if (event.kind === "picture") {
        caption.textContent = event.exact ? "The exact picture." : `x̂₀ after ${event.groups} group${event.groups === 1 ? "" : "s"}.`;
        await paint(event);
      }
      if (event.kind === "stop") {
        stops.set(event.at, event);
        status.textContent = `${stops.size} prefixes are stored.`;
      }
      if (event.kind === "read") {
        about = { ...event, model: body.model, picture: body.picture };
        for (const [name, size, rate] of event.sizes) row(name, whole(size), rate.toFixed(3));
        sizes.hidden = false;
        Object.assign(handle, { min: event.begin, max: event.bytes, disabled: false });
        handle.value = event.bytes;
        if (about.picture) files.append(measure);
        files.append(save);
        note.textContent += ` The header and the checks take ${event.begin + event.trailer} of the ${whole(event.bytes)} bytes.`;
        look();
      }
      if (event.kind === "stop" && about) look();
    });
    if (ended) status.textContent = `Done. ${stops.size} prefixes are stored.`;
  }

  const measure = el("button", { type: "button", onclick: async () => {
    say();
    // The picture was confirmed when it was compressed.
    await run("bound", { model: about.model, picture: about.picture, confirmed: true }, (event) => {
      if (event.kind !== "bound") return;
      measure.remove();
      if (event.reason) {
        note.textContent += ` The bound is left out: ${event.reason}.`;
        return;
      }
      const size = (event.bits_per_dim * about.values) / 8;
      row("The model’s bound", `≈ ${whole(Math.round(size))}`, `${event.bits_per_dim.toFixed(3)} ± ${event.standard_error.toFixed(3)}`);
      const tiles = event.of > 1 ? `each of ${event.tiles} whole tiles of ${event.of}` : "the picture";
      note.textContent += ` The bound (Eq. 5) is estimated from ${event.levels} levels of ${tiles}, ${event.repeats} times. ` +
        "± is the standard error of these draws; the picture itself is given.";
    });
  } }, "Measure the bound");

  const form = el("form", { class: "panel" }, picker, slot, field("Aim", bits), ask,
    el("div", { class: "row" }, go, cancel, open), chosen, status, progress);
  const stage = el("div", { class: "panel stage" }, el("figure", {}, canvas, caption), bytes, sizes, note, files, encode, decode);
  section.append(el("div", { class: "columns" }, form, stage));
  cancel.addEventListener("click", () => controller?.abort());
  handle.addEventListener("input", look);
  chosen.addEventListener("change", async () => {
    const [file] = chosen.files;
    say();
    const held = await trying(() => upload(file, "/api/pictures/file"));
    chosen.value = "";
    if (held) await work("open", { file: held.id });
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    status.textContent = "";
    const asked = { model: picker.input.value, bits: bits.value ? Number(bits.value) : null };
    await ready(go, slot);
    if (slot.picture) work("start", { ...asked, picture: slot.picture.id });
    else say("Add a picture first.");
  });
}
