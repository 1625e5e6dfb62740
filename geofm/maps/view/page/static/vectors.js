// Rows of int8, and their dot products with float64 weights. This file uses no DOM.
'use strict';

const PAGE_BYTES = 65536; // of WebAssembly
const STEP = 8; // bytes of a row per iteration of the loop

class Vectors {
  // base64: count rows of dims bytes.
  constructor(base64, count, dims) {
    this.count = count;
    this.dims = dims;
    // Rows are padded with zeros to a multiple of the step.
    this.stride = STEP * Math.ceil(dims / STEP);
    // The memory starts with the weights, followed by the rows.
    this.start = 8 * this.stride;
    const size = this.start + count * this.stride;
    const { buffer, dot } = compiled(size) ?? interpreted(size);
    this.weights = new Float64Array(buffer, 0, this.stride);
    this.bytes = new Int8Array(buffer, this.start, count * this.stride);
    this.dotAt = dot;
    const packed = decode(base64);
    for (let i = 0; i < count; i++) {
      this.bytes.set(packed.subarray(i * dims, (i + 1) * dims), i * this.stride);
    }
  }

  row(index) {
    return this.bytes.subarray(index * this.stride, index * this.stride + this.dims);
  }

  // Product of two rows: an exact integer.
  product(one, other) {
    this.weights.set(this.row(one));
    return this.dot(other);
  }

  // Product of every row with weights, float64 or int8.
  products(weights) {
    this.weights.set(weights);
    const products = new Float64Array(this.count);
    for (let index = 0; index < this.count; index++) products[index] = this.dot(index);
    return products;
  }

  // Product of a row with the current weights.
  dot(index) {
    const row = this.start + index * this.stride;
    return this.dotAt(row, row + this.stride);
  }
}

function decode(base64) {
  if (Uint8Array.fromBase64) return new Int8Array(Uint8Array.fromBase64(base64).buffer);
  const text = atob(base64);
  const values = new Int8Array(text.length);
  for (let i = 0; i < values.length; i++) values[i] = text.charCodeAt(i);
  return values;
}

// Returns the memory, and a function for the product of the bytes from row to end with the weights at
// the start of the memory.
function interpreted(size) {
  const buffer = new ArrayBuffer(size);
  const bytes = new Int8Array(buffer);
  const weights = new Float64Array(buffer, 0, Math.floor(size / 8));
  return { buffer, dot(row, end) {
    let sum = 0;
    for (let i = 0, k = row; k < end; i++, k++) sum += bytes[k] * weights[i];
    return sum;
  } };
}

// The same in WebAssembly with SIMD; null if the browser does not support it. A page opened from disk
// cannot fetch a file of code, so the module is assembled here.
function compiled(size) {
  try {
    const memory = new WebAssembly.Memory({ initial: Math.ceil(size / PAGE_BYTES) });
    const instance = new WebAssembly.Instance(new WebAssembly.Module(dotModule()), { a: { memory } });
    return { buffer: memory.buffer, dot: instance.exports.dot };
  } catch {
    return null;
  }
}

function dotModule() {
  // Opcodes of WebAssembly.
  const get = (local) => [0x20, local];
  const set = (local) => [0x21, local];
  const tee = (local) => [0x22, local];
  // i32.const with a signed LEB128 number: bit 6 of its last byte is the sign.
  const constant = (value) => [0x41, ...(value < 64 ? [value] : [value | 128, 0])];
  const simd = (code, ...immediates) => [0xfd, ...leb(code), ...immediates];
  const i32 = { add: 0x6a, lessThan: 0x49 };
  const load8 = simd(0x01, 0, 0); // v128.load8x8_s
  const load = (offset) => simd(0x00, 3, offset); // v128.load
  const lower = simd(0xa7), upper = simd(0xa8); // i32x4.extend_{low,high}_i16x8_s
  const toDouble = simd(0xfe); // f64x2.convert_low_i32x4_s
  const swap = simd(0x0d, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); // i8x16.shuffle
  const add = simd(0xf0), multiply = simd(0xf2); // f64x2
  const addDoubles = 0xa0; // f64.add
  const lane = (index) => simd(0x21, index); // f64x2.extract_lane
  const [loop, again, end] = [[0x03, 0x40], [0x0d, 0], 0x0b]; // loop, br_if 0, end

  // Parameters row and stop; locals weight (i32), even, odd, eight and four (v128), initially 0.
  const [row, stop, weight, even, odd, eight, four] = [0, 1, 2, 3, 4, 5, 6];
  // sum += the lower two of four integers * the two weights at an offset
  const accumulate = (sum, integers, offset) => [...integers, ...toDouble, ...get(weight),
    ...load(offset), ...multiply, ...get(sum), ...add, ...set(sum)];
  const swapped = [...get(four), ...get(four), ...swap];
  const body = [
    ...loop,
    ...get(row), ...load8, ...tee(eight), ...lower, ...set(four),
    ...accumulate(even, get(four), 0), ...accumulate(odd, swapped, 16),
    ...get(eight), ...upper, ...set(four),
    ...accumulate(even, get(four), 32), ...accumulate(odd, swapped, 48),
    ...get(weight), ...constant(8 * STEP), i32.add, ...set(weight),
    ...get(row), ...constant(STEP), i32.add, ...tee(row), ...get(stop), i32.lessThan, ...again,
    end,
    ...get(even), ...get(odd), ...add, ...tee(even), ...lane(0), ...get(even), ...lane(1), addDoubles,
    end,
  ];
  const I32 = 0x7f, V128 = 0x7b, F64 = 0x7c;
  const name = (text) => [text.length, ...[...text].map((letter) => letter.charCodeAt())];
  const section = (id, ...content) => [id, ...leb(content.length), ...content];
  const code = [2, 1, I32, 4, V128, ...body];
  return Uint8Array.from([
    ...[0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0],
    ...section(1, 1, 0x60, 2, I32, I32, 1, F64), // type: (i32, i32) -> f64
    ...section(2, 1, ...name('a'), ...name('memory'), 2, 0, 1), // import of the memory
    ...section(3, 1, 0), // the function has the type
    ...section(7, 1, ...name('dot'), 0, 0), // export
    ...section(10, 1, ...leb(code.length), ...code),
  ]);
}

// Unsigned LEB128.
function leb(value) {
  return value < 128 ? [value] : [(value & 127) | 128, ...leb(value >> 7)];
}
