"""What pyproject.toml cannot say: the shipped models, in models/, become the folder weights/ of the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ldm3d*"]), "ldm3d.weights"],
    package_dir={"ldm3d.weights": "models"},
    package_data={
        "ldm3d": ["py.typed", "references.bib"],
        "ldm3d.report": ["*.html"],
        "ldm3d.serve": ["static/*"],
        "ldm3d.weights": ["**/*"],
    },
)
