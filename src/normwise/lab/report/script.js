"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
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
      document.querySelectorAll(`[data-optimizer="${name}"]`).forEach((element) => {
        element.classList.toggle("off", off);
      });
    });
  });

  const row = (line, index) => {
    const element = document.createElement("div");
    element.className = `o-${line.name}`;
    const key = document.createElement("span");
    key.className = "key";
    element.append(key, `${line.label}  ${line.text[index]}`);
    return element;
  };

  document.querySelectorAll("[data-chart]").forEach((figure) => {
    const chart = data[figure.dataset.chart];
    const svg = figure.querySelector("svg");
    if (!svg || !chart.lines.length) return;
    const cursor = svg.querySelector(".cursor");
    const span = chart.last - chart.first || 1;
    const x = (epoch) =>
      chart.left + ((epoch - chart.first) / span) * (chart.right - chart.left);
    const dots = chart.lines.map((line) => {
      const dot = document.createElementNS(svg.namespaceURI, "circle");
      dot.setAttribute("class", `dot o-${line.name}`);
      dot.setAttribute("r", "4");
      dot.setAttribute("visibility", "hidden");
      svg.append(dot);
      return dot;
    });
    let epoch = chart.last;

    const hide = () => {
      tip.hidden = true;
      [cursor, ...dots].forEach((element) => element.setAttribute("visibility", "hidden"));
    };
    const show = () => {
      const box = svg.getBoundingClientRect();
      const title = document.createElement("b");
      title.textContent = `epoch ${epoch}`;
      tip.replaceChildren(title);
      chart.lines.forEach((line, i) => {
        const index = line.epochs.indexOf(epoch);
        const seen = index >= 0 && !hidden.has(line.name);
        dots[i].setAttribute("visibility", seen ? "visible" : "hidden");
        if (!seen) return;
        dots[i].setAttribute("cx", x(epoch));
        dots[i].setAttribute("cy", line.y[index]);
        tip.append(row(line, index));
      });
      cursor.setAttribute("x1", x(epoch));
      cursor.setAttribute("x2", x(epoch));
      cursor.setAttribute("visibility", "visible");
      tip.hidden = false;
      const at = box.left + (x(epoch) / chart.width) * box.width;
      const left = at + 16 + tip.offsetWidth < innerWidth ? at + 16 : at - 16 - tip.offsetWidth;
      tip.style.left = `${Math.max(4, left)}px`;
      tip.style.top = `${Math.max(4, Math.min(box.top + 24, innerHeight - tip.offsetHeight - 4))}px`;
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const place = ((event.clientX - box.left) / box.width) * chart.width;
      const share = (place - chart.left) / (chart.right - chart.left);
      epoch = Math.round(chart.first + Math.min(1, Math.max(0, share)) * span);
      show();
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(); });
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      epoch = Math.min(chart.last, Math.max(chart.first, epoch + step));
      show();
    });
  });
})();
