// Task six: merge, export and download.
import { $, api, bytes, command, during, el, quoted, say, table } from './api.js';
import { t } from './texts.js';

const KINDS = ['merge', 'gguf', 'gguf-lora', 'ollama', 'vllm'];
let timer, runs = [], folder;

export function start(facts) {
  folder = facts.exports;
  $('export-start').addEventListener('click', begin);
  for (const name of ['export-run', 'export-to', 'export-type']) $(name).addEventListener('change', shape);
}

export function texts() {
  const now = $('export-to').value;
  $('export-to').replaceChildren(...KINDS.map(kind => el('option', { value: kind, selected: kind === now }, t(`to_${kind}`))));
  $('export-type').replaceChildren(...['auto', 'f32', 'f16', 'bf16', 'q8_0', 'q4_0'].map(one => el('option', { value: one }, one)));
  shape();
}

export async function shown() {
  try {
    const before = $('export-run').value;
    runs = (await api('runs')).runs.filter(one => one.state === 'finished');
    $('export-run').replaceChildren(...runs.map(one => el('option', { value: one.name, selected: one.name === before }, one.name)));
    say($('export-message'), runs.length ? '' : t('no_finished'), 'busy');
    shape();
    await list();
  } catch (error) { say($('export-message'), error.message); }
}

function shape() {
  const run = runs.find(one => one.name === $('export-run').value), to = $('export-to').value, type = $('export-type').value;
  $('export-type').disabled = ['merge', 'vllm'].includes(to);
  $('export-adapter').replaceChildren(...(run ? [el('a', { className: 'button', href: `api/download?path=${encodeURIComponent(`${run.path}/adapter`)}`, download: '' }, t('download_adapter'))] : []));
  if (!run) return command($('export-command'), '');
  const output = quoted(`${folder}/${run.name.replaceAll('/', '-')}-${to}-1${to.startsWith('gguf') ? '.gguf' : ''}`);
  command($('export-command'), to === 'merge' ? `fitune merge ${quoted(run.path)} --output ${output}`
    : `fitune export ${quoted(run.path)} --to ${to}${type !== 'auto' && to !== 'vllm' ? ` --type ${type}` : ''} --output ${output}`);
}

function begin() {
  if (!$('export-run').value) return say($('export-message'), t('no_finished'));
  return during($('export-start'), $('export-message'), t('starting'), async () => {
    const to = $('export-to').value;
    const found = await api('export', { run: $('export-run').value, to, type: ['merge', 'vllm'].includes(to) ? 'auto' : $('export-type').value });
    command($('export-command'), found.command);
    say($('export-message'), '');
    await list();
  });
}

async function list() {
  clearTimeout(timer);
  const { exports: found } = await api('exports');
  $('exports').replaceChildren(...(found.length ? [table([{ text: t('name'), t: true }, { text: t('state'), k: true }, { text: t('size'), n: true }, { text: '', k: true }, { text: t('log'), t: true }],
    found.map(one => [one.name, el('span', { className: one.state === 'failed' ? 'bad' : '' }, t(`state_${one.state}`)), one.bytes ? bytes(one.bytes) : '–',
      one.state === 'finished' && one.path ? el('a', { href: `api/download?path=${encodeURIComponent(one.path)}`, download: '', ariaLabel: `${t('download')} ${one.name}` }, t('download')) : '',
      el('details', { open: one.state === 'failed' }, el('summary', {}, t('log')), el('pre', { className: 'log' }, one.log))]), t('export_title'))] : []));
  if (found.some(one => one.state === 'running') && !$('export').hidden) timer = setTimeout(() => list().catch(error => say($('export-message'), error.message)), 1000);
}
