"""No file that is read can run code: nothing is unpickled, evaluated, or passed to a shell.

The rules are checked over the syntax tree of every Python file that is shipped, with the names that
its imports give to modules and functions resolved.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    [ROOT / "train.py"]
    + [file for name in ("jaxgpt", "configs", "benchmarks") for file in (ROOT / name).rglob("*.py")]
)

ALLOWED = {
    ("jaxgpt/config.py", "_execute"),  # a config is a program, named on the command line
    ("jaxgpt/__init__.py", "__getattr__"),  # one of the package's own modules
}

MODULES = {  # whose only use is to run what a file says
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "imp",
    "joblib",
    "jsonpickle",
    "marshal",
    "pickle",
    "runpy",
    "shelve",
}
FUNCTIONS = {
    "builtins.__import__",
    "builtins.compile",
    "builtins.eval",
    "builtins.exec",
    "importlib.machinery.SourceFileLoader",
    "importlib.machinery.SourcelessFileLoader",
    "importlib.util.module_from_spec",
    "importlib.util.spec_from_file_location",
    "jinja2.Environment",
    "jinja2.Template",
    "jinja2.environment",
    "jinja2.nativetypes",
    "os.popen",
    "os.system",
    "pandas.read_pickle",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "torch.load",
    "yaml.full_load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
}
METHODS = {"exec_module", "load_module"}
FLAGS = {"allow_pickle", "shell", "trust_remote_code"}  # keyword arguments that may only be False
BUILTINS = {"__import__", "compile", "eval", "exec"}


def imported_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name of a file stands for: `np` for numpy, `x` for pickle.loads."""
    names = {name: f"builtins.{name}" for name in BUILTINS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                names[name] = alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def offences(source: str, file: str = "") -> list[str]:
    """The places of a Python source that could run code from a file, as `line: what`."""
    tree = ast.parse(source)
    names = imported_names(tree)
    found = []

    def full_name(node: ast.AST) -> str:
        """`numpy.load` for `np.load`; empty for an expression that is not a name."""
        if isinstance(node, ast.Name):
            return names.get(node.id, node.id)
        if isinstance(node, ast.Attribute) and (base := full_name(node.value)):
            return f"{base}.{node.attr}"
        return ""

    def is_false(node: ast.AST) -> bool:
        return isinstance(node, ast.Constant) and node.value is False

    def check(node: ast.AST) -> None:
        def offence(what: str) -> None:
            found.append(f"{node.lineno}: {what}")

        if isinstance(node, ast.FunctionDef) and (file, node.name) in ALLOWED:
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for alias in node.names:
                name = f"{module}.{alias.name}".lstrip(".")
                if name.split(".")[0] in MODULES or name in FUNCTIONS or module in FUNCTIONS:
                    offence(name)
                if alias.name == "*":
                    offence(f"{name} hides what it imports")
        elif isinstance(node, ast.Name | ast.Attribute) and full_name(node) in FUNCTIONS:
            if isinstance(node.ctx, ast.Load):  # not a field or variable of the same name
                offence(full_name(node))
        elif isinstance(node, ast.Attribute) and node.attr in METHODS:
            offence(node.attr)
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in FLAGS and not is_false(keyword.value):
                    offence(keyword.arg)
            name = full_name(node.func)
            if name == "numpy.load" and len(node.args) > 2 and not is_false(node.args[2]):
                offence("allow_pickle")
            if name == "importlib.import_module" and not isinstance(node.args[0], ast.Constant):
                offence(name)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in FLAGS and not is_false(value):
                    offence(key.value)
        for child in ast.iter_child_nodes(node):
            check(child)

    check(tree)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_code_is_run_from_files(file):
    assert not offences(file.read_text(), file.relative_to(ROOT).as_posix())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads as x",
        "from _pickle import loads",
        "import cPickle",
        "import dill",
        "from joblib import load",
        "import shelve",
        "import marshal",
        "def read():\n    import runpy",
        "import yaml\nyaml.load(text)",
        "from yaml import load as parse",
        "import yaml as y\ny.unsafe_load(text)",
        "import torch\ntorch.load(path)",
        "import torch as t\nf = t.load",
        "from torch import load",
        "import numpy\nnumpy.load(path, allow_pickle=True)",
        "import numpy as n\nn.load(path, allow_pickle=trusted)",
        "import numpy as np\nnp.load(path, None, True)",
        "from numpy import load\nload(path, allow_pickle=1)",
        "import numpy as np\nnp.load(path, **{'allow_pickle': True})",
        "import pandas as pd\npd.read_pickle(path)",
        "eval(text)",
        "f = eval",
        "import builtins\nbuiltins.exec(text)",
        "from builtins import eval as literal",
        "exec(text)",
        "compile(text, 'config', 'exec')",
        "__import__(name)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module as get\nget(name)",
        "import importlib.util\nimportlib.util.spec_from_file_location('m', path)",
        "from importlib.util import spec_from_file_location as spec",
        "from importlib import util\nutil.module_from_spec(spec)",
        "from importlib.machinery import SourceFileLoader",
        "spec.loader.exec_module(module)",
        "loader.load_module()",
        "import subprocess\nsubprocess.run(command, shell=True)",
        "from subprocess import Popen\nPopen(command, shell=on)",
        "import subprocess as s\ns.getoutput(command)",
        "import os\nos.system(command)",
        "from os import popen",
        "from jinja2 import Template",
        "import jinja2\njinja2.Environment().from_string(text)",
        "from jinja2.nativetypes import NativeEnvironment",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "from os import *",
    ],
)
def test_each_rule_catches_an_example(source):
    assert offences(source)


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile(text)",
        "model.eval()",
        "class Job:\n    compile: str",
        "import json\njson.load(file)",
        "import yaml\nyaml.safe_load(text)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import numpy as np\nnp.load(path)",
        "import importlib\nimportlib.import_module('re._parser')",
        "import subprocess\nsubprocess.run(command)",
        "from jinja2.sandbox import ImmutableSandboxedEnvironment",
    ],
)
def test_harmless_code_is_allowed(source):
    assert not offences(source)
