// The panel of classes: examples at a click, undo, and a file of labels.
'use strict';

// page: the map's functions that this needs. Returns what a click, a key and the legend do.
function classPanel({ patches, element, latlng, world, say, layer, onMap, legend, title, pixel }) {
  const $ = (id) => document.getElementById(id);
  const prototypes = new Prototypes(patches);
  const marks = L.layerGroup();
  const history = [];
  const MOST_UNDONE = 500;
  const named = (n) => ({ name: `Class ${n}`, color: paletteColor(n - 1) });
  let state = { classes: [named(1), named(2)], examples: [], chosen: 0 };
  let result = null;
  const painted = new Uint32Array(patches.count);

  // ---- State ------------------------------------------------------------------------------

  function change(next, text) {
    history.push(state);
    if (history.length > MOST_UNDONE) history.shift();
    state = { ...state, ...next };
    update();
    if (text) say(text);
  }

  function undo() {
    if (!history.length) return say('Nothing to undo.');
    state = history.pop();
    fault('');
    update();
    say('Undone.');
  }

  function add(patch) {
    if (patch < 0) return say('No data here.');
    if (!state.classes.length) return fault('Add a class first.');
    const others = state.examples.filter((example) => example.patch !== patch);
    const { name } = state.classes[state.chosen];
    change({ examples: [...others, { patch, index: state.chosen }] },
      `${name}: example in row ${patches.row(patch)}, column ${patches.col(patch)}.`);
  }

  function removeLast() {
    if (!state.examples.length) return say('No example to remove.');
    change({ examples: state.examples.slice(0, -1) }, 'Last example removed.');
  }

  function choose(index) {
    if (index >= state.classes.length) return say(`There is no class ${index + 1}.`);
    state = { ...state, chosen: index };
    drawList();
    say(`${state.classes[index].name} chosen.`);
  }

  function addClass() {
    if (state.classes.length >= MOST_CLASSES) return fault('There are too many classes.');
    let n = state.classes.length + 1;
    while (state.classes.some(({ name }) => name === `Class ${n}`)) n++;
    const fresh = { name: `Class ${n}`, color: paletteColor(n - 1) };
    change({ classes: [...state.classes, fresh], chosen: state.classes.length },
      `${fresh.name} added.`);
    const name = $('class-list').lastChild.querySelector('[type=text]');
    name.focus();
    name.select();
  }

  function removeClass(index) {
    const examples = state.examples.filter((example) => example.index !== index)
      .map(({ patch, index: i }) => ({ patch, index: i > index ? i - 1 : i }));
    const classes = state.classes.filter((_, i) => i !== index);
    const chosen = state.chosen > index ? state.chosen - 1 : state.chosen;
    change({ classes, examples, chosen: Math.max(Math.min(chosen, classes.length - 1), 0) },
      `${state.classes[index].name} removed.`);
  }

  function editClass(index, edit) {
    const classes = state.classes.map((entry, i) => (i === index ? { ...entry, ...edit } : entry));
    change({ classes });
  }

  function rename(index, name) {
    const taken = state.classes.some((entry, i) => i !== index && entry.name === name);
    const why = taken ? 'two classes cannot have one name.' : nameFault(name);
    if (why) {
      drawList();
      return fault(`Not renamed: ${why}`);
    }
    if (name !== state.classes[index].name) editClass(index, { name });
  }

  // ---- What is seen -----------------------------------------------------------------------

  function update() {
    const examples = state.classes.map(() => []);
    for (const { patch, index } of state.examples) examples[index].push(patch);
    const enough = examples.filter((list) => list.length).length >= 2;
    const found = enough ? prototypes.classify(examples) : null;
    const counts = new Uint32Array(256);
    if (found) {
      const colors = Uint32Array.from({ length: 256 },
        (_, i) => (i < state.classes.length ? pixel(state.classes[i].color.slice(1)) : 0));
      for (let patch = 0; patch < patches.count; patch++) {
        painted[patch] = colors[found[patch]];
        counts[found[patch]]++;
      }
    } else painted.fill(0);
    layer.paintAll(painted);
    const known = Math.max(patches.count - counts[NO_CLASS], 1);
    result = { found, shares: state.classes.map((_, i) => counts[i] / known) };
    drawMarks();
    drawList();
    legend();
  }

  function drawMarks() {
    marks.clearLayers();
    for (const { patch, index } of state.examples) {
      L.circleMarker(latlng(patches.centre(patch)), { radius: 5, weight: 2, color: '#fff',
        fillColor: state.classes[index].color, fillOpacity: 1, interactive: false,
        className: 'example' }).addTo(marks);
    }
  }

  function row({ name, color }, index) {
    const key = (what) => ({ 'data-focus': `${what}${index}` });
    const pick = element('input', { type: 'radio', name: 'class', ...key('pick'),
      'aria-label': `Click for ${name}` });
    pick.checked = index === state.chosen;
    pick.addEventListener('change', () => choose(index));
    const swatch = element('input', { type: 'color', value: color, ...key('color'),
      'aria-label': `Colour of ${name}` });
    swatch.addEventListener('change', () => editClass(index, { color: swatch.value }));
    const text = element('input', { type: 'text', value: name, maxlength: 80, spellcheck: false,
      autocomplete: 'off', ...key('name'), 'aria-label': `Name of class ${index + 1}` });
    text.addEventListener('change', () => { fault(''); rename(index, text.value.trim()); });
    text.addEventListener('keydown', (event) => { if (event.key === 'Enter') text.blur(); });
    const count = state.examples.filter((example) => example.index === index).length;
    const remove = element('button', { type: 'button', ...key('remove'),
      'aria-label': `Remove ${name}` }, '×');
    remove.addEventListener('click', () => removeClass(index));
    return element('li', {},
      element('label', { class: 'pick' }, pick, element('span', {}, String(index + 1))),
      swatch, text, element('output', { 'aria-label': 'Examples' }, String(count)), remove);
  }

  function drawList() {
    const focus = document.activeElement?.dataset?.focus;
    $('class-list').replaceChildren(...state.classes.map(row));
    if (focus) document.querySelector(`[data-focus="${focus}"]`)?.focus();
    $('class-undo').disabled = !history.length;
    $('class-export').disabled = !state.examples.length;
    const used = new Set(state.examples.map(({ index }) => index)).size;
    $('class-hint').textContent = used === 0
      ? 'Choose a class, then click patches that show it.'
      : used === 1 ? 'Now choose another class and click an example of it.'
        : 'The scene follows each click. Click where it is wrong.';
  }

  function fault(text) {
    $('class-fault').textContent = text;
    $('class-fault').hidden = !text;
  }

  function drawLegend() {
    if (!result?.found) return [];
    return [element('ul', { class: 'classes' }, ...state.classes.flatMap(({ name, color }, i) =>
      (state.examples.some(({ index }) => index === i)
        ? [element('li', {}, element('i', { style: `background: ${color}` }),
          `${name} ${(100 * result.shares[i]).toFixed(0)} %`)] : [])))];
  }

  // ---- Files ------------------------------------------------------------------------------

  function lonlat(patch) {
    const { lat, lng } = latlng(patches.centre(patch)).wrap();
    return [lng, lat];
  }

  function save() {
    const file = labelsToGeoJSON(state.classes, state.examples, lonlat);
    const blob = new Blob([JSON.stringify(file, null, 1)], { type: 'application/geo+json' });
    const link = element('a', { href: URL.createObjectURL(blob),
      download: `${title.replace(/[^\p{L}\p{N}]+/gu, '_').replace(/^_|_$/g, '')}_labels.geojson` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  async function load(file) {
    fault('');
    try {
      if (file.size > 50e6) throw new Error('The file is larger than 50 MB.');
      const read = labelsFromGeoJSON(await file.text(),
        (lon, lat) => patches.at(...world([lat, lon])));
      const { classes, examples, outside } = read;
      change({ classes, examples, chosen: 0 }, `${examples.length} examples imported.`);
      if (outside) fault(`${outside} points were left out: they lie where this scene has no data.`);
    } catch (error) {
      fault(`Not imported. ${error.message}`);
    }
  }

  // ---- Keys -------------------------------------------------------------------------------

  function pressed(event) {
    if (!onMap() || event.altKey || event.target.matches('[type=text], [type=file]')) return;
    if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === 'z') undo();
    else if (event.ctrlKey || event.metaKey) return;
    else if (/^[1-9]$/.test(event.key)) choose(Number(event.key) - 1);
    else if (event.key === 'Delete') removeLast();
    else return;
    event.preventDefault();
  }

  document.addEventListener('keydown', pressed);
  $('class-add').addEventListener('click', addClass);
  $('class-undo').addEventListener('click', undo);
  $('class-export').addEventListener('click', save);
  const picker = $('class-import').querySelector('input');
  picker.addEventListener('change', async () => {
    const [file] = picker.files;
    if (file) await load(file);
    picker.value = '';
  });
  drawList();
  return { add, choose, marks, drawLegend, undo, state: () => state, result: () => result };
}
