"""Loading models by name, folder and file; what cannot be loaded says so in one line."""

import copy
import hashlib
import json
import pickle
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

from vitdemo import Model, Preprocessing, VitdemoError, convert, data_path, load_model
from vitdemo.models import loading as weights_module
from vitdemo.models.loading import WEIGHTS_FILE, weights_sha256

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """A weights file that fits vit_tiny_patch16_224, random but not those of seed 0."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    return path


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, on a machine that looks offline."""
    monkeypatch.setattr(weights_module.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights_module.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(weights_module.constants, "HUGGINGFACE_HUB_CACHE", str(tmp_path), raising=False)
    return tmp_path


def test_bundled_model_is_what_timm_loads_from_the_folder(vit_shapes20):
    theirs = timm.create_model(f"local-dir:{data_path('shapes20/vit_shapes20')}", pretrained=True).eval()
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(vit_shapes20.module(x), theirs(x))
    config = timm.data.resolve_model_data_config(theirs)
    assert vit_shapes20.info.preprocessing == Preprocessing(**config)


def test_bundled_model_info(vit_shapes20, shapes20):
    info = vit_shapes20.info
    assert (info.tag, info.weights) == ("vit_shapes20", "pretrained")
    assert list(info.classes) == shapes20.classes
    json.dumps(asdict(info))
    assert not vit_shapes20.module.training
    assert not any(p.requires_grad for p in vit_shapes20.module.parameters())


def test_folder_by_path_is_the_same_model(vit_shapes20):
    model = load_model(str(data_path("shapes20/vit_shapes20")))
    assert model.info.weights_sha256 == vit_shapes20.info.weights_sha256


@pytest.mark.parametrize(
    "name, gmacs", [("vit_tiny_patch16_224", 1.26), ("vit_base_patch16_224", 17.58), ("resnet18.tv_in1k", 1.82)]
)
def test_flops_are_twice_the_published_macs(name, gmacs):
    model = load_model(name, "random")
    assert model.info.flops_per_image / 2e9 == pytest.approx(gmacs, rel=0.01)
    assert len(model.info.classes) == 1000 and model.info.classes[65] == "n01751748"


def test_preprocessing_comes_from_the_tag():
    tv = load_model("resnet18.tv_in1k", "random").info.preprocessing
    assert (tv.crop_pct, tv.interpolation, tv.mean) == (0.875, "bilinear", (0.485, 0.456, 0.406))
    a1 = load_model("resnet18.a1_in1k", "random").info.preprocessing
    assert (a1.input_size, a1.crop_pct, a1.interpolation) == ((3, 288, 288), 1.0, "bicubic")  # its size for tests


def test_random_weights_are_the_same_every_time_and_leave_the_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = load_model("vit_tiny_patch16_224", "random")
    assert torch.equal(torch.rand(1), expected)
    assert first.info.weights_sha256 == load_model("vit_tiny_patch16_224", "random").info.weights_sha256


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file(tiny_file, tmp_path, suffix):
    state = load_file(tiny_file)
    path = tiny_file if suffix == ".safetensors" else tmp_path / "tiny.pth"
    if suffix == ".pth":
        torch.save({"state_dict": state}, path)
    model = load_model(TINY, str(path))
    assert all(torch.equal(model.module.state_dict()[key], tensor) for key, tensor in state.items())
    assert model.info.weights == path.name


def test_pretrained_tag_comes_from_the_hub_cache_when_offline(hub_cache, tiny_file):
    repo = hub_cache / f"models--timm--{TINY}"
    snapshot = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    shutil.copy(tiny_file, snapshot / WEIGHTS_FILE)
    assert load_model(TINY).info.weights_sha256 == load_model(TINY, str(tiny_file)).info.weights_sha256


def test_pretrained_tag_without_network_says_how_to_bring_the_file(hub_cache):
    with pytest.raises(VitdemoError, match=f"hf download timm/{TINY} model.safetensors"):
        load_model(TINY)


@pytest.mark.parametrize(
    "name, message",
    [
        ("vit_base_patch16_224", "full tag: .*vit_base_patch16_224.augreg2_in21k_ft_in1k"),
        ("vit_base_patch16_224.nonsense", "has no such weights tag"),
        ("vit_shapes_20", "no such model; did you mean vit_shapes20"),
        ("", "no such model"),
        ("/nowhere/at/all", "no such file or folder; check the path$"),
        ("owner/model", "no such file or folder; .*is hf-hub:owner/model"),
        ("weights.pth", "no such file or folder"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(VitdemoError, match=message) as error:
        load_model(name)
    assert "\n" not in str(error.value)


def corrupted_folder(tmp_path, **changes):
    folder = tmp_path / "model"
    shutil.copytree(data_path("shapes20/vit_shapes20"), folder)
    for name, content in changes.items():
        (folder / {"config": "config.json", "weights": WEIGHTS_FILE}[name]).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": b"{"}, "config.json: is not a JSON object"),
        ({"config": b"[]"}, "config.json: is not a JSON object"),
        ({"config": b"\xff\xfe"}, "config.json: is not a JSON object"),
        ({"config": b"{}"}, 'config.json: has neither "architecture" and "pretrained_cfg"'),
        ({"config": b'{"architecture": "resnet18"}'}, "config.json: has neither"),
        ({"config": b'{"architecture": "resnet18", "pretrained_cfg": null}'}, "config.json: has neither"),
        (
            {"config": b'{"architecture": "vit_unheard_of", "pretrained_cfg": {}}'},
            "cannot be built .*vit_unheard_of",
        ),
        (
            {"config": b'{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": {"depth": -3}}'},
            "cannot be built",
        ),
        ({"weights": b"\x00" * 100}, "cannot be read as weights"),
        ({"weights": b""}, "is empty, and not the weights; download"),
    ],
)
def test_damaged_folder(tmp_path, changes, message):
    with pytest.raises(VitdemoError, match=message) as error:
        load_model(str(corrupted_folder(tmp_path, **changes)))
    assert "\n" not in str(error.value)


def test_folder_without_config_or_weights(tmp_path):
    with pytest.raises(VitdemoError, match="config.json: not there"):
        load_model(str(tmp_path))
    folder = corrupted_folder(tmp_path)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(VitdemoError, match="no such weights file"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("norm.weight"), 'Missing key.s. in state_dict: "norm.weight"'),
        (lambda s: s.update(extra=torch.zeros(1)), 'Unexpected key.s. in state_dict: "extra"'),
        (lambda s: s.update({"head.bias": torch.zeros(7)}), r"size mismatch for head.bias: .*\[7\].*\[1000\]"),
    ],
)
def test_weights_of_another_architecture_name_the_key(tiny_file, tmp_path, change, message):
    state = load_file(tiny_file)
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(VitdemoError, match=message) as error:
        load_model(TINY, str(tmp_path / "w.safetensors"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], torch.zeros(2), {1: torch.zeros(1)}, {"state_dict": None}, {"a": 1}]
)
def test_files_that_hold_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(VitdemoError, match="odd.pth: ") as error:
        load_model(TINY, str(tmp_path / "odd.pth"))
    assert "\n" not in str(error.value)


