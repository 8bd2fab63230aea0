"use strict";
(() => {
  const table = document.getElementById("results");
  const body = table.tBodies[0];
  const filter = document.getElementById("filter");

  const show = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    document.querySelectorAll("[data-words]").forEach((element) => {
      const text = element.dataset.words.toLowerCase();
      element.hidden = !words.every((word) => text.includes(word));
    });
  };
  filter.addEventListener("input", show);

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
    const rows = [...body.rows].sort((a, b) => order(value(a), value(b)));
    body.append(...rows);
    [...table.tHead.rows[0].cells].forEach((cell, i) => {
      cell.setAttribute("aria-sort", i !== column ? "none" : down ? "descending" : "ascending");
    });
  };
  table.tHead.querySelectorAll("button").forEach((button, column) => {
    button.addEventListener("click", () => {
      const now = button.parentElement.getAttribute("aria-sort");
      sort(column, now === "ascending");
    });
  });

  // #filter=WORDS&sort=COLUMN choose a view, for links and for tests.
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (wanted.has("filter")) {
    filter.value = wanted.get("filter");
    show();
  }
  if (wanted.has("sort")) sort(Number(wanted.get("sort")), wanted.has("down"));
})();
