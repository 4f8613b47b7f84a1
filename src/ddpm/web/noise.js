// `ddpm.noise.normal` bit for bit: the draw of an image at level t depends on the image's seed and on t only.
// The keys are SplitMix64's, the bits are NumPy's Philox4x64-10, and the numbers are those of its float32 ziggurat.
// ziggurat.js has NumPy's licence.

import { fi, ki, wi } from "./ziggurat.js";

const { fround, imul } = Math;
const MASK = (1n << 64n) - 1n;

/** Hash integers to one seed of 63 bits, a BigInt: SplitMix64's finaliser, applied to one key after another. */
export function mix(...keys) {
  let state = 0n;
  for (const key of keys) {
    state = (state + (BigInt(key) & MASK) + 0x9e3779b97f4a7c15n) & MASK;
    state = ((state ^ (state >> 30n)) * 0xbf58476d1ce4e5b9n) & MASK;
    state = ((state ^ (state >> 27n)) * 0x94d049bb133111ebn) & MASK;
    state ^= state >> 31n;
  }
  return state >> 1n;
}

/** The high 32 bits of a product of two 32-bit numbers; `imul` gives the low ones. */
function high(a, b) {
  const a0 = a & 0xffff, a1 = a >>> 16, b0 = b & 0xffff, b1 = b >>> 16;
  const low = a1 * b0 + (imul(a0, b0) >>> 16); // each of these sums is below 2^32
  const middle = a0 * b1 + (low & 0xffff);
  return a1 * b1 + (low >>> 16) + (middle >>> 16);
}

const product = new Uint32Array(4);

/** `product` = the 128 bits of (a1 a0) x (b1 b0), the lowest word first. */
function multiply(a0, a1, b0, b1) {
  const low = high(a0, b0) + (imul(a1, b0) >>> 0) + (imul(a0, b1) >>> 0);
  const middle = high(a1, b0) + high(a0, b1) + (imul(a1, b1) >>> 0) + Math.floor(low / 2 ** 32);
  product[0] = imul(a0, b0);
  product[1] = low; // a Uint32Array keeps the low 32 bits
  product[2] = middle;
  product[3] = high(a1, b1) + Math.floor(middle / 2 ** 32);
}

/** The 32-bit numbers of NumPy's Philox(key) in order, the low half of each 64 bits first. */
class Philox {
  constructor(key) {
    this.key = [Number(key & 0xffffffffn), Number(key >> 32n)]; // the upper 64 bits of the key are 0
    this.counter = 0; // NumPy counts before it draws; nobody draws 2^53 blocks
    this.block = new Uint32Array(8);
    this.used = 8;
  }

  next() {
    if (this.used === 8) this.refill();
    return this.block[this.used++];
  }

  refill() {
    const c = this.block, k = new Uint32Array([...this.key, 0, 0]);
    this.counter += 1;
    this.used = 0;
    c.fill(0);
    c[0] = this.counter;
    c[1] = this.counter / 2 ** 32;
    for (let round = 0; round < 10; round++) {
      multiply(c[0], c[1], 0xe14c6c93, 0xd2e7470e);
      const [low0, low1, high0, high1] = product;
      multiply(c[4], c[5], 0x95121157, 0xca5a8263);
      c[0] = product[2] ^ c[2] ^ k[0];
      c[1] = product[3] ^ c[3] ^ k[1];
      c[2] = product[0];
      c[3] = product[1];
      c[4] = high0 ^ c[6] ^ k[2];
      c[5] = high1 ^ c[7] ^ k[3];
      c[6] = low0;
      c[7] = low1;
      add(k, 0, 0x7f4a7c15, 0x9e3779b9);
      add(k, 2, 0x84caa73b, 0xbb67ae85);
    }
  }
}

/** Add (high low) to the 64 bits words[i + 1] words[i]. */
function add(words, i, low, high) {
  const sum = words[i] + low;
  words[i] = sum;
  words[i + 1] += high + (sum >= 2 ** 32 ? 1 : 0);
}

const bits = new Uint32Array(1), float = new Float32Array(bits.buffer);
const LN2_HIGH = fround(6.9313812256e-01), LN2_LOW = fround(9.0580006145e-06);
const SERIES = [
  1.479819864e-01, 1.5313838422e-01, 1.818357259e-01, 2.2222198546e-01, 2.8571429849e-01, 4.0000000596e-01,
  6.6666668653e-01,
].map(fround);

/**
 * C's log1pf(-m / 2^24) for m = 0 .. 2^24 - 1, as glibc 2.36 computes it. For 7% of the arguments it is
 * not the float32 that is nearest to the logarithm, so Math.log1p would not do. (For m = 2^23 + 1 the last bit differs
 * from glibc's, and no draw differs.) This is fdlibm's s_log1pf.c:
 * Copyright (C) 1993 by Sun Microsystems, Inc. All rights reserved. Developed at SunPro, a Sun Microsystems, Inc.
 * business. Permission to use, copy, modify, and distribute this software is freely granted, provided that this notice
 * is preserved.
 */
export function log1pf(m) {
  const x = -m / 2 ** 24;
  if (m === 0) return x;
  let k = 0, f = x;
  if (x < -0.2928932309150696) {
    float[0] = 1 + x; // exact
    k = (bits[0] >>> 23) - 127;
    const fraction = bits[0] & 0x7fffff;
    if (fraction >= 0x3504f7) k += 1;
    bits[0] = fraction | (fraction < 0x3504f7 ? 0x3f800000 : 0x3f000000);
    f = float[0] - 1;
    if (f === 0) return fround(fround(k * LN2_HIGH) + fround(k * LN2_LOW));
  }
  const half = fround(fround(0.5 * f) * f);
  const s = fround(f / fround(2 + f)), z = fround(s * s);
  let R = 0;
  for (const coefficient of SERIES) R = fround(z * fround(coefficient + R));
  const tail = fround(s * fround(half + R));
  if (k === 0) return fround(f - fround(half - tail));
  const rest = fround(half - fround(tail + fround(k * LN2_LOW)));
  return fround(fround(k * LN2_HIGH) - fround(rest - f));
}

const R = fround(3.6541528853610088), INVERSE_R = fround(0.27366123732975828);

/** One standard normal float32: NumPy's random_standard_normal_f. */
function draw(philox) {
  for (;;) {
    const r = philox.next();
    const layer = r & 0xff, negative = r & 0x100, size = r >>> 9;
    const x = negative ? -fround(size * wi[layer]) : fround(size * wi[layer]);
    if (size < ki[layer]) return x; // 99.3% of the draws end here
    if (layer === 0) {
      for (;;) {
        const xx = fround(-INVERSE_R * log1pf(philox.next() >>> 8));
        const yy = -log1pf(philox.next() >>> 8);
        if (yy + yy > fround(xx * xx)) return (size >>> 8) & 1 ? -fround(R + xx) : fround(R + xx);
      }
    }
    const u = (philox.next() >>> 8) / 2 ** 24;
    const y = fround(fround(fround(fi[layer - 1] - fi[layer]) * u) + fi[layer]);
    if (y < Math.exp(-0.5 * x * x)) return x;
  }
}

/** Standard normal draws of one image, Float32Array [length]: row i of `ddpm.noise.normal(seeds, shape, ...keys)`. */
export function normal(seed, length, ...keys) {
  const philox = new Philox(mix(seed, ...keys));
  return Float32Array.from({ length }, () => draw(philox));
}
