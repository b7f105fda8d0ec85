"""Train vit_shapes20, the course's small ViT, from scratch: ``python -m data.shapes20.make.train``.

Draws the training pictures (stream "train"), trains on all but the last HELD_OUT of them, and scores the bundled
set once, at the end, with timm's own evaluation transform. The seeds are fixed; another machine or another
version of torch still rounds differently, so a repeat gives a model as good, not the same bytes.

On two cores that do other work too, set OMP_WAIT_POLICY=PASSIVE: otherwise torch's threads spin while they wait
for each other, and training falls to a tenth of its speed.
"""

import argparse
import io
import json
import math
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import PatchDropout, build_sincos2d_pos_embed
from tqdm import tqdm

from data.shapes20.make.classes import CLASSES
from data.shapes20.make.scenes import SEED, TRAIN_PICTURES, bundled_labels, drawing_pool, picture
from vitdemo.errors import VitdemoError
from vitdemo.evaluation.metrics import wilson_interval
from vitdemo.paths import data_path, replacing

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"embed_dim": 128, "depth": 6, "num_heads": 4}
DRAWN_SIDE = 240  # pixels; the model sees 224, and the crop needs room to move
HELD_OUT = 1000
BATCH = 32
PEAK_LR = 1e-3
PATCHES_DROPPED = 0.5  # but none in the last epoch


def _drawn(index: int) -> np.ndarray:
    return np.asarray(picture("train", index, (DRAWN_SIDE, DRAWN_SIDE)))


def draw_pictures(count: int, folder: Path) -> np.ndarray:
    """The first ``count`` training pictures, uint8[count, 240, 240, 3], drawn by all cores, kept in ``folder``."""
    shape = (count, DRAWN_SIDE, DRAWN_SIDE, 3)
    pictures = np.lib.format.open_memmap(folder / "train.npy", "w+", np.uint8, shape)
    with drawing_pool() as pool:
        for index, pixels in enumerate(tqdm(pool.imap(_drawn, range(count), 64), "drawing", count, unit="img")):
            pictures[index] = pixels
    return pictures


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """uint8[B, 240, 240, 3] to float32[B, 3, 224, 224] in -1..1: a random crop, turn, mirror, light and contrast."""

    def uniform(low, high):
        return torch.empty(len(pixels)).uniform_(low, high, generator=generator)

    zoom, aspect, turn = uniform(0.8, 1.0), uniform(0.9, 1.1), uniform(-0.15, 0.15)
    mirror = uniform(-1, 1).sign()
    room = 1.02 - zoom
    across = [mirror * zoom * aspect * turn.cos(), -zoom * turn.sin(), uniform(-1, 1) * room]
    down = [mirror * zoom * turn.sin(), zoom / aspect * turn.cos(), uniform(-1, 1) * room]
    affine = torch.stack([torch.stack(across, 1), torch.stack(down, 1)], 1)
    grid = F.affine_grid(affine, (len(pixels), 3, 224, 224), align_corners=False)
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return images * uniform(0.8, 1.2).view(-1, 1, 1, 1) + uniform(-0.15, 0.15).view(-1, 1, 1, 1)


