"""Which module may import which, and what `import sprint` may not import."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sprint

SOURCE = Path(sprint.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# A room may import the rooms beside it, and what those may; leaves hold no room.
ALLOWED = {
    "random": set(),
    "checkpoint": set(),
    "interpolants": set(),
    "tokens": set(),
    "drop": {"random", "tokens"},
    "fusion": {"random"},
    "middle": {"fusion", "tokens"},
    "layers": {"fused", "random"},
    "fused": {"kernels", "kernels.launches"},
    "kernels.launches": set(),
    "config": {"fusion", "interpolants"},
    "inputs": {"config"},
    "reference": {"config"},
    "sit": {"checkpoint", "config", "fused", "fusion", "inputs", "layers", "middle", "random", "reference", "tokens"},
    "flow": {"drop", "interpolants", "random", "tokens"},
    "guidance": {"drop"},
    "sampling": {"guidance", "interpolants", "random"},
    "hosts.declare": set(),
    "hosts.known": {"hosts.declare"},
    "hosts.places": {"hosts.declare"},
    "hosts.tables": {"hosts.declare", "tokens"},
    "hosts.sides": {"hosts.places"},
    "hosts.recompute": set(),
    "hosts.bound": {"hosts.places"},
    "hosts.state": {"drop", "hosts.declare", "hosts.places", "middle", "tokens"},
    "hosts.paths": {"drop", "hosts.state", "middle", "tokens"},
    "hosts.keep": {"drop", "hosts.declare", "tokens"},
    "hosts.route": {
        *("hosts.bound", "hosts.declare", "hosts.keep", "hosts.places", "hosts.recompute", "hosts.sides", "hosts.tables"),
        "random",
    },
    "hosts.wrapped": {"checkpoint", "hosts.bound", "hosts.paths", "hosts.route", "hosts.state"},
    "hosts.wrapping": {
        *("drop", "fusion", "hosts.bound", "hosts.declare", "hosts.paths", "hosts.places", "hosts.state", "hosts.wrapped"),
    },
    "pipeline": {"checkpoint", "diffusers", "guidance", "hosts.check", "sit"},
    "diffusers": {"checkpoint", "drop", "hosts.wrapping"},
    "graph_state": set(),
    "capture": {"graph_state"},
    "compiling": {"hosts.wrapping", "layers"},
    "inference": {"capture", "compiling", "graph_state"},
    "kernels.mode": set(),
    "kernels.adamw": set(),
    "kernels.modulation": {"kernels.mode"},
    "kernels.rotary": {"kernels.mode"},
    "images": {"checkpoint"},
    "latents": {"checkpoint", "random"},
    "schedule": {"drop"},
    "order": {"schedule"},
    "runs": {"checkpoint"},
    "parallel": {"compiling", "layers"},
    "teacher": set(),
    "original": {"config", "layers", "sit"},
    "optim": set(),
    "shadows": {"fusion"},
    "averages": {"graph_state", "guidance"},
    "gradients": set(),
    "step": {"averages", "capture", "compiling", "gradients", "graph_state", "guidance", "optim", "shadows"},
    "counting": set(),
    "hardware": {"config", "counting", "sit"},
    "path_costs": {"config", "counting", "drop", "hosts.check", "hosts.wrapping", "layers", "sit"},
    "costs": {"counting", "drop", "guidance", "hardware", "path_costs", "sit"},
    "hosts.check": {"fusion", "hosts.paths", "hosts.state", "random", "tokens"},
}
CORE = {"torch", "einops", "safetensors", "numpy"}
OPT_IN = {  # rooms imported where used
    "diffusers": {"diffusers"},
    "pipeline": {"diffusers"},
    **{f"kernels.{name}": {"triton"} for name in ("mode", "adamw", "modulation", "rotary")},
}
LAZY = {"xformers", "tqdm", "PIL", "timm"}  # imported inside the function that needs them


def imports(path: Path) -> list[tuple[str, bool]]:
    """Imported modules, and whether they are imported when the file is (not for types only, not in a function)."""
    found = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            at_import = False
        if isinstance(node, ast.ImportFrom):
            names = [f"sprint.{alias.name}" for alias in node.names] if node.module == "sprint" else [node.module]
            found.extend((name, at_import) for name in names)
        elif isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import)

    visit(ast.parse(path.read_text()), True)
    return found


def room(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def rooms() -> dict[str, set[str]]:
    return {
        room(path): {name.removeprefix("sprint.") for name, now in imports(path) if now and name.startswith("sprint.")}
        for path in FILES
        if path.stem != "__init__"
    }


def test_rooms_import_only_what_they_may():
    assert rooms().keys() == ALLOWED.keys()
    for room, imported in rooms().items():
        assert imported <= ALLOWED[room], f"{room} imports {imported - ALLOWED[room]}"


def test_the_graph_has_no_cycle():
    order = list(graphlib.TopologicalSorter(ALLOWED).static_order())
    assert order.index("middle") < order.index("sit")
    assert order.index("middle") < order.index("guidance")


@pytest.mark.parametrize("path", FILES, ids=room)
def test_third_parties_are_the_core_or_lazy(path):
    for name, at_import in imports(path):
        top = name.split(".")[0]
        if top != "sprint" and top not in sys.stdlib_module_names:
            assert top in (CORE | OPT_IN.get(room(path), set())) if at_import else top in CORE | LAZY, (
                f"{path.name} imports {name}"
            )


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


def test_every_public_name_is_there_and_documented():
    for name in sprint.__all__:
        assert getattr(sprint, name).__doc__, name
