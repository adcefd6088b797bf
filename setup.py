"""What pyproject.toml cannot say: models/ and configs/ become the folders weights/ and configs/ of the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ldm3d*"]), "ldm3d.weights", "ldm3d.configs"],
    package_dir={"ldm3d.weights": "models", "ldm3d.configs": "configs"},
    package_data={
        "ldm3d": ["py.typed", "references.bib"],
        "ldm3d.report": ["*.html"],
        "ldm3d.serve": ["static/*"],
        "ldm3d.weights": ["**/*"],
        "ldm3d.configs": ["**/*.yaml"],
    },
)
