// The frame of the page: tasks as tabs, language, light and dark.
import { $, api, el, say } from './api.js';
import { fill, language, setLanguage, t } from './texts.js';
import * as chatting from './chat.js';
import * as choosing from './choose.js';
import * as exporting from './export.js';
import * as planning from './plan.js';
import * as runs from './runs.js';
import * as training from './train.js';

const TASKS = { choose: choosing, plan: planning, train: training, runs, chat: chatting, export: exporting };
const dark = matchMedia('(prefers-color-scheme:dark)');

function stored(name) { try { return localStorage.getItem(`fitune-${name}`); } catch { return null; } }
function store(name, value) { try { localStorage.setItem(`fitune-${name}`, value); } catch { /* private windows */ } }

function theme() { return stored('theme') ?? (dark.matches ? 'dark' : 'light'); }

function showTheme() {
  document.documentElement.dataset.theme = theme();
  $('theme').textContent = theme() === 'dark' ? '☀' : '☾';
}

function show(name) {
  for (const task of Object.keys(TASKS)) $(task).hidden = task !== name;
  for (const button of $('tabs').children) {
    if (button.dataset.task === name) button.setAttribute('aria-current', 'page');
    else button.removeAttribute('aria-current');
  }
  TASKS[name].shown?.(location.hash.split('/')[1]);
}

function texts() {
  fill(document);
  $('language').textContent = language() === 'zh' ? 'English' : '中文';
  $('tabs').replaceChildren(...Object.keys(TASKS).map(name => el('button',
    { type: 'button', 'data-task': name, onclick: () => { location.hash = name; } }, t(`${name}_tab`))));
  for (const task of Object.values(TASKS)) task.texts?.();
  show(current());
}

const current = () => Object.keys(TASKS).find(name => name === location.hash.slice(1).split('/')[0]) ?? 'choose';

async function start() {
  setLanguage(stored('language') ?? (navigator.language.startsWith('zh') ? 'zh' : 'en'));
  showTheme();
  dark.addEventListener('change', showTheme);
  $('theme').addEventListener('click', () => { store('theme', theme() === 'dark' ? 'light' : 'dark'); showTheme(); });
  $('language').addEventListener('click', () => {
    setLanguage(language() === 'zh' ? 'en' : 'zh');
    store('language', language());
    texts();
  });
  addEventListener('hashchange', () => show(current()));
  try {
    const facts = await api('start');
    for (const task of Object.values(TASKS)) task.start(facts);
  } catch (error) { say($('choose-message'), error.message); }
  texts();
  document.documentElement.dataset.ready = 'yes';
}

start();
