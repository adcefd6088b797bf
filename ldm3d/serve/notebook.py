"""The page's sliders and viewer in a notebook, as a widget."""

import secrets
from typing import Any

import ipywidgets
from ipyniivue import NiiVue, SliceType, Volume

from ldm3d.covariates import describe
from ldm3d.pipeline import Pipeline
from ldm3d.serve import PREVIEW_STEPS
from ldm3d.serve.asked import Asked
from ldm3d.serve.plausibility import remarks
from ldm3d.serve.studio import Job, Studio

OPEN = "(open)"
WIDE = ipywidgets.Layout(width="330px")


class Explorer(ipywidgets.HBox):
    """Sliders for covariates and the brain that follows; every volume is synthetic.

    Args:
        pipeline: the model.
        preview_steps: sampling steps of what is shown while covariates move; `full` shows the volume that
            `pipeline(...)` makes for the same covariates and seed.

    Attributes:
        controls: covariate -> its slider or choice.
        opened: continuous covariate -> whether it is left open.
        seed, full, another: the other controls.
        shown: the volume that is shown, as .nii.gz.
    """

    def __init__(self, pipeline: Pipeline, preview_steps: int = PREVIEW_STEPS):
        self._studio = Studio(pipeline, "model", preview_steps=preview_steps)
        self.controls: dict[str, Any] = {}
        self.opened: dict[str, Any] = {}
        self.shown = b""
        rows = [self._row(covariate) for covariate in self._studio.description()["covariates"]]
        self.seed = ipywidgets.BoundedIntText(pipeline.sampling.seed, 0, 2**31 - 1, description="seed", layout=WIDE)
        self.another = ipywidgets.Button(description="Another person")
        self.full = ipywidgets.Button(description="Full volume")
        self._said = ipywidgets.HTML()
        # Both sides of each plane, with room around them: without it, letters are cut off at the edge
        sides = {"show_all_orientation_markers": True, "multiplanar_pad_pixels": 16}
        self._viewer = NiiVue(height=420, crosshair_width=0.3, **sides)
        self._viewer.set_slice_type(SliceType.MULTIPLANAR)
        for control in (*self.controls.values(), *self.opened.values(), self.seed):
            control.observe(lambda _: self.show(coarse=True), "value")
        self.another.on_click(lambda _: setattr(self.seed, "value", secrets.randbelow(10**6)))
        self.full.on_click(lambda _: self.show(coarse=False))
        buttons = ipywidgets.HBox([self.another, self.full])
        left = ipywidgets.VBox([*rows, self.seed, buttons], layout=ipywidgets.Layout(flex="0 0 440px"))
        right = ipywidgets.VBox([self._said, self._viewer], layout=ipywidgets.Layout(flex="1 1 0%", min_width="0"))
        super().__init__([left, right])
        self.show(coarse=True)

    def _row(self, covariate: dict[str, Any]) -> Any:
        name = covariate["name"]
        label = f"{covariate['label']} ({covariate['unit']})" if covariate["unit"] else covariate["label"]
        shape = {"description": label, "style": {"description_width": "130px"}, "layout": WIDE}
        if covariate["kind"] == "categorical":
            options = list(covariate["categories"]) + ([] if covariate["required"] else [OPEN])
            asked = covariate["required"] or not any(
                OPEN in c.options for c in self.controls.values() if hasattr(c, "options")
            )
            self.controls[name] = ipywidgets.Dropdown(options=options, value=options[0] if asked else OPEN, **shape)
            return self.controls[name]
        limits = {"min": covariate["low"], "max": covariate["high"], "step": covariate["step"]}
        slider = ipywidgets.FloatSlider(covariate["middle"], continuous_update=False, **limits, **shape)
        self.controls[name] = slider
        if covariate["required"]:
            return slider
        first = not self.opened
        self.opened[name] = ipywidgets.Checkbox(
            not first, description="open", indent=False, layout=ipywidgets.Layout(width="80px")
        )
        return ipywidgets.HBox([slider, self.opened[name]])

    def asked(self) -> dict[str, Any]:
        """The covariates as they stand; None where open."""
        return {
            name: None if control.value == OPEN or (name in self.opened and self.opened[name].value) else control.value
            for name, control in self.controls.items()
        }

    def show(self, coarse: bool = False) -> None:
        """Make and show the volume: a coarse one, or the full one."""
        pipeline = self._studio.pipeline
        row = pipeline.schema.parse(self.asked())
        sampling = pipeline.sampling.replace(seed=self.seed.value)
        if coarse:
            sampling = sampling.replace(steps=min(sampling.steps, self._studio.preview_steps))
        asked = Asked(tuple(row.items()), sampling, coarse)
        self.shown = self._studio.submit(asked, Job(self._studio.limits.seconds)).result()
        grey = {"colormap": "gray", "cal_min": 0.02, "cal_max": 1.0, "colorbar_visible": False}
        self._viewer.load_volumes([Volume(name="synthetic.nii.gz", data=self.shown, **grey)])
        quality = f"coarse preview, {sampling.steps} steps" if coarse else f"full, {sampling.steps} steps"
        warning = " ".join(remarks(pipeline, row))
        self._said.value = f"<b>SYNTHETIC</b>: {describe(row)}, seed {sampling.seed}; {quality}. {warning}"


def explore(pipeline: Pipeline, preview_steps: int = PREVIEW_STEPS) -> Explorer:
    """The widget of a pipeline, see `Explorer`."""
    return Explorer(pipeline, preview_steps)
