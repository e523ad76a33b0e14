// A chart of lines: values under the pointer, zoom by drawing across it, all of it by keyboard too. The page of fitune ui
// loads it, and report.html holds it.
const NS = 'http://www.w3.org/2000/svg';
const PALETTE = ['var(--line1)', 'var(--line2)', '#1d9a6c', '#8b5cc7', '#c9a227', '#3f8fa8', '#a14d6f', '#6b7a90'];
const HEIGHT = 220, TOP = 10, BOTTOM = 30, RIGHT = 10, LETTER = 6.6;

function svg(tag, attributes, ...children) {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Round numbers, 1, 2 or 5 x 10^n apart, inside low to high.
export function ticks(low, high, most = 5) {
  const raw = ((high - low) || Math.abs(high) || 1) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(one => one >= raw * 0.999);
  const first = Math.ceil(low / step - 1e-9), count = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length: Math.max(0, count) }, (_, n) => (first + n) * step);
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), found = [];
  for (let n = first; n <= last; n++) for (const m of last - first > 3 ? [1] : [1, 2, 5]) found.push(m * 10 ** n);
  const inside = found.filter(one => one >= low * 0.999 && one <= high * 1.001);
  return inside.length > 1 ? inside : ticks(low, high).filter(one => one > 0);
}

export const text = value => value === null || value === undefined ? '–' : value !== 0 && Math.abs(value) < 0.001
  ? value.toExponential(2) : Number(value.toPrecision(5)).toLocaleString('en-US', { maximumSignificantDigits: 5 });

// No more points than can be seen, and no peak of them lost.
export function thinned(points, most) {
  if (points.length <= 2 * most) return points;
  const found = [];
  for (let n = 0; n < most; n++) {
    const part = points.slice(Math.floor(n * points.length / most), Math.floor((n + 1) * points.length / most));
    const low = part.reduce((a, b) => b[1] < a[1] ? b : a), high = part.reduce((a, b) => b[1] > a[1] ? b : a);
    found.push(...(low === high ? [low] : low[0] < high[0] ? [low, high] : [high, low]));
  }
  return [points[0], ...found.filter(one => one !== points[0] && one !== points.at(-1)), points.at(-1)];
}

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (points[middle][0] < x) low = middle; else high = middle; }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
}

export class Chart {
  // series: [{name, points: [[x, y], ...], marks, colour}]; names: texts {zoom_out, log, help}; label: what it shows.
  constructor(place, { label, x = 'step', names = {}, log = false }) {
    Object.assign(this, { place, label, x, log, series: [], zoom: null, at: null, drag: null });
    this.names = { zoom_out: 'Whole', log: 'Logarithmic', help: 'Draw across to zoom; arrows, + and - by keyboard', ...names };
    const button = (title, action) => {
      const made = Object.assign(document.createElement('button'), { type: 'button', textContent: title });
      made.addEventListener('click', action);
      return made;
    };
    this.out = button(this.names.zoom_out, () => this.zoomTo(null));
    this.scale = button(this.names.log, () => { this.log = !this.log; this.draw(); });
    this.legend = Object.assign(document.createElement('div'), { className: 'legend' });
    const bar = Object.assign(document.createElement('div'), { className: 'chart-bar' });
    bar.append(this.legend, this.scale, this.out);
    this.root = svg('svg', { role: 'img', tabindex: 0 });
    this.root.addEventListener('pointermove', event => this.moved(event));
    this.root.addEventListener('pointerleave', () => { if (!this.drag) { this.at = null; this.point(); } });
    this.root.addEventListener('pointerdown', event => { this.drag = [this.value(event), null]; this.root.setPointerCapture(event.pointerId); });
    this.root.addEventListener('pointerup', () => this.released());
    this.root.addEventListener('dblclick', () => this.zoomTo(null));
    this.root.addEventListener('keydown', event => this.key(event));
    place.classList.add('chart');
    place.replaceChildren(bar, this.root);
    new ResizeObserver(() => { if (place.clientWidth && place.clientWidth !== this.width) this.draw(); }).observe(place);
  }

  show(series) { this.series = series.filter(one => one.points.length); this.draw(); }

  range() {
    const all = this.series.flatMap(one => [one.points[0][0], one.points.at(-1)[0]]);
    const low = Math.min(...all), high = Math.max(...all);
    return this.zoom ?? [low, high > low ? high : low + 1];
  }

  zoomTo(range) { this.zoom = range; this.draw(); }

  place_of(x) { const [low, high] = this.range(); return this.left + (x - low) / (high - low) * this.room; }

