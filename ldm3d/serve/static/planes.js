// Three planes of a volume on a canvas, with a crosshair; needs no WebGL. The patient's left is on the left.

export const AXIAL = { across: 0, up: 1, through: 2, name: "axial", ends: ["L", "R"] };
export const CORONAL = { across: 0, up: 2, through: 1, name: "coronal", ends: ["L", "R"] };
export const SAGITTAL = { across: 1, up: 2, through: 0, name: "sagittal", ends: ["P", "A"] };
const LEAST = 0.04; // of a difference that is drawn
export const MOST = 0.3;
export const BRIGHTER = [255, 120, 60];
export const DARKER = [70, 140, 255];
const GAP = 6;

export class Planes {
  constructor(picture, moved) {
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "A brain: axial, coronal and sagittal plane. Arrows, Page Up and Page Down move.");
    this.moved = moved;
    picture.replaceChildren(this.canvas);
    this.picture = picture;
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.point(event);
    });
    this.canvas.addEventListener("pointermove", (event) => event.buttons && this.point(event));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.watch = new ResizeObserver(() => this.draw());
    this.watch.observe(picture);
  }

  async show(volume, difference = null) {
    this.volume = volume;
    this.difference = difference;
    this.voxel ??= volume.shape.map((n) => n >> 1);
    this.draw();
  }

  moveTo(voxel) {
    this.voxel = voxel;
    this.draw();
  }

  close() {
    this.watch.disconnect();
  }

  // Where each plane lies on the canvas, in CSS pixels
  layout() {
    const { volume } = this;
    const spacing = volume.spacing();
    const size = volume.shape.map((n, axis) => n * spacing[axis]);
    const wide = this.picture.clientWidth;
    const planes = [AXIAL, CORONAL, SAGITTAL];
    const rows = wide < 520 ? [[AXIAL, CORONAL], [SAGITTAL]] : [planes];
    const widest = Math.max(...rows.map((row) => row.reduce((sum, plane) => sum + size[plane.across], 0)));
    const scale = Math.min((wide - 2 * GAP) / widest, 460 / Math.max(...size));
    const boxes = [];
    let top = 22;
    for (const row of rows) {
      const tall = Math.max(...row.map((plane) => size[plane.up])) * scale;
      let left = (wide - row.reduce((sum, plane) => sum + size[plane.across], 0) * scale - (row.length - 1) * GAP) / 2;
      for (const plane of row) {
        const width = size[plane.across] * scale;
        const height = size[plane.up] * scale;
        boxes.push({ plane, left, top: top + (tall - height) / 2, width, height });
        left += width + GAP;
      }
      top += tall + GAP;
    }
    return { boxes, height: top };
  }

  draw() {
    if (!this.volume || !this.picture.clientWidth) return;
    const { boxes, height } = this.layout();
    const ratio = window.devicePixelRatio || 1;
    this.picture.style.height = `${height}px`;
    this.canvas.width = this.picture.clientWidth * ratio;
    this.canvas.height = height * ratio;
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.fillStyle = "black";
    pen.fillRect(0, 0, this.picture.clientWidth, height);
    for (const box of boxes) this.drawPlane(pen, box);
    pen.fillStyle = "#ffb38f"; // in the picture itself, so that a saved one says it
    pen.font = "600 12px system-ui, sans-serif";
    pen.textAlign = "left";
    pen.fillText(`${this.volume.mark} (ldm3d)`, 8, 15);
  }

  drawPlane(pen, { plane, left, top, width, height }) {
    const { shape } = this.volume;
    const columns = shape[plane.across];
    const rows = shape[plane.up];
    const image = new ImageData(columns, rows);
    const voxel = [...this.voxel];
    for (let row = 0; row < rows; row++) {
      voxel[plane.up] = rows - 1 - row;
      for (let column = 0; column < columns; column++) {
        voxel[plane.across] = column;
        const grey = 255 * Math.min(1, Math.max(0, this.volume.at(voxel)));
        image.data.set(this.coloured(grey, voxel), 4 * (row * columns + column));
      }
    }
    const small = new OffscreenCanvas(columns, rows);
    small.getContext("2d").putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = true;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(small, left, top, width, height);
    const x = left + ((this.voxel[plane.across] + 0.5) / columns) * width;
    const y = top + (1 - (this.voxel[plane.up] + 0.5) / rows) * height;
    pen.strokeStyle = "rgba(110, 190, 255, 0.7)";
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(x, top);
    pen.lineTo(x, top + height);
    pen.moveTo(left, y);
    pen.lineTo(left + width, y);
    pen.stroke();
    pen.fillStyle = "#9aa7b4";
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "left";
    pen.fillText(plane.ends[0], left + 3, top + 12);
    pen.textAlign = "right";
    pen.fillText(plane.ends[1], left + width - 3, top + 12);
  }

  coloured(grey, voxel) {
    const change = this.difference ? this.difference.at(voxel) : 0;
    const share = Math.min(1, Math.max(0, (Math.abs(change) - LEAST) / (MOST - LEAST)));
    const colour = change > 0 ? BRIGHTER : DARKER;
    return [...colour.map((c) => grey * (1 - share) + c * share), 255];
  }

  point(event) {
    const bounds = this.canvas.getBoundingClientRect();
    const x = event.clientX - bounds.left;
    const y = event.clientY - bounds.top;
    for (const { plane, left, top, width, height } of this.layout().boxes) {
      if (x < left || x >= left + width || y < top || y >= top + height) continue;
      const voxel = [...this.voxel];
      voxel[plane.across] = Math.floor(((x - left) / width) * this.volume.shape[plane.across]);
      voxel[plane.up] = Math.floor((1 - (y - top) / height) * this.volume.shape[plane.up]);
      this.go(voxel);
    }
  }

  key(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowDown: [1, -1], ArrowUp: [1, 1], PageDown: [2, -1], PageUp: [2, 1] };
    const move = moves[event.key];
    if (!move || !this.volume) return;
    event.preventDefault();
    const voxel = [...this.voxel];
    voxel[move[0]] += move[1];
    this.go(voxel);
  }

  go(voxel) {
    this.moveTo(voxel.map((n, axis) => Math.min(this.volume.shape[axis] - 1, Math.max(0, n))));
    this.moved(this.voxel);
  }
}
