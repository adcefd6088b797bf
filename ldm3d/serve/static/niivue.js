// Three planes and a volume rendering by NiiVue, which needs WebGL2.

import { AXIAL, BRIGHTER, CORONAL, DARKER, MOST, SAGITTAL } from "./planes.js";

const BUNDLE = "static/niivue-0.69.0.umd.js";
const PLANES = [AXIAL, CORONAL, SAGITTAL]; // in the order of NiiVue's numbers for them
const TRANSLUCENT = 1; // below cal_min, opacity is the square of the share of it, in NiiVue's shader
const OPAQUE = (2 / 3) * MOST; // so that smaller differences look as they do on the planes, which blend in proportion
const COLOURS = { brighter: BRIGHTER, darker: DARKER };
let loading = null;

export function hasWebGL2() {
  try {
    const context = document.createElement("canvas").getContext("webgl2");
    context?.getExtension("WEBGL_lose_context")?.loseContext();
    return context !== null;
  } catch {
    return false;
  }
}

export function loadNiiVue() {
  loading ??= new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = BUNDLE;
    script.onload = () => done(window.niivue);
    script.onerror = () => failed(new Error("NiiVue did not load"));
    document.head.append(script);
  });
  return loading;
}

export class Rendered {
  constructor(picture, moved) {
    this.picture = picture;
    this.moved = moved;
    this.busy = Promise.resolve();
    picture.classList.add("rendered");
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    picture.replaceChildren(this.canvas);
  }

  show(volume, difference = null) {
    this.busy = this.busy.then(() => this.update(volume, difference)); // one after another
    return this.busy;
  }

  async update(volume, difference) {
    this.volume = volume;
    this.picture.dataset.mark = volume.mark;
    if (!this.nv) await this.begin();
    const layers = difference ? [volume, difference.above(), difference.below()] : [volume];
    if (this.nv.volumes.length !== layers.length) {
      for (const old of [...this.nv.volumes]) this.nv.removeVolume(old);
      for (const [i, layer] of layers.entries()) await this.nv.loadFromArrayBuffer(layer.buffer.slice(0), `synthetic${i}.nii`);
      this.nv.volumes.forEach((layer, i) => scale(layer, i));
    }
    // In place: camera and crosshair stay where they are
    layers.forEach((layer, i) => this.nv.volumes[i].img.set(layer.data));
    this.nv.updateGLVolume();
  }

  async begin() {
    const { Niivue, SHOW_RENDER } = await loadNiiVue();
    this.nv = new Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [0.43, 0.75, 1, 0.7],
      crosshairWidth: 0.25,
      dragAndDropEnabled: false,
      isOrientationTextVisible: false, // `label` has both sides, and nothing is cut off
      isRadiologicalConvention: false,
      loadingText: "",
      logLevel: "error",
      multiplanarShowRender: SHOW_RENDER.ALWAYS,
      multiplanarLayout: 2,
      show3Dcrosshair: true,
    });
    for (const [name, colour] of Object.entries(COLOURS)) {
      const [R, G, B] = colour.map((c) => [c, c]);
      this.nv.addColormap(name, { R, G, B, A: [0, 255], I: [0, 255] });
    }
    const draw = this.nv.drawScene.bind(this.nv);
    this.nv.drawScene = (...given) => {
      draw(...given);
      this.label();
    };
    await this.nv.attachToCanvas(this.canvas);
    this.nv.setSliceType(this.nv.sliceTypeMultiplanar);
    this.nv.onLocationChange = (place) => this.told(place);
  }

  // Sides of each plane, in its corners
  label() {
    const ratio = this.canvas.width / (this.canvas.clientWidth || 1);
    const slices = this.nv.screenSlices.filter(({ axCorSag }) => axCorSag < PLANES.length);
    const wanted = JSON.stringify(slices.map(({ axCorSag, leftTopWidthHeight }) => [axCorSag, leftTopWidthHeight, ratio]));
    if (wanted === this.labelled) return;
    this.labelled = wanted;
    for (const old of this.picture.querySelectorAll(".side")) old.remove();
    for (const { axCorSag, leftTopWidthHeight } of slices) {
      const [left, top, wide] = leftTopWidthHeight.map((n) => n / ratio);
      for (const [end, text] of PLANES[axCorSag].ends.entries()) {
        const side = Object.assign(document.createElement("span"), { className: end ? "side right" : "side", textContent: text });
        Object.assign(side.style, { left: `${left + end * wide}px`, top: `${top}px` });
        this.picture.append(side);
      }
    }
  }

  told(place) {
    if (this.following || !this.volume) return;
    this.moved(place.vox.slice(0, 3).map((n, axis) => Math.min(this.volume.shape[axis] - 1, Math.max(0, Math.round(n)))));
  }

  moveTo(voxel) {
    if (!this.nv || !this.volume) return;
    this.following = true; // its own answer to this is no move of the user's
    const { shape } = this.volume;
    this.nv.scene.crosshairPos = voxel.map((n, axis) => (n + 0.5) / shape[axis]);
    this.nv.updateGLVolume();
    this.following = false;
  }

  close() {
    this.canvas.getContext("webgl2")?.getExtension("WEBGL_lose_context")?.loseContext();
  }
}

// Grey for the brain; differences the more opaque the larger they are, as the planes have them
function scale(layer, i) {
  layer.colormap = ["gray", ...Object.keys(COLOURS)][i]; // first: it sets the range by the data
  [layer.cal_min, layer.cal_max] = i ? [OPAQUE, 1.01 * OPAQUE] : [0.02, 1];
  layer.colormapType = i ? TRANSLUCENT : 0;
}
