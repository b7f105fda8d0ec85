"""Artifacts: built once, keyed by everything, whole or not there. With a small engine of our own over torch.export."""

import copy
import dataclasses
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import nn

from vitdemo import CompiledEngine, Model, VitdemoError, convert, reference_crop
from vitdemo.engines.artifacts import CARD, Recipe, cached_artifacts, clear_cache
from vitdemo.engines.graph import export_graph
from vitdemo.paths import PART


class ExportedEngine(CompiledEngine):
    """torch's exported program, run as it is: a real engine, quickly built."""

    name = "exported"
    precisions = ("fp32",)

    def __init__(self, folder, info, precision, *, device, threads):
        super().__init__(folder, info, precision, device=device, threads=threads)
        self._graph = torch.export.load(folder / "graph.pt2").module()

    @classmethod
    def build(cls, model, precision, folder, *, device, calibration):
        torch.export.save(export_graph(model), folder / "graph.pt2")

    def _infer(self, x):
        with torch.inference_mode():
            return self._graph(x)

    @property
    def precision_ran(self):
        return {"fp32": 1.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VITDEMO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "artifacts"


@pytest.fixture(scope="module")
def tiny(vit_shapes20) -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 16, 16), nn.GELU(), nn.Flatten(2), nn.LayerNorm(196), nn.Flatten(1), nn.LazyLinear(20)
    )
    module(torch.zeros(1, 3, 224, 224))
    return Model.from_module(module, vit_shapes20.info.preprocessing, name="tiny", classes=vit_shapes20.info.classes)


@pytest.fixture(scope="module")
def x(shapes20, vit_shapes20) -> torch.Tensor:
    return torch.stack([reference_crop(shapes20[i].image, vit_shapes20.info.preprocessing) for i in range(3)])


def recipe(model: Model, cls=ExportedEngine, precision="fp32", device="cpu") -> Recipe:
    return Recipe.of(model, cls, precision, device)


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def test_built_once_then_loaded(tiny, x, cache, capsys):
    first = recipe(tiny).engine(2)
    assert "building exported fp32 of tiny" in capsys.readouterr().err
    second = recipe(tiny).engine(1)
    assert capsys.readouterr().err == ""
    assert first.card == second.card and second.threads == 1
    (folder,) = folders(cache)
    card = json.loads((folder / CARD).read_text())
    assert card["build_s"] > 0 and card["model"]["tag"] == "tiny" and card["files"]["graph.pt2"]["bytes"] > 10_000
    torch.testing.assert_close(second(x), convert(tiny)(x))


def test_force_builds_anew(tiny, capsys):
    recipe(tiny).engine(1)
    recipe(tiny).engine(1, force=True)
    assert capsys.readouterr().err.count("building") == 2


def changed(model: Model, change) -> Model:
    module = copy.deepcopy(model.module)
    change(module)
    return Model(module, dataclasses.replace(model.info))


def with_preprocessing(model: Model, **changes) -> Model:
    preprocessing = dataclasses.replace(model.info.preprocessing, **changes)
    return Model(model.module, dataclasses.replace(model.info, preprocessing=preprocessing))


def test_everything_that_shapes_an_artifact_is_in_its_key(tiny, monkeypatch):
    monkeypatch.setattr("vitdemo.engines.artifacts.gpu_record", lambda: {"name": "a GPU"})
    with torch.no_grad():
        reweighted = changed(tiny, lambda m: m[0].weight.mul_(1.001))
    others = {
        "weights": recipe(reweighted),
        "eps": recipe(changed(tiny, lambda m: setattr(m[3], "eps", 1e-4))),
        "gelu": recipe(changed(tiny, lambda m: setattr(m[1], "approximate", "tanh"))),
        "mean": recipe(with_preprocessing(tiny, mean=(0.485, 0.456, 0.406))),
        "crop": recipe(with_preprocessing(tiny, crop_mode="squash")),
        "device": recipe(tiny, device="cuda"),
        "precision": recipe(tiny, precision="bf16"),
    }
    keys = {name: other.key for name, other in others.items()} | {"none": recipe(tiny).key}
    assert len(set(keys.values())) == len(keys), keys


OF_A_FILE = """
from torch import nn
def act(x): return {}
class Net(nn.Linear):
    def forward(self, x): return super().forward(act(x.flatten(1)))
"""


