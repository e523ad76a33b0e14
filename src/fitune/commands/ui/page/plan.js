// Task two: the bar of memory, which follows the settings.
import { $, api, bytes, command, count, drawn, during, el, say, table } from './api.js';
import { choose, chosen, wanted, whenChosen } from './state.js';
import { partName, t } from './texts.js';

const LENGTHS = ['auto', 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768];
const RANKS = [1, 2, 4, 8, 16, 32, 64, 128, 256];
const SIZES = [6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 192];

let facts, last, waiting, asked = 0;

export function start(given) {
  facts = given.choices;
  whenChosen(soon);
  $('advise').addEventListener('click', advise);
}

export function texts() { controls(); if (last) draw(last); }
export function shown() { soon(); }

// Sliders and lists; each writes one setting, or takes it out where it is what fitune has by itself.
function fields() {
  const names = list => list.map(one => [one, one]);
  return [
    pick('objective', names(facts.objectives), 'sft'),
    pick('method', names(facts.methods.map(one => one.name)), facts.defaults.method),
    slide('rank', RANKS, () => chosen.settings.lora?.rank ?? facts.defaults.rank,
      value => set('lora', value === facts.defaults.rank ? undefined : { ...chosen.settings.lora, rank: value }),
      () => (chosen.settings.method ?? facts.defaults.method) === 'lora'),
    slide('batch_size', range(1, 64), () => chosen.settings.batch_size ?? facts.defaults.batch_size, value => set('batch_size', value)),
    slide('accumulation', range(1, 64), () => chosen.settings.accumulation ?? 1, value => set('accumulation', value === 1 ? undefined : value)),
    slide('max_length', LENGTHS, () => chosen.settings.max_length ?? 'auto', value => set('max_length', value === 'auto' ? undefined : value)),
    pick('quant', names(facts.quantizers), 'none'),
    pick('checkpointing', [['false', t('off')], ['true', t('on')], ['auto', 'auto']], 'false', value => value === 'auto' ? 'auto' : value === 'true'),
    pick('precision', names(['auto', 'bf16', 'fp16', 'fp32']), 'auto'),
    pick('optimizer', names(facts.optimizers), facts.defaults.optimizer),
    gpu(),
    slide('gpu_size', SIZES, () => Number(/^(\d+)GB$/.exec(chosen.gpu ?? '')?.[1] ?? 24), value => choose({ gpu: `${value}GB` }),
      () => /^\d+GB$/.test(chosen.gpu ?? ''), value => `${value} GB`),
  ];
}

const range = (from, to) => Array.from({ length: to - from + 1 }, (_, n) => from + n);

export function set(name, value) {
  const settings = { ...chosen.settings };
  if (value === undefined) delete settings[name]; else settings[name] = value;
  choose({ settings });
}

function field(name, control, output) {
  control.id = `set-${name}`;
  return el('div', { className: 'field' }, el('label', { htmlFor: control.id }, t(`set_${name}`)), control, output ?? el('span'));
}

function slide(name, values, now, change, active = () => true, text = String) {
  const output = el('output', {});
  const at = values.reduce((best, one, n) => Math.abs(Number(one) - Number(now())) < Math.abs(Number(values[best]) - Number(now())) ? n : best,
    Math.max(0, values.indexOf(now())));
  const control = el('input', { type: 'range', min: 0, max: values.length - 1, step: 1, value: at, disabled: !active() });
  const write = () => {
    output.textContent = text(values[control.value]);
    control.setAttribute('aria-valuetext', text(values[control.value]));
  };
  control.addEventListener('input', () => { write(); change(values[Number(control.value)]); });
  write();
  return field(name, control, output);
}

function pick(name, options, usual, read = value => value) {
  const now = String(chosen.settings[name] ?? usual);
  const control = el('select', {}, ...options.map(([value, text]) => el('option', { value, selected: value === now }, text)));
  control.addEventListener('change', () => { set(name, control.value === usual ? undefined : read(control.value)); controls(); $(`set-${name}`).focus(); });
  return field(name, control);
}

function gpu() {
  const now = /^\d+GB$/.test(chosen.gpu ?? '') ? 'size' : chosen.gpu ?? '';
  const options = [['', t('this_machine')], ['size', t('by_size')], ...facts.gpus.map(one => [one.name, `${one.name} (${Math.round(one.mib / 1024)} GB)`])];
  const control = el('select', {}, ...options.map(([value, text]) => el('option', { value, selected: value === now }, text)));
  control.addEventListener('change', () => {
    choose({ gpu: control.value === 'size' ? '24GB' : control.value || null });
    controls();
    $('set-gpu').focus();
  });
  return field('gpu', control);
}

