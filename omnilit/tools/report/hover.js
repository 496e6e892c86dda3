"use strict";
// Shows the values of all curves at the step that the pointer is nearest to.
const names = [...document.querySelectorAll(".legend label")].map((label) => label.textContent.trim());

function readNumbers(text) {
  return text.split(" ").map(Number);
}

function isShown(element) {
  return getComputedStyle(element).display !== "none";
}

function readCurves(figure) {
  const encoded = JSON.parse(figure.querySelector("script").textContent);
  return encoded.map(([run, differences, values]) => {
    let step = 0;
    return { run, values, steps: differences.map((difference) => (step += difference)) };
  });
}

function nearest(steps, wanted) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low && wanted - steps[low - 1] < steps[low] - wanted ? low - 1 : low;
}

function make(name, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent.append(element);
  return element;
}

function place(value, [low, high], start, end, isLog) {
  const to = isLog ? Math.log10 : (x) => x;
  return start + ((to(value) - to(low)) / (to(high) - to(low))) * (end - start);
}

function findPoints(view, curves, wanted) {
  const [low, high] = readNumbers(view.dataset.x);
  const found = [];
  for (const curve of curves) {
    let index = nearest(curve.steps, wanted);
    if (curve.steps[index] < low) index += 1; // the nearest one is before the range
    const step = curve.steps[index];
    if (step >= low && step <= high && isShown(view.querySelector(`.r${curve.run}`)))
      found.push({ run: curve.run, step, value: curve.values[index] });
  }
  return found;
}

function fillTip(tip, points) {
  const step = points[0].step;
  tip.replaceChildren(document.createElement("b"));
  tip.firstChild.textContent = `step ${step.toLocaleString("en")}`;
  for (const point of points) {
    const line = tip.appendChild(document.createElement("div"));
    line.className = `k${point.run}`;
    const at = point.step === step ? "" : ` at ${point.step.toLocaleString("en")}`;
    line.append(document.createElement("i"), ` ${point.value}${at} `);
    line.append(Object.assign(document.createElement("span"), { textContent: names[point.run] }));
  }
}

function follow(figure) {
  const svg = figure.querySelector("svg");
  const [left, right, top, bottom] = readNumbers(svg.dataset.plot);
  const tip = figure.appendChild(Object.assign(document.createElement("div"), { className: "tip" }));
  let curves, marks;
  const leave = () => {
    tip.style.display = "none";
    if (marks) marks.remove();
  };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", (event) => {
    leave();
    curves = curves || readCurves(figure);
    const view = [...svg.querySelectorAll(".view")].find(isShown);
    const x = event.offsetX * (svg.viewBox.baseVal.width / svg.clientWidth);
    const [low, high] = readNumbers(view.dataset.x);
    const points = findPoints(view, curves, low + ((x - left) / (right - left)) * (high - low));
    if (!points.length) return;
    marks = make("g", { class: "marks" }, svg);
    const at = place(points[0].step, [low, high], left, right, false);
    make("path", { d: `M${at} ${top}V${bottom}` }, marks);
    const isLog = view.classList.contains("logarithmic");
    for (const point of points) {
      if (isLog && point.value <= 0) continue;
      const cx = place(point.step, [low, high], left, right, false);
      const cy = place(point.value, readNumbers(view.dataset.y), bottom, top, isLog);
      make("circle", { cx, cy, r: 3.5, class: `k${point.run}` }, marks);
    }
    fillTip(tip, points);
    tip.style.display = "block";
    const isRight = x > (left + right) / 2;
    tip.style.left = isRight ? "4rem" : "auto";
    tip.style.right = isRight ? "auto" : "1rem";
  });
}

document.querySelectorAll(".chart").forEach(follow);
