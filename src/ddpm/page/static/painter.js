// A canvas on which a mask is painted over a picture, by mouse, touch or keyboard.
import { el, field, picture as loaded } from "./common.js";

/** A div with the functions show(picture), which begins a new mask, and bits(), the mask in base64, row by row. */
export function painter() {
  const canvas = el("canvas", { tabindex: 0, role: "application", width: 384, height: 384, "aria-label":
    "Mask. Arrow keys move the cursor. Space paints or erases. Shift with an arrow key paints while it moves." });
  const status = el("small", { role: "status" });
  const brush = el("input", { type: "radio", name: "tool", checked: true });
  const eraser = el("input", { type: "radio", name: "tool" });
  const size = el("input", { type: "range", min: 1, max: 8, value: 1 });
  const box = el("div", { class: "painter" }, canvas, status,
    el("div", { class: "row", role: "radiogroup", "aria-label": "Tool" },
      el("label", {}, brush, "Brush"), el("label", {}, eraser, "Eraser"),
      el("button", { type: "button", onclick: () => fill(1) }, "Paint all"),
      el("button", { type: "button", onclick: () => fill(0) }, "Clear")),
    field("Size of the brush, in pixels", size));
  let image, width = 1, height = 1, mask = new Uint8Array(1), cursor = [0, 0], last = null;

  function paint() {
    const scale = canvas.width / width;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.clearRect(0, 0, canvas.width, canvas.height); // a transparent picture covers nothing
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    context.fillStyle = "rgb(220 40 90 / 65%)";
    mask.forEach((set, i) => {
      if (set) context.fillRect((i % width) * scale, Math.floor(i / width) * scale, scale, scale);
    });
    if (document.activeElement === canvas) {
      const at = cursor.map((place) => place * scale);
      for (const [style, line] of [["#000", 5], ["#fff", 2]]) {
        Object.assign(context, { strokeStyle: style, lineWidth: line });
        context.strokeRect(at[0] + 1, at[1] + 1, scale - 2, scale - 2);
      }
    }
    const painted = mask.reduce((sum, set) => sum + set, 0);
    status.textContent = `${painted} of ${mask.length} pixels are painted.`;
  }

  /** Set or clear a disc around a pixel. */
  function dab([x, y]) {
    const reach = size.value / 2;
    for (let row = Math.max(0, Math.ceil(y - reach)); row <= Math.min(height - 1, y + reach); row++) {
      for (let column = Math.max(0, Math.ceil(x - reach)); column <= Math.min(width - 1, x + reach); column++) {
        if (Math.hypot(row - y, column - x) < reach) mask[row * width + column] = Number(brush.checked);
      }
    }
  }

  /** Dab from the last place to this one. */
  function stroke(to) {
    const from = last ?? to;
    const steps = Math.max(1, ...to.map((place, i) => Math.abs(place - from[i])));
    for (let i = 0; i <= steps; i++) dab(to.map((place, k) => Math.round(from[k] + ((place - from[k]) * i) / steps)));
    last = to;
    paint();
  }

  function fill(value) {
    mask.fill(value);
    if (image) paint();
  }

  function place(event) {
    const frame = canvas.getBoundingClientRect();
    const at = [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
    return at.map((share, i) => Math.min(Math.max(0, Math.floor(share * [width, height][i])), [width, height][i] - 1));
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (!image || event.button) return;
    canvas.setPointerCapture(event.pointerId);
    [last, cursor] = [null, place(event)];
    stroke(cursor);
  });
  canvas.addEventListener("pointermove", (event) => { if (last) stroke(place(event)); });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { last = null; });
  for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => image && paint());
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] }[event.key];
    if (!image || !move) return;
    event.preventDefault();
    cursor = cursor.map((at, i) => Math.min(Math.max(0, at + move[i]), [width, height][i] - 1));
    if (event.key === " " || event.shiftKey) dab(cursor);
    paint();
    status.textContent = `Row ${cursor[1] + 1}, column ${cursor[0] + 1}${mask[cursor[1] * width + cursor[0]] ? ", painted" : ""}. ${status.textContent}`;
  });

  box.show = async (given) => {
    image = await loaded(given.url);
    [width, height, cursor] = [given.width, given.height, [given.width >> 1, given.height >> 1]];
    mask = new Uint8Array(width * height);
    const scale = Math.max(1, Math.floor(416 / Math.max(width, height)));
    Object.assign(canvas, { width: width * scale, height: height * scale });
    size.max = Math.max(2, width >> 1);
    size.value = Math.max(1, width >> 3);
    paint();
  };
  box.bits = () => {
    const bytes = new Uint8Array(Math.ceil(mask.length / 8));
    mask.forEach((set, i) => { bytes[i >> 3] |= set << (7 - (i & 7)); });
    return btoa(String.fromCharCode(...bytes));
  };
  return box;
}
