// Task three: start a run, watch it, pause, stop and resume it. The run is a process of its own.
import { $, api, bytes, command, count, during, el, figure, say } from './api.js';
import { Chart } from './chart.js';
import { findings } from './choose.js';
import { set } from './plan.js';
import { choose, chosen, wanted, whenChosen } from './state.js';
import { t } from './texts.js';

const METRICS = ['loss', 'lr', 'speed'];
let facts, run = '', timer, follow, previewing;

export function start(given) {
  facts = given.choices;
  whenChosen(summary);
  form();
}

export function texts() { form(); if (run) open(run); }

export function shown(rest) {
  if (rest && rest !== run) open(decodeURIComponent(rest));
  summary();
}

function number(name, usual, how) {
  const control = el('input', { type: 'number', id: `train-${name}`, value: chosen.settings[name] ?? '', placeholder: usual, ...how });
  control.addEventListener('change', () => set(name, control.value === '' ? undefined : Number(control.value)));
  return el('div', { className: 'field' }, el('label', { htmlFor: control.id }, t(`set_${name}`)), control, el('span'));
}

function form() {
  const name = el('input', { id: 'train-name', placeholder: t('name_hint'), autocomplete: 'off' });
  name.value = $('train-name')?.value ?? '';
  name.addEventListener('change', summary);
  const more = el('input', { id: 'train-more', placeholder: 'lora.alpha=32 warmup=0.1', autocomplete: 'off', spellcheck: false, value: chosen.more });
  more.addEventListener('change', () => choose({ more: more.value.trim() }));
  const rate = facts.methods.find(one => one.name === (chosen.settings.method ?? facts.defaults.method))?.lr;
  $('train-form').replaceChildren(
    el('div', { id: 'train-summary', className: 'soft' }),
    el('div', { className: 'field' }, el('label', { htmlFor: 'train-name' }, t('name')), name, el('span')),
    number('epochs', facts.defaults.epochs, { min: 0.01, step: 'any' }), number('max_steps', '', { min: 1 }),
    number('lr', rate ?? '', { min: 0, step: 'any' }), number('eval_every', '', { min: 1 }), number('seed', facts.defaults.seed, { min: 0 }),
    el('div', { className: 'field' }, el('label', { htmlFor: 'train-more' }, t('further')), more, el('span')),
    el('button', { type: 'button', id: 'begin', className: 'main', onclick: begin }, t('start_run')));
  summary();
}

function summary() {
  if (!$('train-summary')) return;
  const both = chosen.model && chosen.data.length;
  $('train-summary').textContent = both ? [chosen.model, ...chosen.data].join(' · ') : t('choose_both');
  if ($('train').hidden) return;
  clearTimeout(previewing);
  if (!both) return command($('train-command'), '');
  previewing = setTimeout(() => api('command', { ...wanted(), name: $('train-name').value.trim() })
    .then(found => { command($('train-command'), found.command); say($('train-message'), ''); })
    .catch(error => say($('train-message'), error.message)), 100);
}

function begin() {
  if (!chosen.model || !chosen.data.length) return say($('train-message'), t('choose_both'));
  return during($('begin'), $('train-message'), t('starting'), async () => {
    const found = await api('begin', { ...wanted(), name: $('train-name').value.trim() });
    say($('train-message'), '');
    $('train-name').value = '';
    command($('train-command'), found.command);
    location.hash = `train/${encodeURIComponent(found.run)}`;
  });
}

// ---- one run, live ----

export function open(name) {
  run = name;
  follow = { next: 0, steps: [] };
  clearTimeout(timer);
  const buttons = ['pause', 'stop', 'resume'].map(action => el('button', {
    type: 'button', id: `act-${action}`, hidden: true, onclick: event => act(event.currentTarget, action) }, t(action)));
  const charts = el('div', { className: 'two' }, ...METRICS.map(metric => el('div', { className: 'card' }, el('h3', {}, t(`curve_${metric}`)), el('div', { id: `curve-${metric}` }))));
  $('live').replaceChildren(el('h3', { id: 'live-name' }, name), el('div', { className: 'row' }, el('b', { id: 'live-state' }), ...buttons,
    el('a', { id: 'live-report', hidden: true, target: '_blank', rel: 'noopener', href: `api/report?run=${encodeURIComponent(name)}` }, t('report'))),
    el('progress', { id: 'live-share', max: 1, value: 0, ariaLabel: t('progress') }), el('div', { id: 'live-numbers', className: 'numbers' }),
    el('div', { id: 'live-message', role: 'status' }), charts, el('div', { id: 'live-command' }), el('div', { id: 'live-findings' }),
    el('details', {}, el('summary', {}, t('log')), el('pre', { id: 'live-log', className: 'log', tabIndex: 0, ariaLabel: t('log') })));
  const names = { zoom_out: t('zoom_out'), log: t('logarithmic'), help: t('chart_help') };
  follow.charts = Object.fromEntries(METRICS.map(metric => [metric, new Chart($(`curve-${metric}`), { label: t(`curve_${metric}`), x: t('step'), names })]));
  watch();
}

