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
  const curves = "figure.plot:not(.dotted):not(.live)";
  const drawAll = (within) => within.querySelectorAll(curves).forEach((figure) => folded(figure) || draw(figure));
  drawAll(document);
  document.querySelectorAll("details.traces, details.claim").forEach((details) => {
    details.addEventListener("toggle", () => details.open && drawAll(details));
  });

  // A link to a claim opens it.
  const unfold = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    const details = target.querySelector("details.claim") ?? target.closest("details.claim");
    if (details && !details.open) {
      details.open = true;
      target.scrollIntoView();
    }
  };
  addEventListener("hashchange", unfold);
  document.querySelectorAll('a[href^="#"]').forEach((a) => a.addEventListener("click", () => {
    if (a.hash === location.hash) unfold(); // again: no hashchange
  }));
  unfold();

  const redraw = () => charts.forEach((chart) => chart.u.redraw(false, true));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // On paper everything is said: how each claim was judged, and how to repeat it.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.claim:not([open]), details.repeat:not([open])")];
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
