"use strict";
{
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  document.documentElement.classList.add("scripted");

  // Which chart is shown, and on which axes: a metric that has no logarithm keeps the axis that it has.
  for (const controls of all(".controls")) {
    const charts = all(".chart", controls.closest("section"));
    const metric = controls.querySelector("select");
    const buttons = all("button", controls);
    const chosen = { x: null, y: null };
    const show = () => {
      for (const chart of charts) chart.hidden = chart.dataset.name !== metric.value;
      const chart = charts.find((candidate) => !candidate.hidden);
      const plots = all(".plot", chart);
      const wanted = { x: chosen.x ?? "log", y: chosen.y ?? chart.dataset.y };
      const misses = (plot) => 2 * (plot.dataset.y !== wanted.y) + (plot.dataset.x !== wanted.x);
      const [best] = [...plots].sort((a, b) => misses(a) - misses(b));
      for (const plot of plots) plot.hidden = plot !== best;
      for (const button of buttons) {
        const { axis, scale } = button.dataset;
        button.setAttribute("aria-pressed", best?.dataset[axis] === scale);
        button.disabled = !plots.some((plot) => plot.dataset[axis] === scale);
      }
    };
    metric.addEventListener("change", show);
    for (const button of buttons) {
      button.addEventListener("click", () => {
        chosen[button.dataset.axis] = button.dataset.scale;
        show();
      });
    }
    show();
  }

  // Pointing at a group, in a chart, a list or a table, or reaching it by keyboard, brings it out; a click keeps it so.
  let pinned = null;
  const bringOut = (key) => {
    for (const element of all("[data-group]")) element.classList.toggle("on", element.dataset.group === key);
    for (const chart of all(".chart")) {
      const entry = key && all("button", chart).find((button) => button.dataset.group === key);
      chart.classList.toggle("focusing", Boolean(entry));
      const readout = chart.querySelector(".readout[aria-hidden]");
      if (readout) readout.textContent = entry ? entry.textContent : "";
    }
  };
  const keyOf = (event) => event.target.closest?.("[data-group]")?.dataset.group ?? pinned;
  for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, (event) => bringOut(keyOf(event)));
  document.addEventListener("focusout", () => bringOut(pinned));
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-group]");
    if (!button) return;
    pinned = pinned === button.dataset.group ? null : button.dataset.group;
    for (const entry of all("button[data-group]")) entry.setAttribute("aria-pressed", entry.dataset.group === pinned);
    bringOut(keyOf(event));
  });
  // A line is thin: its broad and unseen copy is what a pointer meets.
  for (const line of all(".curve .line")) {
    const reach = line.cloneNode();
    reach.setAttribute("class", "reach");
    line.after(reach);
  }
}
