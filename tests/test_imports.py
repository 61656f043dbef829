"""The architecture, held by tests: imports point down, and heavy packages wait until they are used."""

import ast
import importlib
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sqakd_hf


ROOT = Path(sqakd_hf.__file__).parent
# A folder (or a module beside the folders) imports from those before it; those of one line know nothing of each other.
ORDER = [
    "errors | _compat | _text",
    "_validation",
    "data | quantization",
    "layers",
    "outputs",
    "conversion",
    "reconstruction",
    "reporting",
    "hub",
    "export | distillation",
    "search | research",
    "cli",
    "__main__",
    "__init__",
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names.split(" | ")}
MAY_IMPORT_TRANSFORMERS = {
    "layers/transformers_layers.py",  # itself imported when a model has a layer of BiT
    "conversion/config.py",
    "reporting/training_record.py",
    "hub",
    "export",
    "distillation",
    "cli",
}
# Imported inside functions, so that `import sqakd_hf` stays quick and each is needed only where it is used.
LATE = {"timm", "datasets", "evaluate", "torchvision", "sklearn", "matplotlib", "onnx", "onnx_ir", "onnxruntime"}
# timm_layers, paper_networks and export are themselves imported late: when a model has a layer of timm's own, or is
# named.
MAY_IMPORT_EARLY = {
    "distillation/metrics.py": {"datasets", "evaluate"},
    "layers/timm_layers.py": {"timm"},
    "hub/paper_networks.py": {"timm", "torchvision"},
    "export": {"onnx", "onnx_ir", "onnxruntime"},
}
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES}


def place_of(path):
    """The name in ORDER that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def listed(path, names):
    """Those of a list (or a table) of files and folders under which `path` falls."""
    inside = path.relative_to(ROOT)
    return [name for name in names if name in (str(inside), inside.parts[0])]


def named_modules(path, tree=None):
    """Yield absolute dotted names of modules that `path` imports by a string, if it imports by strings at all."""
    tree = ast.parse(path.read_text()) if tree is None else tree
    if not any(isinstance(node, ast.Name | ast.alias) and _name(node) == "import_module" for node in ast.walk(tree)):
        if not any(isinstance(node, ast.Attribute) and node.attr == "import_module" for node in ast.walk(tree)):
            return
    folder = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.removeprefix("sqakd_hf.").lstrip(".")
            for module in (name, ".".join([*folder, name])):
                if name and module in MODULES:
                    yield f"sqakd_hf.{module}"


def _name(node):
    return node.id if isinstance(node, ast.Name) else node.name


def imported_modules(path, nodes=None):
    """Yield absolute dotted names of everything `path` imports, relative imports resolved."""
    package = ["sqakd_hf", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def run_at_import(nodes):
    """Yield the statements that run when a module is imported: not those of functions, nor for type checkers."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield from run_at_import(node.orelse)
            continue
        yield node
        yield from run_at_import(ast.iter_child_nodes(node))


def run_at_any_time(nodes):
    """Yield the statements that run at some time: not those for type checkers alone."""
    for node in nodes:
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield node
            yield from run_at_any_time(ast.iter_child_nodes(node))


def module_level_imports(path):
    return imported_modules(path, run_at_import(ast.parse(path.read_text()).body))


def each_file(test):
    return pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))(test)


def edges(names):
    """Yield those of absolute dotted names that are modules of this package, or in one, without `sqakd_hf`."""
    for name in names:
        package, *rest = name.split(".")
        if package == "sqakd_hf":
            # The longest part of the name that is a module; a bare name such as sqakd_hf.InputError is of __init__.
            known = (".".join(rest[:n]) for n in range(len(rest), 0, -1))
            yield next((module for module in known if module in MODULES), "__init__")


