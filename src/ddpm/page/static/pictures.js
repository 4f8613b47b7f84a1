// A place for a picture: drop one, paste one, choose a file, or let the model draw one.
import { el, getJSON, say, stream, upload } from "./common.js";

for (const name of ["dragover", "drop"]) { // elsewhere a dropped file would replace the page
  document.addEventListener(name, (event) => event.preventDefault());
}

/** Do `work` and show an error as one line; an abort is no error. */
export async function trying(work) {
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
    return null;
  }
}

/** An image of the model, as a picture that the server holds. */
async function sampled(model, classes, url) {
  let last;
  const seed = Math.floor(Math.random() * 2 ** 31);
  const { samplers } = await getJSON(`/api/sample/choices?model=${encodeURIComponent(model)}`);
  const quick = samplers.ddim ? { sampler: "ddim", steps: 20 } : {}; // a consistency model has a sampler of its own
  await stream("/api/sample/start", { model, classes, seed, count: 1, ...quick }, (event) => {
    if (event.kind === "step") last = event.x;
  });
  const bytes = Uint8Array.from(atob(last.slice(last.indexOf(",") + 1)), (letter) => letter.charCodeAt(0));
  return upload(new Blob([bytes]), url);
}

/** A div that holds a picture as its property `picture`; `changed(picture)` is called for a new one. The property
    `ready` is a promise of the end of this call, from when a picture is chosen.
    model()    the model that draws samples
    classes()  their class
    url        where pictures are sent
    first      whether it takes what is pasted while no other place has the focus */
export function pictureSlot(title, { model, classes = () => [], url = "/api/pictures", first = true, changed = () => {} }) {
  const image = el("img", { class: "pixels", alt: "", hidden: true });
  const about = el("small", { role: "status" }, "Drop or paste a picture here.");
  const file = el("input", { type: "file", accept: "image/*", hidden: true });
  const choose = el("button", { type: "button", onclick: () => file.click() }, "Choose a file");
  const draw = el("button", { type: "button" }, "Take a sample");
  const box = el("div", { class: "slot", role: "group", "aria-label": title }, el("strong", {}, title), image, about,
    el("div", { class: "row" }, choose, draw), file);

  box.set = (picture) => {
    box.picture = picture;
    image.src = picture.url;
    image.alt = `${title}, ${picture.width} by ${picture.height} pixels`;
    image.hidden = false;
    about.textContent = `${[`${picture.width}×${picture.height} pixels`, ...(picture.notes ?? [])].join("; ")}.`;
    return changed(picture);
  };
  let newest;
  const take = (get) => {
    const asked = newest = {};
    return box.ready = trying(async () => {
      say();
      const given = await get();
      if (newest === asked) await box.set(given); // else another one was chosen meanwhile
    });
  };
  const send = (given) => given && take(() => upload(given, url));
  draw.addEventListener("click", async () => {
    draw.disabled = true;
    await take(() => sampled(model(), classes(), url));
    draw.disabled = false;
  });
  file.addEventListener("change", () => { send(file.files[0]); file.value = ""; });
  for (const name of ["dragover", "dragleave", "drop"]) {
    box.addEventListener(name, () => box.classList.toggle("over", name === "dragover"));
  }
  box.addEventListener("drop", (event) => send(event.dataTransfer.files[0]));
  document.addEventListener("paste", (event) => {
    const focused = document.activeElement.closest(".slot");
    if (box.offsetParent && (focused ? focused === box : first)) send(event.clipboardData.files[0]);
  });
  return box;
}

/** Wait until the slots have the pictures that were chosen last. The button is off meanwhile. */
export async function ready(button, ...slots) {
  button.disabled = true;
  await Promise.all(slots.map((slot) => slot.ready));
  button.disabled = false;
}

/** Seconds in words. */
export function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} second${Math.round(seconds) > 1 ? "s" : ""}`;
  return `${Math.round(seconds / 60)} minutes`;
}
