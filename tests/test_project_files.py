"""The project's own files agree with each other."""

import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(lines) -> dict[str, str]:
    """name -> version range, without extras, markers and spaces."""
    found = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9-]+)(?:\[[^]]*\])?\s*([^;]*?)\s*(?:;.*)?", line)
        found[match[1].lower()] = match[2].replace(" ", "")
    return found


def conda_requirements() -> dict[str, str]:
    text = (ROOT / "environment.yml").read_text()
    lines = re.findall(r"^ +- ([^:#\n]+?)(?: +#.*)?$", text.split("dependencies:")[1], re.MULTILINE)
    return requirements(line for line in lines if line not in ("pip", "-e ."))


def test_environment_yml_and_pyproject_ask_for_the_same_versions():
    conda = conda_requirements()
    wanted = requirements(PROJECT["dependencies"])
    wanted |= requirements(PROJECT["optional-dependencies"]["test"])
    numba_cuda = wanted.pop("numba-cuda")
    assert conda.pop("python") == PROJECT["requires-python"]
    assert conda == wanted
    assert f'"numba-cuda{numba_cuda}"' in (ROOT / "environment.yml").read_text()
    for extra in ("cuda", "cuda12"):
        assert requirements(PROJECT["optional-dependencies"][extra]) == {"numba-cuda": numba_cuda}


def test_environment_yml_uses_conda_forge_alone():
    channels = re.search(r"channels:\n((?:  - .*\n)+)", (ROOT / "environment.yml").read_text())[1]
    assert re.findall(r"- (.*)", channels) == ["conda-forge", "nodefaults"]


def test_ci_calls_exactly_the_test_command_of_the_readme():
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("exec make test")
    readme = (ROOT / "README.md").read_text()
    assert "make test" in readme and "make demo" in readme


def test_training_needs_torch_but_the_product_does_not():
    assert not any("torch" in line for line in PROJECT["dependencies"])
    for path in (ROOT / "tinyvllm").rglob("*.py"):
        if "demo" in path.parts or "bench" in path.parts:
            continue
        assert not re.search(r"^\s*(import|from) (torch|transformers)\b", path.read_text(), re.MULTILINE), path


def test_notebooks_are_as_git_and_nbval_want_them():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = json.loads(path.read_text())
        assert "widgets" not in notebook["metadata"], f"{path.name} carries widget state"
        assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code" and cell["outputs"]:
                assert cell["execution_count"], f"{path.name}, {cell['id']}: nbval refuses outputs without a number"
                assert "widget-view" not in json.dumps(cell["outputs"])
                assert str(ROOT) not in json.dumps(cell["outputs"])
