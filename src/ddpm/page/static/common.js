// What the tabs share: requests, elements, labelled inputs, messages and pictures.

/** An element. `on...` attributes are listeners, `html` is markup of our own, and children are elements or text. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "html") element.innerHTML = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Show an error as one line at the top of the page; without a line, the old one goes. */
export function say(line = "") {
  const box = document.getElementById("error");
  box.querySelector("span").textContent = line;
  box.querySelector("button").onclick = () => say();
  box.hidden = !line;
  if (line) box.scrollIntoView({ block: "nearest" });
}

async function answer(url, options = {}) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; it may have been stopped");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new Error(told.line ?? `the server answered ${response.status}`);
}

/** The JSON value at a url. Throws an Error with the server's line. */
export async function getJSON(url) {
  return (await answer(url)).json();
}

/** Post JSON, and call onEvent(event) for each event of the answer. Throws an Error with the line of an error event.
    `signal` of an AbortController stops the job on the server. */
export async function stream(url, body, onEvent, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await answer(url, { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events.map((line) => JSON.parse(line.slice("data: ".length)))) {
      if (event.kind === "error") throw new Error(event.line);
      await onEvent(event);
    }
  }
}

/** Send a file, a Blob, as a picture: {id, width, height, url}. */
export async function upload(file, url = "/api/pictures") {
  const headers = { "Content-Type": "application/octet-stream" };
  const { upload: most } = await getJSON("/api/models");
  if (file.size > most) throw new Error(`${file.name ?? "the picture"}: ${file.size.toLocaleString("en")} bytes; want at most ${most.toLocaleString("en")}`);
  return (await answer(url, { method: "POST", headers, body: file })).json();
}

let fields = 0;

/** A labelled input: a div whose property `input` is the input. */
export function field(label, input, hint = "") {
  const id = input.id || (input.id = `field-${++fields}`);
  if (hint) input.setAttribute("aria-describedby", `${id}-hint`);
  const box = el("div", { class: "field" }, el("label", { for: id }, label), input,
    hint ? el("small", { id: `${id}-hint` }, hint) : null);
  box.input = input;
  return box;
}

export function number(value, min, max, step = 1, attributes = {}) {
  return el("input", { type: "number", value, min, max, step, inputmode: "decimal", ...attributes });
}

/** A select; options are [value, text] pairs or values. */
export function select(options, value, attributes = {}) {
  const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  const element = el("select", attributes, ...pairs.map(([v, text]) => el("option", { value: v }, text)));
  if (value !== undefined) element.value = value;
  return element;
}

/** A labelled list of the models. `changed(name)` is called at once and at each change. */
export async function modelPicker(changed = () => {}) {
  const { models } = await getJSON("/api/models");
  const picker = field("Model", select(models));
  const tell = async () => { try { await changed(picker.input.value); } catch (error) { say(error.message); } };
  picker.input.addEventListener("change", tell);
  await tell();
  return picker;
}

/** The text for a place in the queue. */
export function queueLine(place) {
  return place === 1 ? "Waits for one other job to end." : `Waits for ${place} other jobs to end.`;
}

/** A word of a command, quoted for the shell where it has to be. */
export function quoted(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`;
}

/** A command to copy: a div with the function set(text). */
export function commandLine(text = "") {
  const code = el("code", { tabindex: 0 });
  const button = el("button", { type: "button", onclick: async () => {
    await navigator.clipboard?.writeText(code.textContent).catch(() => {});
    getSelection().selectAllChildren(code); // where the clipboard is refused, Ctrl-C still works
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } }, "Copy");
  const box = el("div", { class: "command", role: "group", "aria-label": "The same on the command line" }, code, button);
  box.set = (line) => { // a line may break between words only
    code.replaceChildren(...line.split(" ").flatMap((word) => [el("span", {}, word), " "]).slice(0, -1));
    box.hidden = !line;
  };
  box.set(text);
  return box;
}

/** A picture from a url, loaded. */
export async function picture(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

/** Draw `count` equal pictures that stand side by side in `image` as a grid, each pixel a square. */
export function draw(canvas, image, count = 1, columns = Math.ceil(Math.sqrt(count))) {
  const [width, height] = [image.width / count, image.height];
  const rows = Math.ceil(count / columns);
  const scale = Math.max(1, Math.floor(512 / (columns * width)));
  const gap = count > 1 ? 6 : 0;
  canvas.width = columns * (width * scale + gap) - gap;
  canvas.height = rows * (height * scale + gap) - gap;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  for (let i = 0; i < count; i++) {
    const [x, y] = [(i % columns) * (width * scale + gap), Math.floor(i / columns) * (height * scale + gap)];
    context.drawImage(image, i * width, 0, width, height, x, y, width * scale, height * scale);
  }
}