def test_a_function_in_the_file_of_a_class_is_in_the_key(tmp_path, monkeypatch, vit_shapes20):
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for told in ("x", "x * 2.0"):
        (tmp_path / "my_net.py").write_text(OF_A_FILE.format(told))
        monkeypatch.delitem(sys.modules, "my_net", raising=False)
        torch.manual_seed(0)
        net = importlib.import_module("my_net").Net(3 * 224 * 224, 20)
        keys.append(recipe(Model.from_module(net, vit_shapes20.info.preprocessing, name="mine")).key)
    assert keys[0] != keys[1]


TYPED = """
class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 224 * 224, 20)
    def forward(self, x):
        return self.fc(x.flatten(1))
"""


def holding(value) -> nn.Module:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 20))
    module.held = value
    return module


def made_by_a_function() -> nn.Module:
    class Local(nn.Flatten):
        pass

    return nn.Sequential(Local(), nn.Linear(3 * 224 * 224, 20))


def typed_into_a_notebook() -> nn.Module:
    names = {"nn": nn, "__name__": "__main__"}
    exec(TYPED, names)
    return names["Scaled"]()


@pytest.mark.parametrize(
    "make", [typed_into_a_notebook, made_by_a_function, lambda: holding((lambda factor: lambda x: factor * x)(2))]
)
def test_what_nobody_can_tell_apart_tomorrow_is_never_taken_from_the_cache(vit_shapes20, make):
    keys = []
    for _ in range(2):
        torch.manual_seed(0)
        keys.append(recipe(Model.from_module(make(), vit_shapes20.info.preprocessing, name="typed")).key)
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    "value", [torch.relu, functools.partial(torch.mul, other=2), nn.functional.silu, nn.GELU, {"b", "a"}]
)
def test_what_a_library_has_is_known_by_its_source(vit_shapes20, value):
    keys = []
    for _ in range(2):
        torch.manual_seed(0)
        keys.append(recipe(Model.from_module(holding(value), vit_shapes20.info.preprocessing, name="held")).key)
    assert keys[0] == keys[1]


AT_EXIT = """
import torch
from vitdemo import Model, Preprocessing, convert
from vitdemo.engines.artifacts import artifacts_root
class Typed(torch.nn.Flatten):
    pass
module = torch.nn.Sequential(Typed(), torch.nn.Linear(3072, 5))
black = Preprocessing((3, 32, 32), 1.0, "center", "bilinear", (0.5,) * 3, (0.5,) * 3)
model = Model.from_module(module, black, name="typed")
convert(model, "openvino", "fp32")
print(len(list(artifacts_root().glob("*/card.json"))))
"""


def test_an_artifact_that_nobody_finds_again_goes_with_its_process(tmp_path):
    pytest.importorskip("openvino")
    environment = os.environ | {"VITDEMO_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", AT_EXIT], env=environment, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr[-2000:]
    assert list(tmp_path.rglob("card.json")) == []


def test_values_that_no_state_dict_holds_are_in_the_key(tiny):
    values = [1, 2], {"a": 1}, {"a": 2}, 2.5, torch.ones(2), torch.zeros(2)
    keys = {recipe(changed(tiny, lambda m, v=v: setattr(m[1], "_held", v))).key for v in values}
    assert len(keys | {recipe(tiny).key}) == len(values) + 1


@pytest.mark.parametrize("change", [lambda weight: weight.mul_(2), lambda weight: weight.data.mul_(2)])
def test_weights_changed_behind_the_hash_make_another_artifact(tiny, change):
    model = Model(copy.deepcopy(tiny.module), tiny.info)
    before = convert(model)
    change(model.module[0].weight)
    after = convert(model)
    assert before.card["key"] == convert(tiny).card["key"] != after.card["key"]
    assert after.info.weights_sha256 != before.info.weights_sha256 == tiny.info.weights_sha256


def test_keys_are_the_same_in_another_process_and_for_any_threads(vit_shapes20):
    script = "from vitdemo import *; print(convert(load_model('vit_shapes20'), threads=1).card['key'])"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert there.stdout.strip() == convert(vit_shapes20, threads=2).card["key"]


def become_another(folder: Path) -> None:
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {"key": "0" * 64}))


