"""Hugging Face's ViTForImageClassification through our converter; transformers is the oracle."""

import hashlib
import http.server
import io
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vitdemo import Preprocessing, VitdemoError, data_path, load_model, reference_crop
from vitdemo.models import loading as weights_module
from vitdemo.models.checkpoints import labels_of
from vitdemo.models.huggingface import WEIGHTS_FILES
from vitdemo.models.loading import WEIGHTS_FILE

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
# What the two repositories of Google's hold, the older file and the newer.
OLDER = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224}
NEWER = OLDER | {"do_rescale": True, "image_processor_type": "ViTImageProcessor", "resample": 2}
NEWER |= {"rescale_factor": 0.00392156862745098, "size": {"height": 224, "width": 224}}
NAMES = ImageNetInfo("imagenet-1k").label_descriptions()
WNIDS = tuple(ImageNetInfo("imagenet-1k").label_names())


def classes_of(config: dict) -> tuple[str, ...] | None:
    return labels_of(config.get("id2label")).classes


def theirs(**changes) -> ViTForImageClassification:
    """transformers' model with random weights. Its embeddings are so small that LayerNorm's eps matters."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SMALL | changes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * (1e-3 if "embeddings" in name else 0.2))
    return model


def saved(model: ViTForImageClassification, folder, **options):
    """``model`` as transformers saves it, with the preprocessing that goes with it."""
    model.save_pretrained(folder, **options)
    image_size = model.config.image_size
    height, width = image_size if isinstance(image_size, (list, tuple)) else (image_size, image_size)
    ViTImageProcessorPil(size={"height": height, "width": width}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model in Hugging Face's layout; not to be changed."""
    return saved(theirs(), tmp_path_factory.mktemp("huggingface") / "small")


@pytest.fixture
def folder(small, tmp_path):
    """A copy of ``small`` to change."""
    return shutil.copytree(small, tmp_path / "model")


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(message: str, *arguments) -> None:
    with pytest.raises(VitdemoError, match=message) as error:
        load_model(*map(str, arguments))
    assert "\n" not in str(error.value)


def assert_same_logits(model, oracle: ViTForImageClassification) -> None:
    x = torch.randn(3, *model.info.preprocessing.input_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.module(x), oracle(x).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_norm_eps": 1e-5, "hidden_act": "gelu_new"},
        {"layer_norm_eps": 1e-6, "qkv_bias": False, "hidden_act": "quick_gelu"},
        {
            "hidden_size": 22,
            "num_attention_heads": 2,
            "intermediate_size": 49,
            "hidden_act": "relu",
        },  # 49 / 22 * 22 < 49
        {"image_size": (24, 40), "patch_size": (4, 8), "num_hidden_layers": 3, "hidden_act": "silu"},
        {"image_size": 39, "patch_size": 16, "num_attention_heads": 1, "num_labels": 1000, "hidden_act": "swish"},
        {"hidden_act": "gelu_fast"},
        {"hidden_act": "gelu_pytorch_tanh"},
    ],
)
def test_logits_are_those_of_transformers(tmp_path, changes):
    oracle = theirs(**changes)
    model = load_model(str(saved(oracle, tmp_path / "some_vit")))
    assert_same_logits(model, oracle)
    assert (model.info.tag, model.info.weights) == ("some_vit", "pretrained")


@pytest.mark.soak
def test_googles_base_model_at_full_size(tmp_path):
    torch.manual_seed(0)
    oracle = ViTForImageClassification(ViTConfig(num_labels=1000)).eval()
    saved(oracle, tmp_path)
    edited(tmp_path / "config.json", **id2label(NAMES))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OLDER))
    model = load_model(tmp_path)
    assert_same_logits(model, oracle)
    assert model.info.flops_per_image / 2e9 == pytest.approx(17.58, rel=0.01)
    assert model.info.classes == WNIDS


def test_both_names_of_the_same_tensors(tmp_path, small):
    """save_pretrained writes transformers 4's names, a state dict taken in transformers 5 has its own."""
    oracle = theirs()
    new = saved(oracle, tmp_path / "new", save_original_format=False)
    assert "vit.layers.0.mlp.fc1.bias" in load_file(new / WEIGHTS_FILE)
    assert "vit.encoder.layer.0.intermediate.dense.bias" in load_file(small / WEIGHTS_FILE)
    assert_same_logits(load_model(str(new)), oracle)
    torch.save(oracle.state_dict(), tmp_path / "state.pth")
    model = load_model(str(small), str(tmp_path / "state.pth"))
    assert_same_logits(model, oracle)
    assert model.info.weights == "state.pth"


