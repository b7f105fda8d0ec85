"""predict and choose from the shell, and the options that say how images, labels and weights are read; evaluate, torch
and PIL say what is right."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from PIL import Image

from tests.dataset.conftest import largest_file, tar_bytes
from tests.own.test_checkpoints import saved
from tests.own.test_images import picture, write
from vitdemo import convert, evaluate, load_model, open_data, reference_crop
from vitdemo.cli import main
from vitdemo.engines.eager import EagerEngine
from vitdemo.stats import spread

pytestmark = pytest.mark.own
CHOSEN = [*range(0, 1000, 60), 16, 376, 612, 741, 999]  # a grey, a CMYK, a tiny and a turned one among them
DAMAGED = "damaged.jpg"


@pytest.fixture(scope="module")
def called(vit_shapes20) -> list[str]:
    return [name.split(",")[0] for name in vit_shapes20.info.class_names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shapes20, called) -> Path:
    """A few of the bundled images in folders of their classes' words, which is not to be changed."""
    files = {f"{called[shapes20[i].label]}/{shapes20[i].file}": shapes20[i].image for i in CHOSEN}
    return write(tmp_path_factory.mktemp("verbs") / "set", files)


def in_torch(module: torch.nn.Module, preprocessing, images: list[bytes]) -> list[int]:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    crops = torch.stack([reference_crop(image, preprocessing) for image in images])
    with torch.no_grad():
        return module((crops / 255 - mean) / std).argmax(1).tolist()


def test_predict_gives_the_answers_of_evaluate(tmp_path, monkeypatch, capsys, folder, eager, vit_shapes20, called):
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.JPEG")}
    write(tmp_path / "set", files | {f"{called[0]}/{DAMAGED}": b"no image"})
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "vit_shapes20", "set", "--top", "5", "--out", "answers.csv"]) == 0
    printed, told = capsys.readouterr()
    table = pd.read_csv("answers.csv").fillna({"error": ""})
    said = evaluate(eager, open_data("set"), progress=False).rows
    assert [os.path.relpath(file, "set") for file in table["file"]] == said["file"].tolist() and len(table) == 23
    for name in (*(f"{what}_{k}" for what in ("predicted", "probability") for k in range(1, 6)), "error"):
        assert table[name].dropna().astype(said[name].dtype).tolist() == said[name].dropna().tolist()
    read, unread = table[table["error"] == ""], table[table["error"] != ""]
    assert read["predicted_1"].astype(int).tolist() == in_torch(
        vit_shapes20.module, vit_shapes20.info.preprocessing, [Path(file).read_bytes() for file in read["file"]]
    )
    for k in range(1, 6):
        assert read[f"class_{k}"].tolist() == [called[int(output)] for output in read[f"predicted_{k}"]]
    assert [Path(file).name for file in unread["file"]] == [DAMAGED] and unread["class_1"].isna().all()
    turned = sum(Image.open(Path(file)).getexif().get(0x112, 1) != 1 for file in read["file"])
    assert f"{turned} of them carry an EXIF orientation" in told and turned and "23 images, 1 unread" in told
    lines = [line.split("\t") for line in printed.splitlines()]
    assert [line[0] for line in lines] == table["file"].tolist() and {len(line) for line in lines} == {6, 2}


def test_predict_takes_patterns_and_tars_and_lists_as_many_classes_as_asked(tmp_path, capsys):
    model, _ = saved(tmp_path / "model", label_names=["a", "b", "c", "d"])
    one = write(tmp_path, {"a/0.png": picture(0, "PNG")}) / "a/0.png"
    (tmp_path / "x.tar").write_bytes(tar_bytes({"a/0.png": one.read_bytes()}))
    for k, (given, top) in enumerate([(one, 3), (one.with_name("*.png"), 2), (tmp_path / "x.tar", 1)]):
        out, options = tmp_path / f"{k}.csv", ["--top", str(top)] if top < 3 else []
        assert main(["predict", str(model), str(given), *options, "--out", str(out)]) == 0
        line, table = capsys.readouterr().out.split("\t"), pd.read_csv(out)
        classes = [f"{table[f'class_{i}'][0]} {table[f'probability_{i}'][0]:.1%}" for i in range(1, top + 1)]
        assert f"class_{top + 1}" not in table and line == [table["file"][0], *classes[:-1], f"{classes[-1]}\n"]
        assert table["file"].tolist() == ["a/0.png" if top == 1 else os.path.relpath(one)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["set", "--out", "mine.csv"], "mine.csv: give the name of a new file"),
        (["set", "--out", "answers.txt"], "answers.txt: give the name of a new file that ends in .csv"),
        (["set", "--out", "nowhere/answers.csv"], "in a folder that is there"),
        (["set", "--out", "answers.csv", "--top", "6"], "top 6: must be a whole number from 1 to 5"),
        (["absent", "--out", "answers.csv"], "absent: no such file or folder"),
        (["set", "--out", "answers.csv"], "none of 2 images can be read"),
    ],
)
def test_predict_refuses_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    write(tmp_path, {"set/0.jpg": b"no image", "set/1.png": b"none", "mine.csv": "mine"})
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "vit_shapes20", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("vitdemo: ") and error.count("\n") == 1
    assert sorted(os.listdir()) == ["mine.csv", "set"] and Path("mine.csv").read_text() == "mine"