DAMAGES = {
    "a cut file": lambda folder: os.truncate(folder / "graph.pt2", 1000),
    "a file gone": lambda folder: (folder / "graph.pt2").unlink(),
    "a file too many": lambda folder: (folder / "more.bin").write_bytes(b"?"),
    "a torn card": lambda folder: os.truncate(folder / CARD, 100),
    "no card": lambda folder: (folder / CARD).unlink(),
    "another artifact's card": become_another,
    "a card that is a list": lambda folder: (folder / CARD).write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_artifact_is_built_again_and_said(tiny, x, cache, capsys, damage):
    expected = recipe(tiny).engine(1)(x)
    (folder,) = folders(cache)
    damage(folder)
    capsys.readouterr()
    again = recipe(tiny).engine(1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith(f"{folder}: cannot be used (") and said[1].startswith("building")
    torch.testing.assert_close(again(x), expected)


BUILD = """
from tests.engines.test_artifacts import ExportedEngine, Recipe
from vitdemo import load_model
print("ready", flush=True)
engine = Recipe.of(load_model("vit_shapes20"), ExportedEngine, "fp32", "cpu").engine(1)
print(engine.card["key"], flush=True)
"""


def start_build() -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", BUILD], **pipes, start_new_session=True)


def test_killed_build_leaves_nothing_that_looks_built(cache):
    seen_partial = 0
    for delay_s in (0.0, 0.3, 0.6):
        child = start_build()
        assert child.stdout.readline() == "ready\n"
        while child.poll() is None and not list(cache.glob(f"*{PART}")):
            time.sleep(0.01)
        time.sleep(delay_s)
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        seen_partial += bool(list(cache.glob(f"*{PART}")))
        assert all((folder / CARD).exists() for folder in folders(cache) if not folder.name.endswith(PART))
    assert seen_partial  # some kill did strike while it was written
    whole = start_build()
    out, err = whole.communicate()
    assert whole.returncode == 0, err
    assert out.splitlines()[-1] in {card["key"] for card in cards(cache)}
    assert not list(cache.glob(f"*{PART}"))


def cards(cache: Path) -> list[dict]:
    return [json.loads((folder / CARD).read_text()) for folder in folders(cache)]


def test_builds_at_the_same_time_build_once(cache):
    children = [start_build() for _ in range(2)]
    answers = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert len({out.splitlines()[-1] for out, _ in answers}) == 1
    assert sum("building" in err for _, err in answers) == 1
    assert len(folders(cache)) == 1


class BrokenEngine(ExportedEngine):
    @classmethod
    def build(cls, model, precision, folder, *, device, calibration):
        (folder / "half").write_bytes(b"half of it")
        raise RuntimeError("unsupported operation: aten::so\nand forty lines more")


def test_failed_build_is_one_line_and_leaves_nothing(tiny, cache):
    message = r"exported fp32 of tiny: cannot be built \(unsupported operation: aten::so\); see `vitdemo doctor`"
    with pytest.raises(VitdemoError, match=message) as caught:
        recipe(tiny, cls=BrokenEngine).engine(1)
    assert "\n" not in str(caught.value) and not folders(cache)


class UnloadableEngine(ExportedEngine):
    def __init__(self, *arguments, **options):
        raise RuntimeError("model.so: failed to map segment from shared object")


def test_what_is_built_and_cannot_be_loaded_is_one_line(tiny, cache):
    with pytest.raises(
        VitdemoError, match=r"tiny: it was built, and cannot be loaded \(model.so: failed to map"
    ) as caught:
        recipe(tiny, cls=UnloadableEngine).engine(1)
    assert "\n" not in str(caught.value)


def test_full_disk_is_one_line(tiny, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small tmpfs here")
    monkeypatch.setenv("VITDEMO_CACHE", str(disk))
    try:
        with pytest.raises(VitdemoError, match="a build may need .* MB, the disk has 0 MB free; make room") as caught:
            recipe(tiny).engine(1)
        assert "\n" not in str(caught.value) and not folders(disk / "artifacts")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_table_of_the_cache_and_clearing_it(tiny, cache):
    assert len(cached_artifacts()) == 0 and clear_cache() == 0
    engine = recipe(tiny).engine(1)
    (cache / "foreign").mkdir()
    (cache / "foreign" / CARD).write_text("{")
    table = cached_artifacts()
    row = table[table["model"] == "tiny"].iloc[0]
    (folder,) = (path for path in folders(cache) if path.name != "foreign")
    assert row["bytes"] == (folder / "graph.pt2").stat().st_size
    assert (row["engine"], row["precision"], row["key"]) == ("exported", "fp32", engine.card["key"])
    assert "unreadable: foreign" in set(table["model"])
    assert clear_cache() == 1, "the engine is in use"
    del engine
    assert clear_cache() >= row["bytes"] and {path.suffix for path in cache.iterdir()} == {".lock"}


def test_clearing_leaves_what_is_being_built(tiny, cache):
    recipe(tiny).engine(1)
    (folder,) = folders(cache)
    (cache / "other.part").mkdir()
    with FileLock(f"{folder}.lock"):
        assert clear_cache() == 0 and folders(cache) == [folder]
    assert clear_cache() > 10_000 and folders(cache) == []
