// Task five: base and tuned model answer the same question, side by side.
import { $, Problem, api, command, during, el, quoted, say } from './api.js';
import { t } from './texts.js';

const SIDES = ['base', 'tuned'];
let runs = [], turns = { base: [], tuned: [] };

export function start() {
  $('ask').addEventListener('click', ask);
  $('question').addEventListener('keydown', event => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
  });
  $('forget').addEventListener('click', forget);
  $('unload').addEventListener('click', event => during(event.currentTarget, $('chat-message'), '', async () => { await api('drop', {}); }));
  $('chat-run').addEventListener('change', () => { forget(); same(); });
  $('temperature').addEventListener('change', same);
}

export function texts() {
  $('sides').replaceChildren(...SIDES.map(side => el('div', {}, el('h3', {}, t(`side_${side}`)), el('div', { id: `side-${side}`, 'aria-live': 'polite', ariaLabel: t(`side_${side}`), role: 'log' }))));
  for (const side of SIDES) draw(side);
  same();
}

export async function shown() {
  try {
    runs = (await api('runs')).runs.filter(one => one.state === 'finished');
    const before = $('chat-run').value;
    $('chat-run').replaceChildren(...runs.map(one => el('option', { value: one.name, selected: one.name === before }, one.name)));
    say($('chat-message'), runs.length ? '' : t('no_finished'), 'busy');
    same();
  } catch (error) { say($('chat-message'), error.message); }
}

function same() {
  const run = runs.find(one => one.name === $('chat-run').value)?.path, warm = Number($('temperature').value);
  command($('chat-command'), run ? `fitune chat ${quoted(run)} --compare${warm ? ` --temperature ${warm}` : ''}` : '');
}

function forget() {
  turns = { base: [], tuned: [] };
  for (const side of SIDES) draw(side);
}

function draw(side) {
  $(`side-${side}`)?.replaceChildren(...turns[side].map(one => el('div', { className: `bubble ${one.role}` }, one.content)));
}

function ask() {
  const text = $('question').value.trim();
  if (!text || !$('chat-run').value) return;
  return during($('ask'), $('chat-message'), t('answering'), async () => {
    same();
    $('question').value = '';
    await Promise.all(SIDES.map(side => answer(side, text)));
    say($('chat-message'), '');
  });
}

async function answer(side, text) {
  const all = turns[side], messages = [...all, { role: 'user', content: text }];
  all.push({ role: 'user', content: text }, { role: 'assistant', content: '' });
  draw(side);
  const bubble = $(`side-${side}`).lastChild;
  const body = { run: $('chat-run').value, messages, base: side === 'base', temperature: Number($('temperature').value) || 0,
    max_new_tokens: Number($('longest').value) || 256 };
  const response = await fetch('api/chat', { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body) });
  if (!response.ok) throw new Problem((await response.json()).error.message);
  for await (const came of lines(response.body)) {
    if (came.error) { all.splice(-2); draw(side); throw new Problem(came.error); }
    all.at(-1).content = came.answer ?? all.at(-1).content + came.text;
    bubble.textContent = all.at(-1).content;
  }
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split('\n');
    held = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}