def new_model() -> torch.nn.Module:
    """The untrained network, float32, made ready for a short training."""
    model = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=len(CLASSES), **MODEL_ARGS)
    # Positions start as sines and cosines: neighbours look alike from the first step on.
    waves = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim)
    model.pos_embed.data[:, 1:] = 0.3 * waves
    # A step on a random half of the patches takes about half the time, so twice as many fit in.
    model.patch_drop = PatchDropout(PATCHES_DROPPED)
    # On CPUs the backward pass of torch's fused attention takes as long as everything else together.
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def train(pictures: np.ndarray, epochs: int) -> torch.nn.Module:
    """Train a new model on uint8[N, 240, 240, 3], all but the last HELD_OUT; those are scored after every epoch."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.arange(len(pictures)) % len(CLASSES)
    count = len(pictures) - HELD_OUT
    steps = count // BATCH
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, epochs * steps, pct_start=0.15)
    smooth_loss = math.log(len(CLASSES))
    for epoch in range(epochs):
        model.train()
        if epoch == epochs - 1:
            model.patch_drop.prob = 0.0
        # The remainder of each shuffled epoch is left out; the next epoch shuffles anew.
        order = torch.randperm(count, generator=generator)[: steps * BATCH].view(steps, BATCH)
        progress = tqdm(order, f"epoch {epoch + 1}/{epochs}", unit_scale=BATCH, unit="img")
        for chosen in progress:
            images = augment(torch.from_numpy(pictures[chosen.numpy()]), generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            smooth_loss += 0.02 * (loss.item() - smooth_loss)
            progress.set_postfix(loss=f"{smooth_loss:.3f}")
        held_out = (Image.fromarray(pixels) for pixels in pictures[count:])
        correct = count_correct(model, held_out, labels[count:])
        print(f"held out after epoch {epoch + 1}: {correct}/{HELD_OUT} = {correct / HELD_OUT:.1%}", flush=True)
    return model


def pretrained_cfg() -> dict:
    """How to feed the model and what its outputs mean, in timm's terms."""
    return {
        "tag": "vit_shapes20",
        "input_size": [3, 224, 224], "fixed_input_size": True,
        "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
        "num_classes": len(CLASSES), "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head",
        "label_names": [leaf.wnid for leaf in CLASSES],
        "label_descriptions": {leaf.wnid: leaf.words for leaf in CLASSES},
        "license": "apache-2.0",
    }  # fmt: skip


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (float16) into an existing folder, for timm's ``local-dir:``."""
    config = {"architecture": ARCHITECTURE, "num_classes": len(CLASSES), "num_features": model.num_features,
              "global_pool": "token", "model_args": MODEL_ARGS, "pretrained_cfg": pretrained_cfg()}  # fmt: skip
    with replacing(folder / "config.json") as file:
        file.write(json.dumps(config, indent=2) + "\n")
    half = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / "model.safetensors", "wb") as file:
        file.write(safetensors.torch.save(half, metadata={"format": "pt"}))


@torch.inference_mode()
def count_correct(model: torch.nn.Module, images, labels) -> int:
    """How many PIL images the model names right, in fp32, through timm's evaluation transform."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg()))
    model.eval()
    return sum(int(model(transform(image.convert("RGB"))[None]).argmax()) == int(label)
               for image, label in zip(images, labels, strict=True))  # fmt: skip


def bundled_pictures(archive: Path):
    """The 1,000 bundled pictures as PIL images, in ascending file-name order."""
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            yield Image.open(io.BytesIO(tar.extractfile(member).read()))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data.shapes20.make.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("vit_shapes20"), help="folder for the model")
    parser.add_argument("--pictures", type=int, default=TRAIN_PICTURES, help="pictures to draw (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="times each one is seen (default %(default)s)")
    options = parser.parse_args()
    if options.pictures < HELD_OUT + BATCH or options.epochs < 1:
        parser.error(f"--pictures must be at least {HELD_OUT + BATCH} and --epochs at least 1")
    try:
        archive = data_path("shapes20/shapes20_img_val.tar")
        options.out.mkdir(parents=True, exist_ok=True)
    except VitdemoError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--out {options.out}: cannot create this folder ({error.strerror})")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        pictures = draw_pictures(options.pictures, Path(scratch))
        drawn = time.perf_counter()
        model = train(pictures, options.epochs)
        trained = time.perf_counter()
    save(model, options.out)
    stored = timm.create_model(f"local-dir:{options.out}", pretrained=True)
    correct, total = count_correct(stored, bundled_pictures(archive), bundled_labels()), len(bundled_labels())
    low, high = wilson_interval(correct, total)
    print(f"drawing {drawn - start:.0f} s, training {trained - drawn:.0f} s")
    print(f"bundled top-1: {correct}/{total} = {correct / total:.1%} (95 % interval {low:.1%} to {high:.1%})")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; no model was written") from None
