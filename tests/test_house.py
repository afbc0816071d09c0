"""The shape of the house: which room may use which, how long a function may be, what is published.

These are ratchets: a limit is raised only in a commit that says why.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("flip_hf", "modeling", "scripts")
    for path in (ROOT / folder).rglob("*.py")
    if "flip_hf/modeling" not in path.as_posix()
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# What each room may import of the others.
MAY_IMPORT = {
    "modeling": set(),
    # Their names alone: nothing is imported before it is used.
    "flip_hf": {"modeling", "evaluation", "registration"},
    "registration": set(),
    "auto_classes": {"modeling"},
    "__main__": {"commands"},
    "data": {"data", "redaction"},
    "losses": set(),
    "console": {"console"},
    "redaction": set(),
    "curation": {"curation", "data", "modeling", "console", "redaction"},
    "evaluation": {"evaluation", "data", "modeling", "console", "redaction"},
    "conversion": {"conversion", "console", "modeling", "redaction"},
    # A Space of it holds these rooms alone.
    "demo": {"demo", "evaluation", "data", "modeling", "console", "redaction"},
    "retrieval": {"retrieval", "evaluation", "data", "modeling", "console", "redaction"},
    "hub": {"hub", "console", "conversion", "evaluation", "data", "modeling", "redaction"},
    # `conversion` to start from a ViTMAE
    "training": {
        *("training", "hub", "evaluation", "data", "losses", "modeling", "conversion", "console", "redaction"),
    },
    # Used by no run.
    "planning": {"planning", "training", "data", "losses", "modeling", "console", "redaction"},
    "reproduction": {"reproduction", "training", "data", "console"},
    "benchmarks": {
        "benchmarks",
        "flip_hf",
        "planning",
        "training",
        "evaluation",
        "modeling",
        "console",
        "data",
        "losses",
    },
    "commands": {
        *("flip_hf", "commands", "reproduction", "benchmarks", "training", "evaluation", "conversion", "demo", "hub"),
        *("retrieval", "planning", "curation", "data", "losses", "console", "redaction"),
    },
    "scripts": {"commands"},
}
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = {"modeling_flip.py": 1094}
PUBLISHED = [
    "blocks_flip.py",
    "clip_flip.py",
    "configuration_flip.py",
    "configuration_pretraining_flip.py",
    "decoder_flip.py",
    "image_processing_flip.py",
    "masking_flip.py",
    "modeling_flip.py",
    "pretraining_flip.py",
    "processing_flip.py",
    "resizing_flip.py",
    "siglip_flip.py",
]


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] != "flip_hf":
        return parts[0]
    return parts[1] if len(parts) > 2 else "flip_hf" if parts[1] == "__init__.py" else parts[1].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_arrows_point_one_way(path):
    allowed = MAY_IMPORT[room_of(path)]
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "flip_hf":
            used = parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "flip_hf"
            # `flip_hf.x.y` also yields `flip_hf`'s own names; a public name counts as modeling.
            used = "modeling" if used == "flip_hf" and len(parts) > 1 and "modeling" in allowed else used
            assert used in allowed, f"{path.name} uses {name}"


def test_the_design_page_prints_what_may_import_what():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    printed = {package: set(re.findall(r"`(\w+)`", others)) for package, others in rows}
    assert printed == {package: others - {package} for package, others in MAY_IMPORT.items()}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_and_functions_fit_their_size(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES.get(path.name, 500)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def test_pictures_are_opened_in_one_place():
    """Elsewhere no limit would hold: on formats, pixels, metadata, time.

    `jpeg_end.py` is given what `decode.py` has opened; `plain_jpeg.py` keeps all limits by what it takes for plain;
    `reconstructions.py` opens what it has drawn itself.
    """
    openers = r"\bImage\.open\(|\bload_images?\b|\bimread\(|\bImageFile\.|\bdecode_jpeg|\bread_image\("
    users = {path.name for path in SOURCES if re.search(openers, path.read_text(encoding="utf-8"))}
    assert users == {"decode.py", "jpeg_end.py", "plain_jpeg.py", "reconstructions.py"}


def test_tests_share_helpers_and_not_each_other():
    """Shared code is in `tests/helpers`; scripts in strings, which tests run in other processes, count, too."""
    for path in TESTS:
        text = path.read_text(encoding="utf-8")
        for module, name in re.findall(r"^\s*(?:from|import) (tests\b[\w.]*)(?: import (\w+))?", text, re.MULTILINE):
            assert f"{module}.{name}".startswith("tests.helpers."), f"{path.name} imports {name} from {module}"


# A test says one thing in its name. These check much of what one run in processes of its own leaves.
MAX_ASSERTIONS = 8
SEVERAL_THINGS = {
    # A run and its resume under a server that asks for a password, for each kind of secret.
    "test_a_run_writes_no_credentials_and_resumes_with_them",
    # A Python without this package, which imports torch and Transformers anew.
    "test_folders_work_without_this_package_where_their_code_is_trusted",
    "test_the_script_publishes_a_model_that_loads_elsewhere",
    "test_a_run_is_pushed_while_it_trains_and_at_its_end",
}


def test_a_test_has_few_assertions():
    found = set()
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                if sum(map(is_assertion, ast.walk(node))) > MAX_ASSERTIONS:
                    found.add(node.name)
    assert found == SEVERAL_THINGS


def is_assertion(node: ast.AST) -> bool:
    """Tells whether a node is an `assert`, or a call of `pytest.raises`."""
    return isinstance(node, ast.Assert) or (isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.raises")


def test_published_files_are_flat_and_import_nothing_else():
    assert sorted(p.name for p in (ROOT / "modeling").glob("*.py")) == ["__init__.py", *PUBLISHED]
    for name in PUBLISHED:
        tree = ast.parse((ROOT / "modeling" / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1 and (node.level == 0 or f"{node.module}.py" in PUBLISHED)
                assert node.module not in (None, "__future__")  # strings instead of types break configurations


def test_only_the_loss_the_states_and_the_agreement_talk_to_torch_distributed():
    users = {p.name for p in SOURCES if any(n.startswith("torch.distributed") for n in imports_of(p))}
    # The states of a checkpoint too: Accelerate and torch read sharded ones by pickle. And the agreement before a step,
    # which Accelerate would make on the device.
    assert users == {"losses.py", "states.py", "agreement.py"}


# Methods whose unsafe forms can run what a file says, and what must be said in each call.
SAFE_CALLS = {
    "Auto.from_pretrained": ("trust_remote_code",),
    "Processor.from_pretrained": ("trust_remote_code",),
    "torch.load": ("weights_only",),
    "np.load": ("allow_pickle",),
    "yaml.load": ("Loader",),
}
UNSAFE_NAMES = {
    *("eval", "exec", "yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads", "os.system"),
    "Accelerator.load_state",
}


def kind_of_call(node: ast.Call) -> str:
    """`Auto.from_pretrained` for `AutoModel.from_pretrained(...)`, else the name as it is written."""
    name = ast.unparse(node.func)
    owner, _, method = name.rpartition(".")
    if method == "from_pretrained":
        return next((f"{kind}.{method}" for kind in ("Auto", "Processor") if kind in owner), name)
    return f"Accelerator.{method}" if method == "load_state" else name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_that_is_loaded_can_run_code(path):
    """Calls say that they trust nothing; `**options` in a call is taken to say it, and is looked at in review."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            kind = kind_of_call(node)
            given = {keyword.arg for keyword in node.keywords}
            assert kind not in UNSAFE_NAMES, f"{path.name}:{node.lineno} {kind}"
            for wanted in SAFE_CALLS.get(kind, ()):
                assert wanted in given or None in given, f"{path.name}:{node.lineno} {ast.unparse(node)[:80]}"


@pytest.mark.skipif(tomllib is None, reason="tomllib came with Python 3.11")
def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in (ROOT / "flip_hf").rglob("__init__.py")}
    assert set(listed) == found | {"flip_hf.modeling"}


def test_the_folder_has_one_import_name():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import modeling"
    import subprocess

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0 and "Import `flip_hf.modeling`" in run.stderr
