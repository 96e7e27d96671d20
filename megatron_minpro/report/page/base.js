"use strict";
// The page's data, numbers as text, and the box that follows the pointer. Texts of a run reach the page by textContent alone.

const page = JSON.parse(document.getElementById("data").textContent);

/** An element with a class and a text. */
function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

/** A number with at most this many significant digits, without needless zeros. */
function digits(value, most = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-4 || size >= 1e6) ? trimZeros(value.toExponential(most - 1)) : String(Number(value.toPrecision(most)));
  return text.replace("-", "−").replace("e−", "e-").replace("e+", "e");
}

function trimZeros(text) {
  const [mantissa, exponent] = text.split("e");
  return `${Number(mantissa)}e${Number(exponent)}`;
}

/** base64 -> the array whose bytes it holds, little-endian. */
function unpack(text, ArrayType) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new ArrayType(bytes.buffer);
}

const tip = document.getElementById("tip");

/** Show rows of [name, value] beside a point of the window; null hides the box. */
function showTip(rows, x, y) {
  tip.hidden = rows === null;
  if (rows === null) return;
  tip.replaceChildren(
    ...rows.map(([name, value]) => {
      const row = make("div");
      row.append(make("span", "quiet", name), make("span", "number", value));
      return row;
    }),
  );
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 4))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 18}px`;
}