def test_folder_as_timm_saves_it_for_the_hub(tmp_path, vit_shapes20):
    """timm writes the classes' names beside pretrained_cfg, not into it."""
    names = [f"n9{k:07}" for k in range(4)]
    module = timm.create_model("vit_tiny_patch16_224", num_classes=4, embed_dim=32, depth=1, num_heads=2)
    config = {"label_names": names, "num_classes": 4, "model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2}}
    timm.models.save_for_hf(module, tmp_path, model_config=config, safe_serialization=True)
    model = load_model(str(tmp_path))
    assert list(model.info.classes) == names
    assert model.info.preprocessing == Preprocessing(**timm.data.resolve_model_data_config(module))
    assert model.info.weights_sha256 == weights_sha256(module)


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a pickle was run')",))


def test_pickle_with_code_is_refused_and_not_run(tmp_path):
    path = tmp_path / "trap.pth"
    torch.save({"state_dict": Trap()}, path)
    with pytest.raises(VitdemoError, match="perhaps code, and is not opened"):
        load_model(TINY, str(path))
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(VitdemoError, match="perhaps code, and is not opened"):
        load_model(TINY, str(path))


def test_paths_of_the_wrong_kind(tiny_file, tmp_path):
    with pytest.raises(VitdemoError, match="tiny.safetensors: does not say its architecture; give that as the model"):
        load_model(tiny_file)
    with pytest.raises(VitdemoError, match="is a folder; give a .safetensors"):
        load_model(TINY, tmp_path)


@pytest.fixture(scope="module")
def torchvision_resnet18():
    """torchvision's own module, whose BatchNorm has seen images, so that its running statistics matter."""
    torch.manual_seed(2)
    module = torchvision.models.resnet18(weights=None)
    module(torch.randn(8, 3, 64, 64))
    return module.eval()


@pytest.mark.parametrize("origin", ["torchvision", "torchvision before 0.2.1", "timm"])
def test_resnet18_from_either_library(tmp_path, torchvision_resnet18, origin):
    """The two have the same keys; files older than torch 0.4.1 lack BatchNorm's count of batches."""
    state = torchvision_resnet18.state_dict()
    if origin == "timm":
        theirs = timm.create_model("resnet18")
        theirs.load_state_dict(state)
        state = theirs.state_dict()
    elif "before" in origin:
        state = {key: tensor for key, tensor in state.items() if "num_batches_tracked" not in key}
        assert len(state) == 102
    torch.save(state, tmp_path / "resnet18.pth")
    model = load_model("resnet18.tv_in1k", tmp_path / "resnet18.pth")
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model.module(x), torchvision_resnet18(x), rtol=0, atol=1e-5)
    state.pop("bn1.running_var")
    torch.save(state, tmp_path / "resnet18.pth")
    with pytest.raises(VitdemoError, match='Missing key.*"bn1.running_var"'):
        load_model("resnet18.tv_in1k", tmp_path / "resnet18.pth")


