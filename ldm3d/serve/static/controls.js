// The form: a slider or a choice for each covariate, seed, sampler, steps.

const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
}

export class Controls {
  constructor(model, changed) {
    this.model = model;
    this.changed = changed;
    const first = { continuous: true, categorical: true }; // one of each is asked from the start, the others are open
    this.covariates = model.covariates.map((covariate) => {
      const control = covariate.kind === "continuous" ? new Slider(covariate, changed) : new Choice(covariate, changed);
      control.setOpen(!covariate.required && !first[covariate.kind]);
      first[covariate.kind] = false;
      byId("covariates").append(control.box);
      return control;
    });
    if (!model.covariates.length) byId("covariates").append(element("p", { className: "hint", textContent: "This model knows no covariates." }));
    for (const name of model.samplers) byId("sampler").append(element("option", { value: name, textContent: name }));
    byId("sampler").value = model.sampling.sampler;
    byId("steps").value = model.sampling.steps;
    byId("steps").max = model.max_steps;
    byId("guidance").value = model.sampling.guidance;
    byId("guided").hidden = !model.guides;
    byId("seed").value = model.sampling.seed;
    for (const id of ["sampler", "steps", "guidance", "seed"]) byId(id).addEventListener("change", changed);
    byId("another").addEventListener("click", () => {
      byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;
      changed();
    });
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
  }

  request() {
    const covariates = {};
    for (const control of this.covariates) if (control.value() !== null) covariates[control.name] = control.value();
    const request = { covariates, seed: byId("seed").valueAsNumber, steps: byId("steps").valueAsNumber, sampler: byId("sampler").value };
    if (this.model.guides) request.guidance = byId("guidance").valueAsNumber;
    return request;
  }
}

// A request in words
export function describe(request, model) {
  if (request.work === "counterpart") return "its healthy counterpart";
  if (request.work === "restore") return `restored: ${request.operator}`;
  const asked = model.covariates
    .filter(({ name }) => request.covariates[name] !== undefined)
    .map(({ name, label, unit }) => `${label} ${request.covariates[name]}${unit ? ` ${unit}` : ""}`);
  return [...(asked.length ? asked : ["nothing asked"]), ...(request.scan ? [] : [`seed ${request.seed}`])].join(", ");
}

class Control {
  constructor(covariate, changed) {
    this.name = covariate.name;
    this.changed = changed;
    this.open = element("input", { type: "checkbox", id: `open-${covariate.name}` });
    this.open.addEventListener("change", () => {
      this.setOpen(this.open.checked);
      changed();
    });
    const open = element("label", { className: "open", hidden: covariate.required }, this.open, " leave open");
    const unit = covariate.unit ? ` (${covariate.unit})` : "";
    this.label = element("label", { htmlFor: `ask-${covariate.name}`, textContent: covariate.label + unit });
    this.box = element("div", { className: "covariate" }, element("div", { className: "head" }, this.label, open));
  }

  setOpen(open) {
    this.open.checked = open;
    this.box.classList.toggle("left-open", open);
  }

  ask() {
    this.setOpen(false);
    this.changed();
  }
}

class Slider extends Control {
  constructor(covariate, changed) {
    super(covariate, changed);
    const { low, high, step, middle, seen } = covariate;
    const limits = { min: low, max: high, step };
    this.number = element("input", { type: "number", id: `ask-${covariate.name}`, ...limits, value: middle });
    this.slider = element("input", { type: "range", ...limits, value: middle, ariaLabel: covariate.label });
    this.slider.addEventListener("input", () => {
      this.number.value = this.slider.value;
      this.ask();
    });
    this.number.addEventListener("change", () => {
      this.slider.value = this.number.value;
      this.ask();
    });
    const asked = element("div", { className: "asked slider" }, this.number, this.slider);
    this.box.append(asked);
    if (seen) {
      const bar = element("span");
      const [from, to] = seen.map((value) => (100 * (value - low)) / (high - low));
      bar.style.left = `${from}%`;
      bar.style.width = `${to - from}%`;
      asked.append(element("div", { className: "seen" }, bar));
      this.box.append(element("p", { className: "hint", textContent: `training saw ${seen[0]} to ${seen[1]} (green)` }));
    }
  }

  value() {
    return this.open.checked || Number.isNaN(this.number.valueAsNumber) ? null : this.number.valueAsNumber;
  }
}

class Choice extends Control {
  constructor(covariate, changed) {
    super(covariate, changed);
    this.select = element("select", { id: `ask-${covariate.name}` });
    for (const name of covariate.categories) this.select.append(element("option", { value: name, textContent: name }));
    this.select.addEventListener("change", () => this.ask());
    this.box.append(element("div", { className: "asked" }, this.select));
  }

  value() {
    return this.open.checked ? null : this.select.value;
  }
}
