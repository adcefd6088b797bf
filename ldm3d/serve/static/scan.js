// A scan of the user's own: first its covariates are given, then something is made of it. An edit follows the sliders; the
// healthy counterpart and a restored scan take longer, and are made when asked for.

import { downloadUrl, sendScan } from "./client.js";
import { readVolume } from "./nifti.js";

const byId = (id) => document.getElementById(id);

const WORKS = {
  edit: ["the same head, following the sliders", "Its identity stays. Move a slider: what is shown never happened."],
  counterpart: ["its healthy counterpart", "By a model of healthy people. Unusual is not ill: no diagnosis."],
  restore: ["the scan restored", "The mean of some draws. What was not measured is made up: no diagnosis."],
};

export class Scan {
  constructor(model, controls, brains, say, changed) {
    Object.assign(this, { model, controls, brains, say, changed, name: null, source: null, made: null });
    byId("scan").hidden = !model.works.length;
    byId("file").addEventListener("change", () => byId("file").files.length && this.take(byId("file").files[0]));
    byId("scan").addEventListener("dragover", (event) => event.preventDefault());
    byId("scan").addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files.length) this.take(event.dataTransfer.files[0]);
    });
    for (const work of model.works) byId("work").append(Object.assign(document.createElement("option"), { value: work, textContent: WORKS[work][0] }));
    byId("own").addEventListener("click", () => this.own());
    byId("work").addEventListener("change", () => this.choose());
    byId("happened").addEventListener("change", () => this.choose());
    byId("begin").addEventListener("click", () => this.begin());
    byId("edited").addEventListener("click", () => this.download("own"));
    byId("unsure").addEventListener("click", () => this.download("deviation"));
  }

  async take(file) {
    this.say("Reading the scan, and bringing it to the model's grid.");
    try {
      const { content, scan } = await sendScan(file, (line) => line.place && this.say(`The scan waits: ${line.place} before it.`));
      const volume = await readVolume(content, "YOUR SCAN");
      Object.assign(this, { name: scan, source: null, made: null });
      byId("works").hidden = true;
      byId("working").textContent = "";
      await this.brains.keep({ volume, text: file.name });
      byId("own").hidden = false;
      byId("downloads").hidden = true; // they are of generated volumes
      this.say("Set the person's own covariates, leave open what you do not know, and press the button below.");
      if (!this.model.covariates.length) this.own();
    } catch (error) {
      this.say(error.message, true);
    }
    byId("file").value = "";
  }

  own() {
    this.source = this.controls.request().covariates;
    byId("own").hidden = true;
    byId("works").hidden = false;
    this.choose();
  }

  // Show what goes with the chosen work
  choose() {
    const work = byId("work").value;
    const happened = work === "restore" ? byId("happened").value : "";
    this.made = null;
    byId("happening").hidden = byId("noisy").hidden = !happened;
    byId("through").hidden = byId("which").hidden = happened !== "missing";
    byId("wide").hidden = !["hole", "blur"].includes(happened);
    byId("wide-name").textContent = happened === "hole" ? "radius" : "full width at half maximum";
    byId("drawing").hidden = byId("begin").hidden = work === "edit";
    byId("edited").hidden = work !== "edit";
    byId("unsure").hidden = true;
    byId("working").textContent = WORKS[work][1];
    if (work === "edit") this.changed();
    else this.say("Choose, and press the button below. It takes a while.");
  }

  begin() {
    const work = byId("work").value;
    this.made = { work, scan: this.name, source: this.source, samples: byId("samples").valueAsNumber };
    if (work === "restore") Object.assign(this.made, this.happened(), { noise: byId("noise").valueAsNumber / 100 });
    byId("edited").hidden = false;
    byId("unsure").hidden = work !== "restore" || this.made.samples < 2;
    this.changed();
  }

  happened() {
    const happened = byId("happened").value;
    if (happened === "missing") return { operator: `missing=${byId("axis").value}:${byId("slices").value.replaceAll(" ", "")}` };
    if (happened === "blur") return { operator: `blur=${byId("mm").value}` };
    if (happened === "hole") return { operator: "hole", centre: this.brains.voxel(), radius_mm: byId("mm").valueAsNumber };
    return { operator: happened };
  }

  // What is to be shown now: of the scan, if there is one; null where something must be chosen first
  asked(request) {
    if (this.name === null) return request;
    if (this.source === null) return null;
    if (byId("work").value !== "edit") return this.made;
    return { work: "edit", scan: this.name, source: this.source, covariates: request.covariates };
  }

  download(part) {
    const href = downloadUrl("made", this.asked(this.controls.request())) + `&part=${part}`;
    Object.assign(document.createElement("a"), { href, download: "" }).click();
  }

  async leave() {
    this.name = this.source = this.made = null;
    byId("own").hidden = byId("works").hidden = true;
    byId("working").textContent = "";
    byId("downloads").hidden = false;
    await this.brains.drop();
    this.changed();
  }
}
