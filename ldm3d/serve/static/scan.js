// A scan of the user's own: first its covariates are given, then the same head follows the sliders.

import { downloadUrl, sendScan } from "./client.js";
import { readVolume } from "./nifti.js";

const byId = (id) => document.getElementById(id);

export class Scan {
  constructor(model, controls, brains, say, changed) {
    Object.assign(this, { controls, brains, say, changed, name: null, source: null });
    byId("scan").hidden = !model.edits;
    byId("file").addEventListener("change", () => byId("file").files.length && this.take(byId("file").files[0]));
    byId("scan").addEventListener("dragover", (event) => event.preventDefault());
    byId("scan").addEventListener("drop", (event) => {
      event.preventDefault();
      if (event.dataTransfer.files.length) this.take(event.dataTransfer.files[0]);
    });
    byId("own").addEventListener("click", () => this.own());
    byId("edited").addEventListener("click", () => {
      const href = downloadUrl("scan", this.asked(this.controls.request()));
      Object.assign(document.createElement("a"), { href, download: "" }).click();
    });
  }

  async take(file) {
    this.say("Reading the scan, and bringing it to the model's grid.");
    try {
      const { content, scan } = await sendScan(file, (line) => line.place && this.say(`The scan waits: ${line.place} before it.`));
      const volume = await readVolume(content, "YOUR SCAN");
      this.name = scan;
      this.source = null;
      await this.brains.keep({ volume, text: file.name });
      byId("own").hidden = false;
      byId("edited").hidden = true;
      this.say("Set the person's own covariates, leave open what you do not know, and press the button below.");
    } catch (error) {
      this.say(error.message, true);
    }
    byId("file").value = "";
  }

  own() {
    this.source = this.controls.request().covariates;
    byId("own").hidden = true;
    byId("edited").hidden = false;
    byId("downloads").hidden = true; // they are of generated volumes
    this.changed();
  }

  // Whether there is a scan whose covariates are not known yet
  waits() {
    return this.name !== null && this.source === null;
  }

  // The request for the scan as the controls have it; null without a scan
  asked(request) {
    if (this.source === null) return null;
    return { scan: this.name, source: this.source, covariates: request.covariates };
  }

  async leave() {
    this.name = this.source = null;
    byId("own").hidden = byId("edited").hidden = true;
    byId("downloads").hidden = false;
    await this.brains.drop();
    this.changed();
  }
}
