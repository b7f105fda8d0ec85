"""The inductor engine: what the package computes, what it needs, and what is said of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.engines.near import relative_l2
from tests.native import unless_native
from vitdemo import Model, Preprocessing, convert, data_path
from vitdemo.engines.inductor import InductorEngine

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler here"),
    unless_native("inductor", "bf16"),
]


@pytest.fixture(scope="module")
def engine(vit_shapes20) -> InductorEngine:
    return convert(vit_shapes20, "inductor", "bf16")


class HalfStubborn(nn.Module):
    """A convolution and a linear layer in the precision asked for, a head that is float32 whatever is asked for."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16)
        self.fc, self.head = nn.Linear(1024, 32), nn.Linear(32, 1000)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        x = self.fc(torch.relu(self.norm(self.conv(x))).flatten(1)).float()
        return nn.functional.linear(x, self.head.weight.float(), self.head.bias.float())


@pytest.fixture(scope="module")
def half_stubborn() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        preprocessing = Preprocessing((3, 32, 32), 1.0, "center", "bicubic", (0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
        return Model.from_module(HalfStubborn(), preprocessing, name="half_stubborn")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Where a build may write."""
    return {name: tmp_path_factory.mktemp(name) for name in ("VITDEMO_CACHE", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR")}


@pytest.fixture(scope="module")
def half_stubborn_engine(half_stubborn, places) -> InductorEngine:
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in places.items():
            patch.setenv(name, str(folder))
        patch.setattr("tempfile.tempdir", None)
        return convert(half_stubborn, "inductor", "bf16")


def test_weights_are_laid_out_ahead(engine):
    """Freezing is lost without a word where gradients are on, and with it a tenth of the speed and more."""
    constants = engine._run.__self__.get_constant_fqns()
    assert any("frozen" in name for name in constants)


def test_threads_are_the_engines_not_the_artifacts(engine, vit_shapes20, crops):
    expected = engine(crops)
    for threads in (1, 2):
        other = convert(vit_shapes20, "inductor", "bf16", threads=threads)
        assert other.card == engine.card
        torch.testing.assert_close(other(crops), expected, atol=5e-2, rtol=2e-2)
        assert torch.get_num_threads() == threads


def test_precision_ran(engine, half_stubborn, half_stubborn_engine):
    """Read off the graph that was compiled: a layer in float32 shows, in the share that eager counts as it runs."""
    assert engine.precision_ran == {"bf16": 1}
    ran = half_stubborn_engine.precision_ran
    assert ran == pytest.approx(convert(half_stubborn, "eager", "bf16").precision_ran)
    assert ran["fp32"] > 0.2


def test_layers_of_any_module(half_stubborn, half_stubborn_engine):
    x = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, expected = half_stubborn_engine.layers(x), convert(half_stubborn, "eager", "fp32").layers(x)
    assert list(found) == list(expected) == ["conv", "norm", "fc", "logits"]
    assert all(1e-5 < relative_l2(found[name], expected[name]) < 2e-2 for name in expected)
    assert relative_l2(found["logits"], half_stubborn_engine(x)) < 1e-2


def test_nothing_else_is_left(half_stubborn_engine, places):
    artifacts = places["VITDEMO_CACHE"] / "artifacts"
    (artifact,) = (path for path in artifacts.iterdir() if path.is_dir())
    assert {path.name for path in artifact.iterdir()} == {"model.pt2", "tapped.pt2", "facts.json", "card.json"}
    assert {path.suffix for path in artifacts.iterdir()} == {"", ".lock"}
    assert list(places["TORCHINDUCTOR_CACHE_DIR"].iterdir()) == []
    # A package is unpacked to be loaded, and that goes when the engine does.
    assert all(path.name.startswith("aotinductor_") for path in places["TMPDIR"].iterdir())


WITHOUT_COMPILER = """
import os, sys, torch
from vitdemo import convert, load_model
from vitdemo.cli import main

crops, logits, empty, data = sys.argv[1:]
torch.save(convert(load_model("vit_shapes20"), "inductor", "bf16")(torch.load(crops)), logits)
os.environ["VITDEMO_CACHE"] = empty
options = ["--engine", "inductor", "--precision", "bf16", "--out", os.path.join(empty, "run")]
sys.exit(main(["evaluate", "vit_shapes20", "--data", data, *options]))
"""


def test_without_a_compiler(engine, crops, tmp_path):
    """What is built loads and runs; what is not says what to install."""
    torch.save(crops, tmp_path / "crops.pt")
    empty = tmp_path / "cache"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(empty)}
    arguments = [tmp_path / "crops.pt", tmp_path / "logits.pt", empty, data_path("shapes20")]
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), engine(crops))
    assert child.returncode == 2 and "Traceback" not in child.stderr
    assert child.stderr.splitlines()[-1].startswith("vitdemo: inductor engine: needs a C++ compiler, and g++ does not")
    assert [path for path in empty.rglob("*") if path.is_dir()] == [empty / "artifacts"]
