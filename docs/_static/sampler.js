/* The figure to play with in the chapter `sampler`: points of a region, farthest point sampling, neighbours.
   The geometry is that of ferret_lite/points.py, loop by loop; a test in docs/tests compares the two. */
"use strict";

// Geometry ------------------------------------------------------------------------------------------------------------

const SIZE = 64;  // pixels a side of the image
const near = (x, y, ax, ay, bx, by) => {  // distance of (x, y) from the line a to b
  const dx = bx - ax, dy = by - ay;
  const t = Math.max(0, Math.min(1, ((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy || 1)));
  return Math.hypot(x - ax - t * dx, y - ay - t * dy);
};
const PATH = [[8, 20], [16, 10], [28, 12], [34, 30], [44, 48], [56, 40]];  // the scribble of the chapter `points`
const inside = (x, y, x1, y1, x2, y2) => x1 <= x && x < x2 && y1 <= y && y < y2;
const REGIONS = {  // is the pixel with the centre (x, y) part of the region?
  disc: (x, y) => Math.hypot(x - 32, y - 32) <= 24,
  L: (x, y) => inside(x, y, 12, 8, 28, 56) || inside(x, y, 12, 40, 52, 56),
  ring: (x, y) => { const d = Math.hypot(x - 32, y - 32); return 16 <= d && d <= 26; },
  scribble: (x, y) => PATH.slice(1).some((b, i) => near(x, y, ...PATH[i], ...b) <= 4.5),
  "two parts": (x, y) => inside(x, y, 4, 4, 44, 44) || inside(x, y, 54, 54, 61, 61),
  click: (x, y) => Math.hypot(x - 32, y - 32) <= 2,
};

/* Pixels [column, row] of a region, in reading order. */
function regionPixels(test) {
  const found = [];
  for (let row = 0; row < SIZE; row++)
    for (let column = 0; column < SIZE; column++) if (test(column + 0.5, row + 0.5)) found.push([column, row]);
  return found;
}

/* Numbers in [0, 1) that the same seed gives again (mulberry32). */
function random(seed) {
  return () => {
    let t = (seed = (seed + 0x6d2b79f5) | 0);
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

/* `sample_points`: n positions xy in [0, 1]; enough pixels: their centres, each once; too few: with repeats, moved. */
function samplePoints(pixels, n, draw) {
  if (n > pixels.length)
    return Array.from({ length: n }, () => {
      const [column, row] = pixels[Math.floor(draw() * pixels.length)];
      return [(column + draw()) / SIZE, (row + draw()) / SIZE];
    });
  const rest = pixels.slice();
  return Array.from({ length: n }, () => {
    const at = Math.floor(draw() * rest.length), [column, row] = rest[at];
    rest[at] = rest[rest.length - 1];
    rest.pop();
    return [(column + 0.5) / SIZE, (row + 0.5) / SIZE];
  });
}

const squared = (p, q) => (p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2;

/* `fps`: indices of m points; start at the first, then always the point farthest from all those taken. */
function fps(points, m) {
  const nearest = points.map(() => Infinity), taken = [0];
  while (taken.length < m) {
    const last = points[taken[taken.length - 1]];
    let far = 0;
    for (let i = 0; i < points.length; i++) {
      nearest[i] = Math.min(nearest[i], squared(points[i], last));
      if (nearest[i] > nearest[far]) far = i;
    }
    taken.push(far);
  }
  return taken;
}

/* `knn`: indices of the k points nearest to one query, nearest first. */
function knn(query, points, k) {
  const gaps = points.map((p) => squared(p, query));
  return gaps.map((_, i) => i).sort((i, j) => gaps[i] - gaps[j] || i - j).slice(0, k);
}

/* The points before and after each block: block b keeps one point in `ratio` of what block b - 1 kept. */
function sampleBlocks(points, ratio, count) {
  const blocks = [];
  for (let b = 0; b < count; b++) {
    const kept = fps(points, Math.max(1, Math.floor(points.length / ratio))).map((i) => points[i]);
    blocks.push({ points, kept });
    points = kept;
  }
  return blocks;
}

/* How far the worst served point is from a kept one, in pixels. */
const worstGap = (points, kept) =>
  SIZE * Math.sqrt(Math.max(...points.map((p) => Math.min(...kept.map((q) => squared(p, q))))));

// The page ------------------------------------------------------------------------------------------------------------

/* An element with attributes and children; with `svg` one of a drawing. */
function make(name, attributes = {}, children = [], svg = false) {
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}
const draw = (name, attributes, children) => make(name, attributes, children, true);

/* The pixels of a region as one path of squares. */
const outline = (pixels) => draw("path", { class: "region", d: pixels.map(([x, y]) => `M${x} ${y}h1v1h-1z`).join("") });

/* A labelled slider whose number stands beside it. */
function slider(id, label, state, key, [min, max, step], redraw) {
  const input = make("input", { type: "range", id, min, max, step, value: state[key] });
  const output = make("output", { for: id });
  input.addEventListener("input", () => { state[key] = Number(input.value); redraw(); });
  const show = () => { input.value = state[key]; output.textContent = state[key]; };
  return { line: make("div", { class: "line" }, [make("label", { for: id }, [label]), input, output]), input, show };
}

/* A row of buttons of which one is pressed. */
function choice(label, names, state, key, redraw, dress = (name) => [name]) {
  const buttons = names.map((name) => {
    const button = make("button", { type: "button" }, dress(name));
    button.addEventListener("click", () => { state[key] = name; state.centre = 1; redraw(); });
    return button;
  });
  const show = () => buttons.forEach((b, i) => b.setAttribute("aria-pressed", names[i] === state[key]));
  return { line: make("div", { class: "line", role: "group", "aria-label": label }, buttons), show };
}

/* What the figure shows, in words: read aloud after each change. */
function summary(state, pixels, { points, kept }, heard) {
  const reach = SIZE * Math.sqrt(Math.max(...heard.map((p) => squared(p, kept[state.centre - 1]))));
  const times = ((kept.length * heard.length) / points.length).toFixed(1);
  const name = state.region[0].toUpperCase() + state.region.slice(1);
  return `${name}: ${pixels.length} pixels. Block ${state.block} keeps ${kept.length} of ${points.length} points; ` +
    `no point is farther than ${worstGap(points, kept).toFixed(1)} pixels from a kept one. ` +
    `Centre ${state.centre} of ${kept.length} hears ${heard.length} neighbours, up to ${reach.toFixed(1)} pixels ` +
    `away. On average a point is heard by ${times} centres.`;
}

/* The drawing itself: dropped points, kept ones (hollow until their turn), the picked centre and its neighbours. */
function paint(svg, state, pixels, { points, kept }, heard) {
  const at = ([x, y]) => ({ cx: SIZE * x, cy: SIZE * y });
  const centre = kept[state.centre - 1];
  svg.replaceChildren(
    outline(pixels),
    ...points.map((p) => draw("circle", { class: "point", r: 0.35, ...at(p) })),
    ...heard.map((p) => draw("line", { class: "heard", x1: SIZE * centre[0], y1: SIZE * centre[1],
                                       x2: SIZE * p[0], y2: SIZE * p[1] })),
    ...heard.map((p) => draw("circle", { class: "heard", r: 0.55, ...at(p) })),
    ...kept.map((p, i) => draw("circle", { class: i < state.centre ? "kept taken" : "kept", r: 0.7, ...at(p) })),
    draw("circle", { class: "centre", r: 1.3, ...at(centre) }),
  );
}

/* Build the figure inside one element of the page. */
function samplerFigure(root) {
  const state = { region: "ring", points: 512, ratio: 4, k: 24, block: 1, centre: 1, seed: 0 };
  const svg = draw("svg", { viewBox: `0 0 ${SIZE} ${SIZE}`, role: "img",
                            "aria-label": "The region, its points, the kept points and one centre's neighbours" });
  const text = make("p", { "aria-live": "polite", class: "summary" });
  let block = null;  // of the last drawing
  const redraw = () => {
    const pixels = regionPixels(REGIONS[state.region]);
    const points = samplePoints(pixels, state.points, random(state.seed));
    block = sampleBlocks(points, state.ratio, state.block)[state.block - 1];
    state.centre = Math.min(state.centre, block.kept.length);
    centre.input.max = block.kept.length;
    const heard = knn(block.kept[state.centre - 1], block.points, state.k).map((i) => block.points[i]);
    controls.forEach((control) => control.show());
    paint(svg, state, pixels, block, heard);
    text.textContent = summary(state, pixels, block, heard);
  };
  const icon = (name) => [draw("svg", { viewBox: `0 0 ${SIZE} ${SIZE}`, "aria-hidden": true },
                               [outline(regionPixels(REGIONS[name]))]), name];
  const centre = slider("sampler-centre", "Centre, in the order taken", state, "centre", [1, 1, 1], redraw);
  const controls = [
    choice("Region", Object.keys(REGIONS), state, "region", redraw, icon),
    choice("Block", [1, 2, 3], state, "block", redraw, (b) => [`block ${b}`]),
    slider("sampler-points", "Points drawn, N", state, "points", [32, 512, 32], redraw),
    slider("sampler-ratio", "Kept: one point in r", state, "ratio", [2, 8, 1], redraw),
    slider("sampler-k", "Neighbours, k", state, "k", [1, 48, 1], redraw),
    centre,
  ];
  const again = make("button", { type: "button" }, ["Draw other points"]);
  again.addEventListener("click", () => { state.seed += 1; redraw(); });
  svg.addEventListener("click", (event) => {  // the kept point nearest to the pointer becomes the centre
    const box = svg.getBoundingClientRect();
    const place = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    state.centre = 1 + knn(place, block.kept, 1)[0];
    redraw();
  });
  const panel = make("div", { class: "controls" }, [...controls.slice(1).map((control) => control.line), again]);
  root.replaceChildren(controls[0].line, make("div", { class: "scene" }, [svg, panel]), text);
  redraw();
}

window.ferretSampler = { REGIONS, regionPixels, random, samplePoints, fps, knn, sampleBlocks, worstGap };
document.querySelectorAll(".sampler-figure").forEach(samplerFigure);
