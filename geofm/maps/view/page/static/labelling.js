// The panel of classes: examples by click, undo, import and export, and storage in the browser.
'use strict';

// Creates the panel with the functions of the page that it needs. Returns the functions that the page
// calls.
function classPanel({ patches, element, latlng, world, say, layer, active, legend, title, pixel }) {
  const $ = (id) => document.getElementById(id);
  const prototypes = new Prototypes(patches);
  const marks = L.layerGroup();
  const drawn = new Map();
  const rows = [];
  const history = [];
  const MOST_UNDONE = 500;
  const named = (n) => ({ name: `Class ${n}`, color: paletteColor(n - 1) });
  const initial = { classes: [named(1), named(2)], examples: [], chosen: 0 };
  let state = initial;
  let result = null;
  const painted = new Uint32Array(patches.count);

  // ---- State ------------------------------------------------------------------------------

  function change(next, text) {
    history.push(state);
    if (history.length > MOST_UNDONE) history.shift();
    state = { ...state, ...next };
    message('');
    changed();
    if (text) say(text);
  }

  function undo() {
    if (!history.length) return say('Nothing to undo.');
    state = history.pop();
    message('');
    changed();
    say('Undone.');
  }

  function add(patch) {
    if (patch < 0) return say('No data here.');
    if (!state.classes.length) return message('Add a class first.', true);
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
    if (state.classes.length >= MOST_CLASSES) return message('There are too many classes.', true);
    let n = state.classes.length + 1;
    while (state.classes.some(({ name }) => name === `Class ${n}`)) n++;
    const fresh = { name: `Class ${n}`, color: paletteColor(n - 1) };
    change({ classes: [...state.classes, fresh], chosen: state.classes.length },
      `${fresh.name} added.`);
    const { name } = rows.at(-1);
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
    const why = taken ? 'two classes cannot have the same name.' : nameFault(name);
    if (why) {
      drawList();
      return message(`Not renamed: ${why}`, true);
    }
    if (name !== state.classes[index].name) editClass(index, { name });
  }

  function clear() {
    change(initial, 'All examples and classes removed.');
  }

  // ---- Drawing ----------------------------------------------------------------------------

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

  // Only new markers are drawn, because there may be thousands.
  function drawMarks() {
    const wanted = new Map(state.examples.map(({ patch, index }) => [patch, state.classes[index].color]));
    for (const [patch, mark] of drawn) {
      if (mark.options.fillColor === wanted.get(patch)) continue;
      marks.removeLayer(mark);
      drawn.delete(patch);
    }
    for (const [patch, fillColor] of wanted) {
      if (drawn.has(patch)) continue;
      drawn.set(patch, L.circleMarker(latlng(patches.centre(patch)), { radius: 6, weight: 2.5,
        color: '#fff', fillColor, fillOpacity: 1, interactive: false, pane: 'examples' }).addTo(marks));
    }
  }

  // Rows are reused, not rebuilt: a click on another row's button first commits the edited name.
  function newRow(index) {
    const part = (tag, what, attributes, ...children) =>
      element(tag, { 'data-focus': `${what}${index}`, ...attributes }, ...children);
    const pick = part('input', 'pick', { type: 'radio', name: 'class' });
    const color = part('input', 'color', { type: 'color' });
    const name = part('input', 'name', { type: 'text', maxlength: 80, spellcheck: false,
      autocomplete: 'off', 'aria-label': `Name of class ${index + 1}` });
    const remove = part('button', 'remove', { type: 'button' }, '×');
    const examples = element('output', { 'aria-label': 'Examples' });
    const area = element('output', { 'aria-label': 'Area' });
    pick.addEventListener('change', () => choose(index));
    color.addEventListener('change', () => editClass(index, { color: color.value }));
    name.addEventListener('change', () => { message(''); rename(index, name.value.trim()); });
    // After naming a class, the next step is to click examples on the map.
    name.addEventListener('keydown', (event) => { if (event.key === 'Enter') $('map').focus(); });
    remove.addEventListener('click', () => removeClass(index));
    const label = element('label', { class: 'pick' }, pick, element('span', {}, String(index + 1)));
    const item = element('li', {}, label, color, name, examples, area, remove);
    $('class-list').append(item);
    return { item, pick, color, name, examples, area, remove };
  }

  function drawList() {
    while (rows.length > state.classes.length) rows.pop().item.remove();
    while (rows.length < state.classes.length) rows.push(newRow(rows.length));
    const counts = state.classes.map(() => 0);
    for (const { index } of state.examples) counts[index]++;
    state.classes.forEach(({ name, color }, index) => {
      const row = rows[index];
      row.pick.checked = index === state.chosen;
      row.color.value = color;
      row.name.value = row.name.title = name;
      row.examples.value = counts[index];
      row.area.value = counts[index] && result?.found ? percent(result.shares[index]) : '';
      row.pick.setAttribute('aria-label', `Choose ${name}`);
      row.color.setAttribute('aria-label', `Colour of ${name}`);
      row.remove.setAttribute('aria-label', `Remove ${name}`);
    });
    $('class-undo').disabled = !history.length;
    $('class-export').disabled = !state.examples.length;
    $('class-clear').disabled = !state.examples.length && !history.length;
    const used = counts.filter((n) => n).length;
    $('class-hint').textContent = used === 0
      ? 'Name the classes, choose one, then click places that show it.'
      : used === 1 ? 'Now choose another class and click a place that shows it.'
        : 'Choose a class, then click where the map is wrong.';
  }

  // The message is above the list. It waits until a press is over: if it moved the list between press
  // and release, the click that also ends the editing of a name would miss its target.
  let pressed = false;
  let shown = ['', false];

  function message(text, fault = false) {
    shown = [text, fault];
    if (!pressed) showMessage();
  }

  function showMessage() {
    const [text, fault] = shown;
    const place = $('class-message');
    if (place.textContent === text && place.hidden === !text) return;
    place.textContent = text;
    place.hidden = !text;
    place.classList.toggle('fault', fault);
    if (text) place.scrollIntoView({ block: 'nearest' });
  }

  function released() {
    pressed = false;
    // After the click.
    setTimeout(showMessage);
  }

  const percent = (share) => `${(100 * share).toFixed(0)} %`;

  // In Classify mode, the list of classes serves as the legend.
  function drawLegend() {
    if (!result?.found || active()) return [];
    return [element('ul', { class: 'classes' }, ...state.classes.flatMap(({ name, color }, i) =>
      (state.examples.some(({ index }) => index === i)
        ? [element('li', {}, element('i', { style: `background: ${color}` }),
          `${name} ${percent(result.shares[i])}`)] : [])))];
  }

  // ---- Files ------------------------------------------------------------------------------

  function lonlat(patch) {
    const { lat, lng } = latlng(patches.centre(patch)).wrap();
    return [lng, lat];
  }

  const file = () => labelsToGeoJSON(state.classes, state.examples, lonlat);
  const read = (text) => labelsFromGeoJSON(text, (lon, lat) => patches.at(...world([lat, lon])));

  function save() {
    const blob = new Blob([JSON.stringify(file(), null, 1)], { type: 'application/geo+json' });
    const link = element('a', { href: URL.createObjectURL(blob),
      download: `${title.replace(/[^\p{L}\p{N}]+/gu, '_').replace(/^_|_$/g, '')}_labels.geojson` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  async function load(given) {
    try {
      if (given.size > 50e6) throw new Error('The file is larger than 50 MB.');
      const { classes, examples, notes } = read(await given.text());
      change({ classes, examples, chosen: 0 }, `${counted(examples.length, 'example')} imported.`);
      message([`Imported: ${counted(examples.length, 'example')}.`, ...notes].join(' '));
    } catch (error) {
      message(`Not imported. ${error.message}`, true);
    }
  }

  // Labels are stored in the browser until they are cleared. If they cannot be stored, the page warns
  // before it is closed.
  const key = `geofm labels ${location.pathname}`;
  let timer = 0;
  let unkept = false;
  let dirty = false;

  function changed() {
    update();
    dirty = true;
    clearTimeout(timer);
    timer = setTimeout(keep, 300);
  }

  function keep() {
    if (!dirty) return;
    try {
      localStorage.setItem(key, JSON.stringify(file()));
      dirty = unkept = false;
    } catch {
      unkept = state.examples.length > 0;
    }
  }

  // Restores the labels of an earlier visit. Returns whether there are any examples.
  function restore() {
    let kept;
    try {
      kept = read(localStorage.getItem(key));
    } catch {
      return false;
    }
    const { classes, examples, notes } = kept;
    state = { classes, examples, chosen: 0 };
    update();
    if (!examples.length) return false;
    message([`Restored from your last visit: ${counted(examples.length, 'example')}.`, ...notes].join(' '));
    return true;
  }

  // ---- Keys -------------------------------------------------------------------------------

  function keyPressed(event) {
    if (!active() || event.altKey || event.target.matches('[type=text], [type=file]')) return;
    if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === 'z') undo();
    else if (event.ctrlKey || event.metaKey) return;
    else if (/^[1-9]$/.test(event.key)) choose(Number(event.key) - 1);
    else if (event.key === 'Delete' || event.key === 'Backspace') removeLast();
    else return;
    event.preventDefault();
  }

  document.addEventListener('keydown', keyPressed);
  addEventListener('pointerdown', () => { pressed = true; }, true);
  addEventListener('pointerup', released, true);
  addEventListener('pointercancel', released, true);
  addEventListener('pagehide', keep);
  addEventListener('beforeunload', (event) => { if (unkept) event.preventDefault(); });
  $('class-add').addEventListener('click', addClass);
  $('class-undo').addEventListener('click', undo);
  $('class-clear').addEventListener('click', clear);
  $('class-export').addEventListener('click', save);
  const picker = $('class-import').querySelector('input');
  picker.addEventListener('change', () => {
    const [given] = picker.files;
    // So that the same file can be chosen again.
    picker.value = '';
    if (given) load(given);
  });
  drawList();
  const nameAt = (patch) => state.classes[result?.found?.[patch]]?.name;
  return { add, marks, drawLegend, nameAt, restore, state: () => state, result: () => result };
}
