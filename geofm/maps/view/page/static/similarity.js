// Positions and similarities of patches. This file uses no DOM.
'use strict';

// A map from the unit square to the plane, interpolated bilinearly between the nodes of a mesh.
class Mesh {
  constructor({ cells, nodes }) {
    this.cells = cells;
    this.nodes = Float64Array.from(nodes);
  }

  at(s, t) {
    const { cells, nodes } = this;
    const j = Math.min(Math.max(Math.floor(s * cells), 0), cells - 1);
    const i = Math.min(Math.max(Math.floor(t * cells), 0), cells - 1);
    const q = s * cells - j;
    const p = t * cells - i;
    const k = 2 * (i * (cells + 1) + j);
    const m = k + 2 * (cells + 1);
    const mix = (c) =>
      (1 - p) * ((1 - q) * nodes[k + c] + q * nodes[k + 2 + c]) +
      p * ((1 - q) * nodes[m + c] + q * nodes[m + 2 + c]);
    return [mix(0), mix(1)];
  }
}

// The patches of a scene. World coordinates are Web Mercator in the unit square, y to the south.
class Patches {
  constructor(info) {
    this.rows = info.rows;
    this.cols = info.cols;
    this.dims = info.dims;
    this.count = info.rows * info.cols;
    this.transform = info.transform;
    [this.west, this.north, this.east, this.south] = info.map.box;
    this.toPatch = new Mesh(info.map.toPatch);
    this.toBox = new Mesh(info.map.toBox);
    this.vectors = new Vectors(info.base64, this.count, this.dims);
    // Frees the text, which is larger than the vectors and no longer needed.
    info.base64 = null;
    this.lengths = new Float64Array(this.count);
    for (let patch = 0; patch < this.count; patch++) {
      this.lengths[patch] = Math.sqrt(this.vectors.product(patch, patch));
    }
  }

  // Index of the patch at world coordinates; -1 outside the grid and where there is no data.
  at(x, y) {
    // The world repeats: the east of a scene across the antimeridian is beyond 1.
    const s = (x - this.west - Math.floor(x - this.west)) / (this.east - this.west);
    const t = (y - this.north) / (this.south - this.north);
    if (!(s >= 0 && s <= 1 && t >= 0 && t <= 1)) return -1;
    const [row, col] = this.toPatch.at(s, t).map(Math.floor);
    return this.index(row, col);
  }

  index(row, col) {
    if (row < 0 || col < 0 || row >= this.rows || col >= this.cols) return -1;
    const patch = row * this.cols + col;
    return this.lengths[patch] > 0 ? patch : -1;
  }

  row(patch) {
    return Math.floor(patch / this.cols);
  }

  col(patch) {
    return patch % this.cols;
  }

  // World coordinates of a fractional row and column.
  place(row, col) {
    const [s, t] = this.toBox.at(col / this.cols, row / this.rows);
    return [this.west + s * (this.east - this.west), this.north + t * (this.south - this.north)];
  }

  centre(patch) {
    return this.place(this.row(patch) + 0.5, this.col(patch) + 0.5);
  }

  corners(patch) {
    const row = this.row(patch);
    const col = this.col(patch);
    return [[0, 0], [0, 1], [1, 1], [1, 0]].map(([i, j]) => this.place(row + i, col + j));
  }

  // Coordinates of a patch's centre in the CRS of the grid.
  coordinates(patch) {
    const [a, b, c, d, e, f] = this.transform;
    const row = this.row(patch) + 0.5;
    const col = this.col(patch) + 0.5;
    return [a * col + b * row + c, d * col + e * row + f];
  }

  // Cosine similarity of two patches, in -1..1; NaN where there is no data.
  cosine(one, other) {
    return this.vectors.product(one, other) / (this.lengths[one] * this.lengths[other]);
  }

  // Cosine similarity of every patch to one.
  similarity(patch) {
    const { vectors, lengths } = this;
    const values = new Float32Array(this.count);
    const products = vectors.products(vectors.row(patch));
    for (let i = 0; i < values.length; i++) values[i] = products[i] / (lengths[i] * lengths[patch]);
    return values;
  }
}

// Limits of a colour scale, from the 2nd percentile to the largest value. A few very low values would
// otherwise hide differences.
function limits(values) {
  const known = values.filter((v) => v === v).sort();
  return [known[Math.floor(0.02 * (known.length - 1))], known[known.length - 1]];
}
