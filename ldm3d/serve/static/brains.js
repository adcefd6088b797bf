// The brains on the page: the one that follows, one that was kept, and the difference of both. Their crosshairs move together.

import { hasWebGL2, Rendered } from "./niivue.js";
import { Planes } from "./planes.js";

export class Brains {
  constructor(box, planesOnly) {
    this.box = box;
    this.planesOnly = planesOnly;
    this.panels = {};
    this.current = this.kept = null;
  }

  async begin() {
    if (!hasWebGL2()) {
      this.planesOnly.checked = this.planesOnly.disabled = true;
      this.planesOnly.parentElement.title = "This browser has no WebGL2, which the volume rendering needs.";
    }
    this.planesOnly.addEventListener("change", () => this.rebuild());
  }

  // `spread`: how far to trust it, a volume; drawn in place of the difference
  async show(volume, text, spread = null) {
    this.current = { volume, text, spread };
    await this.draw();
  }

  async keep(brain = this.current) {
    if (!brain) return;
    this.kept = brain;
    this.current ??= brain;
    await this.draw();
  }

  async drop() {
    this.kept = null;
    for (const name of ["kept", "difference"]) this.remove(name);
    await this.draw();
  }

  async draw() {
    const { current, kept } = this;
    document.getElementById("drop").hidden = !kept;
    this.box.classList.toggle("three", Boolean(kept));
    if (kept) await this.panel("kept", "kept").show(kept.volume, kept.text);
    await this.panel("current", kept ? "now" : "").show(current.volume, current.text);
    if (kept) {
      const { spread } = current;
      const panel = this.panel("difference", spread ? "how far draws differ" : "now minus kept");
      const text = spread ? "red: a deviation from 0.04 to 0.3" : "red: brighter now, blue: darker, from 0.04 to 0.3";
      await panel.show(current.volume, text, spread ?? current.volume.minus(kept.volume));
    }
  }

  async rebuild() {
    for (const name of Object.keys(this.panels)) this.remove(name);
    if (this.current) await this.draw();
  }

  panel(name, title) {
    this.panels[name] ??= new Panel(this.box, name, this.viewer(), (voxel) => this.follow(name, voxel));
    this.panels[name].title = title;
    return this.panels[name];
  }

  // Where the crosshair is
  voxel() {
    const [panel] = Object.values(this.panels);
    return panel.voxel ?? panel.volume.shape.map((n) => n >> 1);
  }

  viewer() {
    return this.planesOnly.checked ? Planes : Rendered;
  }

  follow(from, voxel) {
    for (const [name, panel] of Object.entries(this.panels)) panel.at(voxel, name !== from);
  }

  remove(name) {
    this.panels[name]?.remove();
    delete this.panels[name];
  }
}

export class Panel {
  constructor(box, name, Viewer, moved) {
    this.picture = Object.assign(document.createElement("div"), { className: "picture" });
    this.caption = document.createElement("figcaption");
    this.figure = document.createElement("figure");
    this.figure.dataset.name = name;
    this.figure.append(this.picture, this.caption);
    box.append(this.figure);
    this.viewer = new Viewer(this.picture, moved);
    this.title = "";
  }

  async show(volume, text, difference = null) {
    this.volume = difference ?? volume;
    this.mark = volume.mark.toLowerCase();
    this.text = text;
    this.say();
    await this.viewer.show(volume, difference);
  }

  at(voxel, follows) {
    this.voxel = voxel;
    if (follows) this.viewer.moveTo(voxel);
    this.say();
  }

  say() {
    const title = this.title ? [Object.assign(document.createElement("b"), { textContent: `${this.title}: ` })] : [];
    const place = this.voxel && this.volume ? ` [${this.volume.millimetres(this.voxel).map((mm) => mm.toFixed(0)).join(", ")} mm: ${this.volume.at(this.voxel).toFixed(2)}]` : "";
    this.caption.replaceChildren(...title, `${this.mark}; ${this.text}${place}`);
  }

  remove() {
    this.viewer.close();
    this.figure.remove();
  }
}