class TestDirection:
    @each_file
    def test_every_module_has_its_place(self, path):
        assert place_of(path) in LEVEL, f"{path.name} is missing in ORDER"

    def test_few_modules_stand_beside_the_folders(self):
        assert len([path for path in ROOT.glob("*.py") if not path.name.startswith("__")]) <= 4

    @each_file
    def test_imports_point_one_way(self, path):
        place = place_of(path)
        for module in edges([*imported_modules(path), *named_modules(path)]):
            target = module.split(".")[0]
            assert target == place or LEVEL[target] < LEVEL[place], f"{path.name} must not import {module}"

    def test_no_module_imports_itself_through_others(self):
        graph = {}
        for path in FILES:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            # A registry may load what registers with it, by a string; and `from . import x` names the folder too.
            targets = edges(imported_modules(path, run_at_any_time(ast.parse(path.read_text()).body)))
            graph[module] = {target for target in targets if not f"{module}.".startswith(f"{target}.")}
        try:
            list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")

    @pytest.mark.parametrize(
        ("source", "modules"),
        [
            ('from importlib import import_module\nimport_module("sqakd_hf.cli.distill")', ["sqakd_hf.cli.distill"]),
            ('import importlib\nimportlib.import_module("base")', ["sqakd_hf.quantization.quantizers.base"]),
            ('print("cli.distill")', []),
        ],
    )
    def test_modules_that_a_string_names_are_seen(self, source, modules):
        path = ROOT / "quantization" / "quantizers" / "lsq.py"
        assert list(named_modules(path, ast.parse(source))) == modules

    @each_file
    def test_few_modules_import_transformers(self, path):
        if any(name.split(".")[0] == "transformers" for name in imported_modules(path)):
            assert listed(path, MAY_IMPORT_TRANSFORMERS)

    @each_file
    def test_heavy_packages_are_imported_where_they_are_used(self, path):
        early = {name.split(".")[0] for name in module_level_imports(path)}
        allowed = set().union(*(MAY_IMPORT_EARLY[name] for name in listed(path, MAY_IMPORT_EARLY)))
        assert early & LATE <= allowed

    @each_file
    def test_nothing_is_imported_by_star(self, path):
        assert not any(name.endswith(".*") for name in imported_modules(path))

    @pytest.mark.parametrize(
        ("source", "names"),
        [
            ("import transformers.utils", ["transformers.utils"]),
            ("from ...errors import InputError", ["sqakd_hf.errors.InputError"]),
            ("from . import base", ["sqakd_hf.quantization.quantizers.base"]),
            ("from .. import packing", ["sqakd_hf.quantization.packing"]),
            ("from ..packing import A, B", ["sqakd_hf.quantization.packing.A", "sqakd_hf.quantization.packing.B"]),
            ("def f():\n    import timm", ["timm"]),
        ],
    )
    def test_names_are_resolved(self, source, names):
        nodes = ast.walk(ast.parse(source))
        assert list(imported_modules(ROOT / "quantization" / "quantizers" / "lsq.py", nodes)) == names

    @pytest.mark.parametrize(
        ("source", "names"),
        [
            ("import timm", ["timm"]),
            ("def f():\n    import timm", []),
            ("class A:\n    import timm\n    def f(self):\n        import datasets", ["timm"]),
            ("if TYPE_CHECKING:\n    import timm\nelse:\n    import datasets", ["datasets"]),
            ("try:\n    import timm\nexcept ImportError:\n    import datasets", ["timm", "datasets"]),
            ("with x:\n    import timm", ["timm"]),
        ],
    )
    def test_what_runs_at_import_is_told_from_what_does_not(self, source, names):
        nodes = run_at_import(ast.parse(source).body)
        assert list(imported_modules(ROOT / "data" / "sources.py", nodes)) == names


