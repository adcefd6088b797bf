"""Which module may import which: the directions that keep networks free of files and generation free of training.

Imports are read from the source, so that one inside a function counts like one at the top.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ldm3d"


def imports(source: str) -> set[str]:
    """Full names of what a module uses: `from a import b` is a.b, `import a` is every a.b that follows."""
    tree, found, plain = ast.parse(source), set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            plain |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "ldm3d imports by full names"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found |= {name.value for name in node.args[:1] if isinstance(name, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (module := plain.get(ast.unparse(node.value))):
            found.add(f"{module}.{node.attr}")
    return found


MODULES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {name: imports(source) for name, source in MODULES.items()}


def below(*folders: str) -> list[str]:
    """Modules by path, or all of a folder."""
    chosen = [name for name in MODULES if name.startswith(folders)]
    assert chosen, f"no module in {folders}: the test looks at nothing"
    return chosen


def is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def ours(module: str) -> set[str]:
    """What comes from ldm3d, beside its version."""
    return {name for name in IMPORTS[module] if is_in(name, ("ldm3d",))} - {"ldm3d", "ldm3d.__version__"}


def others(module: str) -> set[str]:
    """What comes from neither ldm3d nor the standard library."""
    return {name for name in IMPORTS[module] if name.split(".")[0] not in {"ldm3d", *sys.stdlib_module_names}}


def test_reader_sees_every_form_of_import():
    source = "import a.b\nfrom d.e import f, g\ndef h():\n    import i as n\n    importlib.import_module('j.k')\n    n.l()"
    assert imports(source) == {"a.b", "d.e.f", "d.e.g", "i", "i.l", "j.k"}


# Rooms from the ground up: a module may import its own room, and rooms that stand above it in this list
LAYERS = (
    ("errors",),
    ("following", "notation"),
    ("files", "hub", "geometry", "covariates", "randomness", "precision", "preemption", "processes", "devices", "statistics"),
    ("config", "models", "diffusion"),
    ("reading",),
    ("start", "conditions", "contrast"),
    ("data", "memory", "description"),
    ("seen", "metrics", "environment", "figures", "films", "shipped", "methods", "other_data"),
    ("account", "base_model"),
    ("experiment", "generation", "folder", "applied", "dicom"),
    ("networks",),
    ("pipeline",),
    ("published", "rulers", "card"),
    ("applications",),
    ("evaluation", "training", "export"),
    ("privacy",),
    ("report",),
    ("budget", "demo_clock"),
    ("check", "demo", "serve"),
    ("cli",),
)
# Torch and numbers alone, and no other room beside errors: networks know no config, diffusion no network
APART = {
    "models": {"errors"},
    "diffusion": {"errors"},
    "statistics": {"errors", "randomness"},
    "config": {"errors", "covariates"},
}


# Methods of the pipeline that are functions of what stands on it: looked up when they are called
LATE = {"applied": {"applications", "export", "serve"}}


def room(module: str) -> str:
    """data/nifti.py -> data; pipeline.py -> pipeline; ldm3d.data.nifti.read -> data."""
    return module.removeprefix("ldm3d.").replace("/", ".").removesuffix(".py").split(".")[0]


def test_every_module_has_its_place():
    rooms = {room(name) for name in MODULES} - {"__init__", "__main__"}
    assert rooms == {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__.py", "__main__.py"}))
def test_arrows_point_one_way(module):
    above = [name for layer in LAYERS[: next(i for i, layer in enumerate(LAYERS) if room(module) in layer)] for name in layer]
    used = {room(name) for name in ours(module)} - {room(module)}
    assert used <= APART.get(room(module), set(above)) | LATE.get(room(module), set())


def test_what_points_back_is_looked_up_when_it_is_called():
    """At the top of a file it would be a circle."""
    top = ast.parse(MODULES["applied.py"]).body
    assert not [
        node
        for node in top
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldm3d") and node.module != "ldm3d.errors"
    ]


def test_the_picture_of_the_arrows_is_todays():
    done = subprocess.run(
        [sys.executable, "-c", "import arrows; print(arrows.drawing(), end='')"],
        cwd=PACKAGE.parent / "docs",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout in (PACKAGE.parent / "docs/architecture.md").read_text(), "run python docs/arrows.py"


def test_no_import_is_hidden_from_the_program():
    """What is needed for types alone would hide a circle."""
    for module, source in MODULES.items():
        assert "TYPE_CHECKING" not in source, module


def test_networks_and_diffusion_know_torch_only():
    extra = {
        "models/pretrained.py": ("safetensors",),
        "models/foreign.py": ("safetensors",),
        "models/attention.py": ("xformers",),
        "models/monai.py": ("monai", "generative"),
        "models/segmentation.py": ("monai",),
    }
    for module in below("models/", "diffusion/"):
        allowed = ("torch", *extra.get(module, ()))
        assert not {name for name in others(module) if not is_in(name, allowed)}, module


@pytest.mark.parametrize(
    "package, users",
    [
        ("accelerate", ("training/",)),
        ("nibabel", ("data/headers.py", "data/nifti.py")),
        ("matplotlib", ("figures.py",)),
        ("starlette", ("serve/",)),
        ("uvicorn", ("serve/",)),
        ("pydicom", ("dicom/",)),
        ("huggingface_hub", ("hub.py",)),
    ],
)
def test_one_part_alone_uses(package, users):
    using = {module for module, names in IMPORTS.items() if any(is_in(name, (package,)) for name in names)}
    assert using
    assert using <= set(below(*users))


def test_two_files_alone_know_the_ways_of_accelerate():
    """The others take an Accelerator as it is."""
    for module in set(below("training/")) - {"training/parallel.py", "training/sharding.py"}:
        assert {name for name in IMPORTS[module] if is_in(name, ("accelerate",))} <= {"accelerate.Accelerator"}, module


def test_pipeline_never_imports_training():
    reached, waiting = set(), ["ldm3d.pipeline"]
    while waiting:  # nor does anything that it imports
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        path = name.removeprefix("ldm3d.").replace(".", "/")
        for module in (f"{path}.py", f"{path}/__init__.py"):
            if module in MODULES:
                waiting += sorted(ours(module))
        waiting += [parent for parent in [name.rpartition(".")[0]] if parent.count(".")]  # from ldm3d.a.b import c
    assert "ldm3d.geometry" in reached
    assert not {name for name in reached if is_in(name, ("ldm3d.training", "ldm3d.cli"))}


def test_nothing_imports_the_command_line():
    for module in MODULES.keys() - {"__main__.py", *below("cli/")}:
        assert not {name for name in IMPORTS[module] if is_in(name, ("ldm3d.cli",))}, module


def test_monai_is_imported_when_it_is_used():
    """`import ldm3d` and generation with our own networks do not wait for it."""
    imported = "ldm3d, ldm3d.pipeline, ldm3d.models.autoencoder, ldm3d.models.unet, ldm3d.config.read, ldm3d.cli"
    code = f"import sys, {imported}; print([m for m in ('monai', 'generative', 'xformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def loads(source: str) -> tuple[int, int]:
    """(uses of torch.load, those that are calls with weights_only=True written out)."""
    nodes = list(ast.walk(ast.parse(source)))
    uses = [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"]
    safe = [
        node
        for node in nodes
        if isinstance(node, ast.Call)
        and node.func in uses
        and any(k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True for k in node.keywords)
    ]
    return len(uses), len(safe)


def test_reader_of_checkpoints_takes_weights_only():
    """Published checkpoints are pickles: one file reads them, and nothing but tensors comes out."""
    assert loads("torch.load(a, weights_only=True)") == (1, 1)
    assert loads("torch.load(a)\ntorch.load(a, weights_only=x)\nf = torch.load") == (3, 0)
    assert loads(MODULES["models/foreign.py"]) == (1, 1)
    assert "torch.load" in IMPORTS["models/foreign.py"]


def test_no_pickle():
    """Weights and caches of strangers must not be able to run code."""
    for module, source in MODULES.items():
        banned = (
            "pickle",
            "cPickle",
            "dill",
            "cloudpickle",
            "joblib",
            "shelve",
            "marshal",
            "torch.load",
            "torch.save",
            "torch.jit",
        )
        allowed = {"torch.load"} if module == "models/foreign.py" else set()
        assert not {name for name in IMPORTS[module] if is_in(name, banned)} - allowed, module
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", (module, node.value.lineno)
