// Scales of a chart from values to pixels, their ticks, and the front of points on two of them.

const LOG_FROM = 3; // ratio of the largest to the smallest value from which an axis is logarithmic

function shortNumber(value) {
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) {
    return value.toExponential().replace("e+", "e");
  }
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

// A scale from values to pixels: `place(value)`, with ticks; logarithmic where values explode.
function makeScale(values, from, to) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const logarithmic = low > 0 && high / low > LOG_FROM;
  const bend = logarithmic ? Math.log10 : (value) => value;
  const margin = 0.08 * (bend(high) - bend(low)) || 0.05 * Math.abs(bend(high)) || 0.5;
  const [start, end] = [bend(low) - margin, bend(high) + margin];
  const place = (value) => from + ((bend(value) - start) / (end - start)) * (to - from);
  const within = (ticks) => ticks.filter((tick) => bend(tick) >= start && bend(tick) <= end);
  return { place, logarithmic, ticks: logarithmic ? logTicks(within, start, end)
    : within(linearTicks(start, end)) };
}

function logTicks(within, start, end) {
  let ticks = [];
  for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 6, 8]]) {
    ticks = [];
    for (let power = Math.floor(start); power <= end; power += 1) {
      for (const step of steps) ticks.push(Number(`${step}e${power}`));
    }
    ticks = within(ticks);
    if (ticks.length >= 4) break;
  }
  return ticks;
}

function linearTicks(start, end) {
  const rough = (end - start) / 6;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 2.5, 5, 10].find((times) => unit * times >= rough);
  const ticks = [];
  for (let count = Math.ceil(start / step); count * step <= end; count += 1) {
    ticks.push(Number((count * step).toPrecision(12)));
  }
  return ticks;
}

// Marks the points that no other beats in both axes; returns the corners of their border.
function findFront(points, across, up) {
  const sign = (axis) => (axis.better === "more" ? -1 : 1);
  const ordered = points
    .map((point) => ({ point, u: sign(across) * point.x, v: sign(up) * point.y }))
    .sort((a, b) => a.u - b.u || a.v - b.v);
  const corners = [];
  let last = null;
  for (const { point, u, v } of ordered) {
    point.best = !last || v < last.v || (v === last.v && u === last.u);
    if (!point.best) continue;
    if (last) corners.push([point.x, last.point.y]);
    corners.push([point.x, point.y]);
    last = { point, u, v };
  }
  return corners;
}
