// Makes the curves of the report interactive: each figure's JSON is drawn by uPlot in the place of its SVG.
"use strict";
(() => {
  const style = getComputedStyle(document.documentElement); // live: follows light and dark
  const shapes = JSON.parse(document.getElementById("shapes").textContent).map((d) => new Path2D(d));
  const charts = []; // everything that was drawn
  const HELP = "Plot. Plus and minus keys zoom, 0 shows all, left and right keys go from point to point.";
  const ink = (name) => style.getPropertyValue(`--${name}`).trim();

  function element(name, properties = {}, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

{% include "curves.js" %}

{% include "chart.js" %}

  // ---- the page ---------------------------------------------------------------------------------------
  const draw = (figure) => charts.push(new Chart(figure));
  const folded = (figure) => figure.closest("details:not([open])");
  document.querySelectorAll("figure.plot").forEach((figure) => folded(figure) || draw(figure));
  document.querySelectorAll("details.traces").forEach((details) => details.addEventListener("toggle", () => {
    if (details.open) details.querySelectorAll("figure.plot:not(.live)").forEach(draw);
  }));

  const redraw = () => charts.forEach((chart) => chart.u.redraw(false, true));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // On paper everything is said: how each claim was judged, and how to repeat it.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.repeat:not([open])")];
    opened.forEach((details) => (details.open = true));
  });
  addEventListener("afterprint", () => opened.forEach((details) => (details.open = false)));

  // The contents show where the reader is.
  const links = new Map([...document.querySelectorAll(".contents a")].map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      links.forEach((a) => a.removeAttribute("aria-current"));
      links.get(target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -75% 0px" });
  document.querySelectorAll("section[data-claim], header").forEach((section) => seen.observe(section));
})();
