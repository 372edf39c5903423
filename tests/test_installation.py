"""What is installed is one package: nobody's own folders shadow a room, and none is shadowed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("interp", "probes", "steering", "experiments", "figures")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the wheel, built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: a build leaves files where it runs, and picks up those of an earlier one
    aside = shutil.ignore_patterns(".*", "runs", "build", "dist", "tests", "docs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=aside)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True, cwd=folder, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_every_folder_of_code_is_installed(site: Path) -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {"pingscope." + ".".join(folder.parts) for folder in folders} == set(packages) - {"pingscope"}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (site / "pingscope" / path.relative_to(ROOT)).is_file(), path
    installed = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert installed == {"pingscope"}


def test_folders_beside_a_notebook_neither_shadow_nor_are_shadowed(site: Path, tmp_path: Path) -> None:
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("mine = True\n")
    code = (
        f"import sys; sys.path.insert(1, {str(site)!r})\n"
        f"import {', '.join(ROOMS)}\n"
        f"assert all(room.mine for room in ({', '.join(ROOMS)}))\n"
        "import pingscope, pingscope.experiments.cli.main, pingscope.figures.report, pingscope.steering.ping\n"
        "from pingscope import ActivationStore, Direction, LayerProbes, judge, load_model, render\n"
        "ours = [module for name, module in sys.modules.items() if name.startswith('pingscope')]\n"
        f"assert all(module.__file__.startswith({str(site)!r}) for module in ours)\n"
        "assert judge('I cannot help with that.') == 'refused'\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_door_names_what_it_opens() -> None:
    import pingscope

    assert {"load_model", "render", "ActivationStore", "LayerProbes", "Direction", "judge"} <= set(dir(pingscope))
    with pytest.raises(AttributeError, match="no attribute 'lode_model'"):
        pingscope.lode_model  # noqa: B018