def test_torchvisions_module_itself(torchvision_resnet18):
    ours = load_model("resnet18.tv_in1k", "random").info
    model = Model.from_module(torchvision_resnet18, ours.preprocessing, name="resnet18", classes=ours.classes)
    assert model.info.flops_per_image == ours.flops_per_image
    assert model.module is torchvision_resnet18


PREPROCESSING = Preprocessing((3, 32, 32), 1.0, "squash", "bilinear", (0, 0, 0), (1, 1, 1))


def convnet() -> torch.nn.Sequential:
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(8, 4)]
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), *head)


CONVNET_FLOPS = 2 * (30 * 30 * 8 * 27 + 8 * 4)


def test_from_module_in_training_mode_stays_true():
    module = convnet().train()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    model = Model.from_module(module, PREPROCESSING, name="convnet")
    assert model.info.flops_per_image == CONVNET_FLOPS
    assert all(torch.equal(before[key], tensor) for key, tensor in model.module.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.module(x), model.module(x))  # no dropout
    assert not model.module(x).requires_grad


class WithPlainTensor(torch.nn.Module):
    """Holds a tensor that no state dict and no .to() knows, and looks at values."""

    def __init__(self):
        super().__init__()
        self.scale = torch.rand(3, 1, 1)
        self.head = torch.nn.Linear(3, 4)

    def forward(self, x):
        x = x * self.scale
        return self.head(x.mean((2, 3)) if x.mean() < 5 else x.amax((2, 3)))


