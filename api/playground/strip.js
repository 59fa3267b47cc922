// The strip: when the words of an answer came. A line per delta, taller where many came at once; shaded where there was
// no connection; red where an attempt started over. Draws what it is given, and knows nothing of streams.

const MIN_SPAN_MS = 8000; // the strip is at least this long before it starts to compress
const GAP_LABEL_PX = 44; // a gap this wide has room for its length in seconds

export class Strip {
  /** `figure` has a canvas, and legends whose text colours are the colours drawn in. */
  constructor(figure) {
    this.figure = figure;
    this.canvas = figure.querySelector("canvas");
    this.span = figure.querySelector(".span");
  }

  draw(live) {
    const { canvas } = this;
    const ratio = devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const now = live.closedAt ?? Date.now();
    const spanMs = Math.max(MIN_SPAN_MS, (now - live.openedAt) * 1.02);
    const x = (at) => 3 + ((at - live.openedAt) / spanMs) * (width - 8);
    this.drawGaps(pen, x, height, live.gaps, now);
    this.drawTicks(pen, x, height, live.ticks);
    this.drawVoids(pen, x, height, live.voids);
    this.describe(live, spanMs);
  }

  colour(name, part = "color") {
    return getComputedStyle(this.figure.querySelector(`.legend.${name}`))[part];
  }

  drawGaps(pen, x, height, gaps, now) {
    const [edge, wash] = [this.colour("gap", "borderTopColor"), this.colour("gap", "backgroundColor")];
    const ink = this.colour("gap");
    pen.font = "600 11px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    for (const { from, to } of gaps) {
      const [left, right] = [x(from), Math.max(x(to ?? now), x(from) + 2)];
      const seconds = `${(((to ?? now) - from) / 1000).toFixed(1)} s`;
      pen.fillStyle = wash;
      pen.fillRect(left, 0, right - left, height);
      pen.fillStyle = edge;
      pen.fillRect(left, 0, 1, height);
      pen.fillRect(right - 1, 0, 1, height);
      pen.fillStyle = ink;
      if (right - left > GAP_LABEL_PX) pen.fillText(seconds, (left + right) / 2, height / 2);
    }
  }

  /** One line per three pixels; the more deltas share it, the bigger, so that a burst of catching up stands out. */
  drawTicks(pen, x, height, ticks) {
    const columns = new Map();
    for (const at of ticks) {
      const column = Math.round(x(at) / 3) * 3;
      columns.set(column, (columns.get(column) ?? 0) + 1);
    }
    pen.fillStyle = this.colour("tick");
    for (const [column, count] of columns) {
      const many = Math.log2(count);
      const [wide, tall] = [1.5 + 0.4 * many, Math.min(height - 6, height * (0.3 + 0.12 * many))];
      pen.beginPath();
      pen.roundRect(column - wide / 2, (height - tall) / 2, wide, tall, wide / 2);
      pen.fill();
    }
  }

  drawVoids(pen, x, height, voids) {
    pen.fillStyle = this.colour("void");
    for (const at of voids) pen.fillRect(x(at) - 1, 0, 2, height);
  }

  /** The legend names what is there to be seen. */
  describe({ ticks, gaps, voids }, spanMs) {
    this.figure.toggleAttribute("data-gaps", gaps.length > 0);
    this.figure.toggleAttribute("data-voids", voids.length > 0);
    const away = gaps.length === 1 ? "once" : `${gaps.length} times`;
    const text = `${ticks.length} pieces of the answer have come. The connection was away ${away}.`;
    if (this.canvas.ariaLabel !== text) this.canvas.ariaLabel = text;
    const span = `${(spanMs / 1000).toFixed(0)} s`;
    if (this.span.textContent !== span) this.span.textContent = span;
  }
}