def test_torch_file_where_there_is_no_safetensors(folder):
    torch.save(load_file(folder / WEIGHTS_FILE), folder / "pytorch_model.bin")
    (folder / WEIGHTS_FILE).unlink()
    assert_same_logits(load_model(str(folder)), theirs())


def test_half_precision_file_becomes_float32(tmp_path):
    oracle = theirs().half()
    model = load_model(str(saved(oracle, tmp_path)))
    assert_same_logits(model, oracle.float())


def test_random_weights_need_no_file_and_are_the_same_every_time(folder):
    (folder / WEIGHTS_FILE).unlink()
    first, second = (load_model(str(folder), "random").info for _ in range(2))
    assert first.weights_sha256 == second.weights_sha256


def test_unused_pooler_is_left_out_by_name(folder, capsys):
    state = load_file(folder / WEIGHTS_FILE)
    pooler = {"vit.pooler.dense.weight": torch.ones(32, 32), "vit.pooler.dense.bias": torch.ones(32)}
    save_file(state | pooler, folder / WEIGHTS_FILE)
    assert_same_logits(load_model(str(folder)), theirs())
    assert "vit.pooler.dense.weight, vit.pooler.dense.bias not used" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["vit.encoder.layer.1.attention.attention.key.bias", "classifier.weight"])
@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_wrong_keys_are_named_as_the_file_has_them(folder, key, fault):
    state = load_file(folder / WEIGHTS_FILE)
    if fault == "missing":
        state.pop(key)
    elif fault == "extra":
        state[f"{key}.more"] = torch.zeros(1)
    else:
        state[key] = torch.zeros(7)
    save_file(state, folder / WEIGHTS_FILE)
    words = {
        "missing": f'Missing key.*"{key}"',
        "extra": f'Unexpected key.*"{key}.more"',
        "misshapen": rf"size mismatch for {key}: .*\[7\]",
    }
    refused(words[fault], folder)


def test_weights_in_the_wrong_layout(folder, small, tmp_path):
    refused("Hugging Face's weights do not go into timm's module", "vit_shapes20", small / WEIGHTS_FILE)
    save_file(load_model(str(small)).module.state_dict(), tmp_path / "timm.safetensors")
    refused('timm.safetensors: .*Missing key.*"vit.embeddings.cls_token"', small, tmp_path / "timm.safetensors")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"architectures": ["ViTModel"]}, r"architectures \['ViTModel'\]"),
        ({"architectures": None}, "architectures None"),
        ({"hidden_act": "gelu_10"}, "hidden_act 'gelu_10'"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"num_channels": 1}, "num_channels 1"),
        ({"image_size": "32"}, "cannot be built"),
        ({"patch_size": 0}, "cannot be built"),
        ({"id2label": None, "num_labels": "five"}, "cannot be built"),
        ({"num_attention_heads": 5}, "cannot be built"),
        ({"hidden_size": "32"}, "cannot be built"),
        ({"layer_norm_eps": "small"}, "cannot be built"),
        ({"num_hidden_layers": 3}, 'Missing key.*"vit.encoder.layer.2.layernorm_before.weight"'),
        ({"id2label": {"0": "cat"}}, r"size mismatch for classifier.weight: .*\[5, 32\].*\[1, 32\]"),
    ],
)
def test_config_that_timm_cannot_express(folder, changes, named):
    edited(folder / "config.json", **changes)
    refused(named, folder)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"size": {"shortest_edge": 32}}, "size {'shortest_edge': 32} .*the shorter side with do_center_crop"),
        ({"size": {"longest_edge": 32}}, "size {'longest_edge': 32}"),
        ({"size": {"height": 32, "width": 64}}, r"size \(32, 64\) .*32 x 32"),
        ({"size": 224}, r"size \(224, 224\)"),
        ({"size": "32"}, "size '32'"),
        ({"resample": 6}, "resample 6"),
        ({"resample": [2]}, "resample"),
        ({"do_resize": False}, "do_resize False"),
        ({"do_pad": True}, "do_pad True"),
        ({"do_center_crop": True}, "crop_size 224 .*within 32 x 32"),
        ({"rescale_factor": 0}, "rescale_factor 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"image_mean": [0.5]}, r"image_mean \[0.5\]"),
        ({"image_std": "0.5"}, "image_std '0.5'"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"image_processor_type": "DetrImageProcessor"}, "image_processor_type 'DetrImageProcessor'"),
    ],
)
def test_preprocessing_that_is_not_vits(folder, changes, named):
    edited(folder / "preprocessor_config.json", **changes)
    refused(f"preprocessor_config.json: {named}", folder)