class WithCache(torch.nn.Module):
    """Keeps what its first call computed, as LeViT's attention does with its biases."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(4))
        self.kept = None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.bias * 2
        return x.mean((1, 2, 3))[:, None] + self.kept


def shared_layer() -> torch.nn.Sequential:
    layer = torch.nn.Linear(4, 4)
    return torch.nn.Sequential(convnet(), layer, layer)


@pytest.mark.parametrize(
    "make, flops",
    [(WithPlainTensor, 2 * 3 * 4), (WithCache, 0), (shared_layer, CONVNET_FLOPS + 2 * 2 * 4 * 4)],
    ids=["plain tensor", "cache", "shared layer"],
)
def test_from_module_leaves_odd_modules_working(make, flops):
    torch.manual_seed(3)
    oracle = make().eval()
    torch.manual_seed(3)
    model = Model.from_module(make(), PREPROCESSING, name="odd")
    assert model.info.flops_per_image == flops
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.module(x), oracle(x))


def exported() -> torch.nn.Module:
    return torch.export.export(convnet().eval(), (torch.zeros(1, 3, 32, 32),)).module()


@pytest.mark.parametrize(
    "module, message",
    [
        (lambda: convnet().half(), r"odd: 0.weight is torch.float16; give module.float\(\)"),
        (lambda: convnet().double(), r"odd: 0.weight is torch.float64; give module.float\(\)"),
        (lambda: convnet().to("meta"), "odd: 0.weight has no values yet"),
        (lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(4)), "odd: 1.weight has no values yet"),
        (exported, "odd: .*give the module that it was made from"),
        (lambda: convnet, "odd: function is not a torch.nn.Module"),
        (lambda: convnet()[:1], r"does not give logits \[B, C\]"),
        (lambda: torch.nn.ModuleDict({"a": convnet()}), "does not give logits"),
    ],
    ids=["half", "double", "meta", "lazy", "exported", "function", "no logits", "no forward"],
)
def test_from_module_refuses_in_one_line(module, message):
    with pytest.raises(VitdemoError, match=message) as error:
        Model.from_module(module(), PREPROCESSING, name="odd")
    assert "\n" not in str(error.value)


def test_buffers_that_no_file_holds_count_as_weights():
    first, second = convnet(), convnet()
    second.load_state_dict(first.state_dict())
    for module, mean in ((first, 0.0), (second, 0.5)):
        module.register_buffer("mean", torch.tensor(mean), persistent=False)
    assert weights_sha256(first) != weights_sha256(second)
    second.mean.zero_()
    assert weights_sha256(first) == weights_sha256(second)


def test_weights_are_not_read_again_for_a_copy(vit_shapes20, monkeypatch):
    """346 MB of a ViT-B, at each move of a slider in 06; only ``convert`` reads them every time."""
    module, read = copy.deepcopy(vit_shapes20.module), []
    monkeypatch.setattr(weights_module, "hashlib", SimpleNamespace(sha256=lambda: read.append(1) or hashlib.sha256()))
    first = Model(module, vit_shapes20.info)
    other = replace(first.info.preprocessing, crop_pct=0.5)
    assert Model(module, replace(first.info, preprocessing=other)).info.weights_sha256 == first.info.weights_sha256
    assert len(read) == 1
    convert(first), convert(first)
    assert len(read) == 3
    module.head.weight.mul_(2)
    assert Model(module, first.info).info.weights_sha256 == weights_sha256(module) != first.info.weights_sha256


def test_from_module_takes_any_classifier():
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 4))
    preprocessing = Preprocessing((3, 32, 32), 1.0, "squash", "bilinear", (0, 0, 0), (1, 1, 1))
    model = Model.from_module(module, preprocessing, name="mean_color", classes=("a", "b", "c", "d"))
    assert model.info.flops_per_image == 2 * 3 * 4
    assert model.info.weights_sha256 == weights_sha256(module)
    with pytest.raises(VitdemoError, match="4 outputs but 2 classes"):
        Model.from_module(module, preprocessing, name="mean_color", classes=("a", "b"))
    with pytest.raises(VitdemoError, match="does not give logits"):
        Model.from_module(torch.nn.Linear(5, 2), replace(preprocessing, input_size=(3, 8, 8)), name="wrong")
