"use strict";
// Draws what Python counted (the element "data"), sorts the tables and opens configurations.

const data = JSON.parse(document.getElementById("data").textContent);
const HEIGHT = 320, LEFT = 52, RIGHT = 14, TOP = 14, BOTTOM = 42;
const hidden = new Set(); // groups whose names were chosen in the legend

function add(parent, name, attributes = {}, text = "") {
  const space = parent.namespaceURI.endsWith("svg") || name === "svg";
  const made = space
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text; // never as markup
  parent.append(made);
  return made;
}

const color = (group) => group % 8;
const dash = (group) => Math.floor(group / 8) % 4;

function short(number, digits = 3) {
  if (number === 0) return "0";
  const power = Math.min(6, Math.max(0, Math.floor(Math.log10(Math.abs(number)) / 3)));
  return `${Number((number / 1000 ** power).toPrecision(digits))}${" kMGTPE"[power].trim()}`;
}

// Numbers in as few digits as tell them apart.
function labels(numbers) {
  let found = [];
  for (let digits = 3; digits < 9 && new Set(found).size < numbers.length; digits++)
    found = numbers.map((it) => short(it, digits));
  return found;
}

// ---- axes

function ticks(low, high, log) {
  for (const digits of log ? [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9]] : []) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const digit of digits) found.push(Number(`${digit}e${power}`));
    const inside = found.filter((it) => it >= low * 0.999 && it <= high * 1.001);
    if (inside.length > 3) return inside;
  }
  const rough = (high - low) / 5;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((it) => it * unit).find((it) => it >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    found.push(Number((i * step).toPrecision(12)));
  return found;
}

function axis(values, { title, log = false, whole = false, margin = 0.04 }) {
  let low = Math.min(...values), high = Math.max(...values);
  log = log && low > 0;
  if (log) {
    const by = Math.max((high / low) ** margin, 1.02);
    [low, high] = [low / by, high * by];
  } else {
    const by = (high - low) * margin || Math.abs(high) * 0.05 || 1;
    [low, high] = [whole && low >= 0 ? Math.max(0, low - by) : low - by, high + by];
  }
  const scale = log ? Math.log : (it) => it;
  return { title, log, low, high, at: (it) => (scale(it) - scale(low)) / (scale(high) - scale(low)) };
}

function chart(parent, x, y, label, width = 460) {
  const svg = add(add(parent, "figure"), "svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label,
  });
  svg.parentNode.style.flexBasis = `${0.75 * width}px`;
  svg.parentNode.style.maxWidth = `${1.15 * width}px`; // its letters as large as any other's
  const right = width - RIGHT, bottom = HEIGHT - BOTTOM;
  const px = (it) => LEFT + x.at(it) * (right - LEFT);
  const py = (it) => bottom - y.at(it) * (bottom - TOP);
  const [along, up] = [ticks(x.low, x.high, x.log), ticks(y.low, y.high, y.log)];
  const [below, beside] = [labels(along), labels(up)];
  for (const [index, it] of along.entries()) {
    add(svg, "line", { class: "grid", x1: px(it), x2: px(it), y1: TOP, y2: bottom });
    const text = { x: px(it), y: bottom + 15, "text-anchor": "middle", class: "x" };
    add(svg, "text", text, below[index]);
  }
  for (const [index, it] of up.entries()) {
    add(svg, "line", { class: "grid", x1: LEFT, x2: right, y1: py(it), y2: py(it) });
    add(svg, "text", { x: LEFT - 6, y: py(it) + 4, "text-anchor": "end", class: "y" }, beside[index]);
  }
  add(svg, "line", { class: "axis", x1: LEFT, x2: right, y1: bottom, y2: bottom });
  const middle = (LEFT + right) / 2;
  add(svg, "text", { class: "title", x: middle, y: HEIGHT - 8, "text-anchor": "middle" }, x.title);
  const turned = `rotate(-90) translate(${-(TOP + bottom) / 2}, 12)`;
  add(svg, "text", { class: "title", transform: turned, "text-anchor": "middle" }, y.title);
  return { svg, px, py };
}