  value(event) {
    const [low, high] = this.range(), box = this.root.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * this.width - this.left) / this.room;
    return low + Math.min(1, Math.max(0, share)) * (high - low);
  }

  moved(event) { this.at = this.value(event); if (this.drag) this.drag[1] = this.at; this.point(); }

  released() {
    const [from, to] = this.drag ?? [], [low, high] = this.range();
    this.drag = null;
    if (to !== null && to !== undefined && Math.abs(to - from) > (high - low) / 50) this.zoomTo([Math.min(from, to), Math.max(from, to)]);
    else this.point();
  }

  key(event) {
    const [low, high] = this.range(), middle = this.at ?? (low + high) / 2, half = (high - low) / 2;
    const moves = { ArrowLeft: -1, ArrowRight: 1 };
    if (event.key in moves) this.at = Math.min(high, Math.max(low, middle + moves[event.key] * (high - low) / 50));
    else if (event.key === '+') this.zoomTo([middle - half / 2, middle + half / 2]);
    else if (event.key === '-' || event.key === '0' || event.key === 'Escape') this.zoomTo(null);
    else return;
    event.preventDefault();
    this.point();
  }

  draw() {
    this.width = Math.max(280, this.place.clientWidth || 640);
    this.root.setAttribute('viewBox', `0 0 ${this.width} ${HEIGHT}`);
    this.root.setAttribute('aria-label', `${this.label}. ${this.names.help}`);
    this.out.hidden = !this.zoom;
    this.scale.setAttribute('aria-pressed', this.log);
    if (!this.series.length) { this.root.replaceChildren(); this.legend.replaceChildren(); return; }
    const [low, high] = this.range();
    this.seen = this.series.map((one, n) => ({ ...one, colour: one.colour ?? PALETTE[n % PALETTE.length],
      points: one.points.filter(([x, y]) => x >= low && x <= high && y !== null && Number.isFinite(y) && (!this.log || y > 0)) }))
      .filter(one => one.points.length);
    this.frame();
    this.point();
  }

  frame() {
    const [low, high] = this.range(), ys = this.seen.flatMap(one => one.points.map(point => point[1]));
    let [bottom, top] = ys.length ? [ys.reduce((a, b) => Math.min(a, b)), ys.reduce((a, b) => Math.max(a, b))] : [0, 1];
    if (bottom === top) [bottom, top] = this.log ? [bottom / 2, top * 2] : [bottom - Math.abs(bottom || 1) / 2, top + Math.abs(top || 1) / 2];
    const marks = this.log ? logTicks(bottom, top) : ticks(bottom, top), across = ticks(low, high, Math.max(2, this.width / 110));
    this.left = 10 + LETTER * Math.max(...marks.map(mark => text(mark).length), 2);
    this.room = this.width - this.left - RIGHT;
    const floor = HEIGHT - BOTTOM, turn = y => this.log ? Math.log(y) : y;
    this.height_of = y => floor - (turn(y) - turn(bottom)) / (turn(top) - turn(bottom)) * (floor - TOP);
    const end = this.left + this.room, parts = [];
    for (const mark of marks) {
      const y = this.height_of(mark);
      parts.push(svg('line', { class: 'grid', x1: this.left, x2: end, y1: y, y2: y }), svg('text', { x: this.left - 5, y: y + 4, 'text-anchor': 'end' }, text(mark)));
    }
    for (const mark of across) {
      const x = Math.min(this.place_of(mark), this.width - LETTER * text(mark).length / 2 - 2);
      parts.push(svg('text', { x, y: floor + 17, 'text-anchor': 'middle' }, text(mark)));
    }
    for (const one of this.seen) {
      const points = thinned(one.points, Math.round(this.room)).map(([x, y]) => `${this.place_of(x).toFixed(1)},${this.height_of(y).toFixed(1)}`);
      parts.push(svg('polyline', { points: points.join(' '), fill: 'none', stroke: one.colour, 'stroke-width': 1.7, 'stroke-linejoin': 'round' }));
      if (one.marks || points.length === 1) parts.push(...points.map(pair => svg('circle', { cx: pair.split(',')[0], cy: pair.split(',')[1], r: 2.6, fill: one.colour })));
    }
    this.over = svg('g', {});
    this.root.replaceChildren(...parts, this.over);
  }

  // The line under the pointer, and the values there in the legend.
  point() {
    if (!this.series.length) return;
    const floor = HEIGHT - BOTTOM, parts = [], found = [];
    if (this.drag && this.drag[1] !== null) {
      const [from, to] = this.drag.map(x => this.place_of(x));
      parts.push(svg('rect', { x: Math.min(from, to), width: Math.abs(to - from), y: TOP, height: floor - TOP, fill: 'var(--line1)', opacity: 0.18 }));
    }
    const near = this.at === null ? null : this.seen.map(one => nearest(one.points, this.at));
    if (near?.length) {
      const x = this.place_of(near.reduce((a, b) => Math.abs(b[0] - this.at) < Math.abs(a[0] - this.at) ? b : a)[0]);
      parts.push(svg('line', { x1: x, x2: x, y1: TOP, y2: floor, stroke: 'var(--soft)', 'stroke-dasharray': '3 3' }));
    }
    this.seen.forEach((one, n) => {
      const value = near?.[n] ?? one.points.at(-1);
      if (near) parts.push(svg('circle', { cx: this.place_of(value[0]), cy: this.height_of(value[1]), r: 3.6, fill: one.colour, stroke: 'var(--card)' }));
      const key = Object.assign(document.createElement('i'), { className: 'key' });
      key.style.background = one.colour;
      const item = document.createElement('span');
      item.append(key, `${one.name} ${text(value[1])} `);
      item.append(Object.assign(document.createElement('small'), { textContent: `${this.x} ${text(value[0])}` }));
      found.push(item);
    });
    this.legend.replaceChildren(...found);
    this.over.replaceChildren(...parts);
  }
}