class TestImport:
    @pytest.fixture(scope="class")
    def fresh(self):
        """What a fresh interpreter prints, logs and loads: on import, and on the first use of a lazy name."""
        code = (
            "import json, logging, random, sys\n"
            "import transformers.quantizers\n"  # which may draw random numbers itself
            "logging.basicConfig(level=logging.INFO, stream=sys.stderr)\n"
            "state = random.getstate()\n"
            "import sqakd_hf\n"
            "assert random.getstate() == state\n"
            "print(json.dumps(sorted(sys.modules)))\n"
            "assert sqakd_hf.ImageCollator is sys.modules['sqakd_hf.data.collator'].ImageCollator\n"
            "print(json.dumps(sorted(sys.modules)))"
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

    def test_is_silent(self, fresh):
        assert (fresh.returncode, fresh.stderr, fresh.stdout.count("\n")) == (0, "", 2)

    @pytest.mark.parametrize(
        "package",
        ["timm", "datasets", "matplotlib", "onnx", "torchvision", "sklearn", "evaluate", "transformers.trainer"],
    )
    def test_leaves_heavy_packages_alone(self, fresh, package):
        assert package not in json.loads(fresh.stdout.splitlines()[0])

    def test_loads_the_rest_on_first_use(self, fresh):
        before, after = (set(json.loads(line)) for line in fresh.stdout.splitlines())
        loaded = {name for name in after - before if name.startswith("sqakd_hf")}
        assert loaded == {"sqakd_hf.data.collator"}
        assert not {"sqakd_hf.data.dataset", "sqakd_hf.hub.loading", "sqakd_hf.distillation.trainer"} & after


WITHOUT_ONNX = """
import inspect, pydoc, sys
from importlib.machinery import PathFinder

class WithoutOnnx(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] not in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
            return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutOnnx
import sqakd_hf
from sqakd_hf import *
from sqakd_hf import export_onnx
assert {"export_onnx", "ExportReport", "load_model"} <= set(globals()) and set(sqakd_hf.__all__) <= set(globals())
assert hasattr(sqakd_hf, "export_onnx") and not hasattr(sqakd_hf, "export_onxn")
assert {"export_onnx", "quantize_model"} <= dict(inspect.getmembers(sqakd_hf)).keys()
assert "pip install sqakd-hf[onnx]" in pydoc.render_doc(sqakd_hf.export_onnx)
pydoc.render_doc(sqakd_hf)
assert not isinstance(3, ExportReport)
for name in ("export_onnx", "verify_export", "deploy_report", "measure_latency", "ExportCheck"):
    try:
        getattr(sqakd_hf, name)("student", path=3)
    except InputError as error:
        assert "needs the package 'onnx'" in str(error) and "pip install sqakd-hf[onnx]" in str(error)
    else:
        raise SystemExit(f"{name} was called")
"""


def test_without_the_packages_of_the_export_only_calls_of_it_fail():
    done = subprocess.run([sys.executable, "-c", WITHOUT_ONNX], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def names_of(nodes):
    """The public names that `from .module import name` statements define, and the module of each."""
    return {
        alias.asname or alias.name: node.module
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
        if node.module is not None
    }


class TestPublicNames:
    TREE = ast.parse((ROOT / "__init__.py").read_text())
    EAGER = names_of(TREE.body)
    TYPED = names_of(
        node
        for block in TREE.body
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in block.body
    )

    @pytest.mark.parametrize("name", sqakd_hf.__all__)
    def test_is_importable(self, name):
        value = getattr(sqakd_hf, name)
        module = {**self.EAGER, **self.TYPED}[name]
        assert value is getattr(importlib.import_module(f"sqakd_hf.{module}"), name)
        assert value.__doc__ and value.__module__.startswith("sqakd_hf.")

    def test_are_those_that_the_package_imports(self):
        assert set(sqakd_hf.__all__) == set(self.EAGER) | set(self.TYPED)
        assert not set(self.EAGER) & set(self.TYPED)

    def test_lazy_ones_come_from_where_type_checkers_look(self):
        assert sqakd_hf._LAZY == self.TYPED

    def test_are_listed_once_and_sorted(self):
        assert sqakd_hf.__all__ == sorted(set(sqakd_hf.__all__)) == dir(sqakd_hf)

    def test_star_import_gives_exactly_them(self):
        namespace = {}
        exec("from sqakd_hf import *", namespace)
        assert set(namespace) - {"__builtins__"} == set(sqakd_hf.__all__)

    def test_other_names_are_an_attribute_error(self):
        with pytest.raises(AttributeError, match="module 'sqakd_hf' has no attribute 'quantise_model'"):
            sqakd_hf.quantise_model  # noqa: B018
        assert not hasattr(sqakd_hf, "Trainer")

    def test_the_version_is_stated(self):
        assert sqakd_hf.__version__.count(".") >= 2
