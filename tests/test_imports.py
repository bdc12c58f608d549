"""The layers of the package: imports go down the list, there are no cycles, one part uses Flax."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxgpt"

# A module may import from its own line and from the lines above it. The most specific name counts.
LAYERS = """
errors lanes
bounds
streams display accelerators paths strict_json manifest download signals synonyms sharding processes
store huge_pages
model
tokenizer
chat
data
generation
evaluation
objectives
training
config training.dial
training.mirror
evaluation.likelihood
pretrained
data.beam
terminal
evaluation.charts evaluation.document evaluation.history evaluation.report
evaluation.inspect
serve.prefixes serve.programs
serve.engine
evaluation.generate evaluation.tasks
evaluation.measure evaluation.suite evaluation.harness evaluation.judge
training.inputs training.description training.setup training.tasks training.loop training.runs
training.pipeline training.sweep training.work training.estimate training.command
serve diagnosis
cli
__main__
""".splitlines()


def modules():
    """The modules of the package by name, without `jaxgpt.`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return {name: path for name, path in found.items() if name != "__init__"}


MODULES = modules()


def imports(path, whole):
    """The modules of the package that a file imports, in functions too if `whole`."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if whole else tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "jaxgpt":
            parent = node.module.removeprefix("jaxgpt").lstrip(".")
            for alias in node.names:
                name = f"{parent}.{alias.name}".lstrip(".")
                found.add(name if name in MODULES else parent)
    return found - {""}


def layer(name):
    """The number of the line of `LAYERS` that a module belongs to."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for number, line in enumerate(LAYERS):
            if ".".join(parts[:length]) in line.split():
                return number
    raise AssertionError(f"{name} is in no layer; add it to LAYERS")


def test_imports_go_down():
    upward = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in imports(path, whole=True)
        if layer(other) > layer(name)
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_cycle():
    graph = {name: imports(path, whole=False) - {name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_only_the_model_uses_flax():
    users = [
        name
        for name, path in MODULES.items()
        if re.search(r"^\s*(import|from) flax\b", path.read_text(), re.MULTILINE)
    ]
    assert users and all(name.partition(".")[0] == "model" for name in users)
