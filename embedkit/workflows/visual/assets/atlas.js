"use strict";
// The atlas: a map of small images on a canvas. d3-zoom moves it, d3-quadtree finds what lies under the pointer.
// Text from file names only ever becomes textContent.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const xs = new Uint16Array(bytes(data.x).buffer), ys = new Uint16Array(bytes(data.y).buffer);
  const sizes = bytes(data.sizes); // width and height of every thumbnail, in pixels
  const group = new Uint16Array(bytes(data.group).buffer);
  const near = new Uint32Array(bytes(data.neighbors).buffer), cosines = new Int16Array(bytes(data.cosines).buffer);
  const count = xs.length, depth = data.depth, edge = data.edge, across = data.across;
  const names = data.names; // without what they all begin with
  const all = d3.range(count);

  // ---- colors: twelve for the largest groups, told apart on light and on dark; the others share a gray
  const palette = ["#4e79a7", "#e8853b", "#4f9f50", "#d1495b", "#8d6cc2", "#1d9a9a", "#c79a1b", "#d977a8", "#8c6d54",
    "#7aa5d8", "#93b83a", "#b0568f"];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  let ink, page, mark, plain, other;
  function readTheme() {
    [ink, page, mark, plain, other] = ["--ink", "--page", "--mark", "--plain", "--other"].map(css);
  }
  const colorOf = (number) => !data.groups.length ? plain
    : data.groups[number].plain || number >= palette.length ? other : palette[number];

  // ---- the view
  const canvas = $("map"), pen = canvas.getContext("2d");
  let width = 0, height = 0, base = 1, left = 0, top = 0, view = d3.zoomIdentity;
  const spanX = Math.max(1, d3.max(xs)), spanY = Math.max(1, d3.max(ys));
  const worldX = (i) => left + xs[i] * base, worldY = (i) => top + ys[i] * base;
  const screen = (i) => [view.applyX(worldX(i)), view.applyY(worldY(i))];
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const zoom = d3.zoom().scaleExtent([0.7, 600]).on("zoom", (event) => {
    view = event.transform;
    hideTip();
    redraw();
  });
  let tree = null;

  function resize() {
    const ratio = devicePixelRatio || 1, box = canvas.getBoundingClientRect();
    const middle = width ? view.invert([width / 2, height / 2]) : null;
    const before = { base, left, top };
    [width, height] = [box.width, box.height];
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    const margin = 48;
    base = Math.max(1e-6, Math.min((width - 2 * margin) / spanX, (height - 2 * margin) / spanY));
    left = (width - spanX * base) / 2;
    top = (height - spanY * base) / 2;
    levels.clear();
    tree = d3.quadtree(all, worldX, worldY);
    zoom.extent([[0, 0], [width, height]]).translateExtent([[-width, -height], [2 * width, 2 * height]]);
    if (middle) { // what was in the middle stays there
      const x = left + (middle[0] - before.left) / before.base * base;
      const y = top + (middle[1] - before.top) / before.base * base;
      view = d3.zoomIdentity.translate(width / 2 - view.k * x, height / 2 - view.k * y).scale(view.k);
      canvas.__zoom = view;
    }
    redraw();
  }

  function move(change, ...rest) {
    const target = d3.select(canvas);
    (still.matches ? target : target.transition().duration(300)).call(change, ...rest);
  }
  const whole = () => move(zoom.transform, d3.zoomIdentity);

  function bringIntoView(i) {
    const [x, y] = screen(i), margin = 60;
    if (x < margin || y < margin || x > width - margin || y > height - margin) {
      move(zoom.translateTo, worldX(i), worldY(i));
    }
  }

  // ---- which images have room: by scale alone, so that moving the map changes none
  const order = d3.shuffler(d3.randomLcg(0.5))(d3.range(count));
  const levels = new Map();
  const side = (k) => Math.min(1.3 * edge, 36 * Math.pow(Math.max(k, 1), 0.35));

  function withRoom() {
    const step = Math.round(Math.log2(view.k) * 4), known = levels.get(step);
    if (known) return known;
    const k = 2 ** (step / 4), gap = 1.08 * side(k) / k, taken = new Map(), shown = [];
    for (const i of order) {
      if (!isLit(i)) continue;
      const x = worldX(i), y = worldY(i), cx = Math.floor(x / gap), cy = Math.floor(y / gap);
      let free = true;
      for (let dx = -1; dx < 2 && free; dx++) {
        for (let dy = -1; dy < 2 && free; dy++) {
          const j = taken.get((cx + dx) * 1e6 + cy + dy);
          free = j === undefined || Math.abs(worldX(j) - x) >= gap || Math.abs(worldY(j) - y) >= gap;
        }
      }
      if (free) {
        taken.set(cx * 1e6 + cy, i);
        shown.push(i);
      }
    }
    levels.set(step, shown);
    return shown;
  }

  // ---- what is lit: the groups that are pressed, and what the search finds
  const pressed = new Set();
  let matches = null, selected = -1, hovered = -1;
  const isLit = (i) => (!pressed.size || pressed.has(group[i])) && (!matches || matches.has(i));
  function lightAnew() {
    levels.clear();
    redraw();
  }

  // ---- drawing
  const sheets = [];
  let waiting = 0;
  function redraw() {
    if (!waiting) waiting = requestAnimationFrame(draw);
  }

  function paint(target, i, x, y, room) {
    const sheet = sheets[Math.floor(i / (across * across))];
    const w = sizes[2 * i], h = sizes[2 * i + 1], scale = room / Math.max(w, h);
    if (sheet) {
      const cell = i % (across * across);
      // Half a pixel is left out all around, or the next image of the sheet would shine in.
      const inset = Math.min(0.5, w / 4, h / 4);
      target.drawImage(sheet, cell % across * edge + inset, Math.floor(cell / across) * edge + inset,
        w - 2 * inset, h - 2 * inset, x - w * scale / 2, y - h * scale / 2, w * scale, h * scale);
    }
    return [x - w * scale / 2, y - h * scale / 2, w * scale, h * scale];
  }

  function image(i, room, color, line) {
    const [x, y] = screen(i);
    if (x < -room || y < -room || x > width + room || y > height + room) return false;
    const box = paint(pen, i, x, y, room);
    pen.lineWidth = line;
    pen.strokeStyle = color;
    pen.strokeRect(...box);
    drawn.push([i, box]);
    return true;
  }

  let drawn = []; // of the last frame, the topmost last
  function draw() {
    waiting = 0;
    drawn = [];
    pen.fillStyle = page;
    pen.fillRect(0, 0, width, height);
    const radius = Math.min(5, Math.max(1.5, 3.2 - Math.log10(count) / 2 + Math.log2(Math.max(view.k, 1)) / 2));
    const paths = new Map();
    for (let i = 0; i < count; i++) {
      const [x, y] = screen(i);
      if (x < -radius || y < -radius || x > width + radius || y > height + radius) continue;
      const key = isLit(i) ? group[i] : -1;
      if (!paths.has(key)) paths.set(key, new Path2D());
      paths.get(key).rect(x - radius, y - radius, 2 * radius, 2 * radius);
    }
    for (const [key, path] of paths) {
      pen.globalAlpha = key < 0 ? 0.25 : 0.9;
      pen.fillStyle = key < 0 ? other : colorOf(key);
      pen.fill(path);
    }
    pen.globalAlpha = 1;
    const room = side(view.k);
    let images = 0;
    for (const i of withRoom()) images += image(i, room, colorOf(group[i]), 2);
    if (view.k < 4 && !matches) drawNames();
    if (selected >= 0) drawSelection(room);
    if (hovered >= 0 && hovered !== selected) image(hovered, 1.5 * room, ink, 2);
    if (document.activeElement === canvas && canvas.matches(":focus-visible")) drawCross();
    canvas.dataset.view = [view.k, view.x, view.y].map((value) => value.toFixed(3)).join(" ");
    canvas.dataset.images = images;
  }

  const middles = data.groups.map((_, number) => {
    const members = all.filter((i) => group[i] === number);
    return [d3.median(members, (i) => xs[i]), d3.median(members, (i) => ys[i])];
  });
  function drawNames() {
    pen.font = "600 14px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.lineJoin = "round";
    data.groups.forEach(({ name, plain: dull }, number) => {
      if (dull || number >= palette.length || pressed.size && !pressed.has(number)) return;
      const x = view.applyX(left + middles[number][0] * base), y = view.applyY(top + middles[number][1] * base);
      pen.lineWidth = 5;
      pen.strokeStyle = page;
      pen.strokeText(name, x, y);
      pen.fillStyle = ink;
      pen.fillText(name, x, y);
    });
  }

  function drawSelection(room) {
    const [x, y] = screen(selected), others = neighborsOf(selected);
    pen.strokeStyle = mark;
    pen.lineWidth = 1.5;
    pen.beginPath();
    for (const [j] of others) {
      pen.moveTo(x, y);
      pen.lineTo(...screen(j));
    }
    pen.stroke();
    for (const [j] of others.reverse()) image(j, room, mark, 2.5);
    image(selected, 1.5 * room, mark, 4);
  }

  function drawCross() {
    pen.strokeStyle = mark;
    pen.lineWidth = 2;
    pen.beginPath();
    for (const [dx, dy] of [[10, 0], [0, 10]]) {
      pen.moveTo(width / 2 - dx, height / 2 - dy);
      pen.lineTo(width / 2 + dx, height / 2 + dy);
    }
    pen.stroke();
  }

  // ---- pointing
  function under(x, y) {
    for (let at = drawn.length - 1; at >= 0; at--) {
      const [i, [bx, by, bw, bh]] = drawn[at];
      if (x >= bx && x <= bx + bw && y >= by && y <= by + bh) return i;
    }
    const i = tree.find(...view.invert([x, y]), 12 / view.k);
    return i === undefined ? -1 : i;
  }
  function hideTip() {
    $("tip").hidden = true;
    hovered = -1;
  }
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons || event.pointerType === "touch") return;
    const i = under(event.offsetX, event.offsetY), tip = $("tip");
    if (i !== hovered) {
      hovered = i;
      tip.hidden = i < 0;
      if (i >= 0) tip.textContent = described(i);
      redraw();
    }
    if (i >= 0) {
      tip.style.left = `${Math.max(4, Math.min(event.offsetX + 14, width - tip.offsetWidth - 8))}px`;
      tip.style.top = `${Math.min(event.offsetY + 18, height - tip.offsetHeight - 8)}px`;
    }
  });
  canvas.addEventListener("pointerleave", () => {
    hideTip();
    redraw();
  });
  canvas.addEventListener("click", (event) => select(under(event.offsetX, event.offsetY)));
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [80, 0], ArrowRight: [-80, 0], ArrowUp: [0, 80], ArrowDown: [0, -80] };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (steps[event.key]) move(zoom.translateBy, ...steps[event.key].map((step) => step / view.k));
    else if (event.key === "+" || event.key === "=") move(zoom.scaleBy, 1.5);
    else if (event.key === "-") move(zoom.scaleBy, 1 / 1.5);
    else if (event.key === "0") whole();
    else if (event.key === "Enter" || event.key === " ") {
      select(tree.find(...view.invert([width / 2, height / 2])) ?? -1);
    } else return;
    event.preventDefault();
  });
  for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, redraw);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") select(-1);
    if (event.key === "/" && event.target !== $("query")) {
      event.preventDefault();
      $("query").focus();
    }
  });
  $("in").addEventListener("click", () => move(zoom.scaleBy, 2));
  $("out").addEventListener("click", () => move(zoom.scaleBy, 0.5));
  $("reset").addEventListener("click", whole);

  // ---- one image
  function neighborsOf(i) {
    return d3.range(depth).map((at) => [near[i * depth + at], cosines[i * depth + at] / 10000]);
  }
  function groupOf(i) {
    if (!data.groups.length) return "";
    const { name } = data.groups[group[i]];
    return name.startsWith(data.grouping) || data.groups[group[i]].plain ? name : `${data.grouping}: ${name}`;
  }
  const described = (i) => names[i] + (data.groups.length ? ` (${groupOf(i)})` : "");
  function button(list, ...children) {
    const item = document.createElement("li"), made = document.createElement("button");
    made.type = "button";
    made.append(...children);
    item.append(made);
    list.append(item);
    return made;
  }
  function small(i, pixels) {
    const made = document.createElement("canvas");
    made.width = made.height = 2 * pixels;
    paint(made.getContext("2d"), i, pixels, pixels, 2 * pixels);
    return made;
  }
  function select(i) {
    selected = i;
    $("selection").hidden = i < 0;
    if (i >= 0) {
      $("name").textContent = names[i];
      $("about").textContent = groupOf(i);
      const large = $("preview"), brush = large.getContext("2d");
      brush.clearRect(0, 0, large.width, large.height);
      const ratio = sizes[2 * i] / sizes[2 * i + 1];
      brush.imageSmoothingQuality = "high";
      paint(brush, i, large.width / 2, large.height / 2,
        Math.min(large.width, large.height * ratio) * Math.max(1, 1 / ratio));
      $("neighbors").replaceChildren();
      for (const [j, cosine] of neighborsOf(i)) {
        const made = button($("neighbors"), small(j, 60), cosine.toFixed(2));
        made.title = described(j);
        made.setAttribute("aria-label", `${names[j]}, cosine ${cosine.toFixed(2)}`);
        made.addEventListener("click", () => {
          select(j);
          bringIntoView(j);
        });
      }
    }
    redraw();
  }

  // ---- search
  $("query").addEventListener("input", () => {
    const text = $("query").value.trim().toLowerCase();
    const found = text ? all.filter((i) => names[i].toLowerCase().includes(text)) : [];
    matches = text ? new Set(found) : null;
    $("found").textContent = !text ? "" : found.length === 1 ? "1 image" : `${found.length} images`;
    $("results").replaceChildren();
    for (const i of found.slice(0, 50)) {
      const label = document.createElement("span");
      label.textContent = names[i];
      button($("results"), label).addEventListener("click", () => show(i));
    }
    lightAnew();
  });
  $("query").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && matches && matches.size) show(matches.values().next().value);
  });
  function show(i) {
    select(i);
    bringIntoView(i);
  }

  // ---- legend
  if (data.groups.length) {
    $("groups").hidden = false;
    $("grouping").textContent = data.grouping;
    data.groups.forEach((one, number) => {
      const swatch = document.createElement("i"), name = document.createElement("span");
      const size = document.createElement("span");
      swatch.dataset.group = number;
      name.textContent = one.name;
      size.textContent = one.size.toLocaleString("en");
      const made = button($("legend"), swatch, name, size);
      made.setAttribute("aria-pressed", "false");
      made.addEventListener("click", () => {
        pressed.has(number) ? pressed.delete(number) : pressed.add(number);
        made.setAttribute("aria-pressed", String(pressed.has(number)));
        lightAnew();
      });
    });
  }
  function dress() {
    readTheme();
    for (const swatch of document.querySelectorAll("#legend i")) {
      swatch.style.background = colorOf(Number(swatch.dataset.group));
    }
    redraw();
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dress);

  // ---- begin
  $("facts").textContent = data.facts;
  dress();
  d3.select(canvas).call(zoom);
  new ResizeObserver(resize).observe(canvas);
  resize();
  const loaded = [...document.querySelectorAll("#sheets img")].map(async (image, at) => {
    await image.decode();
    sheets[at] = await createImageBitmap(image);
    image.remove();
    redraw();
  });
  Promise.all(loaded).then(() => {
    if (selected >= 0) select(selected);
    requestAnimationFrame(() => { document.documentElement.dataset.ready = "yes"; });
  });
  // For scripts that drive the page.
  window.atlas = { screen, select, names, neighborsOf };
})();
