"""What ships: the wheel and the sdist, used from outside the checkout, beside files that could shadow ours."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PARTS = {"theory", "analysis", "pruning", "paper_figures"}


def _run(*command, cwd, env=None):
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=300, env=env, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel built from that sdist, as a user's pip would."""
    source = tmp_path_factory.mktemp("source")
    out = tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    if not any(tracked):  # an unpacked sdist has no git
        tracked = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file() and ".venv" not in p.parts]
    for name in filter(None, tracked):
        target = source / name
        if (ROOT / name).is_file() and not name.startswith(".namespace"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    _run("-m", "build", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The wheel alone in a folder, and the environment that finds it before anything else."""
    target = tmp_path_factory.mktemp("site")
    wheel, _ = built
    _run("-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel), cwd=target)
    return os.environ | {"PYTHONPATH": str(target)}, target


def test_wheel_holds_one_package_and_nothing_at_the_top_level(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.split("/")[0] for name in names} == {"ellq", f"ellq-{PROJECT['project']['version']}.dist-info"}
    expected = {"ellq/py.typed", "ellq/pruning/report.html.j2", "ellq/theory/measures.py", "ellq/cli.py"}
    assert expected <= set(names)


def test_wheel_holds_every_source_file(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    for folder, package in [("facade", "ellq"), *((part, f"ellq/{part}") for part in PARTS)]:
        for source in (ROOT / folder).glob("*.py"):
            assert f"{package}/{source.name}" in names


def test_sdist_holds_what_the_wheel_is_built_from(built):
    with tarfile.open(built[1]) as archive:
        names = archive.getnames()
    assert any(name.endswith("/facade/__main__.py") for name in names)
    assert any(name.endswith("/LICENSE") for name in names)


def test_wheel_works_in_a_folder_with_files_of_the_same_names(installed, tmp_path):
    env, target = installed
    for name in PARTS:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a foreign module was imported')")
    code = (
        "import ellq, ellq.analysis, ellq.theory, torch;"
        "p = ellq.measure(torch.nn.Linear(4, 3));"
        "print(ellq.__file__, len(p.units))"
    )
    printed = _run("-c", code, cwd=tmp_path, env=env)
    assert str(target) in printed
    assert printed.split()[-1] == "3"


def test_wheel_runs_as_a_module_from_outside(installed, tmp_path):
    env, _ = installed
    assert _run("-m", "ellq", "--version", cwd=tmp_path, env=env).strip() == f"ellq {PROJECT['project']['version']}"


def test_this_environment_imports_ellq_beside_foreign_modules(tmp_path):
    (tmp_path / "analysis.py").write_text("raise RuntimeError('a foreign module was imported')")
    printed = _run("-c", "import ellq.analysis; print(ellq.analysis.__name__)", cwd=tmp_path)
    assert printed.strip() == "ellq.analysis"


def test_import_loads_neither_numpy_nor_torch(tmp_path):
    code = "import sys, ellq; dir(ellq); print([m for m in ('numpy', 'torch', 'pandas') if m in sys.modules])"
    assert _run("-c", code, cwd=tmp_path).strip() == "[]"


def test_every_public_name_loads(tmp_path):
    _run("-c", "import ellq; [getattr(ellq, name) for name in ellq.__all__]", cwd=tmp_path)


def test_unknown_name_is_an_attribute_error():
    import ellq

    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        _ = ellq.prunes


def test_every_package_folder_is_listed_and_has_an_init():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {p.parent for part in PARTS for p in (ROOT / part).rglob("*.py")}
    assert listed == {"ellq"} | {"ellq." + ".".join(f.relative_to(ROOT).parts) for f in folders}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_version_is_said_once():
    import ellq

    assert ellq.__version__ == PROJECT["project"]["version"] == distribution("ellq").version


def test_type_checkers_see_every_folder_and_facade_file():
    if not (ROOT / ".namespace").is_dir():
        pytest.skip(".namespace is for a checkout; this is an unpacked sdist")
    links = {p.name: os.readlink(p) for p in (ROOT / ".namespace/ellq").iterdir()}
    facade = {p.name: f"../../facade/{p.name}" for p in (ROOT / "facade").iterdir() if p.is_file()}
    assert links == {part: f"../../{part}" for part in PARTS} | facade


def test_constraints_pin_every_direct_dependency():
    pinned = set(re.findall(r"(?m)^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8")))
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + extras["test"] + extras["onnx"]
    assert pinned == {re.match(r"[\w-]+", line).group() for line in wanted} - {"ellq"}


def test_constraints_pin_torch():
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()


def test_ci_runs_exactly_the_readme_test_command():
    commands = re.findall(r"(?m)^python3 -m venv .*$", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(commands) == 2
    assert commands[0].endswith("ellq demo")
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert commands[1] in script
