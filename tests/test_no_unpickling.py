"""The sources never unpickle, evaluate or unpack what was downloaded; looked up in their syntax trees, with imports resolved."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("csm", "cluster", "flows") for path in (ROOT / folder).rglob("*.py"))
PICKLERS = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "pandas", "ray.cloudpickle")
# csm/pickles.py looks up no name of a pickle; what cluster/pools.py unpickles came from a worker, and Ray pickles all that it moves.
PICKLES_ALLOWED = {
    "csm/pickles.py": {"pickle._Unpickler.dispatch.items", "pickle.UnpicklingError"},
    "cluster/pools.py": {"pickle.loads", "pickle.dumps"},
}
NEVER = {
    "eval", "exec", "compile", "__import__", "importlib.import_module", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.package",
    "shutil.unpack_archive", "numpy.lib.format.read_array",
}  # fmt: skip
METHODS = {"extractall": "unpacks paths of an archive", "load_model": "MLflow runs what comes with a model"}


def complaints(source: str, name: str = "csm/x.py") -> list[str]:
    """What is wrong in the module ``name`` of this text."""
    tree = ast.parse(source)
    known = dict(_imports(tree))
    allowed = PICKLES_ALLOWED.get(name, set())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and _is_pickler(node.module):
            found.append(f"{node.lineno}: import from {node.module}")
        if isinstance(node, ast.Import) and not allowed:
            found += [f"{node.lineno}: import {alias.name}" for alias in node.names if _is_pickler(alias.name)]
        if not isinstance(node, ast.Call):
            continue
        called = _full_name(node.func, known)
        given = {word.arg: word.value for word in node.keywords if word.arg}
        if called in NEVER or (_is_pickler(called) and called not in allowed):
            found.append(f"{node.lineno}: {called}")
        if called == "torch.load" and not _is(given.get("weights_only"), True):
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if called == "numpy.load" and "allow_pickle" in given and not _is(given["allow_pickle"], False):
            found.append(f"{node.lineno}: numpy.load with pickles")
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            found.append(f"{node.lineno}: {node.func.attr} {METHODS[node.func.attr]}")
        if isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained" and name != "csm/model_folders.py":
            found.append(f"{node.lineno}: from_pretrained, which csm.model_folders keeps to safetensors of a local folder")
        for word, wanted in (("trust_remote_code", False), ("shell", False)):
            if word in given and not _is(given[word], wanted):
                found.append(f"{node.lineno}: {word}")
    return found


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Name in the module -> what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname or alias.name.split(".")[0]), (alias.name if alias.asname else alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield (alias.asname or alias.name), f"{node.module}.{alias.name}"


def _full_name(node: ast.expr, known: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, known)}.{node.attr}"
    return known.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _is_pickler(name: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in PICKLERS)


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize(
    "line",
    [
        "import pickle\npickle.loads(b'')",
        "import pickle as p",
        "from pickle import loads",
        "import torch\ntorch.load('f')",
        "from torch import load\nload('f', weights_only=False)",
        "import numpy as np\nnp.load('f', allow_pickle=True)",
        "import numpy as np\nnp.load('f', allow_pickle=asked)",
        "import joblib",
        "import pandas",
        "from ray import cloudpickle\ncloudpickle.loads(b'')",
        "import yaml\nyaml.load(text)",
        "eval('1')",
        "AutoModel.from_pretrained('owner/name')",
        "load(trust_remote_code=True)",
        "import mlflow\nmlflow.pyfunc.load_model('models:/x')",
        "tar.extractall('.')",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import torch\ntorch.hub.load('owner/name', 'model')",
    ],
)
def test_what_is_looked_for_is_found(line: str) -> None:
    assert complaints(line)


def test_what_is_harmless_is_not() -> None:
    lines = ["import torch", "torch.load('f', weights_only=True)", "network.eval()", "import re", "re.compile('x')"]
    lines += ["import numpy as np", "np.load('f')", "np.load('f', allow_pickle=False)", "import yaml", "yaml.safe_load('1')"]
    assert complaints("\n".join(lines)) == []


def test_there_are_sources() -> None:
    assert len(SOURCES) > 200
    assert ROOT / "csm" / "pickles.py" in SOURCES


def test_sources_run_nothing_that_was_downloaded() -> None:
    names = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in SOURCES}
    assert {name: found for name, text in names.items() if (found := complaints(text, name))} == {}
