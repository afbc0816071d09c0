"""The files around the code agree with one another: workflows, the Makefile, pins."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read_workflow(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rows_of(job: dict) -> list[dict]:
    """The combinations of a job's matrix; one empty one where it has none."""
    matrix = job.get("strategy", {}).get("matrix", {})
    return matrix.get("include") or [{name: value} for name, values in matrix.items() for value in values] or [{}]


def commands_of(workflow: dict) -> list[str]:
    """Every command of every combination."""
    commands = []
    for job in workflow["jobs"].values():
        for row in rows_of(job):
            for step in job["steps"]:
                commands.append(re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda use: row[use[1]], step.get("run", "")))  # noqa: B023
    return [command for command in commands if command]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_existing_targets(path):
    commands = commands_of(read_workflow(path))
    assert commands
    for command in commands:
        words = command.split()
        if words[0] == "make":
            done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        elif words[:2] != ["pipx", "run"]:  # a tool that pipx installs
            assert (ROOT / words[0]).is_file(), command


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_only_read(path):
    """Further permissions are given in the job that needs them, and no job may change the code."""
    workflow = read_workflow(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert set(job.get("permissions", {})) <= {"pages", "id-token"}
        assert job["timeout-minutes"] <= 60


def test_every_python_that_is_claimed_is_tested():
    jobs = read_workflow(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    set_up = [
        step["with"]["python-version"] for step in jobs["check"]["steps"] if "setup-python" in step.get("uses", "")
    ]
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert sorted([*set_up, *jobs["python"]["strategy"]["matrix"]["python"]]) == sorted(claimed)
    ends = {row["end"]: row["python"] for row in rows_of(jobs["versions"])}
    assert ends == {"oldest": claimed[0], "newest": claimed[-1]}


def test_forms_have_the_fields_their_elements_need():
    """GitHub shows no form, and says nothing, where an element lacks what its type needs."""
    needs = {"markdown": {"value"}, "textarea": {"label"}, "dropdown": {"label", "options"}}
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form["name"] and form["description"]
        for element in form["body"]:
            assert needs[element["type"]] <= set(element["attributes"]), f"{path.name}: {element}"


def test_the_version_is_written_once():
    written = re.findall(r'^__version__ = "(.+)"$', (ROOT / "flip_hf" / "__init__.py").read_text(), flags=re.M)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert len(written) == 1 and written[0] not in project
    assert 'dynamic = ["version"]' in project and 'version = { attr = "flip_hf.__version__" }' in project


def test_ruff_has_one_version():
    """Of another version, the hooks would format what `make quality` refuses."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (rev,) = [repo["rev"] for repo in hooks if repo["repo"].endswith("/ruff-pre-commit")]
    for name in ("constraints.txt", "pyproject.toml"):
        assert re.findall(r"\bruff==([\d.]+)", (ROOT / name).read_text()) == [rev.removeprefix("v")], name


def test_the_changelog_has_the_version():
    version = re.search(
        r'^__version__ = "([\d.]+?)(\.dev\d+)?"$', (ROOT / "flip_hf/__init__.py").read_text(), flags=re.M
    )
    latest = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert latest[1] == version[1]
    assert (latest[2] == "unreleased") == bool(version[2]), "a release has a date"
