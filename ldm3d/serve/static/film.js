// A film: the same person while one covariate moves. Frames are made one by one and kept in the browser.

import { fetchVolume } from "./client.js";
import { describe } from "./controls.js";
import { Panel } from "./brains.js";
import { readVolume } from "./nifti.js";

const EVERY = 350; // ms
const byId = (id) => document.getElementById(id);

export class Film {
  constructor(model, controls, brains, say) {
    Object.assign(this, { model, controls, brains, say, frames: [], timer: null, panel: null });
    const moving = model.covariates.filter((covariate) => covariate.kind === "continuous");
    byId("film").hidden = !moving.length;
    for (const { name, label } of moving) byId("over").append(Object.assign(document.createElement("option"), { value: name, textContent: label }));
    byId("make").addEventListener("click", () => this.make());
    byId("play").addEventListener("click", () => this.play(this.timer === null));
    byId("frame").addEventListener("input", () => {
      this.play(false);
      this.show(byId("frame").valueAsNumber);
    });
  }

  async make() {
    this.abort?.abort();
    const abort = (this.abort = new AbortController());
    this.play(false);
    this.frames = [];
    const covariate = this.model.covariates.find(({ name }) => name === byId("over").value);
    const [low, high] = covariate.seen ?? [covariate.low, covariate.high];
    const count = Math.min(25, Math.max(2, byId("frames").valueAsNumber || 2));
    const base = this.controls.request();
    try {
      for (let i = 0; i < count; i++) {
        const value = +(low + ((high - low) * i) / (count - 1)).toPrecision(4);
        const request = { ...base, covariates: { ...base.covariates, [covariate.name]: value }, coarse: !byId("fine").checked };
        const tell = (line) => line.place && this.say(`Film: frame ${i + 1} of ${count}, ${line.place} before you.`);
        this.say(`Film: frame ${i + 1} of ${count}.`);
        const { content } = await fetchVolume(request, tell, abort.signal);
        this.frames.push({ volume: await readVolume(content), text: describe(request, this.model), value: `${covariate.label} ${value} ${covariate.unit}` });
        byId("frame").max = this.frames.length - 1;
        byId("scrub").hidden = byId("play").hidden = false;
        await this.show(i);
      }
      this.say("Film: done.");
      this.play(true);
    } catch (error) {
      if (error.name !== "AbortError") this.say(error.message, true);
    }
  }

  play(on) {
    clearInterval(this.timer);
    this.timer = on ? setInterval(() => this.show((byId("frame").valueAsNumber + 1) % this.frames.length), EVERY) : null;
    byId("play").textContent = on ? "Pause" : "Play";
  }

  async show(i) {
    const frame = this.frames[i];
    if (!frame) return;
    byId("frame").value = i;
    byId("when").textContent = frame.value;
    const Viewer = this.brains.viewer();
    if (!(this.panel?.viewer instanceof Viewer)) {
      this.panel?.remove();
      this.panel = new Panel(byId("screen"), "film", Viewer, (voxel) => this.panel.at(voxel, false));
    }
    await this.panel.show(frame.volume, frame.text);
  }
}
