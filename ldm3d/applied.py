"""What a pipeline does with a given scan, as its methods: each is a function of `ldm3d.applications`.

Applications stand on the pipeline, so they are looked up when they are called.
"""

from collections.abc import Mapping
from typing import Any

from ldm3d.errors import InputError


class Applied:
    """The methods of `Pipeline` that take a scan."""

    def encode(self, image: Any, **options: Any) -> Any:
        """A scan on the model's Grid and as a latent, with the way back; see `ldm3d.applications.placed.place`."""
        from ldm3d.applications.placed import place

        return place(self, image, **options)

    def explore(self, **options: Any) -> Any:
        """A widget for notebooks, sliders and the brain that follows; see `ldm3d.serve.notebook.Explorer`."""
        try:
            from ldm3d.serve.notebook import explore
        except ModuleNotFoundError as error:
            raise InputError(f"{error.name} is missing, which the widget needs; pip install 'ldm3d[notebook]'") from None

        return explore(self, **options)  # type: ignore[arg-type]

    def push_to_hub(self, name: str, **options: Any) -> str:
        """Push the model to a hub as "user/name"; see `ldm3d.export.push`."""
        import tempfile

        from ldm3d.export import push

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)  # type: ignore[attr-defined]
            return push(folder, name, **options)

    def restore(self, image: Any, operator: Any = (), noise: float = 0.01, **options: Any) -> Any:
        """What a degraded scan can have been, see `ldm3d.applications.restore.restore`."""
        from ldm3d.applications.restore import restore

        return restore(self, image, operator, noise, **options)

    def edit(
        self, image: Any, source: Mapping[str, Any] | None = None, to: Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        """The scan with other covariates, pipe.edit(scan, {"age": 62}, age="+10"); see `ldm3d.applications.edit.edit`."""
        from ldm3d.applications.edit import edit

        return edit(self, image, source, to, **options)

    def counterpart(self, image: Any, covariates: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """The scan as healthy people's are; see `ldm3d.applications.counterpart.counterpart`."""
        from ldm3d.applications.counterpart import counterpart

        return counterpart(self, image, covariates, **options)

    def atlas(self, folder: Any, asked: Mapping[str, Any], by: Any = (), volumes: int = 100, **options: Any) -> bool:
        """Templates of generated volumes, pipe.atlas("out", {"age": "20:90:10"}, by=["sex"]); see
        `ldm3d.applications.atlas_files.atlas`.
        """
        from ldm3d.applications.atlas_files import atlas

        return atlas(self, folder, asked, by, volumes, **options)
