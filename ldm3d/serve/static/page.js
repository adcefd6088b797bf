// The page: a brain follows the controls; another is kept beside it; a film over a covariate.

import { downloadUrl, fetchVolume, modelOf } from "./client.js";
import { Controls, describe } from "./controls.js";
import { Film } from "./film.js";
import { readVolume } from "./nifti.js";
import { Brains } from "./brains.js";
import { Scan } from "./scan.js";

const SETTLED = 350; // ms without a change, until the full volume is made
const byId = (id) => document.getElementById(id);
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

function say(text, error = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", error);
}

function progress(line) {
  if (line.remarks) byId("remarks").textContent = line.remarks.join(" ");
  else if (line.place) say(`Waiting: ${line.place} before you.`);
  else if (line.step !== undefined) say(`Sampling: step ${line.step} of ${line.of}.`);
}

class Follower {
  constructor(controls, brains, model) {
    Object.assign(this, { controls, brains, model, wanted: null, running: false, abort: null });
  }

  changed() {
    const wanted = this.scan.asked(this.controls.request());
    if (!wanted || wanted === this.wanted) return;
    this.wanted = wanted;
    document.body.dataset.state = "waiting";
    this.abort?.abort(); // a full volume that nobody wants any more; a coarse one may end, so that the brain keeps moving
    if (!this.running) this.run();
  }

  async run() {
    this.running = true;
    for (let done = null; done !== this.wanted; ) {
      const mine = this.wanted;
      try {
        if ((mine.work ?? "edit") === "edit") {
          await this.make({ ...mine, coarse: true }, null);
          if (this.wanted !== mine) continue;
          await pause(SETTLED);
          if (this.wanted !== mine) continue;
        }
        this.abort = new AbortController();
        await this.make(mine, this.abort.signal);
        document.body.dataset.state = "full";
      } catch (error) {
        if (error.name === "AbortError") continue;
        if (this.wanted === mine) {
          say(error.message, true);
          document.body.dataset.state = "failed";
        }
      } finally {
        this.abort = null;
      }
      done = mine;
    }
    this.running = false;
  }

  async make(request, signal) {
    const { content, coarse, steps } = await fetchVolume(request, progress, signal);
    const volume = await readVolume(content, request.scan ? "DERIVED FROM YOUR SCAN" : "SYNTHETIC");
    const how = request.samples ? `mean of ${request.samples} draws` : (coarse ? "coarse preview" : "full") + (steps ? `, ${steps} steps` : "");
    const spread = request.work === "restore" && request.samples > 1 ? await readVolume((await fetchVolume(request, progress, signal, "spread")).content) : null;
    await this.brains.show(volume, `${describe(request, this.model)}; ${how}`, spread);
    say(coarse ? "Coarse preview; the full volume follows." : request.samples ? "Done." : "Full volume.");
    if (!coarse) document.body.dataset.shown = JSON.stringify(request);
  }
}

async function begin() {
  const model = await modelOf();
  byId("model").textContent = model.name;
  const size = `${model.shape.join(" x ")} voxels of ${model.spacing_mm.map((s) => +s.toFixed(2)).join(" x ")} mm`;
  byId("hash").textContent = `${model.suffix}, ${size}; model ${model.hash}`;
  const brains = new Brains(byId("brains"), byId("planes"));
  await brains.begin();
  let follower = null;
  const controls = new Controls(model, () => follower.changed());
  follower = new Follower(controls, brains, model);
  new Film(model, controls, brains, say);
  follower.scan = new Scan(model, controls, brains, say, () => follower.changed());
  byId("keep").addEventListener("click", () => brains.keep());
  byId("drop").addEventListener("click", () => follower.scan.leave());
  for (const format of model.formats) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: { nifti: "NIfTI", bids: "BIDS", dicom: "DICOM" }[format] });
    button.addEventListener("click", () => {
      const link = Object.assign(document.createElement("a"), { href: downloadUrl(format, controls.request()), download: "" });
      link.click();
    });
    byId("downloads").append(button);
  }
  follower.changed();
}

begin().catch((error) => say(error.message, true));