def test_older_name_of_the_processor_counts_too(folder):
    path = folder / "preprocessor_config.json"
    older = {"feature_extractor_type": "DetrFeatureExtractor", "size": 32}
    path.write_text(json.dumps(older))
    refused("image_processor_type 'DetrFeatureExtractor'", folder)
    path.write_text(json.dumps(older | {"feature_extractor_type": "ViTFeatureExtractor", "resample": None}))
    assert load_model(str(folder), "random").info.preprocessing.interpolation == "bilinear"


def test_preprocessing_must_be_there(folder):
    (folder / "preprocessor_config.json").unlink()
    refused(
        "preprocessor_config.json: not there; transformers writes it by `AutoImageProcessor.from_pretrained", folder
    )


@pytest.mark.parametrize(
    "processor",
    [
        *(OLDER, NEWER),
        NEWER | {"resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
        NEWER | {"size": {"height": 24, "width": 40}},
    ],
)
def test_preprocessing_is_that_of_transformers(tmp_path, processor):
    size = processor["size"] if isinstance(processor["size"], dict) else {"height": 224, "width": 224}
    saved(theirs(image_size=(size["height"], size["width"])), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    preprocessing, oracle = load_model(str(tmp_path)).info.preprocessing, ViTImageProcessorPil.from_pretrained(tmp_path)
    if processor in (OLDER, NEWER):
        half = (0.5, 0.5, 0.5)
        assert preprocessing == Preprocessing((3, 224, 224), 1.0, "squash", "bilinear", half, half)
    noise, jpeg = np.random.default_rng(0).integers(0, 256, (331, 257, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(noise).save(jpeg, "JPEG", quality=95)
    image, pixels = Image.open(jpeg).convert("RGB"), reference_crop(jpeg.getvalue(), preprocessing)
    resized = oracle(image, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values[0]
    assert resized.dtype == torch.uint8 and torch.equal(pixels, resized)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    normalised = oracle(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close((pixels.float() / 255 - mean) / std, normalised)


def id2label(labels) -> dict:
    return {"id2label": {str(index): label for index, label in enumerate(labels)}}


def test_imagenets_names_in_their_order_are_the_1000_classes(tmp_path):
    saved(theirs(num_labels=1000), tmp_path)
    edited(tmp_path / "config.json", **id2label(NAMES))
    assert load_model(str(tmp_path)).info.classes == WNIDS
    labels = list(NAMES)
    assert labels[134] == labels[517] == "crane"
    labels[517] = "crane2"  # as the hub's data set tells them apart
    labels[638], labels[639] = "Maillot", "tank suit"
    assert classes_of(id2label(label.split(",")[0] for label in labels)) == WNIDS


@pytest.mark.parametrize(
    "first, second", [(0, 1), (657, 744), (638, 639), (998, 999)], ids=["fish", "missiles", "maillots", "last"]
)
def test_two_names_in_the_wrong_order_are_not_imagenets(first, second):
    labels = list(NAMES)
    labels[first], labels[second] = labels[second], labels[first]
    assert classes_of(id2label(labels)) is None


@pytest.mark.parametrize(
    "labels",
    [
        [f"LABEL_{k}" for k in range(1000)],
        list(NAMES)[::-1],
        list(NAMES)[:999],
        ["cat", "cat"],
        [*WNIDS[:999], "n01440764"],
        [],
        [None, "cat"],
    ],
)
def test_other_labels_are_no_classes(labels):
    assert classes_of(id2label(labels)) is None


def test_words_are_classes_and_words_that_name_two_outputs_are_names_alone():
    assert labels_of({"0": "cat", "1": "dog"}) == (("cat", "dog"), ("cat", "dog"))
    assert labels_of({"0": "cat", "1": "cat"}) == (None, ("cat", "cat"))
    assert labels_of({"0": "LABEL_0", "1": "LABEL_1"}) == (None, None)
    assert labels_of(["a", "b"], {"b": "the second"}) == (("a", "b"), ("a", "the second"))


def test_labels_that_are_wnids_are_taken_by_their_numbers():
    wnids = [f"n9{k:07}" for k in range(12)]
    by_text = dict(sorted(id2label(wnids)["id2label"].items()))  # "10" before "2", as some files have them
    assert classes_of({"id2label": by_text}) == tuple(wnids)
    assert classes_of({"id2label": {"1": wnids[0], "2": wnids[1]}}) is None
    assert classes_of({}) is None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face hub on this machine: a folder whose ``owner/name/file`` it serves. The cache is empty."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            repo, _, name = self.path.strip("/").partition("/resolve/main/")
            path = root / repo / name
            known = path.is_file()
            self.send_response(200 if known else 404)
            if not known:
                self.send_header("X-Error-Code", "EntryNotFound" if (root / repo).is_dir() else "RepoNotFound")
            self.send_header("ETag", hashlib.sha1(path.read_bytes() if known else b"").hexdigest())
            every = b"".join(file.read_bytes() for file in sorted((root / repo).glob("*")))
            self.send_header("X-Repo-Commit", hashlib.sha1(every).hexdigest())
            self.send_header("Content-Length", str(path.stat().st_size if known else 0))
            self.end_headers()
            return path if known else None

        def do_GET(self):
            if path := self.do_HEAD():
                self.wfile.write(path.read_bytes())

        def log_message(self, *_):
            pass

    root = tmp_path / "hub"
    root.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants, address = weights_module.constants, f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield root
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("file", WEIGHTS_FILES)
def test_model_from_the_hub_then_from_its_cache(hub, small, monkeypatch, file):
    repository = shutil.copytree(small, hub / "google" / "vit-small")
    if file != WEIGHTS_FILE:
        torch.save(load_file(repository / WEIGHTS_FILE), repository / file)
        (repository / WEIGHTS_FILE).unlink()
    model = load_model("hf:google/vit-small")
    assert (model.info.tag, model.info.weights) == ("hf:google/vit-small", "pretrained")
    assert_same_logits(model, theirs())
    shutil.rmtree(repository)
    monkeypatch.setattr(weights_module.constants, "HF_HUB_OFFLINE", True)
    assert load_model("hf:google/vit-small").info == model.info


def test_newer_weights_on_the_hub_are_taken(hub, small):
    repository = shutil.copytree(small, hub / "google" / "vit-small")
    first = load_model("hf:google/vit-small").info
    state = load_file(repository / WEIGHTS_FILE)
    save_file({name: tensor * 2 for name, tensor in state.items()}, repository / WEIGHTS_FILE)
    assert load_model("hf:google/vit-small").info.weights_sha256 != first.weights_sha256


def test_timms_layout_from_the_hub(hub, vit_shapes20):
    shutil.copytree(data_path("shapes20/vit_shapes20"), hub / "owner" / "vit")
    info = load_model("hf:owner/vit").info
    assert info.weights_sha256 == vit_shapes20.info.weights_sha256 and info.classes == vit_shapes20.info.classes


def test_hub_without_the_repository_or_a_file(hub, small):
    refused("google/vit-bsae: the hub has no such repository", "hf:google/vit-bsae")
    shutil.copytree(small, hub / "google" / "vit-small")
    (hub / "google" / "vit-small" / "preprocessor_config.json").unlink()
    refused(
        "google/vit-small: has no preprocessor_config.json in it; check the name, or on a machine .* `hf download",
        "hf:google/vit-small",
    )
    (hub / "google" / "neither").mkdir()
    (hub / "google" / "neither" / "config.json").write_text('{"pipeline": "unknown"}')
    refused('config.json: has neither "architecture" and', "hf:google/neither")


@pytest.mark.parametrize("name", ["hf:", "hf:google/vit/small", "hf:../vit", "hf:google/vit small"])
def test_odd_names_of_repositories(hub, name):
    refused("is not the name of a hub repository", name)


def test_hub_that_does_not_answer(hub, monkeypatch):
    monkeypatch.setattr(weights_module.constants, "HF_HUB_OFFLINE", True)
    refused(
        "config.json is not in the Hugging Face cache .*hf download google/vit-base-patch16-224 --include",
        "hf:google/vit-base-patch16-224",
    )
