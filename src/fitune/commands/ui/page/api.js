// Calls of the server, and small helpers to build the page. Nothing here knows a task.
import { t } from './texts.js';

export class Problem extends Error {
  constructor(message, code) { super(message); this.code = code; }
}

async function answered(response) {
  let value;
  try { value = await response.json(); } catch { throw new Problem(`${response.status} ${response.statusText}`); }
  if (!response.ok) throw new Problem(value.error?.message ?? response.statusText, value.error?.code);
  return value;
}

export async function api(path, body, signal) {
  const how = body === undefined ? { signal } : {
    method: 'POST', signal, headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body) };
  return answered(await fetch(`api/${path}`, how));
}

export function upload(file, onShare) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open('PUT', `api/upload?name=${encodeURIComponent(file.name)}`);
    request.setRequestHeader('Content-Type', 'application/octet-stream');
    request.upload.onprogress = event => onShare(event.loaded / Math.max(1, event.total));
    request.onload = () => answered(new Response(request.response, { status: request.status })).then(resolve, reject);
    request.onerror = () => reject(new Problem(t('connection_lost')));
    request.send(file);
  });
}

export const $ = id => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== 'list') made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}

// A drawing of fitune.views, in which all texts are escaped: rows with their mask, bars of memory.
export function drawn(html, className = '') {
  const made = el('div', { className: `fitune ${className}` });
  made.innerHTML = html;
  return made;
}

export function command(place, text) {
  if (place.dataset.command === text) return;
  place.dataset.command = text;
  if (!text) return place.replaceChildren();
  const copy = el('button', { type: 'button', onclick: () => {
    navigator.clipboard?.writeText(text);
    copy.textContent = t('copied');
    setTimeout(() => { copy.textContent = t('copy'); }, 1200);
  } }, t('copy'));
  place.replaceChildren(el('div', { className: 'command' }, el('pre', { ariaLabel: t('same_command'), tabIndex: 0 }, text), copy));
}

export function say(place, text, kind = '') {
  place.replaceChildren(...(text ? [el('div', { className: `message ${kind}` }, text)] : []));
}

// Work that a button starts, once at a time. The button keeps the focus of the keyboard, which a disabled one would lose.
export async function during(button, place, text, work) {
  if (button.getAttribute('aria-busy') === 'true') return;
  button.setAttribute('aria-busy', 'true');
  say(place, text, 'busy');
  try { await work(); } catch (error) { say(place, error.message); }
  button.removeAttribute('aria-busy');
}

export function table(heads, rows, label) {
  return el('div', { className: 'scroll' }, el('table', { ariaLabel: label ?? '' },
    el('thead', {}, el('tr', {}, ...heads.map(head => el('th', { scope: 'col', className: head.n ? 'n' : '' }, head.text ?? head)))),
    el('tbody', {}, ...rows.map(cells => el('tr', {}, ...cells.map((cell, at) =>
      el('td', { className: heads[at].n ? 'n' : heads[at].t ? 't' : heads[at].k ? 'k' : '' }, cell instanceof Node ? cell : String(cell ?? ''))))))));
}

// A path as a shell takes it.
export const quoted = path => /^[\w@%+=:,./-]+$/.test(path) ? path : `'${path.replaceAll("'", `'"'"'`)}'`;
export const count = value => value === null || value === undefined ? '–' : value.toLocaleString('en-US');
export function bytes(value) {
  const mib = value / 2 ** 20;
  if (mib >= 10240) return `${(mib / 1024).toFixed(1)} GiB`;
  return mib >= 100 ? `${count(Math.round(mib))} MiB` : mib >= 0.05 ? `${mib.toFixed(1)} MiB` : `${(value / 1024).toFixed(1)} KiB`;
}
export const share = value => `${(100 * value).toFixed(1)} %`;
export const figure = (value, digits = 4) => value === null || value === undefined || Number.isNaN(value) ? '–' : value.toFixed(digits);
