// The page: a map, its layers, and the similarity to a clicked patch.
'use strict';

(() => {
  const data = window.geofm;
  const patches = data.embedding && new Patches(data.embedding);
  const $ = (id) => document.getElementById(id);

  function element(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  // ---- The map ----------------------------------------------------------------------------

  const map = L.map('map', {
    keyboard: !patches,
    zoomControl: false,
    zoomSnap: 0.25,
    minZoom: 1,
    maxZoom: Math.max(12, ...data.layers.map((layer) => layer.zooms[1])) + 4,
    maxBounds: L.latLngBounds(data.bounds).pad(4),
  });
  map.attributionControl.setPrefix('<a href="https://leafletjs.com">Leaflet</a>');
  map.createPane('shown').style.zIndex = 300;
  map.createPane('examples').style.zIndex = 450;

  const wide = window.matchMedia('(min-width: 720px)');
  function fit() {
    const panel = $('panel').getBoundingClientRect();
    const gap = 20;
    map.fitBounds(data.bounds, wide.matches
      ? { paddingTopLeft: [panel.right + gap, gap], paddingBottomRight: [gap, 2 * gap], animate: false }
      : { paddingTopLeft: [gap, gap], paddingBottomRight: [gap, panel.height + gap], animate: false });
  }

  const world = (latlng) => {
    const { x, y } = L.CRS.EPSG3857.latLngToPoint(L.latLng(latlng), 0).divideBy(256);
    return [x, y];
  };
  const latlng = ([x, y]) => L.CRS.EPSG3857.pointToLatLng(L.point(x, y).multiplyBy(256), 0);
  const degrees = (value, positive, negative) =>
    `${Math.abs(value).toFixed(5)}° ${value < 0 ? negative : positive}`;
  const written = (at) => {
    const { lat, lng } = L.latLng(at).wrap();
    return `${degrees(lat, 'N', 'S')}, ${degrees(lng, 'E', 'W')}`;
  };

  L.control.zoom({ position: 'topright' }).addTo(map);
  L.control.scale({ position: 'bottomright', imperial: false }).addTo(map);
  const pointer = L.control({ position: 'bottomright' });
  pointer.onAdd = () => element('div', { id: 'pointer' });
  pointer.addTo(map);

  // ---- Layers -----------------------------------------------------------------------------

  // Tiles without data do not exist. They are listed in the data, and never requested.
  const Tiles = L.TileLayer.extend({
    getTileUrl(coords) {
      const { ranges, missing } = this.options.info;
      const z = this._getZoomForUrl();
      const [left, top, right, bottom] = ranges[z];
      const inside = coords.x >= left && coords.x <= right && coords.y >= top && coords.y <= bottom;
      // Column numbers continue across the antimeridian; those of files do not.
      const file = { x: coords.x % 2 ** z, y: coords.y };
      return inside && !missing.has(`${z}/${file.x}/${file.y}`)
        ? L.TileLayer.prototype.getTileUrl.call(this, file)
        : L.Util.emptyImageUrl;
    },
  });

  // An opaque colour as the bytes of a canvas.
  function pixel(hex) {
    const [r, g, b] = [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  }

  // Buffer that every tile is drawn with.
  const tileImage = new ImageData(256, 256);
  const tilePixels = new Uint32Array(tileImage.data.buffer);

  // Patches coloured by a value, drawn tile by tile at any zoom.
  const PatchLayer = L.GridLayer.extend({
    initialize(options) {
      L.GridLayer.prototype.initialize.call(this, options);
      this.tiles = new Map();
      this.on('tileunload', ({ tile }) => this.tiles.delete(tile));
    },
    createTile(coords) {
      const tile = element('canvas', { width: 256, height: 256 });
      this.tiles.set(tile, this.patchesOf(coords));
      this.paint(tile);
      return tile;
    },
    show(values, [low, high], colors) {
      const pixels = colors.map(pixel);
      const scale = 255 / Math.max(high - low, 1e-12);
      this.paintAll(Uint32Array.from(values, (value) => (Number.isNaN(value)
        ? 0 : pixels[Math.round(Math.min(Math.max((value - low) * scale, 0), 255))])));
    },
    paintAll(colors) {
      this.colors = colors;
      this.tiles.forEach((_, tile) => this.paint(tile));
    },
    // The patch at each pixel, computed once per tile, because colours change with every click.
    patchesOf({ x, y, z }) {
      const side = 256 * 2 ** z;
      return Int32Array.from({ length: 256 * 256 }, (_, k) =>
        patches.at((256 * x + (k & 255) + 0.5) / side, (256 * y + (k >> 8) + 0.5) / side));
    },
    paint(tile) {
      if (!this.colors) return;
      const { colors } = this;
      const below = this.tiles.get(tile);
      for (let k = 0; k < tilePixels.length; k++) {
        tilePixels[k] = below[k] >= 0 ? colors[below[k]] : 0;
      }
      tile.getContext('2d').putImageData(tileImage, 0, 0);
    },
  });

  const tilesOf = (info, pane) => new Tiles(info.url, {
    info: { ...info, missing: new Set(info.missing) },
    pane,
    minNativeZoom: info.zooms[0],
    maxNativeZoom: info.zooms[1],
    maxZoom: map.getMaxZoom(),
    bounds: data.bounds,
    // With wrapping, tiles beyond 180 degrees would be outside the bounds.
    noWrap: true,
    className: info.smooth ? '' : 'squares',
  });

  const backdrops = [
    ...data.layers.filter((info) => info.group === data.backdrop)
      .map((info) => ({ ...info, layer: tilesOf(info, 'tilePane') })),
    ...(data.basemap ? [{
      name: 'Online map',
      description: `From ${data.basemap.credit}.`,
      layer: L.tileLayer(data.basemap.url, {
        maxNativeZoom: 19, maxZoom: map.getMaxZoom(),
        attribution: element('span', {}, data.basemap.credit).outerHTML,
      }),
    }] : []),
    { name: 'None' },
  ];
  const patchLayer = () => patches && new PatchLayer({
    pane: 'shown', maxZoom: map.getMaxZoom(), bounds: data.bounds, noWrap: true,
    className: 'patches',
  });
  const similarity = patchLayer();
  const classified = patchLayer();
  const overlays = [
    ...(patches ? [
      { name: 'Similarity', group: '', layer: similarity },
      { name: 'Classes', group: '', layer: classified, description: 'Each patch has the class ' +
        'with the most similar mean embedding of its examples, by cosine similarity.' },
    ] : []),
    ...data.layers.filter((info) => info.group !== data.backdrop)
      .map((info) => ({ ...info, layer: tilesOf(info, 'shown') })),
    { name: 'None', group: '' },
  ];
  const shown = { backdrop: null, overlay: null };

  function show(slot, entry) {
    shown[slot]?.layer?.remove();
    shown[slot] = entry;
    entry.layer?.addTo(map);
    if (slot === 'overlay') entry.layer?.setOpacity(opacity());
    drawLegend();
  }

  const slider = $('opacity').querySelector('input');
  const opacity = () => slider.value / 100;
  slider.addEventListener('input', () => {
    $('opacity').querySelector('output').value = `${slider.value} %`;
    shown.overlay.layer?.setOpacity(opacity());
  });

  function choices(title, slot, entries) {
    const set = element('fieldset', { class: 'choices' }, element('legend', {}, title));
    for (const entry of entries) {
      entry.radio = element('input', { type: 'radio', name: slot });
      entry.radio.addEventListener('change', () => show(slot, entry));
      set.append(element('label', {}, entry.radio, element('span', {}, entry.name)));
    }
    return set;
  }

  function choose(slot, entry) {
    entry.radio.checked = true;
    show(slot, entry);
  }

  function drawChoices() {
    const groups = Map.groupBy
      ? Map.groupBy(overlays, (entry) => entry.group)
      : overlays.reduce((m, e) => m.set(e.group, [...(m.get(e.group) ?? []), e]), new Map());
    for (const [group, entries] of groups) {
      $('layers').append(choices(group || 'On the map', 'overlay', entries));
    }
    $('layers').append(choices('Background', 'backdrop', backdrops),
      element('p', { id: 'backdrop', class: 'about' }));
    choose('backdrop', backdrops[0]);
    choose('overlay', overlays[0]);
  }

  // ---- Legend -----------------------------------------------------------------------------

  // Formats numbers with enough digits to distinguish the ends of a scale.
  function scaleFormat(low, high) {
    const digits = Math.min(Math.max(2 - Math.floor(Math.log10(high - low || 1)), 0), 8);
    return (value) => value.toFixed(digits).replace('-', '−');
  }

  function colorBar(title, colors, [low, high]) {
    const stops = colors.filter((_, i) => i % 15 === 0).map((hex) => `#${hex}`).join(',');
    const number = scaleFormat(low, high);
    const ticks = [low, (low + high) / 2, high].map((v) => element('span', {}, number(v)));
    return element('div', { class: 'bar', role: 'img',
      'aria-label': `${title}: colours from ${number(low)} to ${number(high)}` },
      element('p', {}, title),
      element('div', { class: 'colors', style: `background: linear-gradient(to right, ${stops})` }),
      element('div', { class: 'ticks' }, ...ticks));
  }

  function drawLegend() {
    const parts = [];
    const entry = shown.overlay;
    if (entry && entry.layer === similarity) {
      if (painted) parts.push(colorBar(painted.title, painted.colors, painted.limits));
    } else if (entry && entry.layer === classified) {
      parts.push(...classes.drawLegend());
    } else if (entry?.legend?.kind === 'scalar') {
      const { unit, colors, low, high } = entry.legend;
      parts.push(colorBar(unit, colors, [low, high]));
    } else if (entry?.legend?.kind === 'classes') {
      parts.push(element('ul', { class: 'classes' }, ...entry.legend.classes.map(({ name, color }) =>
        element('li', {}, element('i', { style: `background: #${color}` }), name))));
    }
    if (entry?.description) parts.push(element('p', { class: 'about' }, entry.description));
    $('legend').replaceChildren(...parts);
    $('backdrop').textContent = shown.backdrop?.description ?? '';
  }

  // ---- Similarity -------------------------------------------------------------------------

  // The first chosen patch is A, the second is B. Further clicks move B.
  const chosen = { A: -1, B: -1 };
  const VIEWS = ['A', 'B', 'A − B'];
  let view = 'A';
  let cursor = -1;
  let painted = null;
  const marks = L.layerGroup().addTo(map);
  const cursorMark = L.layerGroup().addTo(map);

  function outline(patch, kind) {
    const corners = patches.corners(patch).map(latlng);
    return ['halo', 'line'].map((part) =>
      L.polygon(corners, { className: `${kind} ${part}`, fill: false, interactive: false }));
  }

  function select(patch) {
    if (patch < 0) {
      say('No data here.');
      return;
    }
    const key = chosen.A < 0 ? 'A' : 'B';
    chosen[key] = patch;
    if (view !== 'A − B') view = key;
    showSimilarity();
    update();
    say(key === 'A'
      ? `A: ${described(patch)}.`
      : `B: ${described(patch)}. Similarity of A and B ${cosine()}.`);
  }

  function showSimilarity() {
    if (shown.overlay.layer !== similarity) choose('overlay', overlays[0]);
  }

  function clear() {
    chosen.A = chosen.B = -1;
    view = 'A';
    update();
    say('Cleared.');
  }

  const decimals = (value) => value.toFixed(3).replace('-', '−');
  const cosine = () => decimals(patches.cosine(chosen.A, chosen.B));
  const described = (patch) =>
    `row ${patches.row(patch)}, column ${patches.col(patch)}, ${written(latlng(patches.centre(patch)))}`;

  function update() {
    const two = chosen.B >= 0;
    const values = Object.fromEntries(['A', 'B'].filter((key) => chosen[key] >= 0)
      .map((key) => [key, patches.similarity(chosen[key])]));
    painted = null;
    if (view === 'A − B') {
      const difference = values.A.map((value, i) => value - values.B[i]);
      const [low, high] = limits(difference);
      const most = Math.max(Math.abs(low), Math.abs(high));
      painted = { values: difference, limits: [-most, most],
        title: 'Similarity to A minus similarity to B', colors: data.embedding.colors.difference };
    } else if (values[view]) {
      painted = { values: values[view], limits: limits(values[view]),
        title: `Cosine similarity to ${view}`, colors: data.embedding.colors.similarity };
    }
    if (painted) similarity.show(painted.values, painted.limits, painted.colors);
    else similarity.show(new Float32Array(patches.count).fill(NaN), [0, 1], []);
    marks.clearLayers();
    for (const key of Object.keys(values)) {
      outline(chosen[key], 'chosen').forEach((line) => line.addTo(marks));
      L.marker(latlng(patches.centre(chosen[key])), { interactive: false, keyboard: false,
        icon: L.divIcon({ className: 'name', html: key, iconSize: [22, 22] }) }).addTo(marks);
    }
    $('hint').hidden = chosen.A >= 0;
    $('places').replaceChildren(...Object.keys(values).map(readout));
    $('views').hidden = $('mutual').hidden = !two;
    $('clear').hidden = chosen.A < 0;
    if (two) $('mutual').replaceChildren('Similarity of A and B: ', element('strong', {}, cosine()));
    $('views').querySelectorAll('input').forEach((radio, i) => { radio.checked = VIEWS[i] === view; });
    drawLegend();
  }

  function readout(key) {
    const patch = chosen[key];
    const lines = [written(latlng(patches.centre(patch))),
      `row ${patches.row(patch)}, column ${patches.col(patch)}`];
    if (!data.embedding.geographic) {
      const place = patches.coordinates(patch).map((value) => value.toFixed(0)).join(', ');
      lines.push(`${data.embedding.crs}: ${place}`);
    }
    return element('dl', { 'data-key': key }, element('dt', {}, key),
      ...lines.map((line) => element('dd', {}, line)));
  }

  function say(text) {
    $('spoken').textContent = text;
  }

  // ---- Classes ----------------------------------------------------------------------------

  // Modes of a click: comparing patches, or labelling them.
  const MODES = { Compare: ['similarity', similarity, marks], Classify: ['classes', classified] };
  let mode = 'Compare';
  const classes = patches && classPanel({ patches, element, latlng, world, say, layer: classified,
    active: () => mode === 'Classify', legend: drawLegend, title: data.title, pixel });
  MODES.Classify.push(classes?.marks);

  function setMode(name) {
    mode = name;
    $('pointer').textContent = '';
    document.querySelector(`#modes [value=${name}]`).checked = true;
    for (const [other, [section, layer, drawn]] of Object.entries(MODES)) {
      $(section).hidden = other !== name;
      if (other === name) {
        drawn.addTo(map);
        choose('overlay', overlays.find((entry) => entry.layer === layer));
      } else drawn.remove();
    }
  }

  const act = (patch) => (mode === 'Classify' ? classes.add(patch) : select(patch));

  // ---- Mouse and keyboard -----------------------------------------------------------------

  function point(at) {
    const patch = patches ? patches.at(...world(at)) : -1;
    const words = [written(at)];
    if (patch >= 0 && mode === 'Classify') words.push(classes.nameAt(patch) ?? 'no class');
    else if (patch >= 0) {
      for (const key of ['A', 'B']) {
        if (chosen[key] >= 0) words.push(`${key} ${decimals(patches.cosine(chosen[key], patch))}`);
      }
    }
    $('pointer').textContent = words.join(' · ');
  }

  function moveCursor(patch) {
    cursor = patch;
    cursorMark.clearLayers();
    if (patch < 0) return;
    outline(patch, 'cursor').forEach((line) => line.addTo(cursorMark));
    const centre = latlng(patches.centre(patch));
    const panel = $('panel').getBoundingClientRect();
    map.panInside(centre, wide.matches
      ? { paddingTopLeft: [panel.right + 40, 40], paddingBottomRight: [40, 40] }
      : { paddingTopLeft: [40, 40], paddingBottomRight: [40, panel.height + 40] });
    point(centre);
    const known = mode === 'Classify' ? [classes.nameAt(patch) ?? 'no class']
      : ['A', 'B'].filter((key) => chosen[key] >= 0)
        .map((key) => `similarity to ${key} ${decimals(patches.cosine(chosen[key], patch))}`);
    say([described(patch), ...known].join(', '));
  }

  // The neighbour that is farthest in a direction on the screen. The grid may be rotated.
  function step(patch, right, down, count) {
    const [x, y] = patches.centre(patch);
    const moves = [[0, 1], [0, -1], [1, 0], [-1, 0]].map(([rows, cols]) => {
      const [u, v] = patches.place(patches.row(patch) + 0.5 + rows, patches.col(patch) + 0.5 + cols);
      return { rows, cols, along: (u - x) * right + (v - y) * down };
    });
    const { rows, cols } = moves.reduce((best, move) => (move.along > best.along ? move : best));
    for (let n = count; n > 0; n--) {
      const next = patches.index(patches.row(patch) + n * rows, patches.col(patch) + n * cols);
      if (next >= 0) return next;
    }
    return patch;
  }

  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  function firstCursor() {
    if (chosen.A >= 0) return chosen.B >= 0 ? chosen.B : chosen.A;
    const middle = patches.index(patches.rows >> 1, patches.cols >> 1);
    return middle >= 0 ? middle : patches.lengths.findIndex((length) => length > 0);
  }

  function pressed(event) {
    if (event.target !== map.getContainer() || event.ctrlKey || event.metaKey || event.altKey) return;
    const arrow = ARROWS[event.key];
    if (arrow) moveCursor(cursor < 0 ? firstCursor() : step(cursor, ...arrow, event.shiftKey ? 8 : 1));
    else if (event.key === 'Enter' || event.key === ' ') {
      if (cursor < 0) moveCursor(firstCursor());
      act(cursor);
    } else if (event.key === 'Escape' && mode === 'Compare') clear();
    else if (event.key === '+' || event.key === '=') map.zoomIn(1);
    else if (event.key === '-') map.zoomOut(1);
    else return;
    event.preventDefault();
  }

  map.on('mousemove', ({ latlng: at }) => point(at));
  map.on('mouseout', () => { $('pointer').textContent = ''; });
  $('fold').addEventListener('click', () => {
    const open = $('panel').classList.toggle('folded') === false;
    $('fold').setAttribute('aria-expanded', open);
    $('fold').setAttribute('aria-label', open ? 'Hide the panel' : 'Show the panel');
  });
  new ResizeObserver(() => {
    document.body.style.setProperty('--sheet', `${$('panel').offsetHeight}px`);
  }).observe($('panel'));
  map.getContainer().setAttribute('aria-label', `Map of ${data.title}`);
  if (patches) {
    $('similarity').hidden = $('modes').hidden = $('help').hidden = false;
    $('keys').textContent = 'On the map, arrow keys move a cursor by one patch, with Shift by ' +
      'eight. Enter acts like a click, Escape clears the comparison, plus and minus zoom. In ' +
      'Classify mode, digits choose a class, Delete removes the last example, and Ctrl+Z undoes ' +
      'the last change.';
    for (const name of Object.keys(MODES)) {
      const radio = element('input', { type: 'radio', name: 'mode', value: name });
      radio.checked = name === mode;
      radio.addEventListener('change', () => setMode(name));
      $('modes').append(element('label', {}, radio, element('span', {}, name)));
    }
    for (const name of VIEWS) {
      const radio = element('input', { type: 'radio', name: 'view' });
      radio.addEventListener('change', () => { view = name; showSimilarity(); update(); });
      $('views').append(element('label', {}, radio, element('span', {}, name)));
    }
    map.on('click', ({ latlng: at }) => {
      moveCursor(-1);
      act(patches.at(...world(at)));
      point(at);
    });
    map.getContainer().addEventListener('keydown', pressed);
    map.getContainer().addEventListener('blur', () => cursorMark.clearLayers());
    $('clear').addEventListener('click', () => { clear(); map.getContainer().focus(); });
    if (data.embedding.kept < 0.9995) {
      const kept = (100 * data.embedding.kept).toFixed(1);
      $('similarity').append(element('p', { class: 'about' },
        `Vectors were projected to ${data.embedding.dims} dimensions, which preserve ${kept} % of ` +
        'their squared length.'));
    }
  }
  drawChoices();
  if (classes?.restore()) setMode('Classify');
  fit();
  // For tests and the browser's console.
  Object.assign(window.geofm, { map, patches, chosen, classes, painted: () => painted });
})();
