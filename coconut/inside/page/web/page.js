"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const kinds = data.kinds;
  const state = { at: 0, k: 0, kind: data.own_reading };
  let timer = null;
  const SHOWN = 12; // rows of the attention table that are not folded away

  // Everything shown goes through textContent: what a model or a file says is never markup.
  function el(name, options = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(options)) {
      if (key === "class") node.className = value;
      else if (key === "p") node.style.setProperty("--p", `${100 * value}%`);
      else node.setAttribute(key, value);
    }
    node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
    return node;
  }
  function svg(name, attributes = {}, text = null) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== null) node.textContent = text;
    return node;
  }
  const percent = (p) => (p >= 0.0995 ? `${Math.round(100 * p)}\u00a0%` : p >= 0.0005 ? `${(100 * p).toFixed(1)}\u00a0%` : p > 0 ? "<0.1\u00a0%" : "0");
  const hops = (n) => (n === 1 ? "1 hop" : `${n} hops`);
  const thoughts = (n) => (n === 1 ? "1 thought" : `${n} thoughts`);
  const token = (text) => text.replace(/\n/g, "⏎").replace(/^ | $/g, "␣");
  const item = () => data.items[state.at];
  const reading = () => item().readings.find((found) => found.kind === state.kind);

  function table(columns, rows, numbers = []) {
    const head = el("tr", {}, ...columns.map((c, i) => el("th", { scope: "col", class: numbers.includes(i) ? "n" : "" }, c)));
    const body = rows.map(({ cells, here, bar }) => {
      const row = el("tr", here ? { class: "here", "aria-current": "true" } : {});
      cells.forEach((cell, i) => {
        const options = { class: numbers.includes(i) ? "n" : "" };
        if (i === 0 && bar !== undefined) { options.class += " bar"; options.p = bar; }
        row.append(el("td", options, cell));
      });
      return row;
    });
    return el("table", {}, el("thead", {}, head), el("tbody", {}, ...body));
  }
  const mark = (is) => (is === null ? "" : is ? el("span", { class: "good" }, "✓ right") : el("span", { class: "bad" }, "✗ wrong"));

  // ---- the graph: columns by hops, dagre orders each column so that few lines cross
  function ranks(graph) {
    const of = graph.distances.slice();
    const sources = graph.names.filter((n) => of[n] === null);
    let layer = sources;
    layer.forEach((n) => (of[n] = 0));
    while (layer.length) {
      const next = [];
      for (const [a, b] of graph.edges) if (layer.includes(a) && of[b] === null) { of[b] = of[a] + 1; next.push(b); }
      layer = next;
    }
    return of.map((rank) => rank ?? 0);
  }
  function ordered(graph, rank, nodes) {
    const g = new dagre.graphlib.Graph();
    g.setGraph({ rankdir: "LR", nodesep: 10, ranksep: 40 });
    g.setDefaultEdgeLabel(() => ({}));
    nodes.forEach((n) => g.setNode(String(n), { width: 40, height: 52 }));
    // Only lines that go one column on: then a node's column is its distance.
    for (const [a, b] of graph.edges) if (nodes.includes(a) && nodes.includes(b) && rank[b] === rank[a] + 1) g.setEdge(String(a), String(b));
    dagre.layout(g);
    return new Map(nodes.map((n) => [n, g.node(String(n)).y]));
  }
  function draw() {
    const graph = item().graph;
    $("tree").hidden = graph === null;
    if (graph === null) return;
    const rank = ranks(graph), n_columns = Math.max(...rank) + 1, margin = 44;
    // Lines within the last column bend to its right.
    const edge = graph.edges.some(([a, b]) => rank[a] === rank[b] && rank[a] === n_columns - 1) ? 60 : margin;
    // A column keeps room for its words; on a narrow screen the graph scrolls inside its card.
    const width = Math.max($("graph").clientWidth, margin + edge + (n_columns - 1) * 58);
    const place = (column) => margin + (column * (width - margin - edge)) / Math.max(1, n_columns - 1);
    const all = graph.nodes.map((_, n) => n);
    const [near, away] = [all.filter((n) => graph.distances[n] !== null), all.filter((n) => graph.distances[n] === null)];
    const x = (n) => place(rank[n]);
    const y = new Map();
    let top = 34;
    for (const nodes of [near, away]) {
      if (!nodes.length) continue;
      const found = ordered(graph, rank, nodes);
      const low = Math.min(...found.values());
      for (const [n, at] of found) y.set(n, top + at - low + 30);
      top = Math.max(...nodes.map((n) => y.get(n))) + 44;
    }
    const root = svg("svg", { viewBox: `0 0 ${width} ${top + 4}`, class: width < 420 ? "narrow" : "", role: "group", "aria-label": "Graph of the question, columns by hops from a name" });
    const defs = svg("defs");
    for (const id of ["tip", "waytip"]) {
      const tip = svg("marker", { id, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 9, markerHeight: 9, markerUnits: "userSpaceOnUse", orient: "auto" });
      tip.append(svg("path", { d: "M0 0 L8 4 L0 8 z" }));
      defs.append(tip);
    }
    root.append(defs);
    for (let c = 0; c < n_columns; c++) {
      root.append(svg("text", { class: "column", x: place(c), y: 14 }, c ? hops(c) : "name"));
    }
    for (const [a, b] of graph.edges) {
      const [x1, y1, x2, y2] = [x(a), y.get(a), x(b), y.get(b)];
      const bend = rank[a] === rank[b] ? 36 : 0, gap = 23;
      let d;
      if (bend) d = `M${x1 + 14} ${y1} C${x1 + bend + 16} ${y1} ${x2 + bend + 16} ${y2} ${x2 + gap} ${y2}`;
      else {
        const sign = Math.sign(x2 - x1), mid = (x1 + x2) / 2;
        d = `M${x1 + 14 * sign} ${y1} C${mid} ${y1} ${mid} ${y2} ${x2 - gap * sign} ${y2}`;
      }
      const at = graph.path.indexOf(a), is_way = at >= 0 && graph.path[at + 1] === b;
      const line = svg("path", { class: is_way ? "edge way" : graph.distances[a] === null ? "edge away" : "edge", d, "marker-end": `url(#${is_way ? "waytip" : "tip"})` });
      // The way to the answer lies above the lines that cross it.
      if (is_way) root.append(line);
      else defs.after(line);
    }
    for (const n of all) {
      const g = svg("g", { class: `node ${kindOf(graph, n)} ${graph.distances[n] === null ? "away" : ""}`, "data-node": graph.nodes[n], role: "img", transform: `translate(${x(n)} ${y.get(n)})` });
      g.append(svg("circle", { class: "disc", r: 6 }), svg("circle", { class: "ring", r: 12 }));
      g.append(svg("text", { class: "share inside", y: 4 }), svg("text", { class: "name", y: 30 }, role(graph, n) + graph.nodes[n]));
      root.append(g);
    }
    root.style.minWidth = `${width}px`;
    $("graph").replaceChildren(root);
  }
  // Where a thought itself is read, there is nothing to read before the first.
  const readable = (found) => [...found.values.keys()].slice(found.kind === "thought" ? 1 : 0);
  const kindOf = (graph, n) => (n === graph.asked ? "asked" : n === graph.right ? "right" : graph.choices.includes(n) && graph.right !== null ? "wrong" : "");
  const role = (graph, n) => ({ asked: "▶ ", right: "✓ ", wrong: "✗ " })[kindOf(graph, n)] ?? "";

  function fill() {
    const graph = item().graph;
    if (graph === null) return;
    const found = reading(), values = found.values[state.k];
    for (const [n, g] of [...$("graph").querySelectorAll(".node")].entries()) {
      const p = values[n], r = 7 + 15 * Math.sqrt(p), far = graph.distances[n];
      const [disc, ring] = g.querySelectorAll("circle"), share = g.querySelector(".share");
      disc.setAttribute("r", r); ring.setAttribute("r", r + 4);
      // As the radius: a probability spread over several concepts is still seen.
      const shade = Math.sqrt(p);
      disc.style.fill = `color-mix(in oklab, var(--high) ${Math.round(100 * shade)}%, var(--low))`;
      g.querySelector(".name").setAttribute("y", Math.max(30, r + 16));
      g.classList.toggle("frontier", far === state.k);
      g.dataset.p = p;
      share.textContent = p >= 0.005 ? `${Math.round(100 * p)}` : "";
      share.style.fill = shade > 0.55 ? "var(--onhigh)" : "var(--ink)";
      share.style.fontSize = p >= 0.1 ? "12px" : "9px";
      const place = far === null ? "not reached from the asked name" : hops(far);
      const choice = n === graph.right ? ", right choice" : graph.choices.includes(n) ? ", other choice" : "";
      g.setAttribute("aria-label", `${graph.nodes[n]}: ${percent(p)}, ${place}${choice}${far === state.k ? ", as many hops as thoughts" : ""}`);
    }
    const lead = found.leads[state.k], own = found.lead_probability[state.k];
    const bare = state.k ? `Nothing is forced: what the output head reads in thought ${state.k} itself.` : "No thought yet: move the slider.";
    const begins = found.kind === "thought" ? bare : lead ? `Forced to go on with “${lead}”, which it would do by itself with probability ${own >= 0.001 ? percent(own) : own.toExponential(0)}.` : "The first word of the step it would print.";
    $("lead").textContent = begins + (found.is_trained ? "" : " Outside of what the checkpoint's method trains.");
    const order = graph.nodes.map((_, n) => n).sort((a, b) => (graph.distances[a] ?? 99) - (graph.distances[b] ?? 99));
    const ks = readable(found);
    const rows = order.map((n) => ({ cells: [role(graph, n) + graph.nodes[n], graph.distances[n] ?? "–", ...ks.map((k) => percent(found.values[k][n]) + (graph.distances[n] === k ? " ◌" : ""))] }));
    rows.push({ cells: ["other words", "", ...ks.map((k) => percent(Math.max(0, 1 - found.values[k].reduce((a, b) => a + b, 0))))] });
    $("values").replaceChildren(table(["concept", "hops", ...ks.map((k) => `after ${k}`)], rows, ks.map((_, i) => i + 2)));
  }

  // ---- tables
  function words() {
    const { thoughts: all, stops, segments, n_sentences, graph } = item();
    const thought = all[state.k - 1], stop = stops[state.k];
    const most = thought ? Math.max(...thought.attention.slice(0, n_sentences)) : 0;
    const spans = segments.slice(0, n_sentences).flatMap((sentence, s) => {
      const span = el("span", {}, sentence);
      if (thought) span.style.background = `color-mix(in oklab, var(--bar) ${Math.round((100 * thought.attention[s]) / (most || 1))}%, transparent)`;
      return [span, " "];
    });
    $("question").replaceChildren(...spans);
    $("shade").textContent = thought ? `Shaded: what the latent of thought ${state.k} attends to; the darkest sentence has ${percent(most)} of it.` : "Nothing is shaded before the first thought.";
    [...$("ticks").children].forEach((tick, k) => { tick.className = k === state.k ? "here" : ""; });
    const other = stop.text.trim().slice(0, 80);
    const says = stop.answer ? `“${stop.answer}”` : other ? `no answer, but “${other}”` : "nothing";
    $("now").replaceChildren(el("b", {}, `After ${thoughts(state.k)}`), ` it says ${says} `, mark(stop.is_correct),
      stop.certainty === null ? "" : `, certain to ${percent(stop.certainty)}`, stop.is_trained ? "" : " (outside of its training)");
    $("k").setAttribute("aria-valuetext", `after ${thoughts(state.k)}`);
    if (thought) {
      const near = thought.cosines.map((c, i) => `${i + 1}: ${c.toFixed(2)}`).join(", ");
      $("vector").textContent = `Thought ${state.k}: ${thought.norm_ratio.toFixed(1)} times as long as a token's embedding.${near ? ` Cosine with thought ${near}.` : ""} ␣ is a space.`;
      $("read").replaceChildren(table(["token", "probability"], thought.top.map(([text, p]) => ({ cells: [el("code", {}, token(text)), percent(p)], bar: p })), [1]));
      const rows = segments.map((segment, s) => ({ s, cells: [segment, percent(thought.attention[s]), `${percent(thought.attention_max[s])} at ${thought.attention_at[s].map((i) => i + 1).join(".")}`], bar: thought.attention[s] }))
        .filter(({ s }) => thought.attention_max[s] > 0).sort((a, b) => b.bar - a.bar);
      const columns = ["part of the prompt", "mean", "largest"], is_open = $("attention").querySelector("details")?.open;
      $("attention").replaceChildren(table(columns, rows.slice(0, SHOWN), [1, 2]));
      if (rows.length > SHOWN) {
        const rest = el("details", {}, el("summary", {}, `${rows.length - SHOWN} more`), table(columns, rows.slice(SHOWN), [1, 2]));
        rest.open = is_open ?? false;
        $("attention").append(rest);
      }
    } else {
      $("vector").textContent = all.length ? "No thought yet: move the slider." : "This model has no thoughts.";
      $("read").replaceChildren(); $("attention").replaceChildren();
    }
    const choices = graph ? graph.choices.map((n) => graph.nodes[n]) : [];
    const rows = stops.map((s) => ({ here: s.n_thoughts === state.k, cells: [s.n_thoughts + (s.is_trained ? "" : " *"), s.answer || "none", mark(s.is_correct),
      s.certainty === null ? "" : percent(s.certainty), ...(s.choices ?? []).map(percent)] }));
    $("stopwords").textContent = "The answer it writes after so many thoughts, and how probable that answer was to it." +
      (graph ? " Then each choice, were it made to answer at once." : "");
    const names = ["after", "answer", "", "certainty", ...choices];
    $("stops").replaceChildren(table(names, rows, [3, 4, 5]), stops.every((s) => s.is_trained) ? "" : el("p", { class: "quiet" }, "* outside of what its method trains"));
    chains();
  }
  function chains() {
    const { graph, stops, thoughts: all } = item(), printed = stops[0], found = graph && reading();
    const latent = el("div", {}, el("h3", {}, "Latent: most probable after each thought"));
    if (found) latent.append(el("ol", { start: readable(found)[0] ?? 1 }, ...readable(found).map((k) => {
      const values = found.values[k], n = values.indexOf(Math.max(...values)), far = graph.distances[n];
      const where = far === null ? el("span", { class: "bad" }, "✗ not below the name") : el("span", { class: "good" }, `✓ ${hops(far)}`);
      return el("li", {}, `${graph.nodes[n]} ${percent(values[n])} `, where);
    })));
    else latent.append(el("ol", {}, ...all.map(({ top: [[text, p]] }) => el("li", {}, el("code", {}, token(text)), ` ${percent(p)}`))));
    if (!all.length) latent.append(el("p", { class: "quiet" }, "It has no thoughts."));
    const right = el("div", {}, el("h3", {}, "Printed, without thoughts"));
    if (!printed.is_trained) right.append(el("p", { class: "quiet" }, "Outside of this model's training:"));
    if (!printed.chain.length) right.append(el("p", { class: "quiet" }, "It prints no chain."));
    else right.append(el("ol", {}, ...printed.chain.map((line, i) => el("li", {}, `${line} `,
      !graph || printed.chain_is_stated[i] === null ? "" : printed.chain_is_stated[i] ? el("span", { class: "good" }, "✓ stated") : el("span", { class: "bad" }, "✗ not stated")))));
    if (graph && graph.path.length) right.append(el("h3", {}, "Right"), el("p", { class: "quiet" }, graph.path.map((n) => graph.nodes[n]).join(" → ")));
    $("chains").replaceChildren(el("div", { class: "two" }, latent, right));
  }

  // ---- moving about
  function move(k) {
    state.k = Math.max(0, Math.min(item().stops.length - 1, k));
    $("k").value = state.k;
    words(); fill();
  }
  function open(at) {
    stop();
    state.at = at;
    $("view").hidden = false;
    $("picker").value = at;
    const { warnings, notes, stops, segments, n_sentences } = item();
    // What is asked comes last; a long sentence stays in its place below.
    const asks = segments[n_sentences - 1] ?? "";
    $("asks").textContent = asks.length <= 120 ? asks : "";
    $("warning").textContent = warnings.length ? `Its answers mean nothing here: ${warnings.join("; ")}.` : "";
    $("notes").replaceChildren(...notes.map((note) => el("li", {}, note)));
    $("k").max = stops.length - 1;
    $("ticks").replaceChildren(...(stops.length > 13 ? [] : stops.map((s) => el("span", {}, s.n_thoughts))));
    draw();
    move(stops.length - 1);
  }
  function pick() {
    $("choose").hidden = data.items.length < 2;
    $("picker").replaceChildren(...data.items.map((one, i) => {
      const wrong = one.stops[one.stops.length - 1].is_correct === false ? " ✗" : "";
      const text = `${one.idx === null ? "typed" : `item ${one.idx}`}${wrong}: ${one.question.trim().split(/[.]\s+/).pop().slice(-70)}`;
      return el("option", { value: i }, text);
    }));
  }
  function stop() { clearInterval(timer); timer = null; $("play").textContent = "Play"; }
  $("k").addEventListener("input", () => { stop(); move(Number($("k").value)); });
  addEventListener("keydown", ({ key, target }) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[key];
    // Whatever has the focus has its own use for the arrows.
    if (step && target === document.body && data.items.length) { stop(); move(state.k + step); }
  });
  $("less").addEventListener("click", () => { stop(); move(state.k - 1); });
  $("more").addEventListener("click", () => { stop(); move(state.k + 1); });
  $("play").addEventListener("click", () => {
    if (timer) return stop();
    move(0);
    $("play").textContent = "Stop";
    timer = setInterval(() => (state.k < item().stops.length - 1 ? move(state.k + 1) : stop()), 1200);
  });
  $("picker").addEventListener("change", () => open(Number($("picker").value)));
  $("kind").addEventListener("change", () => { state.kind = $("kind").value; move(state.k); });
  addEventListener("resize", () => { if (data.items.length) { draw(); fill(); } });
  $("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    $("message").textContent = ""; $("send").disabled = true; $("send").textContent = "Thinking …";
    try {
      const reply = await fetch("/ask", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ question: $("typed").value }) });
      const found = await reply.json();
      if (!reply.ok) $("message").textContent = found.error;
      else { data.items.push(found); pick(); open(data.items.length - 1); }
    } catch { $("message").textContent = "The server does not answer; is it still running?"; }
    $("send").disabled = false; $("send").textContent = "Think";
  });

  $("model").textContent = data.about;
  $("kind").replaceChildren(...Object.entries(kinds).map(([kind, words]) => el("option", { value: kind }, words)));
  $("kind").value = state.kind;
  $("ask").hidden = !data.is_live;
  $("typed").value = data.example;
  pick();
  if (data.items.length) open(0);
})();
