"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const round = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const exact = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });
const whole = new Intl.NumberFormat("en");
const REACH = 48; // pixels: how near the pointer must be to a point

// Choices survive a reload of the page; a browser may forbid storage.
function remember(key, value) {
  try { sessionStorage.setItem(key, JSON.stringify(value)); } catch { }
}
function remembered(key, otherwise) {
  try { return JSON.parse(sessionStorage.getItem(key)) ?? otherwise; } catch { return otherwise; }
}

function svg(name, attributes, parent, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

// Axes: ``share`` maps a value to a share of the axis, ``ticks`` are the values to write beside it.

function linear(low, high) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) ticks.push(+(i * step).toPrecision(6));
  return { share: v => (v - low) / (high - low), ticks };
}

function logarithmic(low, high) {
  const [from, to] = [Math.log10(low), Math.log10(high)];
  const at = factors => {
    const ticks = [];
    for (let p = Math.floor(from); p <= to; p++)
      for (const f of factors) ticks.push(+(f * 10 ** p).toPrecision(6));
    return ticks.filter(t => t >= low && t <= high);
  };
  const choices = [[1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 5, 7], [1, 2, 5], [1]].map(at);
  const ticks = choices.find(c => c.length <= 7) ?? choices[3];
  if (ticks.length < 2) return { ...linear(low, high), share: v => (Math.log10(v) - from) / (to - from) };
  return { share: v => (Math.log10(v) - from) / (to - from), ticks };
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}

// A curve that explodes leaves the frame, so that the others can be told apart; one that is all 0
// does not count.
function axis(curves, scale) {
  const largest = curves.map(c => Math.max(...c.values)).filter(v => v > 0);
  if (!largest.length) return scale === "log" ? logarithmic(1, 10) : linear(0, 1);
  const most = Math.min(Math.max(...largest), 1.5 * median(largest));
  if (scale !== "log") return linear(0, most * 1.05);
  const least = Math.min(...curves.flatMap(c => c.values).filter(v => v > 0), most);
  return logarithmic(least / 1.08, most * 1.08);
}

class Chart {
  constructor(figure) {
    this.chart = data.charts[figure.dataset.chart];
    this.place = figure.querySelector(".plot");
    this.legend = figure.querySelector(".legend");
    this.choices = [...figure.querySelectorAll("[data-y]")];
    this.hidden = new Set(remembered(`hidden ${this.chart.key}`, []));
    this.y = remembered(`y ${this.chart.key}`, "paper");
    this.choices.forEach(button => button.onclick = () => {
      this.y = button.dataset.y;
      remember(`y ${this.chart.key}`, this.y);
      this.draw();
    });
    this.chart.names.forEach(row => this.entry(row));
    this.place.onpointermove = event => this.point(event);
    this.place.onpointerdown = event => this.point(event);
    this.place.onpointerleave = () => this.leave();
    new ResizeObserver(() => this.draw()).observe(this.place);
  }

  entry({ name, color }) {
    const button = document.createElement("button");
    button.type = "button";
    button.innerHTML = `<i class="swatch" style="background:var(--c${color})"></i>`;
    button.append(name);
    button.dataset.name = name;
    button.onclick = () => {
      this.hidden.has(name) ? this.hidden.delete(name) : this.hidden.add(name);
      this.chosen();
    };
    button.ondblclick = () => {
      this.hidden = new Set(this.chart.names.map(row => row.name).filter(other => other !== name));
      this.chosen();
    };
    button.onpointerenter = () => this.light(name);
    button.onpointerleave = () => this.light(null);
    this.legend.append(button);
  }

  chosen() {
    remember(`hidden ${this.chart.key}`, [...this.hidden]);
    this.draw();
  }