// ---- what is under the pointer

const tip = document.getElementById("tip");

function show(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const left = Math.min(event.pageX + 14, document.documentElement.clientWidth - 240);
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${event.pageY + 14}px`;
}

function hide() { tip.hidden = true; }

// Tells of the nearest of points {x, y, text, marked}, in the units of the drawing.
function listen(svg, points) {
  let near = [];
  const leave = () => {
    hide();
    svg.classList.remove("faint");
    near.forEach((it) => it.classList.remove("near"));
    near = [];
  };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let best = null, least = 30 ** 2;
    for (const point of points) {
      const far = (point.x - x) ** 2 + (point.y - y) ** 2;
      if (far < least && !hidden.has(point.group)) [best, least] = [point, far];
    }
    leave();
    if (!best) return;
    svg.classList.add("faint");
    near = best.marked;
    near.forEach((it) => it.classList.add("near"));
    show(event, best.text);
  });
}

// ---- learning curves

function curves() {
  const section = document.getElementById("curves"), place = section.querySelector(".charts");
  place.replaceChildren();
  const late = document.getElementById("late").checked;
  const end = Math.max(0, ...data.members.flatMap((it) =>
    Object.values(it.curves).flatMap((points) => points.map(([step]) => step))));
  for (const [name, title] of Object.entries(data.curves)) {
    const lines = data.members.map((it) => ({
      ...it, points: it.curves[name].filter(([step, value]) =>
        value !== null && (!late || step >= end / 2)),
    })).filter((it) => it.points.length);
    if (!lines.length) continue;
    const log = name.endsWith("loss") && document.getElementById("log-loss").checked;
    const all = lines.flatMap((it) => it.points);
    const x = axis(all.map(([step]) => step), { title: "step", whole: true });
    const y = axis(all.map(([, value]) => value), { title, log });
    const label = `${title} against the step, ${lines.length} members`;
    const { svg, px, py } = chart(place, x, y, label);
    const near = [];
    for (const line of lines) {
      const kind = `c${color(line.group)}`, off = hidden.has(line.group) ? " off" : "";
      const path = line.points.map(([step, value]) =>
        `${px(step).toFixed(1)},${py(value).toFixed(1)}`).join("L");
      const marked = [add(svg, "path", {
        class: `curve ${kind} d${dash(line.group)}${off}`, d: `M${path}`, "data-group": line.group,
        "aria-label": line.name,
      })];
      if (name.startsWith("eval/") && line.points.length <= 60)
        for (const [step, value] of line.points)
          marked.push(add(svg, "circle", {
            class: `f${color(line.group)}${off}`, cx: px(step), cy: py(value), r: 2.4,
            "data-group": line.group,
          }));
      for (const [step, value] of line.points)
        near.push({
          x: px(step), y: py(value), group: line.group, marked,
          text: `${line.name}\nstep ${step.toLocaleString("en")}: ${Number(value.toPrecision(4))}`,
        });
    }
    listen(svg, near);
  }
}

function legend() {
  const place = document.querySelector("#curves .legend");
  data.groups.forEach((group, index) => {
    const button = add(place, "button", { type: "button", "aria-pressed": "true" });
    const line = add(button, "svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
    const kind = `curve c${color(index)} d${dash(index)}`;
    add(line, "path", { class: kind, d: "M1,5L25,5" });
    add(button, "span", {}, group.name);
    button.addEventListener("click", () => {
      if (!hidden.delete(index)) hidden.add(index);
      button.setAttribute("aria-pressed", String(!hidden.has(index)));
      for (const it of document.querySelectorAll(`#curves .charts [data-group="${index}"]`))
        it.classList.toggle("off", hidden.has(index));
    });
  });
}

