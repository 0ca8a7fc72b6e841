"""Which module may import which, and what `import sprint` may not import."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sprint

SOURCE = Path(sprint.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# A room may import these, and its own files one another without a circle.
ALLOWED = {
    "arguments": set(),
    "random": set(),
    "checkpoint": {"arguments"},
    "kernels": set(),
    "middle": {"arguments", "random"},
    "flow": {"arguments", "middle", "random"},
    "data": {"arguments", "checkpoint", "random"},
    "models": {"arguments", "checkpoint", "flow", "kernels", "middle", "random"},
    "hosts": {"arguments", "checkpoint", "middle", "random"},
    "capture": {"arguments", "hosts", "models"},
    "training": {"arguments", "capture", "checkpoint", "flow", "kernels", "middle", "models"},
    "costs": {"arguments", "flow", "hosts", "middle", "models"},
    "commands": {"checkpoint", "costs", "middle", "models", "random"},
    "__main__": {"commands"},
    "diffusers": {"arguments", "checkpoint", "data", "flow", "hosts", "middle", "models", "random"},
}
CORE = {"torch", "einops", "safetensors", "numpy"}
OPT_IN = {  # loaded where used
    "diffusers": {"diffusers"},
    **{f"kernels.{name}": {"triton"} for name in ("mode", "adamw", "modulation", "rotary")},
}
LAZY = {
    "diffusers",
    "huggingface_hub",
    "xformers",
    "tqdm",
    "PIL",
    "pillow_heif",
    "timm",
    "typing_extensions",
}  # inside the function that needs them, or for types


def imports(path: Path) -> list[tuple[str, bool]]:
    """Imported modules, and whether they are imported when the file is (not for types only, not in a function)."""
    found = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            at_import = False
        if isinstance(node, ast.ImportFrom):
            inside = (SOURCE.parent / node.module.replace(".", "/")).is_dir() and node.module.startswith("sprint")
            names = [f"{node.module}.{alias.name}" for alias in node.names] if inside else [node.module]
            found.extend((name, at_import) for name in names)
        elif isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import)

    visit(ast.parse(path.read_text()), True)
    return found


def module(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def room(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


def modules() -> dict[str, set[str]]:
    """What each file imports of ours, anywhere in it and for types too; `__init__` files hand on what their room has."""
    files = {module(path): path for path in FILES if path.stem != "__init__"}
    found = {}
    for name, path in files.items():
        ours = {other.removeprefix("sprint.") for other, _ in imports(path) if other.startswith("sprint.")}
        assert ours <= files.keys(), f"{name} imports {ours - files.keys()}: name the file, not the room"
        found[name] = ours
    return found


def test_rooms_import_only_what_they_may():
    found: dict[str, set[str]] = {}
    for name, ours in modules().items():
        found.setdefault(room(name), set()).update(room(other) for other in ours)
    assert found.keys() == ALLOWED.keys()
    for name, others in found.items():
        assert others - {name} <= ALLOWED[name], f"{name} imports {others - {name} - ALLOWED[name]}"


def test_there_is_no_circle_of_rooms_nor_of_files():
    order = list(graphlib.TopologicalSorter(ALLOWED).static_order())
    assert order.index("middle") < order.index("models")
    list(graphlib.TopologicalSorter(modules()).static_order())  # raises at a circle


def test_each_room_says_what_it_is_for_and_what_it_hands_on():
    for path in SOURCE.rglob("__init__.py"):
        inside = ast.parse(path.read_text())
        text = ast.get_docstring(inside) or ""
        assert "\n" in text, f"{path} says too little"
        name = ".".join(["sprint", *path.relative_to(SOURCE).parent.parts])
        for public in getattr(importlib.import_module(name), "__all__", []):
            assert hasattr(importlib.import_module(name), public)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_third_parties_are_the_core_or_lazy(path):
    for name, at_import in imports(path):
        top = name.split(".")[0]
        if top != "sprint" and top not in sys.stdlib_module_names:
            opt_in = OPT_IN.get(module(path), OPT_IN.get(room(module(path)), set()))
            assert top in (CORE | opt_in if at_import else CORE | LAZY), f"{path.name} imports {name}"


def test_import_is_light():
    """In a fresh process: nothing optional is imported, and nothing optional is needed."""
    optional = ["diffusers", "timm", "xformers", "transformers", "accelerate", "tqdm", "matplotlib", "torchvision"]
    script = (
        "import sys\n"
        f"for name in {optional}: sys.modules[name] = None\n"  # makes importing it raise ImportError
        "import torch, sprint\n"
        "model = sprint.SiT.preset('S/2', middle_depth=1, num_classes=10).eval()\n"
        "noise, y = torch.randn(1, 4, 8, 8), torch.tensor([1])\n"
        "sprint.FlowMatchingLoss()(model, noise, y=y, drop=sprint.StructuredDrop(0.75))\n"
        "sprint.sample(model, noise, y=y, guidance=sprint.PathDropGuidance(2.0), steps=1)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_one_version_source():
    assert re.fullmatch(r"\d+\.\d+\.\d+", sprint.__version__)
    assert f"## {sprint.__version__}" in (SOURCE.parents[1] / "CHANGELOG.md").read_text()


def test_an_extra_that_is_missing_is_named():
    script = (
        "import importlib.util, sprint\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'diffusers' else find(name, *more)\n"
        "sprint.diffusers.from_pretrained\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: sprint.diffusers needs the package diffusers: pip install diffusers" in run.stderr


def test_every_public_name_is_there_and_documented():
    for name in sprint.__all__:
        assert getattr(sprint, name).__doc__, name


def test_objects_print_what_they_are():
    model, drop = sprint.SiT.preset("S/2", middle_depth=1), sprint.StructuredDrop(0.75)
    loss = sprint.FlowMatchingLoss(interpolant="cosine", time=sprint.ShiftedTime(3.0))
    step = sprint.TrainStep(model, loss, sprint.AdamW(model.parameters()), clip=1.0)
    said = {
        "StructuredDrop(0.75)": drop,
        "interpolant=CosineInterpolant(), time=ShiftedTime(": loss,
        "TrainStep(SiT, FlowMatchingLoss(interpolant=CosineInterpolant()": step,
        "clip=1.0, accumulate=1, autocast=None; plain on cpu": step,
        "PathDropGuidance(scale=2.0": sprint.PathDropGuidance(2.0),
        "CapturedModel(SiT, autocast=None; plain on cpu)": sprint.CapturedModel(model.eval()),
        "Heun()": sprint.Heun(),
    }
    for text, thing in said.items():
        assert text in repr(thing)


def test_importing_stays_light():
    """Each of these takes a second or more, and few need them."""
    heavy = [
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch._dynamo",
        "torch._inductor",
        "diffusers",
        "timm",
    ]
    code = (
        "import sys, torch; before = set(sys.modules); import sprint\n"
        f"print([name for name in {heavy} if name in sys.modules and name not in before])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
