"use strict";
(() => {
  const data = JSON.parse(document.getElementById("figures").textContent);
  const byId = (id) => document.getElementById(id);
  const tasks = data.tasks;
  const layers = data.layers;

  // --- text -----------------------------------------------------------------------------------

  const count = (value) => value.toLocaleString("en", { maximumFractionDigits: 1 });
  const short = (value) =>
    value < 1e4 ? count(value) : value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 });
  const digits = (value, figures = 2) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-3) return value.toExponential(figures - 1).replace("e+", "e");
    return Number(value.toPrecision(figures)).toString();
  };
  const percent = (value) => {
    const hundredth = 100 * value;
    if (hundredth === 0 || hundredth >= 99.95) return `${Math.round(hundredth)} %`;
    return `${hundredth >= 10 ? hundredth.toFixed(0) : digits(hundredth)} %`;
  };
  const bytes = (value) => {
    const units = ["B", "kB", "MB", "GB", "TB"];
    const power = Math.min(Math.floor(Math.log10(Math.max(value, 1)) / 3), units.length - 1);
    return `${digits(value / 1000 ** power, 3)} ${units[power]}`;
  };
  const day = (time) => time.slice(0, 10);
  const plural = (number, word) => `${short(number)} ${word}${number === 1 ? "" : "s"}`;

  const make = (tag, properties = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.startsWith("--")) element.style.setProperty(name, value);
      else if (name in element && name !== "role") element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };
  // Names are broken after their dots and dashes, if they can be.
  const breakable = (name) => {
    const parts = name.split(/(?<=[./-])/);
    return parts.flatMap((part, at) => (at ? [document.createElement("wbr"), part] : [part]));
  };

  // --- details beside the pointer or the focus --------------------------------------------------

  const tip = byId("tip");
  let explained = null; // what the details are about
  const hide = () => { tip.hidden = true; explained = null; };
  const place = () => {
    const box = explained.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = tip;
    const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), innerWidth - width - 8);
    const above = box.top - height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : Math.min(box.bottom + 8, innerHeight - height - 8)}px`;
  };
  const show = (anchor, title, lines) => {
    tip.replaceChildren(make("b", {}, title), ...lines.map((line) => make("div", {}, line)));
    tip.hidden = false;
    explained = anchor;
    place();
  };
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  // Moving the focus scrolls: the details follow it. Those of the pointer end.
  addEventListener("scroll", () => {
    if (explained && document.activeElement.contains(explained)) place();
    else hide();
  }, { capture: true, passive: true });

  // --- a grid of cells with one tab stop --------------------------------------------------------

  // `rows`: {title, cells: [{v: 0…1 or null, text, lines}]}; columns: titles.
  const grid = (table, corner, columns, rows) => {
    table.style.setProperty("--columns", columns.length);
    table.setAttribute("aria-rowcount", rows.length + 1);
    const head = make("tr", {}, make("th", { scope: "col" }, corner),
      ...columns.map((name) => make("th", { scope: "col", title: name }, make("div", {}, ...breakable(name)))));
    table.classList.toggle("many", columns.length > 5);
    const body = make("tbody");
    for (const [y, row] of rows.entries()) {
      const line = make("tr", {}, make("th", { scope: "row" }, ...breakable(row.title)));
      for (const [x, cell] of row.cells.entries()) {
        const face = make("span", { "--v": cell.v ?? 0 }, cell.v === null ? "" : cell.text);
        const name = `${row.title}, ${columns[x]}: ${cell.lines.join(", ")}`;
        const kind = cell.v === null ? "absent" : cell.v > 0.665 ? "strong stronger" : cell.v > 0.55 ? "strong" : "";
        const td = make("td", { role: "gridcell", className: kind, tabIndex: x || y ? -1 : 0, "aria-label": name }, face);
        td.dataset.x = x;
        td.dataset.y = y;
        line.append(td);
      }
      body.append(line);
    }
    table.replaceChildren(make("thead", {}, head), body);
    const cellAt = (x, y) => body.rows[y]?.cells[x + 1];
    const explain = (td) => {
      const row = rows[td.dataset.y];
      show(td, `${row.title} · ${columns[td.dataset.x]}`, row.cells[td.dataset.x].lines);
    };
    const target = (event) => event.target.closest("td");
    table.onmouseover = (event) => { const td = target(event); if (td) explain(td); };
    table.onmouseleave = hide;
    body.addEventListener("focusout", hide);
    table.onkeydown = (event) => {
      const td = target(event);
      if (!td) return;
      const [x, y] = [Number(td.dataset.x), Number(td.dataset.y)];
      const [lastX, lastY] = [columns.length - 1, rows.length - 1];
      const clamp = (at, last) => Math.min(Math.max(at, 0), last);
      const moves = {
        ArrowRight: [x + 1, y], ArrowLeft: [x - 1, y], ArrowDown: [x, y + 1], ArrowUp: [x, y - 1],
        Home: [0, event.ctrlKey ? 0 : y], End: [lastX, event.ctrlKey ? lastY : y],
        PageDown: [x, y + 10], PageUp: [x, y - 10],
      };
      const to = moves[event.key];
      if (!to) return;
      event.preventDefault();
      focus(cellAt(clamp(to[0], lastX), clamp(to[1], lastY)));
    };
    const focus = (td) => {
      table.querySelector("td[tabindex='0']")?.setAttribute("tabindex", "-1");
      td.tabIndex = 0;
      td.focus({ preventScroll: true });
      reveal(td);
      explain(td);
    };
    table.onclick = (event) => { const td = target(event); if (td) focus(td); };
    body.addEventListener("focusin", (event) => { const td = target(event); if (td) explain(td); });
  };
  // Scrolls a cell out from under the headers, which stay in place.
  const reveal = (td) => {
    const area = td.closest(".scroll");
    const table = td.closest("table");
    const top = table.tHead.offsetHeight;
    const left = td.parentElement.cells[0].offsetWidth;
    const [box, frame] = [td.getBoundingClientRect(), area.getBoundingClientRect()];
    if (box.top < frame.top + top) area.scrollTop -= frame.top + top - box.top;
    if (box.bottom > frame.bottom) area.scrollTop += box.bottom - frame.bottom;
    if (box.left < frame.left + left) area.scrollLeft -= frame.left + left - box.left;
    if (box.right > frame.right) area.scrollLeft += box.right - frame.right;
    td.scrollIntoView({ block: "nearest", inline: "nearest" });
  };

  // --- head -----------------------------------------------------------------------------------

  const weights = Math.max(...tasks.map((task) => task.weights));
  const days = tasks.map((task) => day(task.time)).sort();
  const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];
  const ninety = median(tasks.map((task) => task.carriers[1]));
  byId("name").textContent = data.name;
  byId("summary").textContent =
    tasks.length === 1
      ? `${percent(ninety)} of the weights carry 90 % of what matters for ${tasks[0].name}.`
      : `In the median task, ${percent(ninety)} of the weights carry 90 % of the importance.`;
  const facts = [
    ["tasks", count(tasks.length)], ["layers", count(layers.length)], ["weights", short(weights)],
    ["on disk", bytes(tasks.reduce((sum, task) => sum + task.bytes, 0))],
    ["recorded", days[0] === days.at(-1) ? days[0] : `${days[0]} to ${days.at(-1)}`],
  ];
  byId("facts").append(...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));

  // --- heat map -------------------------------------------------------------------------------

  const finite = (table) => table.flat().filter((value) => value !== null && value > 0);
  const extreme = (values, best, none) => values.reduce((a, b) => best(a, b), none);
  const scales = {
    density() {
      const table = data.mean.map((row) => row.map((value, at) =>
        value === null ? null : tasks[at].mean ? value / tasks[at].mean : 0));
      const known = finite(table);
      const high = Math.log10(extreme(known, Math.max, 1e-300));
      const low = Math.max(Math.log10(extreme(known, Math.min, 1e300)), high - 4);
      const place = (value) => (value <= 0 ? 0 : high > low ? Math.min(Math.max((Math.log10(value) - low) / (high - low), 0), 1) : 1);
      return { table, place, text: (value) => digits(value), ends: [`${digits(10 ** low)} ×`, `${digits(10 ** high)} × the task’s mean`] };
    },
    share() {
      const high = extreme(finite(data.share), Math.max, 1e-300);
      return { table: data.share, place: (value) => Math.sqrt(value / high), text: percent, ends: ["0 %", `${percent(high)} of the task`] };
    },
    carriers() {
      const table = data.carriers.map((row) => row.map((value) => value && value[1]));
      const high = extreme(finite(table), Math.max, 1e-300);
      return { table, place: (value) => value / high, text: percent, ends: ["few weights", `${percent(high)} of the layer’s weights`] };
    },
    output: () => rankScale("output"),
    input: () => rankScale("input"),
  };
  // Of records with Kronecker factors; of a layer with several matrices, the largest.
  const rankScale = (side) => {
    const table = data.ranks.map((row) => row.map((matrices) =>
      matrices.length ? Math.max(...matrices.map((one) => one[side])) : null));
    const high = extreme(finite(table), Math.max, 1e-300);
    return { table, place: (value) => value / high, text: (value) => digits(value, 3), ends: ["1 direction", `${digits(high, 3)} directions`] };
  };
  if (data.ranks) {
    byId("measure").append(make("option", { value: "output" }, "effective rank of the outputs’ gradients"),
      make("option", { value: "input" }, "effective rank of the inputs"));
  }
  const details = (row, column) => {
    const mean = data.mean[row][column];
    if (mean === null) return ["not in this task’s record"];
    const ratio = tasks[column].mean ? mean / tasks[column].mean : 0;
    const [half, most, nearly] = data.carriers[row][column];
    return [
      `${digits(ratio, 3)} × the task’s mean importance`,
      `${percent(data.share[row][column])} of its importance, in ${percent(layers[row].weights / tasks[column].weights)} of the weights`,
      `50, 90, 99 % are carried by ${percent(half)}, ${percent(most)}, ${percent(nearly)}`,
      `mean ${digits(mean, 3)}, largest ${digits(data.largest[row][column], 3)}`,
      ...(data.ranks?.[row][column] ?? []).map((one) =>
        `effective rank ${digits(one.output, 3)} of outputs, ${digits(one.input, 3)} of inputs: ${one.weight}`),
    ];
  };
  const drawHeat = () => {
    const scale = scales[byId("measure").value]();
    const wanted = byId("filter").value.trim().toLowerCase();
    let shown = layers.map((_, at) => at).filter((at) => layers[at].name.toLowerCase().includes(wanted));
    if (byId("order").value === "value") {
      const size = (at) => Math.max(...scale.table[at].map((value) => value ?? -1));
      shown = shown.sort((a, b) => size(b) - size(a));
    }
    [byId("low").textContent, byId("high").textContent] = scale.ends;
    byId("count").textContent = shown.length === layers.length ? "" : `${shown.length} of ${layers.length} layers.`;
    grid(byId("heat"), "layer", tasks.map((task) => task.name), shown.map((at) => ({
      title: layers[at].name,
      cells: scale.table[at].map((value, column) => ({
        v: value === null ? null : scale.place(value),
        text: value === null ? "" : scale.text(value),
        lines: details(at, column),
      })),
    })));
  };
  for (const id of ["measure", "order"]) byId(id).addEventListener("change", drawHeat);
  byId("filter").addEventListener("input", drawHeat);
  drawHeat();

  // --- overlap --------------------------------------------------------------------------------

  const drawOverlap = () => {
    const table = data.overlap[byId("likeness").value];
    grid(byId("overlap"), "", tasks.map((task) => task.name), tasks.map((task, row) => ({
      title: task.name,
      cells: table[row].map((value, column) => ({
        v: value,
        text: value.toFixed(2),
        lines: [
          `top ${percent(data.top)}: ${digits(data.overlap.jaccard[row][column], 3)} in common`,
          `Fisher overlap ${digits(data.overlap.fisher[row][column], 3)}`,
          `cosine ${digits(data.overlap.cosine[row][column], 3)}`,
        ],
      })),
    })));
  };
  byId("likeness").addEventListener("change", drawOverlap);
  drawOverlap();

  // --- bars -----------------------------------------------------------------------------------

  const bars = (table, titles, rows) => {
    const head = make("tr", {}, ...titles.map((title, at) =>
      make("th", { scope: "col", className: at && title ? "number" : "" }, title)));
    table.append(make("thead", {}, head), make("tbody", {}, ...rows.map(({ title, values, of, more = [] }) => {
      const track = make("span", { className: "track", "aria-hidden": "true" },
        ...[...values].sort((a, b) => b - a).map((value, at) => {
          const bar = make("i", { "--w": of ? value / of : 0 });
          if (!value) bar.style.minWidth = 0;
          return bar;
        }));
      return make("tr", {}, make("th", { scope: "row" }, ...breakable(title)),
        ...[...values, ...more].map((value) => make("td", { className: "number" }, percent(value))),
        make("td", { className: "bar" }, track));
    })));
  };
  bars(byId("carriers"), ["task", "50 %", "90 %", "99 %", ""],
    tasks.map((task) => ({ title: task.name, values: task.carriers, of: 1 })));
  const pinned = data.pinned ? ["frozen"] : [];
  bars(byId("frozen"), ["layer", ...data.frozen.map((part) => `at ${percent(part.fraction)}`), ...pinned, ""],
    layers.map((layer, at) => ({
      title: layer.name,
      values: data.frozen.map((part) => part.layers[at]),
      more: pinned.map(() => data.pinned[at]),
      of: 1,
    })));

  // --- training -------------------------------------------------------------------------------

  const NAMESPACE = make("div", { innerHTML: "<svg></svg>" }).firstChild.namespaceURI;
  const svg = (tag, attributes, text) => {
    const element = document.createElementNS(NAMESPACE, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const chart = (title, unit, steps, values, others) => {
    const [width, height, left, right, top, bottom] = [460, 190, 52, 8, 12, 26];
    // null: was not finite. Curves have a gap there.
    const known = [values, ...others.map((other) => other.values)].flat().filter((value) => value !== null);
    const high = Math.max(0, ...known) || 1;
    const number = (value) => (value === null ? "not finite" : digits(value, 3));
    const [first, last] = [steps[0], steps.at(-1)];
    const x = (step) => left + (last > first ? (step - first) / (last - first) : 0.5) * (width - left - right);
    const y = (value) => height - bottom - (value / high) * (height - top - bottom);
    const path = (line) => line.map((value, at) => (value === null ? "" :
      `${at && line[at - 1] !== null ? "L" : "M"}${x(steps[at]).toFixed(1)} ${y(value).toFixed(1)}`)).join("");
    const name = `${title}: from ${number(values[0])} at step ${count(first)} to ${number(values.at(-1))} at step ${count(last)}`;
    const area = svg("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", "aria-label": name });
    for (const part of [0, 0.5, 1]) {
      area.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y(part * high), y2: y(part * high) }));
      area.append(svg("text", { x: left - 6, y: y(part * high) + 4, "text-anchor": "end" }, digits(part * high)));
    }
    area.append(svg("text", { x: left, y: height - 8 }, `step ${count(first)}`));
    area.append(svg("text", { x: width - right, y: height - 8, "text-anchor": "end" }, count(last)));
    for (const other of others) area.append(svg("path", { class: "layer", d: path(other.values) }));
    area.append(svg("path", { class: "curve", d: path(values) }));
    const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
    area.append(cursor);
    let at = values.length - 1;
    const read = (place) => {
      at = Math.min(Math.max(place, 0), values.length - 1);
      cursor.setAttribute("x1", x(steps[at]));
      cursor.setAttribute("x2", x(steps[at]));
      cursor.setAttribute("visibility", "visible");
      show(cursor, `step ${count(steps[at])}`, [`${title} ${number(values[at])}`,
        ...others.map((other) => `${other.name} ${number(other.values[at])}`)]);
    };
    const leave = () => { cursor.setAttribute("visibility", "hidden"); hide(); };
    area.addEventListener("focus", () => read(at));
    area.addEventListener("blur", leave);
    area.addEventListener("mouseleave", leave);
    area.addEventListener("mousemove", (event) => {
      const box = area.getBoundingClientRect();
      const here = ((event.clientX - box.left) / box.width) * width;
      read(steps.reduce((best, step, place) => (Math.abs(x(step) - here) < Math.abs(x(steps[best]) - here) ? place : best), 0));
    });
    area.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: values.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      read(to);
    });
    return make("figure", {}, make("figcaption", {}, title, " ", make("small", {}, unit)), area);
  };
  byId("training").hidden = data.training.length === 0;
  for (const run of data.training) {
    const others = run.layers.map((layer) => ({ name: layer.name, values: layer.drift }));
    byId("charts").append(
      chart("penalty", `watched from ${run.time.replace("T", " ").replace("Z", "")} UTC`, run.steps, run.penalty, []),
      chart("drift", others.length ? `all weights; thin: the ${plural(others.length, "layer")} that drift most` : "", run.steps, run.drift, others));
  }

  // --- records --------------------------------------------------------------------------------

  const columns = [
    ["task", (task) => task.name], ["recorded", (task) => task.time.slice(0, 16).replace("T", " ")],
    ["labels", (task) => task.labels ?? "–"], ["samples", (task) => count(task.samples)],
    ["weights", (task) => short(task.weights)], ["mean", (task) => digits(task.mean, 3)],
    ["zeros", (task) => percent(task.zeros / task.weights)], ["codec", (task) => task.codec], ["size", (task) => bytes(task.bytes)],
  ];
  const numeric = new Set(["samples", "weights", "mean", "zeros", "size"]);
  byId("records").append(
    make("thead", {}, make("tr", {}, ...columns.map(([title]) => make("th", { scope: "col", className: numeric.has(title) ? "number" : "" }, title)))),
    make("tbody", {}, ...tasks.map((task) => make("tr", {}, ...columns.map(([title, text], at) =>
      make(at ? "td" : "th", { className: numeric.has(title) ? "number" : "", ...(at ? {} : { scope: "row" }) }, text(task)))))));
  byId("forgotten").textContent = data.forgotten.length ? `Forgotten: ${data.forgotten.join(", ")}.` : "";
  byId("made").textContent = `Made by cl_optim ${data.cl_optim} on ${day(data.time)}. Importance is the diagonal Fisher information, the mean over samples of squared gradients.`;

  // What scrolls can be scrolled by keyboard, where it has no cells that take the focus.
  for (const area of document.querySelectorAll(".scroll:not(:has([role=grid]))")) {
    area.tabIndex = 0;
    area.setAttribute("role", "region");
    area.setAttribute("aria-labelledby", area.closest("section").getAttribute("aria-labelledby"));
  }
})();
