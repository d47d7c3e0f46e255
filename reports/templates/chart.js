// Quality against cost, drawn from the figures of the summary that stands above. The drawings that
// are there without this script show the same points.

const SHAPES = [
  "M-4.6 0a4.6 4.6 0 1 0 9.2 0a4.6 4.6 0 1 0-9.2 0z", "M-4.2-4.2h8.4v8.4h-8.4z",
  "M0-5.6L5.2 4H-5.2z", "M0-5.8L5.8 0 0 5.8-5.8 0z", "M0 5.6L5.2-4H-5.2z",
  "M-1.8-5.2h3.6v3.4h3.4v3.6h-3.4v3.4h-3.6v-3.4h-3.4v-3.6h3.4z",
  "M-5-2.5L-2.5-5 0-2.5 2.5-5 5-2.5 2.5 0 5 2.5 2.5 5 0 2.5-2.5 5-5 2.5-2.5 0z",
  "M0-5.6L5.3-1.7 3.3 4.5H-3.3L-5.3-1.7z",
];
const STAR = "M0-9L2.1-2.9 8.6-2.8 3.4 1.1 5.3 7.3 0 3.6-5.3 7.3-3.4 1.1-8.6-2.8-2.1-2.9z";
const COLOURS = 8;
const REACH = 28; // pixels from the pointer within which a point is meant
const EDGE = { left: 66, right: 18, top: 14, bottom: 48 };
const CARD_METRICS = [
  "perplexity", "artefact_bytes", "peak_memory_bytes", "decode_tokens_per_second",
];

