"""Does it convert? Families of timm and of Hugging Face in every engine: ``make families`` writes docs/families.*.

Random weights, configurations cut to about two layers: what is asked is whether the operations are there, not whether a
model is good. fp32 must pass ``verify`` at 1, 3 and 8 images at once; bf16 and int8 are built and their distance told.
What is in the table is not measured again: it may be stopped, and a row taken out of the csv is done anew.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import timm
import torch
from timm.data import resolve_data_config

from vitdemo import Model, Preprocessing, convert, describe_machine, find_engines, load_model, machine_record, verify
from vitdemo.errors import EngineFailure, VitdemoError, reason_of
from vitdemo.paths import REPOSITORY, replacing

IMAGES = (1, 3, 8)
TIMM = {
    "vit_base_patch16_224": dict(depth=2),
    "deit3_small_patch16_224": dict(depth=2),
    "beit_base_patch16_224": dict(depth=2),
    "vit_small_patch14_dinov2": dict(depth=2, img_size=224, num_classes=10),
    "eva02_tiny_patch14_224": dict(depth=2, num_classes=10),
    "cait_xxs24_224": dict(depth=2, depth_token_only=1),
    "xcit_nano_12_p16_224": dict(depth=2, cls_attn_layers=1),
    "swin_tiny_patch4_window7_224": dict(depths=(2, 1, 1, 1)),
    "swinv2_tiny_window8_256": dict(depths=(2, 1, 1, 1)),
    "convnext_tiny": dict(depths=(1, 1, 1, 1)),
    "maxvit_rmlp_pico_rw_256": {},
    "coat_lite_tiny": dict(serial_depths=(1, 1, 1, 1)),
}
HUGGING_FACE = {
    "Swinv2": dict(image_size=64, depths=[2, 1], num_heads=[2, 4], embed_dim=32, window_size=4),
    "Beit": dict(image_size=64, num_hidden_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=128),
    "ConvNext": dict(image_size=64, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 64]),
    "Dinov2": dict(image_size=56, num_hidden_layers=2, hidden_size=64, num_attention_heads=2),
    "Siglip": dict(vision_config=dict(image_size=64, num_hidden_layers=2, hidden_size=64, num_attention_heads=2)),
}
COMPILED = ("vit_base_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny", "Beit", "Dinov2")  # by Inductor
COLUMNS = ["family", "source", "engine", "precision", "result", "share_of_tolerance", "relative_l2", "why"]


def of_timm(name: str) -> Model:
    torch.manual_seed(0)
    module = timm.create_model(name, **TIMM[name])
    crop = resolve_data_config(pretrained_cfg=module.pretrained_cfg)
    if "img_size" in TIMM[name]:
        crop["input_size"] = (3, TIMM[name]["img_size"], TIMM[name]["img_size"])
    return Model.from_module(module, Preprocessing(**crop), name=name, weights="random")


def of_hugging_face(name: str) -> Model:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**HUGGING_FACE[name], num_labels=10)
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)
        side = HUGGING_FACE[name].get("image_size") or HUGGING_FACE[name]["vision_config"]["image_size"]
        size = {"height": side, "width": side}
        transformers.ViTImageProcessor(size=size).save_pretrained(folder)
        return load_model(folder)


def tried(model: Model, engine: str, precision: str) -> dict:
    """What became of one engine."""
    try:
        made = convert(model, engine, precision, device="cpu", force=False, **_calibration(model, precision))
        reports = [verify(made, model, images=images, progress=False) for images in IMAGES]
    except (VitdemoError, EngineFailure) as error:
        return {"result": "not built", "why": " ".join(reason_of(error).split())}
    finally:
        torch._dynamo.reset()
    shares = [(report.layers["relative_l2"] / report.layers["tolerance"]).max() for report in reports]
    failures = [failure for report in reports for failure in report.failures]
    row = {"relative_l2": max(report.overall["relative_l2"].max() for report in reports)}
    if precision != "fp32":
        return row | {"result": "runs", "why": failures[0] if failures else ""}
    return row | {
        "result": "fails" if failures else "passes",
        "share_of_tolerance": max(shares),
        "why": "; ".join(failures[:1]),
    }


def _calibration(model: Model, precision: str) -> dict:
    return {"calibration": model.info.random_pixels(32)} if precision == "int8" else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "families.csv")
    out = parser.parse_args().out
    out.parent.mkdir(exist_ok=True)
    rows = pd.read_csv(out, keep_default_na=False).to_dict("records") if out.exists() else []
    done = {(row["family"], row["engine"], row["precision"]) for row in rows}
    sources: dict[str, tuple[str, Callable[[str], Model]]] = dict.fromkeys(TIMM, ("timm", of_timm))
    sources |= dict.fromkeys(HUGGING_FACE, ("Hugging Face", of_hugging_face))
    for family, (source, build) in sources.items():
        wanted = [(engine, "fp32") for engine in find_engines() if engine in ("onnx", "openvino")]
        wanted += [("inductor", "bf16")] if family in COMPILED else []  # which has no fp32 on a CPU
        wanted += [(engine, "int8") for engine in find_engines() if engine in ("onnx", "openvino")]
        wanted = [pair for pair in wanted if (family, *pair) not in done]
        model = build(family) if wanted else None
        for engine, precision in wanted:
            row = dict(family=family, source=source, engine=engine, precision=precision)
            row |= tried(model, engine, precision)
            print(row, flush=True)
            rows.append(row)
            table = pd.DataFrame(rows, columns=COLUMNS)
            with replacing(out) as file:
                table.to_csv(file, index=False, float_format="%.2g")
            write_page(table, out.with_suffix(".md"))


def write_page(table: pd.DataFrame, path: Path) -> None:
    """The table for people, one row per family."""

    def cell(row: pd.Series) -> str:
        l2 = pd.to_numeric(row["relative_l2"])
        return row["result"] if pd.isna(l2) else f"{row['result']} {l2:.1g}"

    shown = table.assign(pair=table["engine"] + " " + table["precision"], cell=table.apply(cell, axis=1))
    wide = shown.pivot(index=["source", "family"], columns="pair", values="cell").fillna("").reset_index()
    reasons = [
        f"- {r.family}, {r.engine} {r.precision}: {r.why}"
        for r in table.itertuples()
        if isinstance(r.why, str) and r.why
    ]
    lines = [
        "# Does it convert?",
        "",
        f"Written by `make families` on: {describe_machine(machine_record())}. Random weights, cut to about two "
        "layers. fp32 `passes` where `verify` passes with 1, 3 and 8 images at once; the number is the largest "
        "relative L2 distance of the logits from eager fp32's. bf16 and int8 `run` where they can be built. The "
        "ranges of int8 come from random pixels, and all weights are random, so this says nothing about accuracy: run "
        "`verify` on your model. A blank cell was not tried: Inductor, in bf16 on a CPU, was tried for five families.",
        "",
        wide.to_markdown(index=False),
        "",
        "Where `verify` did not pass, or an engine was not built (with random weights):",
        "",
        *reasons,
    ]
    with replacing(path) as file:
        file.write("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
