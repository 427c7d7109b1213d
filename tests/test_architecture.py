"""The rules of the house that no single file shows. `make layers` checks the order of the imports."""

import ast
import importlib
import inspect
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("curvature", "posteriors", "calibration")
PACKAGES = ("lapkit", *(f"lapkit.{part}" for part in PARTS))
OPTIONAL = ("matplotlib", "sklearn", "gpytorch", "transformers", "torchvision")

NAME = r"\b(likelihood|hessian_structure|structure)(\.name|\.value)?\b"

# rule: (what is not allowed, the one file that may)
RULES = {
    "import a part by its full name, lapkit.<part>": (rf"^\s*(from|import)\s+({'|'.join(PARTS)})\b", None),
    "import absolutely, not from a parent": (r"^\s*from\s+\.\.", None),
    "give a type its methods instead of asking with hasattr": (r"\bhasattr\(", None),
    "run the columns under vmap or one by one: is_grads_batched loops": (r"\bis_grads_batched\b", None),
    "turn a name into an object in the facade; below it, call the object": (
        rf"{NAME}\s*(==|!=)|(==|!=)\s*{NAME}|\bif\b.*{NAME}\s+(not\s+)?in\s*[(\[{{]|^\s*match\s.*{NAME}\s*:",
        "lapkit/laplace.py",
    ),
    "keep torch's private names in one module": (
        r"\btorch(\.\w+)*\._[a-zA-Z]|\bfrom\s+torch[\w.]*\s+import\b.*\b_[a-zA-Z]|\b_(saved_|input_metadata|functorch)",
        "curvature/capture/internals.py",
    ),
}


def sources():
    """Every source file of lapkit, once: rglob does not follow the links in lapkit/."""
    return [path for folder in ("lapkit", *PARTS) for path in sorted((ROOT / folder).rglob("*.py"))]


def code_lines(path):
    """The file's lines without comments and docstrings: a rule is about what runs, not about what is said."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return lines


@pytest.mark.parametrize("rule", RULES)
def test_sources_keep_the_rule(rule):
    pattern, exempt = RULES[rule]
    broken = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources()
        if path.relative_to(ROOT).as_posix() != exempt
        for number, line in enumerate(code_lines(path), start=1)
        if re.search(pattern, line)
    ]
    assert not broken, f"{rule}\n" + "\n".join(broken)


BREACHES = [
    "from curvature.tape import tag",
    "import posteriors",
    "from ..curvature import tape",
    "if hasattr(model, 'head'):",
    "grad(f, p, is_grads_batched=True)",
    "if self.likelihood == 'classification':",
    "if 'kron' != hessian_structure:",
    "if likelihood in ('regression', 'classification'):",
    "torch._C._functions",
    "from torch._functorch import apis",
    "getattr(node, '_saved_weight')",
]
INNOCENT = [
    "from lapkit.curvature import tape",
    "from .tape import tag",
    "for likelihood in likelihoods:",
    "structure = structures[hessian_structure]",
    "torch.nn.functional.linear",
    "likelihood.log_prob(f, y)",
]


@pytest.mark.parametrize("line", BREACHES)
def test_a_breach_is_seen(line):
    assert any(re.search(pattern, line) for pattern, _ in RULES.values())


@pytest.mark.parametrize("line", INNOCENT)
def test_an_innocent_line_is_not_a_breach(line):
    assert not any(re.search(pattern, line) for pattern, _ in RULES.values())


def test_comments_and_docstrings_are_not_code(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text('def f():\n    """No hasattr(x)\n    here."""\n    return (\n        "kept"  # not this\n    )\n')
    assert [line.strip() for line in code_lines(path)] == ["def f():", "", "", "return (", '"kept"', ")"]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_says_what_it_is(name):
    """A dataclass without a docstring gets its signature for one, which says nothing."""
    package = importlib.import_module(name)
    public = {public: getattr(package, public) for public in package.__all__}
    documented = {key: thing for key, thing in public.items() if inspect.isclass(thing) or inspect.isroutine(thing)}
    silent = [key for key, thing in documented.items() if (thing.__doc__ or f"{key}(").startswith(f"{key}(")]
    assert not silent, f"no docstring: {silent}"


def test_importing_lapkit_leaves_optional_libraries_alone(tmp_path):
    """They are slow to import and may be absent; each is imported where it is used."""
    program = f"import sys, {', '.join(PACKAGES)}; print(*sorted(set(sys.modules) & set({OPTIONAL})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