// ---- accuracy against cost

function cost(chosen) {
  const place = document.querySelector("#cost .charts");
  place.replaceChildren();
  const known = data.groups.map((it, index) => ({ ...it, index, cost: it.costs[chosen.name] }))
    .filter((it) => it.cost !== null && it.top1[0] !== null);
  if (!known.length) return;
  const x = axis(known.map((it) => it.cost), { title: chosen.title, log: true, margin: 0.08 });
  const y = axis(known.flatMap((it) => it.top1.map((value) => 100 * value)),
    { title: "held-out top-1, %", margin: 0.08 });
  const label = `held-out top-1 against ${chosen.title}, ${known.length} groups`;
  const { svg, px, py } = chart(place, x, y, label, 720);
  const path = chosen.front.map((index) => data.groups[index])
    .map((it) => `${px(it.costs[chosen.name])},${py(100 * it.top1[0])}`).join("L");
  add(svg, "path", { class: "front", d: `M${path}`, "data-front": chosen.front.join(",") });
  const near = [];
  for (const it of known) {
    const [mean, low, high] = it.top1.map((value) => 100 * value);
    const at = px(it.cost), kind = color(it.index);
    add(svg, "line", { class: `bar c${kind}`, x1: at, x2: at, y1: py(low), y2: py(high) });
    const seeds = it.finished > 1 ? ` (${low.toFixed(2)} to ${high.toFixed(2)}, ${it.finished} seeds)` : "";
    const ahead = chosen.front.includes(it.index) ? "\non the Pareto front" : "";
    const text = `${it.name}\ntop-1 ${mean.toFixed(2)} %${seeds}\n${chosen.title} ${short(it.cost)}${ahead}`;
    const dot = add(svg, "circle", {
      class: `mark f${kind}`, cx: at, cy: py(mean), r: 5, tabindex: 0, "data-group": it.index,
      role: "img", "aria-label": text.replaceAll("\n", ", "),
    });
    // Beside the front, not on it: it rises with the cost, or falls where more of it is better.
    const left = at > 600, above = left !== (chosen.name === "images_per_second");
    if (known.length <= 12 || ahead)
      add(svg, "text", {
        class: "name", x: at + (left ? -9 : 9), y: py(mean) + (above ? -7 : 15),
        "text-anchor": left ? "end" : "start",
      }, it.name);
    near.push({ x: at, y: py(mean), group: -1, marked: [dot], text });
  }
  listen(svg, near);
}

function choice() {
  const place = document.querySelector("#cost .choice");
  const known = data.costs.filter((it) => it.front.length);
  known.forEach((it, index) => {
    const label = add(place, "label");
    const input = add(label, "input", { type: "radio", name: "cost", value: it.name });
    input.checked = index === 0;
    label.append(` ${it.title}`);
    input.addEventListener("change", () => { cost(it); fit(it); });
  });
  if (known.length) { cost(known[0]); fit(known[0]); }
  else document.getElementById("cost").hidden = true;
}

// ---- the power law

