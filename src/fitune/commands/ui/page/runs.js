// Task four: all runs in a table, several curves in one picture, settings side by side.
import { $, api, command, count, el, figure, quoted, say, table } from './api.js';
import { Chart } from './chart.js';
import { curves, read } from './train.js';
import { t } from './texts.js';

const METRICS = ['loss', 'held_out', 'lr', 'speed'];
let rows = [], picked = [], metric = 'loss', chart, kept = {};

export function start() {
  $('refresh').addEventListener('click', load);
  $('metric').addEventListener('change', () => { metric = $('metric').value; compare(); });
}

export function texts() {
  $('metric').replaceChildren(...METRICS.map(name => el('option', { value: name, selected: name === metric }, t(`curve_${name}`))));
  chart = new Chart($('together'), { label: t('runs_title'), x: t('step'), names: { zoom_out: t('zoom_out'), log: t('logarithmic'), help: t('chart_help') } });
  if (rows.length) draw();
}

export function shown() { load(); }

async function load() {
  try {
    rows = (await api('runs')).runs;
    kept = {};
    picked = picked.filter(name => rows.some(one => one.name === name));
    if (!picked.length) picked = rows.filter(one => one.model).slice(0, 2).map(one => one.name);
    say($('runs-message'), rows.length ? '' : t('no_runs'), 'busy');
    draw();
  } catch (error) { say($('runs-message'), error.message); }
}

function draw() {
  const n = text => ({ text, n: true });
  const heads = ['', { text: t('run'), k: true }, { text: t('state'), k: true }, t('method'), t('model_short'), n(t('steps')), n(t('before')), n(t('after')), n(t('live_speed')), n(t('peak')), n(t('seconds'))];
  $('runs-table').replaceChildren(table(heads, rows.map(row => [pick(row),
    el('a', { href: `#train/${encodeURIComponent(row.name)}` }, row.name), t(`state_${row.state}`),
    row.method ? row.method + (row.quant !== 'none' ? `, ${row.quant}` : '') : '', row.model ?? '', count(row.steps), figure(row.before), figure(row.after),
    row.speed ? count(Math.round(row.speed)) : '–', row.peak_mib ? `${count(Math.round(row.peak_mib))} MiB` : '–', row.seconds ? count(Math.round(row.seconds)) : '–']), t('runs_title')));
  compare();
}

function pick(row) {
  const box = el('input', { type: 'checkbox', checked: picked.includes(row.name), ariaLabel: `${t('compare')} ${row.name}`, disabled: !row.model });
  box.addEventListener('change', () => {
    picked = box.checked ? [...picked, row.name] : picked.filter(name => name !== row.name);
    compare();
  });
  return box;
}

async function one(name) {
  if (!kept[name]) {
    const place = { next: 0, steps: [] };
    const found = await api(`run?run=${encodeURIComponent(name)}`);
    await read(place, name);
    kept[name] = { ...found, steps: place.steps };
  }
  return kept[name];
}

async function compare() {
  const mine = [...picked];
  try {
    const found = await Promise.all(mine.map(one));
    if (mine.join() !== picked.join()) return;
    chart.show(found.map(run => ({ name: run.name, marks: metric === 'held_out',
      points: curves[metric](run.steps, run.held_out_before) })));
    const names = [...new Set(found.flatMap(run => Object.keys(run.settings)))].filter(name => name !== 'output');
    const text = value => value === undefined ? '' : typeof value === 'string' ? value : JSON.stringify(value);
    const different = names.filter(name => new Set(found.map(run => text(run.settings[name]))).size > 1);
    $('differences').replaceChildren(found.length < 2 ? '' : different.length
      ? table([t('setting'), ...found.map(run => ({ text: run.name, t: true }))], different.map(name => [name, ...found.map(run => text(run.settings[name]))]), t('differences'))
      : el('p', { className: 'soft' }, t('no_differences')));
    command($('runs-command'), found.length ? `fitune eval ${quoted(found[0].path)} --data HELD_OUT.jsonl` : '');
  } catch (error) { say($('runs-message'), error.message); }
}
