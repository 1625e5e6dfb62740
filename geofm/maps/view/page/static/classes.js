// Classification of patches from a few examples, and files of examples. This file uses no DOM.
'use strict';

const NO_CLASS = 255;
const MOST_CLASSES = 250;
const MOST_POINTS = 100000;

// Classifier by the nearest class mean in cosine similarity. A class mean is the mean of the unit
// vectors of its examples.
class Prototypes {
  constructor(patches) {
    this.patches = patches;
    this.scores = new Map();
    this.best = new Float64Array(patches.count);
    this.found = new Uint8Array(patches.count);
  }

  // Returns the index of the nearest class of every patch, NO_CLASS without data, in an array that
  // the next call overwrites. classes: the examples of each class. Scores of a class are kept until
  // its examples change, so that a new example costs one pass over the vectors.
  classify(classes) {
    const { patches: { count, lengths, vectors }, best, found } = this;
    const scores = new Map();
    best.fill(-Infinity);
    found.fill(NO_CLASS);
    classes.forEach((examples, index) => {
      if (!examples.length) return;
      const sorted = Int32Array.from(examples).sort();
      const key = sorted.join();
      // Vectors need not be normalised: their length does not affect which class is nearest.
      const score = this.scores.get(key) ?? vectors.products(this.mean(sorted));
      scores.set(key, score);
      for (let patch = 0; patch < count; patch++) {
        if (score[patch] > best[patch]) {
          best[patch] = score[patch];
          found[patch] = index;
        }
      }
    });
    this.scores = scores;
    for (let patch = 0; patch < count; patch++) if (!(lengths[patch] > 0)) found[patch] = NO_CLASS;
    return found;
  }

  // The mean of the examples' unit vectors, scaled to length 1.
  mean(examples) {
    const { vectors, lengths } = this.patches;
    const sum = new Float64Array(vectors.dims);
    for (const patch of examples) {
      const row = vectors.row(patch);
      for (let i = 0; i < sum.length; i++) sum[i] += row[i] / lengths[patch];
    }
    const length = Math.hypot(...sum) || 1;
    return sum.map((value) => value / length);
  }
}

// ---- Files --------------------------------------------------------------------------------

// Consecutive colours differ in hue and lightness, as in geofm.legend.
function paletteColor(index) {
  const hue = (0.58 + index * 0.61803398875) % 1;
  const lightness = [0.45, 0.62, 0.33][index % 3];
  const part = (n) => {
    const k = (n + 12 * hue) % 12;
    const value = lightness - 0.6 * Math.min(lightness, 1 - lightness) *
      Math.max(-1, Math.min(k - 3, 9 - k, 1));
    return Math.round(255 * value).toString(16).padStart(2, '0');
  };
  return `#${part(0)}${part(8)}${part(4)}`;
}

// Points in longitude and latitude. 'classes' preserves the order of classes, and classes without
// examples.
function labelsToGeoJSON(classes, examples, lonlat) {
  return {
    type: 'FeatureCollection',
    classes: classes.map(({ name, color }) => ({ name, color })),
    features: examples.map(({ patch, index }) => ({
      type: 'Feature',
      properties: { class: classes[index].name, color: classes[index].color },
      geometry: { type: 'Point', coordinates: lonlat(patch).map((v) => Number(v.toFixed(7))) },
    })),
  };
}

// Reads a file of labelsToGeoJSON, or any file of points with a property 'class'. The file is not
// trusted.
function labelsFromGeoJSON(text, patchAt) {
  const fail = (why) => { throw new Error(why); };
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    fail('The file is not JSON, or is damaged. Give a GeoJSON file of points.');
  }
  if (file?.type !== 'FeatureCollection' || !Array.isArray(file.features)) {
    fail('The file is not a GeoJSON FeatureCollection. Give a GeoJSON file of points.');
  }
  if (file.features.length > MOST_POINTS) fail(`The file has more than ${MOST_POINTS} points.`);
  if (file.crs && !/CRS84|4326/.test(String(file.crs?.properties?.name))) {
    fail('The file is not in longitude and latitude. Write it in EPSG:4326.');
  }
  const classes = [];
  const indices = new Map();
  const add = (given, color, where) => {
    const name = typeof given === 'number' ? String(given) : given;
    const why = nameFault(name);
    if (why) fail(`${where}: ${why}`);
    if (!indices.has(name)) {
      if (classes.length === MOST_CLASSES) fail(`The file has more than ${MOST_CLASSES} classes.`);
      indices.set(name, classes.length);
      const known = typeof color === 'string' && /^#[0-9a-f]{6}$/i.test(color);
      classes.push({ name, color: known ? color.toLowerCase() : paletteColor(classes.length) });
    }
    return indices.get(name);
  };
  const listed = Array.isArray(file.classes) ? file.classes : [];
  listed.forEach((entry, i) => add(entry?.name, entry?.color, `Class ${i + 1}`));
  const at = new Map();
  let outside = 0;
  let shared = 0;
  file.features.forEach((feature, i) => {
    const where = `Feature ${i + 1}`;
    const { type, coordinates } = feature?.geometry ?? {};
    const [lon, lat] = Array.isArray(coordinates) ? coordinates : [];
    if (type !== 'Point') fail(`${where} is not a point. Give points only.`);
    if (!(Math.abs(lon) <= 180 && Math.abs(lat) <= 90) || typeof lon !== 'number' ||
        typeof lat !== 'number') {
      fail(`${where} has no longitude and latitude in degrees. Write the file in EPSG:4326.`);
    }
    if (feature.properties?.class == null) {
      const others = Object.keys(feature.properties ?? {}).slice(0, 5).join(', ');
      fail(`${where} has no property 'class'${others && `, but ${others}`}. Rename the property of ` +
        "the class to 'class'.");
    }
    const index = add(feature.properties.class, feature.properties.color, where);
    const patch = patchAt(lon, lat);
    if (patch < 0) outside++;
    // A patch gets the class of its last point in the file.
    else if (at.delete(patch)) shared++;
    if (patch >= 0) at.set(patch, index);
  });
  if (!classes.length) fail('The file has no classes.');
  if (outside && !at.size) fail(`None of ${counted(outside, 'point')} lies where this scene has data.`);
  const notes = [];
  if (outside) notes.push(`Left out: ${counted(outside, 'point')} where this scene has no data.`);
  if (shared) notes.push(`Left out: ${counted(shared, 'point')} that share a patch with a later one.`);
  return { classes, examples: [...at].map(([patch, index]) => ({ patch, index })), notes };
}

const counted = (n, what) => `${n} ${what}${n === 1 ? '' : 's'}`;

// Why a name is invalid for a class; null if it is valid.
function nameFault(name) {
  if (typeof name !== 'string' || !name.trim()) return 'a class needs a name.';
  if (name.length > 80) return 'the name of a class is longer than 80 characters.';
  if (/\p{C}/u.test(name)) return 'the name of a class contains control characters.';
  return null;
}