@pytest.mark.parametrize("fault", ["device lost", signal.SIGINT, signal.SIGTERM, "full disk"])
def test_predict_that_is_broken_off_leaves_nothing(tmp_path, monkeypatch, capsys, fault):
    model, _ = saved(tmp_path / "model")
    write(tmp_path / "set", {f"{k}.jpg": picture(k) for k in range(20)})
    infer, calls = EagerEngine._infer, []

    def breaks(self, x):
        calls.append(x)
        if len(calls) == 2 and fault == "device lost":
            raise RuntimeError(fault)
        if len(calls) == 2 and isinstance(fault, signal.Signals):
            os.kill(os.getpid(), fault)
        return infer(self, x)

    monkeypatch.setattr(EagerEngine, "_infer", breaks)
    with largest_file(100 if fault == "full disk" else 1 << 40):
        code = main(["predict", str(model), str(tmp_path / "set"), "--out", str(tmp_path / "answers.csv")])
    assert code == {"device lost": 1, "full disk": 2}.get(fault, 130) and len(calls) >= 2
    said = capsys.readouterr().err.splitlines()
    assert sorted(os.listdir(tmp_path)) == ["model", "set"] and said[-1].startswith("vitdemo: ")
    assert "Traceback" not in str(said)


def test_choose_refuses_at_once_what_no_script_can_prepare(tmp_path, capsys, folder, called):
    module = timm.create_model("test_vit.r160_in1k", img_size=(64, 96), num_classes=20)
    said = dict(model_config=dict(label_names=called), data_config=dict(input_size=(3, 64, 96)))
    timm.models.save_for_hf(module, tmp_path / "model", safe_serialization=True, **said)
    command = ["choose", str(tmp_path / "model"), "--data", str(folder), "--out", str(tmp_path / "out")]
    assert main(command) == 2 and not (tmp_path / "out").exists()
    assert "model: a script needs square input; vitdemo benchmark measures" in capsys.readouterr().err


def test_an_evaluation_that_reads_no_image_fails(tmp_path, capsys, called):
    data = write(tmp_path / "set", {f"{called[0]}/{k}.jpg": b"no image" for k in range(2)})
    assert main(["evaluate", "vit_shapes20", "--data", str(data), "--out", str(tmp_path / "out")]) == 1
    assert "none of the images can be read" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "out/predictions.csv")) == 2


def test_a_table_and_a_class_map_from_a_shell(tmp_path, capsys, shapes20, eager):
    some = [shapes20[i] for i in CHOSEN]
    write(tmp_path, {f"flat/{sample.file}": sample.image for sample in some})
    write(tmp_path, {"labels.csv": "\n".join(["image,kind", *(f"{s.file},kind {s.label:02d}" for s in some)])})
    rows = [f"kind {k:02d},{k if k % 2 else class_id}" for k, class_id in enumerate(shapes20.classes)]
    write(tmp_path, {"map.csv": "\n".join(["class,output", *rows])})
    how = ["--data", str(tmp_path / "flat"), "--labels", str(tmp_path / "labels.csv")]
    command = ["evaluate", "vit_shapes20", *how, "--out", str(tmp_path / "out")]
    assert main(command) == 2 and "is its class 'kind 00'" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert main([*command, "--class-map", str(tmp_path / "map.csv")]) == 0
    decided = json.loads((tmp_path / "out/run.json").read_text())["settings"]["classes_decided"]
    assert decided.startswith("by the file map.csv") and f"matched {decided}" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out/predictions.csv")
    expected = evaluate(eager, shapes20.take(sorted(CHOSEN)), progress=False).rows
    for name in ("file", "label", "predicted_1", "correct"):
        assert table[name].tolist() == expected[name].tolist()


def test_choose_passes_over_what_fails_verify_and_exports_what_classifies(tmp_path, capfd):
    """int8 is calibrated on a quarter of the images. Where these are black it gives nonsense, and quickly."""
    model, _ = saved(tmp_path / "model", label_names=["a", "b", "c", "d"])
    Image.new("RGB", (224, 224)).save(black := io.BytesIO(), "PNG")
    names, quarter = sorted(f"kind {k % 4}/{k:02d}.png" for k in range(20)), {*spread(20, 5)}
    images = {name: black.getvalue() if k in quarter else picture(k, "PNG") for k, name in enumerate(names)}
    write(tmp_path / "set", images)
    write(tmp_path, {"map.csv": "".join(f"kind {k},{'dcba'[k]}\n" for k in range(4))})
    command = ["choose", str(model), "--data", str(tmp_path / "set"), "--class-map", str(tmp_path / "map.csv")]
    command += ["--engines", "openvino:int8", "--device-batch-sizes", "1"]
    command += ["--row-budget-s", "1", "--latency-ms", "60000", "--largest-loss", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    printed, told = capfd.readouterr()
    assert "not taken: openvino int8 fails verify" in told and "passed\nchosen: eager fp32, batch 1" in printed
    scored = open_data(tmp_path / "set").take([k for k in range(20) if k not in quarter])
    run = evaluate(convert(load_model(model)), scored, class_map=tmp_path / "map.csv", progress=False)
    (sweep,) = (tmp_path / "out/sweeps").glob("perf_*.csv")
    rows = pd.read_csv(sweep).set_index("engine")
    assert {*rows.index} == {"eager", "openvino"} and rows["top1"]["eager"] == pytest.approx(run.metrics["top1"])
    images = [str(tmp_path / "set" / file) for file in run.rows["file"]]
    script = [sys.executable, "-I", str(tmp_path / "out/choice/classify.py"), *images]
    lines = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    answered = [line.split("\t")[1].partition("% ")[2] for line in lines]
    assert (
        answered == ["abcd"[k] for k in run.rows["predicted_1"]]
        and f"use it, one image at a time: python {script[2]}" in printed
    )
