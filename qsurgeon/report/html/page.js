// Draws the charts, lets each of their marks be reached by the keyboard, and sorts the tables.
for (const place of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(place.querySelector("script").textContent);
  const said = place.parentElement.querySelector("output");
  vegaEmbed(place, spec, { actions: false, renderer: "svg" }).then(() => {
    const marks = [...place.querySelectorAll(".role-mark [role=graphics-symbol]")];
    marks.forEach((mark, at) => {
      mark.setAttribute("tabindex", at ? -1 : 0);
      mark.addEventListener("focus", () => { said.textContent = mark.getAttribute("aria-label"); });
      mark.addEventListener("mouseenter", () => { said.textContent = mark.getAttribute("aria-label"); });
      mark.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -marks.length, End: marks.length }[event.key];
        if (!step) return;
        event.preventDefault();
        const next = Math.min(marks.length - 1, Math.max(0, at + step));
        mark.setAttribute("tabindex", -1);
        marks[next].setAttribute("tabindex", 0);
        marks[next].focus();
      });
    });
    place.dataset.drawn = marks.length;
  });
}
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[head.cellIndex].dataset.value ?? "";
    const words = head.classList.contains("text");
    const order = (a, b) => words ? key(a).localeCompare(key(b), undefined, { numeric: true })
      : (key(a) === "") - (key(b) === "") || (up ? 1 : -1) * (key(a) - key(b));
    const rows = [...body.rows].sort(words && !up ? (a, b) => order(b, a) : order);
    body.append(...rows);
  });
}
