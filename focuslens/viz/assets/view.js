// Draws the attention of a response: the prompt coloured token by token, and the shares of the prompt's parts.
// All text comes from the page's own data and is inserted as text, never as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍") || "·";
  const quoted = (text) => `“${visible(text)}”`;
  const share = (value) => value.toFixed(3);
  const state = { head: data.head, said: data.panels.map((panel) => panel.said) };
  // Share with full colour. Means are smaller than the shares from single tokens, so they have a scale of their own.
  const top = () => Math.max(...state.said.map((said) => data.tops[state.head][said ? 1 : 0]));
  const unitShares = (panel, said) => panel.shares[state.head][said].map((x) => x / data.unit);
  // Text changes its colour for contrast on a strongly coloured background.
  const colour = (node, a) => {
    node.style.setProperty("--a", a.toFixed(3));
    node.classList.toggle("strong", a > 0.6);
  };

  // Unpacks one row of attention over all tokens; dropped entries are 0.
  const reader = (panel) => {
    if (!panel.rows) return null;
    const counts = new Uint32Array(bytes(panel.rows.counts).buffer);
    const steps = bytes(panel.rows.steps);
    const values = new Uint16Array(bytes(panel.rows.values).buffer);
    const starts = new Uint32Array(counts.length + 1);
    counts.forEach((n, i) => { starts[i + 1] = starts[i] + n; });
    return (head, said) => {
      const row = new Float32Array(panel.tokens.length);
      const index = head * panel.response.length + said;
      let at = -1;
      for (let i = starts[index]; i < starts[index + 1]; i++) {
        at += steps[i];
        row[at] = values[i] / 65535;
      }
      return row;
    };
  };

  // A group of buttons with the keyboard behaviour of radio buttons.
  const radios = (label, names, chosen, choose) => {
    const group = make("div", { class: "said", role: "radiogroup", "aria-label": label });
    const mark = (index) => [...group.children].forEach((button, i) => {
      button.setAttribute("aria-checked", String(i === index));
      button.tabIndex = i === index ? 0 : -1;
    });
    names.forEach((name, i) => {
      const button = make("button", { type: "button", role: "radio" }, i ? visible(name) : name);
      button.addEventListener("click", () => { mark(i); choose(i); });
      group.append(button);
    });
    group.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const now = [...group.children].indexOf(document.activeElement);
      const next = group.children[(now + step + names.length) % names.length];
      next.focus();
      next.click();
    });
    mark(chosen);
    return group;
  };

  const tokenBox = (panel, index) => {
    const read = reader(panel);
    const box = make("div", {
      class: "text", tabindex: "0", role: "group",
      "aria-label": "Prompt, coloured by attention. Left and right: token by token. Up and down: by attention.",
    });
    const nodes = [];
    let part = null;
    let last = -1;
    panel.tokens.forEach((text, i) => {
      const unit = panel.unitOf[i];
      if (unit !== last) {
        const name = panel.units[unit];
        part = make("span", { class: panel.marked.includes(unit) ? "marked" : i === panel.length ? "tail" : "part" });
        if (panel.marked.includes(unit)) part.setAttribute("aria-label", `${name}, relevant`);
        box.append(part);
        last = unit;
      }
      const node = make("b", {}, text || "·");
      node.dataset.i = i;
      part.append(node);
      nodes.push(node);
    });
    let row = null;
    let at = -1;
    const speak = (i) => {
      nodes[at]?.classList.remove("at");
      at = i;
      nodes[at].classList.add("at");
      const star = panel.marked.includes(panel.unitOf[at]) ? " ★" : "";
      const from = state.said[index] ? quoted(panel.response[state.said[index]]) : "the response (mean)";
      const prefix = data.panels.length > 1 ? `${panel.name}: ` : "";
      $("status").textContent =
        `${prefix}${quoted(panel.tokens[at])}, token ${at} of ${panel.units[panel.unitOf[at]]}${star}, gets ` +
        `${share(row[at])} of the attention of ${data.heads[state.head]} from ${from}`;
    };
    box.addEventListener("mouseover", (event) => {
      const i = event.target.dataset?.i;
      if (i !== undefined) speak(Number(i));
    });
    box.addEventListener("keydown", (event) => {
      let next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: nodes.length - 1 }[event.key];
      if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        const order = [...row.keys()].sort((a, b) => row[b] - row[a] || a - b);
        next = order[at < 0 ? 0 : order.indexOf(at) + (event.key === "ArrowDown" ? 1 : -1)];
      }
      if (next === undefined) return;
      event.preventDefault();
      speak(Math.min(Math.max(next, 0), nodes.length - 1));
      nodes[at].scrollIntoView({ block: "nearest" });
    });
    const draw = () => {
      row = read(state.head, state.said[index]);
      const full = top();
      nodes.forEach((node, i) => colour(node, Math.sqrt(Math.min(1, row[i] / full))));
      if (at >= 0) speak(at);
    };
    return { box, draw };
  };

  // Attention to each part: one column per panel, and the change from the first to the second.
  const barTable = () => {
    const body = make("tbody");
    const two = data.panels.length > 1;
    const head = make("tr", {}, make("th", { scope: "col" }, "part of the prompt"));
    for (const panel of data.panels) head.append(make("th", { scope: "col" }, two ? panel.name : "share"));
    if (two) head.append(make("th", { scope: "col" }, "change"));
    head.append(make("th", { scope: "col", "aria-hidden": "true" }));
    const table = make("table", { class: "bars" }, make("caption", {}, "Share of attention"), make("thead", {}, head), body);
    const draw = () => {
      const columns = data.panels.map((panel, p) => unitShares(panel, state.said[p]));
      body.replaceChildren(...data.panels[0].units.map((name, unit) => {
        const marked = data.panels[0].marked.includes(unit);
        const values = columns.map((column) => column[unit]);
        const cells = values.map((value) => make("td", {}, share(value)));
        if (two) cells.push(make("td", {}, (values[1] < values[0] ? "−" : "+") + share(Math.abs(values[1] - values[0]))));
        const bar = make("td", { class: "bar", "aria-hidden": "true" });
        for (const value of values) {
          const line = make("i");
          line.style.width = `${100 * value}%`;
          bar.append(line);
        }
        const title = make("th", { scope: "row", class: marked ? "marked" : "" }, marked ? `${name} ★` : name);
        return make("tr", {}, title, ...cells, bar);
      }));
    };
    return { table, draw };
  };

  // Makes the rows of the page's static table of heads choose a head.
  const headTable = () => {
    const rows = [...document.querySelectorAll("#means tbody tr")];
    rows.forEach((row, i) => {
      const cell = row.firstElementChild;
      const button = make("button", { type: "button", "aria-controls": "tokens" }, cell.textContent);
      button.addEventListener("click", () => choose(i));
      cell.replaceChildren(button);
    });
    return () => rows.forEach((row, i) => {
      row.classList.toggle("chosen", i === state.head);
      row.querySelector("button").setAttribute("aria-pressed", String(i === state.head));
    });
  };

  // One head's attention from every token of the response to the parts.
  const unitTable = () => {
    const panel = data.panels[0];
    const place = $("tokens");
    return () => {
      const top = Math.max(...panel.shares[state.head].flat(), 1);
      const head = make("tr", {}, make("th", { scope: "col" }, "response"));
      panel.units.forEach((name, unit) => {
        const marked = panel.marked.includes(unit);
        head.append(make("th", { scope: "col", class: marked ? "marked" : "" }, marked ? `${name} ★` : name));
      });
      const lines = panel.response.slice(1).map((token, i) => {
        const cells = panel.shares[state.head][i + 1].map((x) => {
          const cell = make("td", { class: "heat" }, (x / data.unit).toFixed(2));
          colour(cell, x / top);
          return cell;
        });
        return make("tr", {}, make("th", { scope: "row" }, `${i} ${visible(token)}`), ...cells);
      });
      const caption = make("caption", {}, `${data.heads[state.head]}, from every token of the response`);
      place.replaceChildren(make("table", { class: "units" }, caption, make("thead", {}, head), make("tbody", {}, ...lines)));
    };
  };

  const drawers = [];
  const draw = () => drawers.forEach((drawer) => drawer());
  const choose = (head) => {
    state.head = head;
    $("head").value = String(head);
    draw();
  };
  data.heads.forEach((name, i) => $("head").append(make("option", { value: String(i) }, name)));
  $("head").addEventListener("change", (event) => choose(Number(event.target.value)));

  if (data.kind === "units") {
    drawers.push(headTable(), unitTable());
  } else {
    const bars = barTable();
    $("parts").append(bars.table);
    drawers.push(bars.draw, () => { $("top").textContent = share(top()); });
    data.panels.forEach((panel, index) => {
      const text = tokenBox(panel, index);
      const pick = radios(`Response token of ${panel.name || "the response"}`, panel.response, panel.said, (i) => {
        state.said[index] = i;
        draw();
      });
      const title = panel.name ? [make("h2", {}, panel.name)] : [];
      $("panels").append(make("section", { class: "panel", "aria-label": panel.name || "Prompt" }, ...title, pick, text.box));
      drawers.push(text.draw);
      const marked = text.box.querySelector(".marked");
      if (marked) text.box.scrollTop = marked.offsetTop - text.box.offsetTop - 40;
    });
  }
  choose(state.head);
})();