function controls() { $('controls').replaceChildren(...fields()); }

// The estimate by closed forms follows at once, the traced plan as soon as the settings rest.
function soon() {
  if ($('plan').hidden) return;
  clearTimeout(waiting);
  if (!chosen.model) { $('bar').replaceChildren(); return say($('plan-message'), t('choose_model')); }
  waiting = setTimeout(() => ask(true), 40);
}

async function ask(quick) {
  const mine = ++asked;
  try {
    const found = await api('plan', { ...wanted(), gpu: chosen.gpu, quick });
    if (mine !== asked || found.superseded) return;
    say($('plan-message'), '');
    draw(found);
    if (quick) waiting = setTimeout(() => ask(false), 150);
  } catch (error) {
    if (mine !== asked) return;
    last = null;
    $('bar').replaceChildren();
    command($('plan-command'), '');
    say($('plan-message'), error.message);
  }
}

function draw(found) {
  last = found;
  const parts = Object.entries(found.parts).filter(([, size]) => size >= 512);
  const exact = found.how === 'trace';
  const label = `${t('needed')} ${bytes(found.needed)}${found.budget ? `, ${t('there_are')} ${bytes(found.budget)}` : ''}`;
  const bar = el('div', { className: `bar ${exact ? '' : 'estimate'}` },
    ...found.drawn.map((one, n) => translated(drawn(one, n ? 'narrow' : 'wide'), label)));
  const verdict = found.fits === null ? '' : found.fits ? t('fits') : t('does_not_fit');
  $('bar').dataset.how = found.how;
  $('bar').replaceChildren(
    el('p', {}, el('b', { className: found.fits === false ? 'bad' : 'good' }, verdict), ` ${bytes(found.needed)}`,
      found.budget ? ` / ${bytes(found.budget)}` : '', ` · ${found.device} · ${found.precision}`),
    bar,
    el('p', { className: 'soft' }, exact ? t('traced') : t('estimate')),
    table([t('part'), { text: t('memory'), n: true }], parts.map(([name, size]) => [
      el('span', {}, square(found.colours[name]), partName(name)), bytes(size)]), t('memory')),
    el('p', { className: 'soft' }, `${t('largest_step')}: ${count(found.rows)} ${t('rows')}, ${count(found.tokens)} ${t('tokens')}`,
      found.trainable ? ` · ${count(found.trainable)} / ${count(found.total)} ${t('trainable')}` : ''),
    ...found.notes.map(note => el('p', { className: 'soft' }, note)));
  command($('plan-command'), found.commands.plan);
}

function square(colour) {
  const made = el('span', { className: 'key' });
  made.style.background = `var(${colour})`;
  return made;
}

// The words of a drawing in the page's language: names of parts, and what is needed and there.
function translated(drawing, label) {
  const word = text => text === 'needed' ? t('needed') : partName(text);
  for (const one of drawing.querySelectorAll('text')) one.textContent = word(one.textContent.replace(/^budget /, `${t('there_are')} `));
  for (const one of drawing.querySelectorAll('title')) one.textContent = one.textContent.replace(/^needed, (.+): /, (_, name) => `${word(name)}: `);
  drawing.querySelector('svg')?.setAttribute('aria-label', label);
  return drawing;
}

function advise() {
  if (!chosen.model || !chosen.data.length) return say($('advice'), t('choose_both'));
  return during($('advise'), $('advice'), t('searching'), async () => {
    const found = await api('advice', { ...wanted(), gpu: chosen.gpu });
    const rows = found.suggestions.map(one => [one.name, bytes(one.needed), one.seconds ? `${count(Math.round(one.seconds))} s` : '–',
      el('button', { type: 'button', onclick: () => { choose({ settings: one.settings }); controls(); } }, t('use'))]);
    const place = el('div');
    command(place, found.command);
    $('advice').replaceChildren(el('h3', {}, `${t('what_fits')} (${found.where})`),
      table([{ text: t('method'), t: true }, { text: t('memory'), n: true }, { text: t('epoch_takes'), n: true }, ''], rows, t('what_fits')),
      ...found.advice.map(text => el('p', { className: 'soft' }, text)), place);
  });
}
