"use strict";
(() => {
  const root = document.documentElement;
  const tip = document.getElementById("tip");
  const hidden = new Set();

  const theme = document.getElementById("theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark";
  const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  // #dark and #light choose a mode, for links and for pictures of the page.
  if (["#dark", "#light"].includes(location.hash)) root.dataset.theme = location.hash.slice(1);
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  prefersDark.addEventListener("change", nameTheme);
  nameTheme();

  document.querySelectorAll("[data-toggle]").forEach((button) => {
    button.addEventListener("click", () => {
      const name = button.dataset.toggle;
      const off = !hidden.has(name);
      off ? hidden.add(name) : hidden.delete(name);
      button.setAttribute("aria-pressed", String(!off));
      document.querySelectorAll(`[data-series="${CSS.escape(name)}"]`).forEach((element) => {
        element.classList.toggle("off", off);
      });
    });
  });

  const add = (parent, name, attributes) => {
    const element = document.createElementNS(parent.namespaceURI, name);
    Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
    parent.append(element);
    return element;
  };

  // Values under the pointer, or at the place that the arrow keys have reached.
  document.querySelectorAll("svg[data-hover]").forEach((svg) => {
    const { top, bottom, axis, lines } = JSON.parse(svg.dataset.hover);
    const places = [...new Set(lines.flatMap((line) => line.points.map(([x]) => x)))];
    places.sort((a, b) => a - b);
    if (!places.length) return;
    const cursor = add(svg, "line", { class: "cursor", y1: top, y2: bottom, visibility: "hidden" });
    const dots = lines.map((line) =>
      add(svg, "circle", { class: `f-${line.colour}`, r: 4, visibility: "hidden" }));
    let at = places.length - 1;

    const hide = () => {
      tip.hidden = true;
      [cursor, ...dots].forEach((element) => element.setAttribute("visibility", "hidden"));
    };
    const row = (line, text) => {
      const element = document.createElement("div");
      const key = document.createElement("span");
      key.className = `key c-${line.colour}`;
      element.append(key, `${line.label}  ${text}`);
      return element;
    };
    const show = () => {
      const x = places[at];
      const title = document.createElement("b");
      tip.replaceChildren(title);
      lines.forEach((line, i) => {
        const point = hidden.has(line.name) ? undefined : line.points.find(([px]) => px === x);
        dots[i].setAttribute("visibility", point ? "visible" : "hidden");
        if (!point) return;
        title.textContent = `${axis} ${point[2]}`;
        dots[i].setAttribute("cx", x);
        dots[i].setAttribute("cy", point[1]);
        tip.append(row(line, point[3]));
      });
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.setAttribute("visibility", "visible");
      tip.hidden = false;
      const box = svg.getBoundingClientRect();
      const px = box.left + (x / svg.viewBox.baseVal.width) * box.width;
      const left = px + 16 + tip.offsetWidth < innerWidth ? px + 16 : px - 16 - tip.offsetWidth;
      tip.style.left = `${Math.max(4, left)}px`;
      tip.style.top = `${Math.max(4, Math.min(box.top + 24, innerHeight - tip.offsetHeight - 4))}px`;
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const far = places.map((place) => Math.abs(place - x));
      at = far.indexOf(Math.min(...far));
      show();
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(); });
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      at = Math.min(places.length - 1, Math.max(0, at + step));
      show();
    });
  });

  // The table of results: filter and sort.
  const table = document.getElementById("results");
  if (!table) return;
  const filter = document.getElementById("filter");
  const narrow = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    document.querySelectorAll("[data-words]").forEach((element) => {
      const text = element.dataset.words.toLowerCase();
      element.hidden = !words.every((word) => text.includes(word));
    });
  };
  filter.addEventListener("input", narrow);

  const sort = (column, down) => {
    const value = (row) => {
      const text = row.cells[column].dataset.value;
      return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
    };
    const order = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const less = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return down ? -less : less;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => order(value(a), value(b))));
    [...table.tHead.rows[0].cells].forEach((cell, i) => {
      cell.setAttribute("aria-sort", i !== column ? "none" : down ? "descending" : "ascending");
    });
  };
  table.tHead.querySelectorAll("button").forEach((button, column) => {
    button.addEventListener("click", () => {
      sort(column, button.parentElement.getAttribute("aria-sort") === "ascending");
    });
  });

  // #filter=WORDS&sort=COLUMN choose a view, for links and for tests.
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (wanted.has("filter")) {
    filter.value = wanted.get("filter");
    narrow();
  }
  if (wanted.has("sort")) sort(Number(wanted.get("sort")), wanted.has("down"));
})();
