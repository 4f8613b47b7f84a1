// Ancestral sampling (Algorithm 2 of the DDPM paper) and DDIM (Eq. 12 of the DDIM paper), as ddpm/samplers.py has them.
// A signal is a Float32Array of all images one after another; t is the paper's noise level, 1..T, and 0 is the image.

import { normal } from "./noise.js";

/** The levels that a sampler visits, spread evenly over 1..T and rising to T. */
export function uniform(T, steps) {
  const below = (i) => Math.floor((T * i + Math.floor(steps / 2)) / steps);
  return Array.from({ length: steps }, (_, i) => T - below(steps - 1 - i));
}

/** Pixels 0..255 of a signal in [-1, 1]. */
export function toPixels(signal) {
  return Uint8ClampedArray.from(signal, (value) => Math.floor((value + 1) * 127.5 + 0.5));
}

/**
 * Sample images, and yield { t, x, x0 } after every step: the level of x, the signal x_t, and the estimate x0^.
 *
 * model     the settings of model.json
 * network   (x, timestep, labels or null) -> the network's output, a Float32Array
 * settings  sampler ("ddim" or "ancestral"), steps, eta (noise of ddim, 0..1), seeds (one per image), labels (the class
 *           of each image, or null) and guidance (its scale)
 */
export async function* sample(model, network, { sampler, steps, eta, seeds, labels, guidance }) {
  const levels = uniform(model.T, steps);
  const size = sizeOf(model), step = sampler === "ddim" ? ddim : ancestral;
  let x = noise(model, seeds, model.T);
  for (let i = steps; i-- > 0; ) {
    const t = levels[i], s = i > 0 ? levels[i - 1] : 0;
    const estimate = estimator(model, await guided(model, network, x, t, labels, guidance), x, t, size);
    const x0 = new Float32Array(x.length), next = new Float32Array(x.length);
    const move = step(model, t, s, eta), z = s > 0 ? noise(model, seeds, s) : null;
    for (let j = 0; j < x.length; j++) {
      const at = estimate(j);
      x0[j] = at.x0;
      next[j] = move(at, x[j], z ? z[j] : 0);
    }
    x = next;
    yield { t: s, x, x0 };
  }
}

/** The number of values of an image. */
export function sizeOf(model) {
  return model.shape.reduce((a, b) => a * b);
}

/** The standard normal draw that makes x_t, for the images of these seeds; x_T is this draw itself. */
export function noise(model, seeds, t) {
  return join(seeds.map((seed) => normal(seed, sizeOf(model), t)), sizeOf(model));
}

function join(parts, size) {
  const all = new Float32Array(parts.length * size);
  parts.forEach((part, i) => all.set(part, i * size));
  return all;
}

/** The network's output with classifier-free guidance (Eq. 6 of Ho & Salimans 2022, with scale = 1 + w). */
async function guided(model, network, x, t, labels, scale) {
  if (!labels || scale === 1) return network(x, t - 1, labels);
  const both = await network(join([x, x], x.length), t - 1, [...labels, ...labels.map(() => -1)]);
  const half = both.length / 2, out = both.slice(0, half);
  const size = sizeOf(model), perImage = half / labels.length;
  for (let j = 0; j < half; j++) {
    if (j % perImage < size) out[j] = both[half + j] + scale * (both[j] - both[half + j]); // a variance is not guided
  }
  return out;
}

/** A function from an element of x_t to x0^ (Eq. 15), the eps^ that belongs to it, and what else the network says. */
function estimator(model, out, x, t, size) {
  const signal = Math.sqrt(model.alpha_bar[t]), sigma = Math.sqrt(1 - model.alpha_bar[t]);
  const perImage = model.variance.startsWith("learned") ? 2 * size : size;
  const [c0, cx] = posterior(model.alpha_bar[t], model.alpha_bar[t - 1]);
  const x0Of = {
    eps: (output, x) => (x - sigma * output) / signal,
    v: (output, x) => signal * x - sigma * output,
    x0: (output) => output,
    mu: (output, x) => (output - cx * x) / c0,
  }[model.predict];
  return (j) => {
    const place = Math.floor(j / size) * perImage + (j % size), output = out[place];
    let x0 = x0Of(output, x[j]);
    if (model.clip) x0 = Math.min(Math.max(x0, -1), 1);
    return { x0, eps: (x[j] - signal * x0) / sigma, output, raw: out[place + size] };
  };
}

/** The factors of x_0 and of x_t in the mean of q(x_s | x_t, x_0) (Eq. 7), where abar is a at level t and p at s. */
function posterior(a, p) {
  return [(Math.sqrt(p) * (1 - a / p)) / (1 - a), (Math.sqrt(a / p) * (1 - p)) / (1 - a)];
}

/** Algorithm 2 from level t to s: x_s = mu_theta(x_t, t) + sigma_t z, with z = 0 if s is 0. */
function ancestral(model, t, s) {
  const a = model.alpha_bar[t], p = model.alpha_bar[s], beta = 1 - a / p, tilde = ((1 - p) / (1 - a)) * beta;
  const [c0, cx] = posterior(a, p);
  const deviation = {
    fixed_large: () => Math.sqrt(beta),
    fixed_small: () => Math.sqrt(tilde),
    learned: (raw) => Math.exp(raw / 2),
    learned_range: (raw) => Math.sqrt(tilde) * (beta / tilde) ** ((raw + 1) / 4),
  }[model.variance];
  const mean = model.predict === "mu" ? (at) => at.output : (at, x) => c0 * at.x0 + cx * x;
  return (at, x, z) => mean(at, x) + (s > 0 ? deviation(at.raw) * z : 0);
}

/** DDIM from level t to s: x_s = sqrt(abar_s) x0^ + sqrt(1 - abar_s - sigma^2) eps^ + sigma z. */
function ddim(model, t, s, eta) {
  const a = model.alpha_bar[t], p = model.alpha_bar[s];
  const variance = eta ** 2 * ((1 - p) / (1 - a)) * (1 - a / p);
  const signal = Math.sqrt(p), direction = Math.sqrt(1 - p - variance), sigma = Math.sqrt(variance);
  return (at, x, z) => signal * at.x0 + direction * at.eps + sigma * z;
}
