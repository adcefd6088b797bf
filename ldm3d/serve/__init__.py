"""A page, and a widget, with sliders for a trained model."""

# Of the sampler, for what follows a slider: as few as leave a person the same one (benchmarks/preview.py)
PREVIEW_STEPS = 12
