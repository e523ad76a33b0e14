// What is chosen at the moment: a model, data, settings. It is gone with the page; runs are not.
const KEY = 'fitune-chosen';

function kept() {
  try { return JSON.parse(sessionStorage.getItem(KEY)) ?? {}; } catch { return {}; }
}

export const chosen = { model: '', data: [], evalData: [], settings: {}, more: '', gpu: null, ...kept() };
const listeners = [];

export const whenChosen = listener => listeners.push(listener);

export function choose(changes) {
  Object.assign(chosen, changes);
  try { sessionStorage.setItem(KEY, JSON.stringify(chosen)); } catch { /* private windows have none */ }
  for (const listener of listeners) listener();
}

// What the server is asked with; settings that are as fitune has them by itself are left out.
export const wanted = () => ({ model: chosen.model, data: chosen.data, eval_data: chosen.evalData, settings: chosen.settings, more: chosen.more });