function fit(chosen) {
  const section = document.getElementById("fit"), place = section.querySelector(".charts");
  place.replaceChildren();
  section.hidden = !chosen.fit;
  if (!chosen.fit) return;
  const { groups, errors, exponent, factor, residuals } = chosen.fit;
  const costs = groups.map((index) => data.groups[index].costs[chosen.name]);
  section.querySelector(".result").textContent =
    `error ≈ ${factor.toPrecision(3)} × (${chosen.title})^(${exponent.toFixed(3)}), the exponent ` +
    `± ${chosen.fit.standard_error.toFixed(3)} (standard error), R² ` +
    `${chosen.fit.r_squared.toFixed(3)}, from ${groups.length} points: a description of these ` +
    "models on this data and schedule, over this range of costs and not beyond it.";
  const x = axis(costs, { title: chosen.title, log: true, margin: 0.08 });
  const law = (it) => 100 * factor * it ** exponent;
  const percent = errors.map((it) => 100 * it);
  const y = axis([...percent, ...costs.map(law)], { title: "top-1 error, %", log: true, margin: 0.08 });
  const one = chart(place, x, y, `top-1 error against ${chosen.title}, with the fit`);
  const [low, high] = [Math.min(...costs), Math.max(...costs)];
  add(one.svg, "path", {
    class: "law", d: `M${one.px(low)},${one.py(law(low))}L${one.px(high)},${one.py(law(high))}`,
  });
  const off = residuals.map((it) => 100 * (Math.exp(it) - 1));
  const z = axis([0, ...off], { title: "error above the fit, %", margin: 0.1 });
  const two = chart(place, x, z, `residuals of the fit against ${chosen.title}`);
  add(two.svg, "line", {
    class: "law", x1: two.px(low), x2: two.px(high), y1: two.py(0), y2: two.py(0),
  });
  [[one, percent], [two, off]].forEach(([drawn, values]) => {
    const near = groups.map((index, i) => {
      const at = [drawn.px(costs[i]), drawn.py(values[i])], kind = color(index);
      if (drawn === two)
        add(two.svg, "line", { class: `bar c${kind}`, x1: at[0], x2: at[0], y1: two.py(0), y2: at[1] });
      const text = `${data.groups[index].name}\nerror ${percent[i].toFixed(2)} %\n` +
        `${off[i] < 0 ? "−" : "+"}${Math.abs(off[i]).toFixed(1)} % off the fit`;
      const dot = add(drawn.svg, "circle", {
        class: `mark f${kind}`, cx: at[0], cy: at[1], r: 5, tabindex: 0, role: "img",
        "aria-label": text.replaceAll("\n", ", "),
      });
      return { x: at[0], y: at[1], group: -1, marked: [dot], text };
    });
    listen(drawn.svg, near);
  });
}

// ---- tables

function sort(table, key, down) {
  const headings = [...table.tHead.rows[0].cells];
  const column = headings.findIndex((it) => it.dataset.key === key);
  if (column < 0) return;
  const value = (row) => row.cells[column].dataset.value;
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === ""); // nothing comes last, either way
    const numbers = Number(x) - Number(y);
    const found = Number.isNaN(numbers) ? x.localeCompare(y, "en", { numeric: true }) : numbers;
    return down ? -found : found;
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  headings.forEach((it, index) => it.setAttribute(
    "aria-sort", index !== column ? "none" : down ? "descending" : "ascending"));
}

function tables() {
  for (const table of document.querySelectorAll("table"))
    for (const heading of table.tHead.rows[0].cells)
      heading.firstElementChild.addEventListener("click", () => {
        const numbers = [...table.tBodies[0].rows]
          .some((row) => row.cells[heading.cellIndex].classList.contains("number"));
        // Of numbers the largest first.
        const before = heading.getAttribute("aria-sort");
        const down = before === "none" ? numbers : before === "ascending";
        sort(table, heading.dataset.key, down);
        const order = down ? "descending" : "ascending";
        location.replace(`#sort=${table.id},${encodeURIComponent(heading.dataset.key)},${order}`);
      });
}

// The address names an order, or a configuration to open.
function follow() {
  const where = location.hash.slice(1);
  if (where.startsWith("sort=")) {
    const [id, key, order] = where.slice(5).split(",").map(decodeURIComponent);
    const table = document.getElementById(id);
    if (table && table.tHead) sort(table, key, order === "descending");
    return;
  }
  const found = document.getElementById(decodeURIComponent(where));
  if (found && found.tagName === "DETAILS") {
    found.open = true;
    found.scrollIntoView();
  }
}

for (const id of ["log-loss", "late"])
  document.getElementById(id).addEventListener("change", curves);
legend();
curves();
choice();
tables();
window.addEventListener("hashchange", follow);
follow();
