// Task one: a model, data, and the rows as they will be trained.
import { $, api, command, count, drawn, during, el, say, share, table, upload } from './api.js';
import { choose, chosen, wanted, whenChosen } from './state.js';
import { t } from './texts.js';

let facts, found;

export function start(given) {
  facts = given;
  $('model').value = chosen.model;
  $('model').addEventListener('change', () => choose({ model: $('model').value.trim() }));
  $('bundled-model').addEventListener('click', () => setModel(facts.bundled_model));
  $('bundled-data').addEventListener('click', () => addData(facts.samples[0]));
  $('add-data').addEventListener('click', typed);
  $('data-path').addEventListener('keydown', event => { if (event.key === 'Enter') typed(); });
  $('file').addEventListener('change', () => send($('file').files));
  $('browse-model').addEventListener('click', () => browse('', 'model', setModel));
  $('browse-data').addEventListener('click', () => browse('', 'data', addData));
  $('browser-close').addEventListener('click', () => $('browser').close());
  $('show-rows').addEventListener('click', rows);
  dropping($('drop'));
  whenChosen(drawChosen);
  drawChosen();
  api('models').then(answer => {
    $('models').replaceChildren(...answer.models.map(one => el('option', { value: one.name }, named(one))));
  }).catch(error => say($('choose-message'), error.message));
}

export function texts() { drawChosen(); if (found) draw(); }

const named = one => `${t(`kind_${one.kind}`)}${one.parameters ? `, ${(one.parameters / 1e9).toFixed(1)}B` : ''}`;

function setModel(name) { $('model').value = name; choose({ model: name }); }
function addData(path) { if (path && !chosen.data.includes(path) && !chosen.evalData.includes(path)) choose({ data: [...chosen.data, path] }); }
function typed() { addData($('data-path').value.trim()); $('data-path').value = ''; }

// Training data, and held-out data, of which each can become the other.
function drawChosen() {
  const button = (text, label, action) => el('button', { type: 'button', ariaLabel: label, title: label, onclick: action }, text);
  const line = (path, from, to, label) => el('li', {}, el('span', {}, path, from === 'evalData' ? el('b', { className: 'soft' }, ` ${t('held_out_data')}`) : ''), el('span', { className: 'nowrap row' },
    button('⇄', `${t(label)} ${path}`, () => choose({ [from]: chosen[from].filter(one => one !== path), [to]: [...chosen[to], path] })),
    button('×', `${t('remove')} ${path}`, () => choose({ [from]: chosen[from].filter(one => one !== path) }))));
  $('data').replaceChildren(...chosen.data.map(path => line(path, 'data', 'evalData', 'hold_out')), ...chosen.evalData.map(path => line(path, 'evalData', 'data', 'train_on')));
}

function dropping(place) {
  const over = on => event => { event.preventDefault(); place.classList.toggle('over', on); };
  place.addEventListener('dragover', over(true));
  place.addEventListener('dragleave', over(false));
  place.addEventListener('drop', event => { over(false)(event); send(event.dataTransfer.files); });
}

async function send(files) {
  for (const file of files) {
    $('uploading').hidden = false;
    try {
      addData((await upload(file, part => { $('uploading').value = part; })).path);
      say($('choose-message'), '');
    } catch (error) { say($('choose-message'), error.message); }
    $('uploading').hidden = true;
  }
  $('file').value = '';
}

async function browse(path, kind, take) {
  try {
    const { path: here, entries } = await api(`files?path=${encodeURIComponent(path)}`);
    $('browser-path').textContent = here;
    const go = (text, action) => el('li', {}, el('button', { type: 'button', onclick: action }, text));
    const done = name => { take(name); $('browser').close(); };
    const up = here.replace(/[/\\][^/\\]*$/, '');
    $('browser-list').replaceChildren(
      ...(up && up !== here ? [go('..', () => browse(up, kind, take))] : []),
      ...entries.filter(one => one.kind !== 'run' && (one.kind !== 'data' || kind === 'data')).map(one =>
        one.kind === kind ? go(`✓ ${one.name}`, () => done(one.path)) : go(`${one.name}/`, () => browse(one.path, kind, take))));
    if (!$('browser').open) $('browser').showModal();
  } catch (error) { say($('choose-message'), error.message); $('browser').close(); }
}

function rows() {
  if (!chosen.model || !chosen.data.length) return say($('choose-message'), t('choose_both'));
  $('rows').replaceChildren();
  return during($('show-rows'), $('choose-message'), t('reading'), async () => {
    found = null;
    found = await api('rows', { ...wanted(), samples: Number($('samples').value) || 4, labels: t('ids_and_labels') });
    say($('choose-message'), '');
    draw();
  });
}

function draw() {
  command($('choose-command'), found.command);
  const numbers = { ...Object.fromEntries(Object.entries(found.rows).filter(([name, n]) => n || ['read', 'kept'].includes(name))),
    'tokens trained': share(found.label_share), 'max length': found.max_length, 'median length': found.lengths.median ?? found.lengths['50%'] };
  $('rows').replaceChildren(
    el('div', { className: 'numbers' }, ...Object.entries(numbers).filter(([, value]) => value !== undefined).map(([name, value]) =>
      el('div', { className: 'card' }, el('span', { className: 'soft' }, t(`rows_${name}`)), el('b', {}, typeof value === 'number' ? count(value) : value)))),
    el('h3', {}, t('token_by_token')),
    el('p', { className: 'soft' }, key('key-trained'), t('trained'), '  ', key('key-border'), t('border')),
    ...found.samples.map(sample),
    el('h3', {}, t('checks')), findings(found.findings, found.bad),
    el('h3', {}, t('lengths')), histogram(found.histogram));
}

const key = name => el('span', { className: `key ${name}` });

function sample(one) {
  return el('div', { className: 'card sample' }, el('div', { className: 'soft' }, one.source), drawn(one.drawn));
}

export function findings(list, bad = []) {
  const rank = { refuse: 0, warn: 1, fixed: 2, ok: 3 };
  const sorted = [...list].sort((a, b) => rank[a.level] - rank[b.level]);
  return table([t('check'), { text: t('found'), t: true }], [
    ...bad.map(([reason, n, first]) => [el('span', { className: 'warn' }, t('bad_rows')), `${count(n)}: ${reason} (${first})`]),
    ...sorted.map(one => [el('span', { className: one.level }, `${t(`level_${one.level}`)}: ${one.rule}`),
      one.text + (one.fix && one.level !== 'ok' ? `\n${t('fix')}: ${one.fix}` : '')])], t('checks'));
}

function histogram(bins) {
  const most = Math.max(...bins.map(bin => bin[2]), 1);
  const bars = bins.map(([low, high, n]) => {
    const bar = el('i', { title: `${low}–${high}: ${count(n)}` });
    bar.style.height = `${100 * n / most}%`;
    return bar;
  });
  const label = `${t('lengths')}: ${bins[0][0]}–${bins.at(-1)[1]}`;
  return el('div', { className: 'card' }, el('div', { className: 'histogram', role: 'img', ariaLabel: label }, ...bars),
    el('div', { className: 'row soft' }, `${bins[0][0]} – ${bins.at(-1)[1]} ${t('tokens')}`));
}