function drawn(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function styleOf(place) {
  if (place < 0) return { path: STAR, colour: "ink" };
  const round = Math.floor(place / SHAPES.length);
  const colour = (place + 3 * round) % COLOURS;
  return { path: SHAPES[place % SHAPES.length], colour: `series-${colour}` };
}

// What a field of the summary says: its figure with the unit, and what stands below it.
function saidOf(row, axis) {
  const field = row.cells[axis.index];
  const figure = field.querySelector("b")?.textContent ?? field.firstChild?.nodeValue ?? "";
  const figured = !field.classList.contains("absent");
  const below = [...field.querySelectorAll("i")].map((part) => part.textContent);
  return [figured && axis.unit ? `${figure.trim()} ${axis.unit}` : figure.trim(), ...below];
}

function axesOf(table) {
  return [...table.tHead.rows[0].cells].flatMap((head, index) => !head.dataset.axis ? [] : [{
    index,
    side: head.dataset.axis,
    better: head.dataset.better,
    metric: head.dataset.metric,
    name: head.querySelector(".head").textContent.trim(),
    unit: head.querySelector(".unit")?.textContent ?? "",
    protocol: head.querySelector(".protocol").textContent,
  }]);
}

function makeSelect(title, axes, draw) {
  const select = made("select");
  axes.forEach((axis, place) => select.append(made("option", { value: place }, axis.name)));
  select.addEventListener("change", draw);
  return { label: made("label", {}, title, select), chosen: () => axes[select.value] };
}

function makeChart(host) {
  const table = document.querySelector(`table[data-filter="${host.dataset.chart}"]`);
  const rows = [...table.tBodies[0].rows];
  const usable = axesOf(table).filter(
    (axis) => rows.filter((row) => Number.isFinite(figureOf(row.cells[axis.index]))).length > 1,
  );
  const qualities = usable.filter((axis) => axis.side === "quality");
  const costs = usable.filter((axis) => axis.side === "cost");
  if (!qualities.length || !costs.length) return;

  const methods = [...new Set(
    rows.filter((row) => !row.classList.contains("baseline")).map((row) => row.dataset.method),
  )].sort();
  const off = new Set();
  const quality = makeSelect("Quality", qualities, () => draw());
  const cost = makeSelect("Cost", costs, () => draw());
  const only = made("input", { type: "checkbox" });
  only.addEventListener("change", () => draw());
  const legend = made("div", { class: "methods", role: "group", "aria-label": "Methods" });
  const stage = made("div", { class: "stage" });
  const card = made("div", { class: "card", role: "tooltip", hidden: "" });
  const caption = made("figcaption");
  const figure = made("figure", { class: "chart" },
    made("div", { class: "bar" }, quality.label, cost.label,
      made("label", { class: "check" }, only, "Only the rows that the filter leaves")),
    legend, stage, caption);
  for (const still of host.children) still.hidden = true;
  host.prepend(figure);
  card.id = `${host.dataset.chart}--card`;

  let points = [];
  let order = [];
  let svg = null;
  let halo = null;
  let width = 0;

  const isPlaced = (point) => Number.isFinite(point.x) && Number.isFinite(point.y);

  function placed(across, up) {
    return rows.filter((row) => !off.has(row.dataset.method)).map((row) => ({
      row,
      label: labelOf(row),
      baseline: row.classList.contains("baseline"),
      shown: !row.hidden,
      x: figureOf(row.cells[across.index]),
      y: figureOf(row.cells[up.index]),
    }));
  }

  function draw() {
    const [across, up] = [cost.chosen(), quality.chosen()];
    const all = placed(across, up);
    points = all.filter(isPlaced);
    stage.replaceChildren();
    hide();
    svg = null;
    order = points.filter((point) => point.shown).sort((a, b) => a.x - b.x || a.y - b.y);
    if (only.checked) points = order;
    describe(all, across, up);
    if (!points.length) return;
    width = Math.max(320, Math.min(1440, figure.clientWidth - 30));
    const height = Math.round(Math.max(340, Math.min(520, 0.5 * width)));
    const x = makeScale(points.map((p) => p.x), EDGE.left, width - EDGE.right);
    const y = makeScale(points.map((p) => p.y), height - EDGE.bottom, EDGE.top);
    svg = drawn("svg", {
      viewBox: `0 0 ${width} ${height}`, width, height, role: "group",
      "aria-label": `${up.name} against ${across.name.toLowerCase()}, ${order.length} points`,
    });
    drawAxes(svg, { x, y, across, up, width, height });
    const corners = findFront(order, across, up);
    svg.append(drawn("polyline", {
      class: "front", points: corners.map(([a, b]) => `${x.place(a)},${y.place(b)}`).join(" "),
    }));
    for (const point of points) Object.assign(point, { px: x.place(point.x), py: y.place(point.y) });
    drawPoints(across, up);
    drawLabels(svg, order, { width, height });
    halo = drawn("circle", { class: "halo", r: 12, visibility: "hidden" });
    svg.append(halo);
    listen();
    stage.append(svg, card);
  }

  function drawPoints(across, up) {
    const rank = (point) => 2 * point.shown + (point.best || point.baseline ? 1 : 0);
    for (const point of [...points].sort((a, b) => rank(a) - rank(b))) {
      const style = styleOf(point.baseline ? -1 : methods.indexOf(point.row.dataset.method));
      const mark = drawn("path", { d: style.path, class: style.colour });
      const at = { transform: `translate(${point.px.toFixed(1)} ${point.py.toFixed(1)})` };
      if (!point.shown) {
        svg.append(drawn("g", { ...at, class: "point dim", "aria-hidden": "true" }, mark));
        continue;
      }
      const said = [up, across].map((axis) => `${axis.name} ${saidOf(point.row, axis).join(", ")}`);
      point.link = drawn("a", {
        ...at, href: `#${point.row.id}`, class: point.best ? "point best" : "point",
        tabindex: point === order[0] ? 0 : -1,
        "aria-label": `${point.label}: ${said.join("; ")}${point.best ? "; on the front" : ""}`,
      }, mark);
      point.link.addEventListener("focus", () => show(point));
      point.link.addEventListener("blur", hide);
      svg.append(point.link);
    }
  }

  function describe(all, across, up) {
    const missing = all.filter((point) => !isPlaced(point)).map((point) => point.label);
    const sentences = [
      `${up.name} (${up.protocol}; ${up.better} is better) against ${across.name.toLowerCase()} `
        + `(${across.protocol}; ${across.better} is better), ${order.length} of ${rows.length} rows.`,
      "Filled, on the dashed line: no other row shown is better in both. Star: the baseline.",
      "Point at a row, or walk with the arrow keys; a click or Enter goes to it in the summary.",
    ];
    if (points.length > order.length) sentences.push("Faint: left out by the summary's filter.");
    if (missing.length) {
      const more = missing.length > 6 ? ` and ${missing.length - 6} more` : "";
      sentences.push(`Not drawn, without both figures: ${missing.slice(0, 6).join(", ")}${more}.`);
    }
    caption.textContent = sentences.join(" ");
  }

  function nearest(event) {
    const box = svg.getBoundingClientRect();
    const zoom = width / box.width;
    const [px, py] = [(event.clientX - box.left) * zoom, (event.clientY - box.top) * zoom];
    let best = null;
    let reach = REACH;
    for (const point of order) {
      const distance = Math.hypot(point.px - px, point.py - py);
      if (distance < reach) [best, reach] = [point, distance];
    }
    return best;
  }

  function listen() {
    let touched = null;
    svg.addEventListener("pointermove", (event) => {
      const point = nearest(event);
      if (point) show(point); else hide();
    });
    svg.addEventListener("pointerleave", hide);
    // A finger has nothing to hover with: its first touch shows the card, the second goes on.
    svg.addEventListener("pointerdown", (event) => {
      touched = event.pointerType === "touch" && card.hidden ? nearest(event) : null;
    });
    svg.addEventListener("click", (event) => {
      event.preventDefault();
      const byKey = event.detail === 0;
      const link = event.target.closest("a");
      const point = byKey ? order.find((one) => one.link === link) : nearest(event);
      if (point && touched) show(point);
      else if (point) goTo(point.row);
    });
    svg.addEventListener("keydown", (event) => {
      const place = order.findIndex((point) => point.link === document.activeElement);
      const next = {
        ArrowRight: place + 1, ArrowUp: place + 1, ArrowLeft: place - 1, ArrowDown: place - 1,
        Home: 0, End: order.length - 1,
      }[event.key];
      if (event.key === "Escape") hide();
      if (next === undefined || place < 0) return;
      event.preventDefault();
      const to = order[Math.max(0, Math.min(order.length - 1, next))];
      order[place].link.tabIndex = -1;
      to.link.tabIndex = 0;
      to.link.focus({ preventScroll: true });
    });
  }

  function light(point) {
    halo.setAttribute("cx", point.px);
    halo.setAttribute("cy", point.py);
    halo.setAttribute("visibility", "visible");
  }

  function show(point) {
    light(point);
    fillCard(card, point, [quality.chosen(), cost.chosen(), ...usable]);
    card.hidden = false;
    const box = svg.getBoundingClientRect();
    const [px, py] = [(point.px * box.width) / width, (point.py * box.height) / svg.viewBox.baseVal.height];
    const [wide, high] = [card.offsetWidth, card.offsetHeight];
    const beside = [px + 16, px - 16 - wide].find((left) => left >= 0 && left + wide <= box.width);
    // Where it fits on neither side, it stands above or below the point.
    const top = beside === undefined ? (py > box.height / 2 ? py - 16 - high : py + 16) : py - 20;
    card.style.left = `${beside ?? 0}px`;
    card.style.top = `${beside === undefined ? top : Math.max(0, Math.min(top, box.height - high))}px`;
  }

  function hide() {
    card.hidden = true;
    halo?.setAttribute("visibility", "hidden");
  }

  const follow = (event) => {
    const row = event.target.closest("tr");
    const point = points.find((one) => one.row === row && one.shown);
    if (point && svg) light(point);
  };
  table.tBodies[0].addEventListener("pointerover", follow);
  table.tBodies[0].addEventListener("focusin", follow);
  table.tBodies[0].addEventListener("pointerleave", hide);
  table.addEventListener("rowschange", draw);
  fillLegend(legend, methods, off, draw);
  new ResizeObserver(() => {
    if (svg && Math.abs(figure.clientWidth - 30 - width) > 4) draw();
  }).observe(host);
  draw();
}

function drawAxes(svg, { x, y, across, up, width, height }) {
  const [bottom, right] = [height - EDGE.bottom, width - EDGE.right];
  const title = (axis, scale) => axis.name
    + (axis.unit ? ` (${axis.unit}${scale.logarithmic ? ", logarithmic" : ""})`
      : scale.logarithmic ? " (logarithmic)" : "");
  let taken = -Infinity;
  for (const tick of x.ticks) {
    const at = x.place(tick);
    svg.append(drawn("line", { class: "grid", x1: at, x2: at, y1: EDGE.top, y2: bottom }));
    const text = shortNumber(tick);
    if (at - 4 * text.length < taken) continue;
    taken = at + 4 * text.length;
    svg.append(drawn("text", { class: "tick", x: at, y: bottom + 17, "text-anchor": "middle" }, text));
  }
  for (const tick of y.ticks) {
    const at = y.place(tick);
    svg.append(drawn("line", { class: "grid", x1: EDGE.left, x2: right, y1: at, y2: at }));
    svg.append(drawn("text", { class: "tick", x: EDGE.left - 8, y: at + 4, "text-anchor": "end" },
      shortNumber(tick)));
  }
  svg.append(drawn("path", { class: "axes", d: `M${EDGE.left} ${EDGE.top}V${bottom}H${right}` }));
  svg.append(drawn("text", { x: (EDGE.left + right) / 2, y: height - 8, "text-anchor": "middle" },
    title(across, x)));
  svg.append(drawn("text", {
    "text-anchor": "middle", transform: `translate(15 ${(EDGE.top + bottom) / 2}) rotate(-90)`,
  }, title(up, y)));
}

// Names the rows of the front and the baseline, where a name covers no other and few points.
function drawLabels(svg, points, { width, height }) {
  const taken = [];
  const overlap = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  for (const point of points.filter((one) => one.best || one.baseline)) {
    const long = 6.6 * point.label.length;
    const places = [[10, 4], [-10 - long, 4], [-long / 2, -11], [-long / 2, 20], [8, -9], [8, 17],
      [-8 - long, -9], [-8 - long, 17]];
    let best = null;
    for (const [dx, dy] of places) {
      const [left, base] = [point.px + dx, point.py + dy];
      const box = [left, base - 11, left + long, base + 3];
      if (left < EDGE.left || box[2] > width || box[1] < 0 || base > height - EDGE.bottom) continue;
      if (taken.some((other) => overlap(box, other))) continue;
      const covered = points.filter((one) => one !== point
        && overlap(box, [one.px - 5, one.py - 5, one.px + 5, one.py + 5])).length;
      if (!best || covered < best.covered) best = { covered, left, base, box };
    }
    if (!best) continue;
    taken.push(best.box);
    svg.append(drawn("text", { class: "name", x: best.left, y: best.base }, point.label));
  }
}

function fillCard(card, point, axes) {
  const shown = axes.filter((axis, place) => (place < 2 || CARD_METRICS.includes(axis.metric))
    && axes.indexOf(axis) === place);
  const facts = made("dl");
  const add = (name, lines) => facts.append(made("dt", {}, name), made("dd", {}, lines.join(", ")));
  for (const axis of shown) add(axis.name, saidOf(point.row, axis));
  const { bits, group } = point.row.dataset;
  if (bits) add("Bits", [bits]);
  if (group) add("Group size", [group === "-1" ? "per channel" : group]);
  const kernel = point.row.cells[1];
  add("Execution", [kernel.firstChild.nodeValue.trim()]);
  const name = kernel.querySelector(".kernel").textContent;
  if (name) add("Kernel", [name]);
  const notes = [point.baseline && "baseline", point.best && "on the front",
    point.row.dataset.status].filter(Boolean);
  card.replaceChildren(made("strong", {}, point.label), 
    ...notes.flatMap((note) => [" ", made("em", {}, note)]), facts);
}

// A button a method that takes its rows out of the chart and puts them back.
function fillLegend(legend, methods, off, draw) {
  methods.forEach((method, place) => {
    const style = styleOf(place);
    const button = made("button", { type: "button", "aria-pressed": "true" },
      drawn("svg", { viewBox: "-8 -8 16 16", width: 14, height: 14, "aria-hidden": "true" },
        drawn("path", { d: style.path, class: style.colour })), method);
    button.addEventListener("click", () => {
      if (!off.delete(method)) off.add(method);
      button.setAttribute("aria-pressed", `${!off.has(method)}`);
      draw();
    });
    legend.append(button);
  });
}

for (const host of document.querySelectorAll("[data-chart]")) makeChart(host);