  draw() {
    const width = this.place.clientWidth;
    if (!width) return;
    const height = Math.max(250, Math.min(430, width * 0.5));
    const [left, right, top, bottom] = [46, 40, 20, 36];
    const shown = this.chart.curves.filter(c => !this.hidden.has(c.name));
    const [lossScale, errorScale] = data.scales[this.y];
    const of = kind => shown.filter(c => c.kind === kind);
    const ys = { loss: axis(of("loss"), lossScale), error: axis(of("error"), errorScale) };
    const xs = linear(0, Math.max(1, ...this.chart.curves.map(c => c.steps.at(-1))));
    const px = step => left + xs.share(step) * (width - left - right);
    const py = (kind, v) => height - bottom - ys[kind].share(v) * (height - top - bottom);

    this.place.replaceChildren();
    const label = `Training loss and ${this.chart.error} of ${this.chart.names.length} rows against iterations`;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label }, this.place);
    const clip = `clip-${this.chart.id}`;
    svg("rect", { x: left - 6, y: top - 6, width: width - left - right + 12, height: height - top - bottom + 12 },
      svg("clipPath", { id: clip }, root));
    for (const t of ys.error.ticks) {
      svg("path", { class: "grid", d: `M${left} ${py("error", t)}H${width - right}` }, root);
      svg("text", { x: width - right + 8, y: py("error", t) + 4 }, root, round.format(t));
    }
    for (const t of ys.loss.ticks)
      svg("text", { x: left - 8, y: py("loss", t) + 4, "text-anchor": "end" }, root, round.format(t));
    const every = width < 480 ? 2 : 1;
    xs.ticks.filter((_, i) => i % every === 0).forEach(t =>
      svg("text", { x: px(t), y: height - bottom + 20, "text-anchor": "middle" }, root, whole.format(t)));
    svg("text", { x: left - 8, y: 8, "text-anchor": "end" }, root, "loss");
    svg("text", { x: width - right + 8, y: 8 }, root, "%");
    svg("text", { x: (left + width - right) / 2, y: height - 1, "text-anchor": "middle" }, root, "iterations");
    svg("path", { class: "grid", d: `M${left} ${height - bottom}H${width - right}`, stroke: "currentColor" }, root);

    const area = svg("g", { "clip-path": `url(#${clip})` }, root);
    this.points = [];
    for (const curve of shown) {
      const log = data.scales[this.y][curve.kind === "loss" ? 0 : 1] === "log";
      const spots = curve.steps
        .map((step, i) => ({ curve, step, value: curve.values[i] }))
        .filter(p => p.value !== null && (p.value > 0 || !log));
      for (const p of spots) [p.x, p.y] = [px(p.step), py(curve.kind, p.value)];
      this.points.push(...spots.filter(p => p.y > top - 7 && p.y < height - bottom + 7));
      const style = `--c:var(--c${curve.color})`;
      const name = { class: `curve ${curve.kind}`, style, "data-name": curve.name };
      if (spots.length === 1)
        svg("circle", { ...name, class: `curve point ${curve.kind}`, cx: spots[0].x, cy: spots[0].y, r: 3 }, area);
      else if (spots.length)
        svg("path", { ...name, d: "M" + spots.map(p => `${p.x.toFixed(1)} ${p.y.toFixed(1)}`).join("L") }, area);
    }
    this.mark = svg("circle", { class: "here", r: 5, visibility: "hidden" }, root);
    for (const button of this.legend.children)
      button.setAttribute("aria-pressed", !this.hidden.has(button.dataset.name));
    for (const button of this.choices) button.setAttribute("aria-pressed", button.dataset.y === this.y);
  }

  point(event) {
    const box = this.place.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let [nearest, best] = [null, REACH ** 2];
    for (const p of this.points) {
      const distance = (p.x - x) ** 2 + (p.y - y) ** 2;
      if (distance < best) [nearest, best] = [p, distance];
    }
    if (!nearest) return this.leave();
    const { curve, step, value } = nearest;
    this.light(curve.name);
    this.mark.setAttribute("cx", nearest.x);
    this.mark.setAttribute("cy", nearest.y);
    this.mark.setAttribute("style", `--c:var(--c${curve.color})`);
    this.mark.setAttribute("visibility", "visible");
    tip.replaceChildren();
    const name = document.createElement("b");
    name.textContent = curve.name + (curve.seed ? `, ${curve.seed}` : "");
    const unit = curve.kind === "error" ? " %" : "";
    tip.append(name, document.createElement("br"),
      `${curve.what} ${exact.format(value)}${unit} at iteration ${whole.format(step)}`);
    tip.hidden = false;
    const [w, h] = [tip.offsetWidth, tip.offsetHeight];
    const at = [box.left + nearest.x, box.top + nearest.y];
    tip.style.left = `${Math.max(8, Math.min(innerWidth - w - 8, at[0] - w / 2))}px`;
    tip.style.top = `${at[1] - h - 14 < 8 ? at[1] + 16 : at[1] - h - 14}px`;
    touched = Date.now();
  }

  leave() {
    this.light(null);
    this.mark?.setAttribute("visibility", "hidden");
    tip.hidden = true;
  }

  light(name) {
    this.place.classList.toggle("hot", name !== null);
    for (const curve of this.place.querySelectorAll(".curve"))
      curve.classList.toggle("hot", curve.dataset.name === name);
  }
}

let touched = 0; // when the pointer last showed a value
document.querySelectorAll(".chart").forEach(figure => new Chart(figure));

document.getElementById("theme").onclick = () => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.dataset.theme || (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  try { localStorage.setItem("resnetv2-theme", root.dataset.theme); } catch { }
};

// While runs are open the page reloads, but not just after the pointer showed a value.
if (data.refresh) {
  document.getElementById("fresh").textContent = ` · more to come, reloads every ${data.refresh} s`;
  const again = () => Date.now() - touched < 5000 ? setTimeout(again, 1000) : location.reload();
  setTimeout(again, 1000 * data.refresh);
}