async function watch() {
  const mine = follow;
  clearTimeout(timer);
  try {
    const found = await api(`run?run=${encodeURIComponent(run)}`);
    if (mine !== follow) return;
    if (found.path) await read(mine);
    if (mine !== follow) return;
    draw(found, mine);
    if (['running', 'starting'].includes(found.state)) timer = setTimeout(watch, 1000);
  } catch (error) {
    if (mine !== follow) return;
    say($('live-message'), error.message);
    if (!error.code) timer = setTimeout(watch, 3000);
  }
}

export async function read(place, name = run) {
  for (let again = true; again;) {
    let found;
    try { found = await api(`steps?run=${encodeURIComponent(name)}&from=${place.next}`); } catch { return; }
    const first = found.steps[0]?.step;
    if (found.from === 0) place.steps = [];
    else if (first && first <= place.steps.at(-1)?.step) place.steps = place.steps.filter(one => one.step < first);
    for (const step of found.steps) place.steps.push(step);
    place.next = found.next;
    again = found.more;
  }
}

// Lines of a run's steps by metric: [[step, value], ...].
export const curves = {
  loss: steps => steps.filter(one => one.loss !== null).map(one => [one.step, one.loss]),
  held_out: (steps, before) => [...(before ? [[0, before]] : []), ...steps.filter(one => one.held_out_loss).map(one => [one.step, one.held_out_loss])],
  lr: steps => steps.map(one => [one.step, one.lr]),
  speed: steps => steps.filter(one => one.seconds > 0).map(one => [one.step, one.tokens / one.seconds]),
};

function draw(found, place) {
  const steps = place.steps, last = steps.at(-1);
  $('live-state').textContent = t(`state_${found.state}`);
  $('live-state').className = { failed: 'bad', broken: 'bad', finished: 'good' }[found.state] ?? '';
  $('act-pause').hidden = $('act-stop').hidden = !['running', 'starting'].includes(found.state);
  $('act-resume').hidden = found.state !== 'stopped';
  $('live-report').hidden = !found.report;
  $('live-share').value = found.state === 'finished' ? 1 : last ? Math.min(1, found.total ? last.step / found.total : last.epoch / found.epochs) : 0;
  const held = curves.held_out(steps, found.held_out_before);
  const numbers = [['step', last ? count(last.step) + (found.total ? ` / ${count(found.total)}` : '') : '–'], ['epoch', last ? last.epoch.toFixed(2) : '–'],
    ['loss', figure(last?.loss)], ['held_out', figure(held.at(-1)?.[1])], ['lr', last ? last.lr.toExponential(2) : '–'],
    ['speed', last ? count(Math.round(last.tokens / last.seconds)) : '–'],
    ['memory_now', found.memory ? bytes(found.memory) : found.peak_mib ? bytes(found.peak_mib * 2 ** 20) : '–'],
    ['memory_planned', found.planned?.needed ? bytes(found.planned.needed) : '–']];
  $('live-numbers').replaceChildren(...numbers.map(([name, value]) => el('div', { className: 'card' }, el('span', { className: 'soft' }, t(`live_${name}`)), el('b', {}, value))));
  place.charts.loss.show([{ name: t('curve_train'), points: curves.loss(steps) }, { name: t('curve_held_out'), points: held, marks: true }]);
  place.charts.lr.show([{ name: t('curve_lr'), points: curves.lr(steps) }]);
  place.charts.speed.show([{ name: t('curve_speed'), points: curves.speed(steps) }]);
  say($('live-message'), found.problem ?? (found.state === 'failed' ? `${t('state_failed')}\n${found.log}` : ''));
  command($('live-command'), found.state === 'stopped' ? found.commands.resume : found.state === 'running' ? found.commands.pause : found.commands.chat ?? '');
  $('live-findings').replaceChildren(...(found.findings?.length ? [findings(found.findings)] : []));
  if ($('live-log').textContent !== found.log) {
    $('live-log').textContent = found.log ?? '';
    $('live-log').scrollTop = $('live-log').scrollHeight;
  }
}

function act(button, action) {
  return during(button, $('live-message'), t(`doing_${action}`), async () => {
    const done = await api('act', { run, action });
    command($('live-command'), done.command);
    setTimeout(watch, 200);
  });
}

