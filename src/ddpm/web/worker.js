// Loads the model and samples beside the page, so that the page stays responsive. Every message gets one answer:
// {} the model's settings, { begin: settings } the first step of new images, and { next: true } the next step.
// Who stops asking has cancelled.

import * as ort from "./ort/ort.wasm.bundle.min.mjs";
import { sample, sizeOf, toPixels } from "./sampler.js";

ort.env.wasm.numThreads = 1; // threads need headers that static hosts do not send

const loaded = load();
let steps = null;
let last = Promise.resolve();

async function load() {
  const file = async (name) => {
    const response = await fetch(new URL(name, import.meta.url));
    if (!response.ok) throw new Error(`${name}: the server answers ${response.status}`);
    return response;
  };
  const model = await (await file("model.json")).json();
  const graph = new Uint8Array(await (await file("model.onnx")).arrayBuffer());
  const session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] });
  const whole = (numbers) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [numbers.length]);
  const network = async (x, timestep, labels) => {
    const count = x.length / sizeOf(model);
    const inputs = {
      x: new ort.Tensor("float32", x, [count, ...model.shape]),
      timestep: whole(Array(count).fill(timestep)),
    };
    if (model.classes.length) inputs.y = whole(labels ?? Array(count).fill(-1));
    return (await session.run(inputs)).out.data;
  };
  return { model, network };
}

async function answer({ begin, next }) {
  const { model, network } = await loaded;
  if (!begin && !next) return { model };
  if (begin) steps = sample(model, network, begin);
  const { value } = await steps.next();
  return { t: value.t, x: toPixels(value.x), x0: toPixels(value.x0) };
}

onmessage = ({ data }) => {
  last = last.then(() => answer(data)).catch((error) => ({ error: error.message })).then((reply) => postMessage(reply));
};
