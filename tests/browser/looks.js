// What test_looks.py asks of a page. Evaluates to {rememberTexts(), faults(scale)}.
(() => {
  // Keeps every text on a canvas, with its box, in `canvas.texts`; begun anew when the canvas is cleared.
  function rememberTexts() {
    const { fillText, clearRect } = CanvasRenderingContext2D.prototype;
    CanvasRenderingContext2D.prototype.clearRect = function (x, y, width, height) {
      if (!x && !y && width >= this.canvas.clientWidth) this.canvas.texts = [];
      clearRect.call(this, x, y, width, height);
    };
    CanvasRenderingContext2D.prototype.fillText = function (text, x, y, ...most) {
      const width = Math.min(this.measureText(text).width, most[0] ?? Infinity);
      const size = Number(/([\d.]+)px/.exec(this.font)[1]);
      const left = x - width * ({ center: 0.5, right: 1 }[this.textAlign] || 0), isTurned = this.getTransform().b;
      if (text && !isTurned) (this.canvas.texts ??= []).push({ text, left, right: left + width, size });
      fillText.call(this, text, x, y, ...most);
    };
  }

  // Relative luminance (WCAG 2), plus 0.05, of colours painted one over the other: [[colour, opacity], ...].
  const probe = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  function luminance(layers) {
    for (const [colour, opacity] of layers) {
      probe.globalAlpha = opacity;
      probe.fillStyle = colour;
      probe.fillRect(0, 0, 1, 1);
    }
    const channels = [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255);
    const linear = channels.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05;
  }
  // Contrast of an element's text with what lies below it.
  function contrastOf(element) {
    const styles = [];
    for (let node = element; node; node = node.parentElement) styles.unshift(getComputedStyle(node));
    const ground = [["#fff", 1], ...styles.map((style) => [style.backgroundColor, 1])];
    const opacity = styles.reduce((product, style) => product * style.opacity, 1);
    const ink = [...ground, [getComputedStyle(element).color, opacity]];
    const [low, high] = [luminance(ground), luminance(ink)].sort((a, b) => a - b);
    return high / low;
  }
  const isSeen = (node) => node.getClientRects().length && !node.closest(".tv-spoken, .tv-tooltip, style, option");

  function faultsOf(panel, scale) {
    const found = [], { right } = panel.getBoundingClientRect();
    const texts = document.createTreeWalker(panel, NodeFilter.SHOW_TEXT);
    for (const node of panel.querySelectorAll("button, input, select, textarea, canvas")) {
      const isOut = isSeen(node) && node.getBoundingClientRect().right > right + 1;
      if (isOut) found.push(`out of reach: ${node.outerHTML.slice(0, 80)}`);
    }
    while (texts.nextNode()) {
      const { data, parentElement: node } = texts.currentNode;
      if (!data.trim() || !isSeen(node) || node.closest(":disabled")) continue;
      if (contrastOf(node) < 4.5) found.push(`contrast ${contrastOf(node).toFixed(2)}: ${data.slice(0, 40)}`);
    }
    for (const canvas of panel.querySelectorAll("canvas")) {
      for (const { text, left, right: end, size } of isSeen(canvas) && canvas.texts || []) {
        const width = canvas.clientWidth;
        if (left < -1 || end > width + 1) found.push(`cut off: ${text} at ${left} to ${end} of ${width}`);
        if (size < 8 * scale) found.push(`too small at ${size} pixels: ${text}`);
      }
    }
    return found.map((text) => `${panel.ariaLabel}: ${text}`);
  }

  // What a class could not see or reach, in words.
  function faults(scale) {
    const found = [...document.querySelectorAll(".tv-panel")].flatMap((panel) => faultsOf(panel, scale));
    const wide = document.documentElement.scrollWidth;
    return wide > innerWidth ? [`the page is ${wide} pixels wide`, ...found] : found;
  }
  return { rememberTexts, faults };
})()
