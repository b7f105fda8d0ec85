"""What people bring as images and labels, one id per row; torchvision, timm and pandas say what is right."""

import copy
import gzip
import io
import json
import pickle
import tarfile
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from timm.data import ImageNetInfo, create_dataset, create_transform
from torchvision.datasets import ImageFolder

from tests.dataset.conftest import refused, tar_bytes, tiny_jpeg, write_devkit
from vitdemo import (
    Model,
    Preprocessing,
    answers,
    check_images,
    convert,
    evaluate,
    match_classes,
    open_data,
    open_images,
    reference_crop,
)
from vitdemo.dataset.dataset import Dataset, open_again
from vitdemo.dataset.decoding import UnreadableImage, is_rotated, upright
from vitdemo.dataset.tars import TARS
from vitdemo.engines.artifacts import clear_cache
from vitdemo.models.classes import short_names
from vitdemo.paths import cache_root
from vitdemo.plots import plot_gallery
from vitdemo.plots.dataset import shortened

pytestmark = pytest.mark.own
WNIDS = ["n01440764", "n01443537", "n01751748"]
HALF = ((0.5,) * 3, (0.5,) * 3)


def picture(number: int, kind: str = "JPEG") -> bytes:
    """A small image of its own."""
    content = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(content, kind)
    return content.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def found(data: Dataset) -> dict[str, str]:
    """File -> class; the bytes of every image can be had."""
    assert all(sample.image for sample in data) and [*data.files] == sorted(data.files)
    return {sample.file: sample.class_id for sample in data}


KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "jfif": "JPEG"}
WORDS = {
    f"{name}/{k}.{suffix}": picture(10 * i + k, kind)
    for i, name in enumerate(["cat", "big dog"])
    for k, (suffix, kind) in enumerate(KINDS.items())
}
FLAT = {f"ILSVRC2012_val_{k:08d}.JPEG": tiny_jpeg(k) for k in range(1, 5)}
TRUTH = [WNIDS[k % 3] for k in range(1, 5)]


@pytest.mark.parametrize("where", ["", "val/", "validation/", "test/"])
def test_a_folder_per_class_in_words(tmp_path, capsys, where):
    write(tmp_path / where, WORDS)
    data, oracle = open_data(tmp_path), ImageFolder(tmp_path / where)
    assert data.classes == oracle.classes == ["big dog", "cat"]
    theirs = {str(Path(path).relative_to(tmp_path / where)): label for path, label in oracle.samples}
    ours = dict(zip(data.files, data.labels, strict=True))
    assert {name: ours[name] for name in theirs} == theirs  # torchvision passes over .jfif
    assert found(data) == {name: name.partition("/")[0] for name in WORDS}
    assert (f"{where} is read" in capsys.readouterr().err) == bool(where)
    timms = create_dataset("", root=tmp_path / where)
    assert {**timms.reader.class_to_idx} == {name: k for k, name in enumerate(data.classes)}


def test_top_1_is_the_same_by_everyones_reading(tmp_path, shapes20, vit_shapes20, eager):
    """torchvision and timm read the folder, whose classes are in another order than the model's, and make pixels."""
    names = [name.split(",")[0] for name in vit_shapes20.info.class_names]
    write(tmp_path, {f"{names[shapes20[i].label]}/{i}.jpg": shapes20[i].image for i in range(0, 1000, 50)})
    p = vit_shapes20.info.preprocessing
    config = dict(input_size=p.input_size, interpolation=p.interpolation, mean=p.mean, std=p.std)
    transform = create_transform(**config, crop_pct=p.crop_pct, crop_mode=p.crop_mode)
    torchvisions, timms = ImageFolder(tmp_path, transform), create_dataset("", root=tmp_path, transform=transform)
    pixels, labels = zip(*torchvisions, strict=True)
    by_timm = dict(zip(timms.filenames(absolute=True), timms, strict=True))
    assert all(torch.equal(by_timm[path][0], own) for (path, _), own in zip(torchvisions.samples, pixels, strict=True))
    assert [by_timm[path][1] for path, _ in torchvisions.samples] == [*labels]
    found = vit_shapes20.module(torch.stack(pixels)).argmax(1).tolist()
    labels = [names.index(torchvisions.classes[label]) for label in labels]
    rows = evaluate(eager, open_data(tmp_path), progress=False).rows.set_index("file")
    rows = rows.loc[[str(Path(path).relative_to(tmp_path)) for path, _ in torchvisions.samples]]
    assert rows["label"].tolist() == labels and rows["predicted_1"].tolist() == found
    assert rows["correct"].sum() == np.equal(labels, found).sum() > 14


def test_train_by_split_and_the_first_folder_that_is_there(tmp_path):
    for split in ("train", "validation", "test"):
        write(tmp_path / split, {f"{split}ed/{name}": content for name, content in list(WORDS.items())[:1]})
    assert open_data(tmp_path, split="train").classes == ["trained"]
    assert open_data(tmp_path).classes == ["validationed"]
    (tmp_path / "only" / "train" / "cat").mkdir(parents=True)
    write(tmp_path / "only/train/cat", {"0.jpg": picture(0)})
    with pytest.raises(Exception, match="train"):
        open_data(tmp_path / "only")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("wrapper", ["", "set/val/"])
def test_a_tar_of_folders(tmp_path, monkeypatch, compressed, wrapper):
    monkeypatch.setenv("VITDEMO_CACHE", str(tmp_path / "cache"))  # cleared below: not the one that all tests share
    content = tar_bytes({wrapper + name: image for name, image in WORDS.items()})
    tar = tmp_path / ("x.tar.gz" if compressed else "x.tar")
    tar.write_bytes(gzip.compress(content) if compressed else content)
    data = open_data(tar)
    assert found(data) == {name: name.partition("/")[0] for name in WORDS} and data.path == tar
    assert data.fingerprint == open_data(write(tmp_path / "folder", WORDS)).fingerprint
    if compressed:
        clear_cache()
        assert not list((cache_root() / TARS).glob("*")) and all(s.image for s in data)
    tar.with_name("cut.tar.gz").write_bytes(gzip.compress(content)[:-200])
    with refused("cut.tar.gz", "get the archive again"):
        open_data(tar.with_name("cut.tar.gz"))


def test_numbers_as_folders(tmp_path, vit_shapes20):
    write(tmp_path, {f"{k}/0.jpg": picture(k) for k in range(20)})
    data = open_data(tmp_path)
    with refused("'0'", "--class-map numbers"):
        match_classes(vit_shapes20.info, data)
    assert match_classes(vit_shapes20.info, data, "natural").labels == [int(name.split("/")[0]) for name in data.files]
    assert match_classes(vit_shapes20.info, data, "numbers").labels == [int(name.split("/")[0]) for name in data.files]
    by_text = match_classes(vit_shapes20.info, data, "sorted")
    assert by_text.labels == data.labels and by_text.decided == "by order, the folders as text"


@pytest.mark.parametrize("path", ["ILSVRC/Data/CLS-LOC/val", ""])
def test_imagenet_from_kaggle(tmp_path, path):
    write(tmp_path / "ILSVRC/Data/CLS-LOC/val", FLAT)
    rows = [
        f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for name, wnid in zip(FLAT, TRUTH, strict=True)
    ]
    write(tmp_path, {"LOC_val_solution.csv": "\n".join(["ImageId,PredictionString", *reversed(rows)])})
    data = open_data(tmp_path / path)
    assert found(data) == dict(zip(FLAT, TRUTH, strict=True)) and len(data.classes) == 1000


def test_imagenet_from_the_hub_by_the_names_ends(tmp_path):
    files = {
        name.replace(".JPEG", f"_{wnid}.JPEG"): image for (name, image), wnid in zip(FLAT.items(), TRUTH, strict=True)
    }
    (tmp_path / "val_images.tar.gz").write_bytes(gzip.compress(tar_bytes(files)))
    data = open_data(tmp_path / "val_images.tar.gz")
    assert [*found(data).values()] == TRUTH and data.labels == [1, 65, 0, 1] and len(data.classes) == 1000


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("beside", ["", ".."])
def test_a_flat_folder_and_the_devkit(tmp_path, unpacked, beside):
    folder = write(tmp_path / "val", FLAT)
    ids = {"n90000001": 4, "n90000002": 2, "n90000003": 3, "n90000004": 1}
    devkit = write_devkit(folder / beside / "ILSVRC2012_devkit_t12.tar.gz", ids, [3, 1, 4, 1])
    if unpacked:
        with tarfile.open(devkit) as tar:
            tar.extractall(folder / beside, filter="data")
        devkit.unlink()
    data = open_data(folder)
    assert [*found(data).values()] == ["n90000003", "n90000004", "n90000001", "n90000004"]
    (folder / "ILSVRC2012_val_00000004.JPEG").unlink()
    with refused("3 images", "4 lines"):
        open_data(folder)


def parquet(path: Path, rows: list[dict], names: list[str] | None = None, **options) -> Path:
    """As the hub has it."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.Table.from_pylist(rows, pa.schema([("image", image), ("label", pa.int64())]))
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=3, **options)
    return path


def rows_of(count: int, paths: Callable[[int], str | None]) -> list[dict]:
    return [{"image": {"bytes": picture(k), "path": paths(k)}, "label": k % 2} for k in range(count)]


@pytest.mark.parametrize("paths", ["own", "none", "equal"])
def test_parquet_files_of_the_hub(tmp_path, paths):
    name = {"own": lambda k: f"p{k:02d}.jpg", "none": lambda k: None, "equal": lambda k: "image.jpg"}[paths]
    rows = rows_of(10, name)
    parquet(tmp_path / "data/validation-00000-of-00002.parquet", rows[:7], ["cat", "dog"])
    parquet(tmp_path / "data/validation-00001-of-00002.parquet", rows[7:], ["cat", "dog"])
    parquet(tmp_path / "data/train-00000-of-00001.parquet", rows[:1], ["cat", "dog"])
    data = open_data(tmp_path)
    assert [sample.image for sample in data] == [row["image"]["bytes"] for row in rows]
    assert [sample.class_id for sample in data] == ["cat", "dog"] * 5 and data.classes == ["cat", "dog"]
    assert len(set(data.files)) == 10 and (data.files[3] == "p03.jpg") == (paths == "own")
    assert [s.image for s in pickle.loads(pickle.dumps(data))] == [s.image for s in data]
    assert len(open_data(tmp_path, split="train")) == 1
    for file in (tmp_path / "data").glob("val*"):
        file.rename(file.with_name(file.name.replace("validation", "held-out")))
    assert len(open_data(tmp_path)) == 10, "the training images are none of them"
    with refused("holds no image, but cats/test-0.parquet; give its folder"):
        open_data(write(tmp_path / "above", {"cats/test-0.parquet": b"x"}))


def test_shuffled_rows_of_parquet_are_read_group_by_group(tmp_path, monkeypatch):
    rows, groups = rows_of(30, lambda k: f"p{k * 7 % 30:02d}.jpg"), []
    data = open_data(parquet(tmp_path / "a.parquet", rows))
    file = pytest.importorskip("pyarrow.parquet").ParquetFile
    read = file.read_row_group
    monkeypatch.setattr(file, "read_row_group", lambda *how, **more: groups.append(how[1]) or read(*how, **more))
    assert [s.image for s in data] == [row["image"]["bytes"] for row in rows]
    assert data.files == [row["image"]["path"] for row in rows] and groups == [*range(10)]


def test_columns_of_labels_in_parquet(tmp_path, capsys):
    images = [{"bytes": picture(k)} for k in range(3)]
    frame = pd.DataFrame({"image": images, "species": pd.Categorical(["cat", "dog", "cat"])}, index=list("abc"))
    pytest.importorskip("pyarrow")
    frame.to_parquet(tmp_path / "a.parquet")
    assert [s.class_id for s in open_data(tmp_path / "a.parquet")] == ["cat", "dog", "cat"]
    frame.assign(owner="me").to_parquet(tmp_path / "b.parquet")
    assert set(open_data(tmp_path / "b.parquet").labels) == {-1}
    assert "no labels, as species, owner might all be; call the column label" in capsys.readouterr().err


def test_parquet_files_that_are_damaged_or_something_else(tmp_path):
    whole = parquet(tmp_path / "a.parquet", rows_of(5, str))
    assert open_data(whole).classes == ["0", "1"]
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-50])
    with refused("cut.parquet", "get it again"):
        open_data(tmp_path / "cut.parquet")
    pd.DataFrame({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "text.parquet")
    with refused("text.parquet", "no column holds images"):
        open_data(tmp_path / "text.parquet")
    hidden = parquet(tmp_path / "test.parquet", [row | {"label": -1} for row in rows_of(5, str)], ["cat", "dog"])
    assert len(open_images([hidden])) == 5 and set(open_data(hidden).labels) == {-1}


def test_labels_of_images_that_are_only_to_be_classified_do_no_harm(tmp_path, eager):
    hidden = parquet(tmp_path / "test.parquet", [row | {"label": -1} for row in rows_of(3, str)], ["cat", "dog"])
    rows = [row | {"label": 40 + row["label"]} for row in rows_of(3, str)]
    many = parquet(tmp_path / "many.parquet", rows, [f"class {k}" for k in range(50)])
    for path in (hidden, many):
        assert answers(eager, open_images([path]), progress=False)["error"].eq("").all()
    assert "?" in [text.get_text() for text in plot_gallery(open_images([hidden]), [0]).findobj(Text)]
    report = check_images(open_images([hidden]))
    assert report.rows["class_id"].eq("").all() and report.rows["bytes"].gt(0).all() and report.damaged.empty


def test_a_column_of_paths_beside_the_images_in_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"image": [picture(k) for k in range(3)], "path": list("abc"), "label": [0, 1, 0]})
    frame.to_parquet(tmp_path / "a.parquet")
    assert [s.class_id for s in open_data(tmp_path / "a.parquet")] == ["0", "1", "0"]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("path", ["images", ""])
def test_an_imagefolder_of_hugging_face(tmp_path, name, path):
    rows = [
        {"file_name": file, "label": label} for file, label in [("a.jpg", "cat"), ("b.png", "dog"), ("c.jpg", "cat")]
    ]
    csv_lines = ["file_name,label", *(f"{row['file_name']},{row['label']}" for row in rows)]
    lines = [json.dumps(row) for row in rows] if name.endswith("l") else csv_lines
    write(
        tmp_path / "images",
        {"a.jpg": picture(0), "b.png": picture(1, "PNG"), "c.jpg": picture(2), name: "\n".join(lines)},
    )
    ours = {Path(file).name: label for file, label in found(open_data(tmp_path / path)).items()}
    assert ours == {row["file_name"]: row["label"] for row in rows}


@pytest.mark.parametrize(
    "table",
    [
        ",file,label\n0,1.jpg,cat\n1,2.jpg,dog\n2,0.jpg,cat\n",  # pandas' index names images too, without suffix
        "label,file\n2,0.jpg\n0,1.jpg\n1,2.jpg\n",
        '[{"id": 0, "file": "1.jpg", "label": "cat"}, {"id": 1, "file": "2.jpg", "label": "dog"}]',
    ],
)
def test_numbers_in_a_table_are_not_the_files(tmp_path, table):
    write(tmp_path / "set", {f"{k}.jpg": picture(k) for k in range(3)})
    file = "labels.json" if table.startswith("[") else "labels.csv"
    write(tmp_path, {file: table})
    read = pd.read_json(tmp_path / file) if file.endswith("n") else pd.read_csv(tmp_path / file)
    data = open_data(tmp_path / "set", labels=tmp_path / file)
    assert found(data) == dict(zip(read["file"], read["label"].astype(str), strict=True))


def test_a_table_in_which_two_columns_may_be_the_files(tmp_path):
    write(tmp_path / "set", {f"{k}.jpg": picture(k) for k in range(3)})
    write(tmp_path, {"labels.csv": "row,number,label\n0,1,cat\n1,2,dog\n2,0,cat\n"})
    with refused("labels.csv", "'row' and 'number'", "leave out the one"):
        open_data(tmp_path / "set", labels=tmp_path / "labels.csv")


def test_numbers_of_classes_are_not_the_files_either(tmp_path):
    write(tmp_path / "set", {f"{k}.png": picture(k, "PNG") for k in range(30)})
    write(tmp_path, {"labels.csv": "id,label\n" + "".join(f"{k},{k % 5}\n" for k in range(30))})
    data = open_data(tmp_path / "set", labels=tmp_path / "labels.csv")
    assert found(data) == {f"{k}.png": str(k % 5) for k in range(30)}


@pytest.mark.parametrize("header", ["ImageId,Label", "Width,Path,ClassId", "ClassId,Path,ClassName"])
def test_other_headers_of_tables(tmp_path, header):
    files = write(tmp_path / "set", {f"{k}.jpg": picture(k) for k in range(2)})
    rows = ["0,golden retriever", "1,golden eagle"] if header.startswith("I") else ["16,0.jpg,a", "16,1.jpg,b"]
    write(tmp_path, {"t.csv": "\n".join([header, *rows])})
    assert [*found(open_data(files, labels=tmp_path / "t.csv")).values()] == [row.split(",")[-1] for row in rows]


def test_a_table_of_the_training_images_is_not_one_of_the_test_images(tmp_path):
    write(tmp_path / "set", {f"{split}/{k}.png": picture(k, "PNG") for split in ("train", "test") for k in range(3)})
    table = write(tmp_path, {"trainLabels.csv": "id,label\n0,cat\n1,dog\n2,cat\n"}) / "trainLabels.csv"
    with refused("set/train or ", "set/test, whichever has the images that trainLabels.csv names"):
        open_data(tmp_path / "set", labels=table)
    assert len(open_data(tmp_path / "set", labels=table.rename(tmp_path / "test_labels.csv"))) == 3
    table = (tmp_path / "test_labels.csv").rename(table)
    for data in (
        open_data(tmp_path / "set/train", labels=table),
        open_data(tmp_path / "set", split="train", labels=table),
    ):
        assert [*found(data).values()] == ["cat", "dog", "cat"]


def test_letters_as_macos_writes_them(tmp_path, vit_shapes20):
    mac, usual = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
    write(tmp_path / "set", {f"{mac}/{mac}.jpg": picture(0), f"smile :)/Screenshot 10.00\u202fAM{mac}.png": picture(1)})
    data = open_data(tmp_path / "set")
    write(tmp_path, {"map.csv": f"class;output\n{usual};3\nsmile :);4\n"})
    assert match_classes(vit_shapes20.info, data, tmp_path / "map.csv").labels == [3, 4]
    write(tmp_path, {"labels.csv": f"{usual}.jpg,cat\n"})
    assert found(open_data(tmp_path / "set", labels=tmp_path / "labels.csv")) == {f"{mac}/{mac}.jpg": "cat"}


@pytest.mark.parametrize("val", ["valid", "Testing", "VAL"])
def test_folders_of_splits_in_other_spellings(tmp_path, val):
    write(tmp_path / val, {"cat/0.jpg": picture(0)})
    write(tmp_path / "Training", {"cat/1.jpg": picture(1), "dog/2.jpg": picture(2)})
    assert open_data(tmp_path).files == ["cat/0.jpg"] and len(open_data(tmp_path, split="train")) == 2


def test_splits_are_no_classes(tmp_path):
    write(tmp_path / "two", {"val/0.jpg": picture(0), "test/0.jpg": picture(1)})
    with refused("two: holds test/ and no train/; give that folder as the data set"):
        open_data(tmp_path / "two", split="train")
    images = {f"{split}/{word}/0.jpg": picture(0) for split in ("train", "eval") for word in ("cat", "dog")}
    with refused("holds train/ and no val/; give that folder as the data set"):
        open_data(write(tmp_path / "other", images))
    trains = {f"{word}/0.jpg": picture(0) for word in ("car", "train")}
    assert open_data(write(tmp_path / "vehicles", trains)).classes == ["car", "train"]


def test_a_class_whose_images_cannot_be_read_is_a_class_also_below_a_folder(tmp_path):
    write(tmp_path, {"set/data/cat/0.jpg": picture(0), "set/data/dog/0.heic": b"x"})
    assert open_data(tmp_path / "set").classes == open_data(tmp_path / "set/data").classes == ["cat", "dog"]


def test_names_with_commas_are_shortened_only_if_they_stay_different():
    words = ["Pepper,_bell___healthy", "Pepper,_bell___spot", "crane", "crane, bird", "tench, Tinca tinca"]
    assert short_names(words) == [*words[:4], "tench"]
    assert shortened("american_pit_bull_terrier", 18) == "american_pit_bul …" and shortened("tench", 5) == "tench"


def test_pixels_of_more_than_8_bits_are_refused_not_cut_off(tmp_path):
    Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UnreadableImage, match="more than 8 bits .mode I;16.; convert"):
        reference_crop((tmp_path / "deep.png").read_bytes(), Preprocessing((3, 32, 32), 1, "center", "bicubic", *HALF))


@pytest.mark.parametrize("name", ["set.zip", "set.tar.xz"])
def test_a_packed_set_is_to_be_unpacked(tmp_path, name):
    write(tmp_path, {name: b"x"})
    for open_it in (open_data, lambda path: open_images([path])):
        with refused(name, "unpack it"):
            open_it(tmp_path / name)


def test_a_table_of_ones_own_called_classes(tmp_path):
    write(tmp_path, {f"val/{wnid}/0.JPEG": tiny_jpeg(k) for k, wnid in enumerate(WNIDS)})
    write(tmp_path, {"classes.csv": "number,word\n0,tench\n"})
    assert len(open_data(tmp_path).classes) == 1000


def test_captions_are_no_labels(tmp_path):
    write(tmp_path, WORDS | {"metadata.csv": "file_name,text\ncat/0.jpg,a cat\n"})
    assert found(open_data(tmp_path)) == {name: name.partition("/")[0] for name in WORDS}


def test_tiny_imagenet(tmp_path):
    lines = [f"val_{k}.JPEG\t{WNIDS[k % 3]}\t0\t32\t44\t62" for k in range(4)]
    write(
        tmp_path / "val",
        {f"images/val_{k}.JPEG": picture(k) for k in range(4)} | {"val_annotations.txt": "\n".join(lines)},
    )
    assert [*found(open_data(tmp_path)).values()] == [WNIDS[k % 3] for k in range(4)]
    write(tmp_path / "train", {f"{wnid}/images/{wnid}_0.JPEG": picture(0) for wnid in WNIDS})
    assert [*found(open_data(tmp_path, split="train")).values()] == WNIDS


@pytest.mark.parametrize("separator", [",", ";", "\t", " "])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("prefix", ["", "./", "val/", "ABSOLUTE/", "/home/somebody/val/"])
def test_a_table_of_ones_own(tmp_path, separator, header, prefix):
    folder = write(tmp_path / "val", {f"a/{k}.jpg": picture(k) for k in range(4)})
    prefix = prefix.replace("ABSOLUTE", str(folder))
    table = pd.DataFrame({"id": range(4), "where": [f"{prefix}a/{k}.jpg" for k in range(4)], "label": ["x y", "z"] * 2})
    table.to_csv(tmp_path / "t.csv", sep=separator, header=header, index=False, encoding="utf-8-sig")
    if not header:
        with refused("t.csv", "which column"):
            open_data(folder, labels=tmp_path / "t.csv")
        table.drop(columns="id").to_csv(tmp_path / "t.csv", sep=separator, header=False, index=False)
    for path in (folder, tmp_path):
        data = open_data(path, labels=tmp_path / "t.csv")
        assert found(data) == {f"a/{k}.jpg": ["x y", "z"][k % 2] for k in range(4)}
    again = open_again(data.address)
    assert again.labels == data.labels and again.fingerprint == data.fingerprint


@pytest.mark.parametrize(
    "table, line",
    [
        ("", "cannot be read as a table"),
        ("path,label\n", "no column names the images"),
        ("path,label\nabsent.jpg,cat\n0.jpg,cat\n", "row 2 names 'absent.jpg'"),
        ("absent.jpg,cat\n0.jpg,cat\n", "row 1 names 'absent.jpg'"),
        ("path,label\n0.jpg,cat\n0.jpg,dog\n", "two labels, 'cat' and 'dog'"),
        ("path,label\n0.jpg,\n1.jpg,cat\n", "row 2, '0.jpg', has no label"),
        ("path,a,b\n0.jpg,cat,dog\n", "which column has the labels"),
        ("path,label,class\n0.jpg,cat,dog\n", "which column has the labels (label, class)"),
        ("path,path\n0.jpg,cat\n", "two columns have the name"),
        ("path\n0.jpg\n", "none is left"),
        (b"\xff\xfe\x00a", "not text in UTF-8"),
    ],
)
def test_tables_that_cannot_be_understood(tmp_path, table, line):
    write(tmp_path / "set", {f"{k}.jpg": picture(k) for k in range(2)})
    write(tmp_path, {"t.csv": table})
    with refused("t.csv", line):
        open_data(tmp_path / "set", labels=tmp_path / "t.csv")


def test_a_name_that_several_images_have_is_called_ambiguous(tmp_path):
    write(tmp_path / "set", {f"{k}/x.jpg": picture(k) for k in range(2)})
    write(tmp_path, {"t.csv": "path,label\n0/x.jpg,cat\n./x.jpg,dog\n"})
    with refused("row 3 names './x.jpg', of which there are several in"):
        open_data(tmp_path / "set", labels=tmp_path / "t.csv")


def test_images_that_a_table_leaves_out_are_told(tmp_path, capsys):
    write(tmp_path, {f"{k}.jpg": picture(k) for k in range(3)} | {"metadata.csv": "file_name,label\n0.jpg,cat\n"})
    assert len(open_data(tmp_path)) == 1
    assert "2 images that it does not name, such as 1.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("names", ["ILSVRC2012_val_{k:08d}.JPEG", "sketch_0.JPEG"])
def test_a_part_of_imagenets_classes(tmp_path, names):
    write(tmp_path, {f"{wnid}/{names.format(k=k)}": picture(k) for k, wnid in enumerate(WNIDS)})
    data = open_data(tmp_path)
    assert len(data.classes) == 1000 and data.present == [0, 1, 65] == sorted(data.labels)
    assert [*found(data).values()] == WNIDS


def test_a_part_of_the_classes_has_two_accuracies(tmp_path, shapes20, eager):
    some = [i for i in range(len(shapes20)) if shapes20.labels[i] < 4][:40]
    for i in some:
        write(tmp_path / shapes20[i].class_id, {f"{i}.jpg": shapes20[i].image})
    run = evaluate(eager, open_data(tmp_path), progress=False)
    m, rows = run.metrics, run.rows
    assert m["classes_present"] == 4 and m["classes_decided"] == "by equal ids"
    assert rows["correct_present"].sum() == m["correct_present"] >= m["correct"]
    assert "among all 20 outputs" in str(run) and "among the 4 classes that are present" in str(run)


@pytest.fixture(scope="module")
def imagenets() -> Model:
    """A small model with ImageNet's outputs."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 1000))
    preprocessing = Preprocessing((3, 32, 32), 1.0, "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Model.from_module(module, preprocessing, name="linear", classes=tuple(ImageNetInfo().label_names()))


def test_200_of_1000_classes_are_chosen_among_as_imagenet_a_is_published(tmp_path, imagenets):
    """Its authors take the columns of its 200 classes out of the logits; so do we here, from the same pixels."""
    images, present = [picture(k) for k in range(250)], np.arange(2, 1000, 5)
    crops = torch.stack([reference_crop(image, imagenets.info.preprocessing) for image in images])
    logits = imagenets.module((crops / 255 - 0.5) / 0.5).numpy()
    among = present[logits[:, present].argmax(1)]
    labels = np.where(np.arange(250) < 200, present[np.arange(250) % 200], among)  # all are present, and 50 right
    for k, label in enumerate(labels):
        write(tmp_path / imagenets.info.classes[label], {f"{k:03d}.jpg": images[k]})
    run = evaluate(convert(imagenets), open_data(tmp_path), input_path="reference", progress=False)
    expected = [int((guess == labels).sum()) for guess in (logits.argmax(1), among)]
    assert [run.metrics["correct"], run.metrics["correct_present"]] == expected and 50 <= expected[1] > expected[0]
    assert run.metrics["classes_present"] == 200 and "among the 200 classes that are present" in str(run)


def test_no_labels_at_all(tmp_path):
    write(tmp_path, {"a/0.jpg": picture(0), "b/0.png": picture(1, "PNG"), "notes.txt": "no image"})
    with refused("lie flat", "vitdemo predict"):
        open_data(write(tmp_path / "flat", {"x.jpg": picture(2)}))
    for given, files in [
        ([tmp_path / "a", tmp_path / "b/0.png"], ["a/0.jpg", "b/0.png"]),
        ([tmp_path / "*/*.png"], ["0.png"]),
    ]:
        images = open_images(given)
        assert images.files == files and images.labels == [-1] * len(files) and all(s.image for s in images)
    with refused("absent", "check the path"):
        open_images([tmp_path / "absent"])
    with refused("no paths were given"):
        open_images([])


def test_what_predict_passes_over_is_told(tmp_path, capsys):
    write(tmp_path, {"a.jpg": picture(0), "b.heic": b"x", "notes.txt": "x", "c/d.png": picture(1, "PNG")})
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "moved.jpg")
    (tmp_path / "c/again").symlink_to(tmp_path / "c")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "a.jpg", "a.jpg")
        tar.add(tmp_path / "b.heic", "b.heic")
    unread = "1 image in a format that cannot be read here (.heic)"
    told = f"left out: 1 file that is no image and {unread} and 1 link to files that do not exist, such as gone.jpg"
    for given, files, said in [
        ([tmp_path / "*.*g", tmp_path / "b.heic", tmp_path / "notes.txt", tmp_path / "c"], ["a.jpg", "c/d.png"], told),
        ([tmp_path / "all.tar"], ["a.jpg"], f"left out: {unread}"),
    ]:
        assert open_images(given).files == files
        assert said in capsys.readouterr().err
    with refused("b.heic", unread, "convert"):
        open_images([tmp_path / "b.heic"])


def test_images_beside_parquet_files_do_not_vanish(tmp_path, capsys):
    parquet(tmp_path / "answers.parquet", rows_of(2, lambda k: None))
    assert len(open_images([tmp_path], progress=False)) == 2 and not capsys.readouterr().err
    write(tmp_path, {"a.jpg": picture(0)})
    with refused("holds answers.parquet and 1 image, such as a.jpg"):
        open_images([tmp_path])


def test_a_packed_set_in_a_folder_is_named(tmp_path):
    write(tmp_path, {"data/val_images.tar.gz": b"x", "README.md": "x"})
    with refused("holds no image, but data/val_images.tar.gz; unpack it, or give it"):
        open_data(tmp_path)
    with refused("but images.zip; unpack it;"):
        open_data(write(tmp_path / "zipped", {"images.zip": b"x"}))


def test_kaggles_table_beside_images_that_were_sorted_into_folders(tmp_path):
    write(tmp_path / "ILSVRC/Data/CLS-LOC/val", {f"{w}/{n}": c for w, (n, c) in zip(TRUTH, FLAT.items(), strict=True)})
    write(tmp_path, {"LOC_val_solution.csv": "ImageId,PredictionString\nILSVRC2012_val_00000001,n01443537 1 2 3 4\n"})
    assert found(open_data(tmp_path)) == dict(zip(FLAT, TRUTH, strict=True))


def test_outputs_without_names_are_named_by_the_data(tmp_path, vit_shapes20):
    nameless = partial(Model.from_module, vit_shapes20.module, vit_shapes20.info.preprocessing)
    first, words = nameless(name="first"), [f"word {k:02d}" for k in range(20)]
    data = open_data(write(tmp_path / "set", {f"{word}/0.jpg": picture(k) for k, word in enumerate(words)}))
    matched = match_classes(first.info, data, "sorted")
    assert matched.class_names == words and match_classes(first.info, matched) is matched
    again = open_again(matched.address)  # as in the process that measures an engine
    assert match_classes(first.info, again) is again and again.labels == matched.labels
    torch.nn.init.zeros_((other := copy.deepcopy(vit_shapes20.module)).head.bias)
    second = Model.from_module(other, vit_shapes20.info.preprocessing, name="second")
    with refused("second: nothing says which class each of its 20 outputs is"):
        match_classes(second.info, matched)
    write(tmp_path, {"map.csv": "word 03,7\nword 04,7\n"})
    part = match_classes(first.info, data.take([3, 4]), tmp_path / "map.csv")
    assert part.class_names[6:8] == ["output 6", "word 03 or word 04"]
    wnids = open_data(write(tmp_path / "wnids", {f"{wnid}/0.jpg": picture(0) for wnid in ("n01440764", "n01443537")}))
    module = copy.deepcopy(first.module)
    module.reset_classifier(2)
    two = Model.from_module(module, first.info.preprocessing, name="two")
    assert match_classes(two.info, wnids, "sorted").class_names == ["tench", "goldfish"], "2 of ImageNet's 1,000"
    write(tmp_path / "set", {"word 00/0.jpg": b"no image", "word 01/0.heic": b"x"})
    (tmp_path / "set/word 01/0.jpg").unlink()
    assert match_classes(first.info, open_data(tmp_path / "set"), "sorted").class_names == words
    write(tmp_path, {"both.csv": "n01440764,7\nn01443537,7\n"})
    assert match_classes(first.info, wnids, tmp_path / "both.csv").class_names[7] == "tench or goldfish"
    table = answers(convert(first), data.take([3]), class_names=matched.class_names, progress=False)
    assert table["class_1"].item() == words[table["predicted_1"].item()]
    assert answers(convert(first), data.take([3]), progress=False)["class_1"].item().startswith("output ")


def test_a_link_to_another_class_is_another_class(tmp_path):
    write(tmp_path, {"cat/0.jpg": picture(0)})
    (tmp_path / "kitty").symlink_to(tmp_path / "cat")
    assert found(open_data(tmp_path)) == {"cat/0.jpg": "cat", "kitty/0.jpg": "kitty"}
    (tmp_path / "cat/1.jpg").symlink_to(tmp_path / "moved.jpg")
    assert len(open_data(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_in_any_format_is_seen(kind):
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x112] = 6
    Image.new("RGB", (20, 10)).save(content, kind, exif=exif)
    assert is_rotated(content.getvalue()) and not is_rotated(picture(0, kind))
    with Image.open(io.BytesIO(upright(content.getvalue()))) as turned:
        assert turned.size == (10, 20)


def test_phone_photographs_are_counted_and_diagnosed(tmp_path, shapes20, eager, vit_shapes20):
    from vitdemo import diagnose

    for i in range(0, 120):
        upright = Image.open(io.BytesIO(shapes20[i].image)).convert("RGB")
        exif = Image.Exif()
        exif[0x112] = 6
        content = io.BytesIO()
        upright.transpose(Image.Transpose.ROTATE_90).save(content, "JPEG", quality=95, exif=exif)
        write(tmp_path / shapes20[i].class_id, {f"{i}.jpg": content.getvalue()})
    data = open_data(tmp_path)
    run = evaluate(eager, data, progress=False)
    assert run.metrics["rotated"] == 120 and "120 images carry an EXIF orientation" in str(run)
    found = diagnose(eager, vit_shapes20, data, images=120, progress=False)
    assert found.named == "with images turned as their EXIF says", found.verdict


LEFT = ["@eaDir/cat/0.jpg", "__MACOSX/cat/._0.jpg", "lost+found/x.jpg", "$RECYCLE.BIN/a.jpg", "cat/._0.jpg"]
LEFT += ["cat/.DS_Store", "Thumbs.db"]


@pytest.mark.parametrize("tar", [False, True])
def test_what_systems_leave_is_passed_over(tmp_path, capsys, tar):
    files = WORDS | dict.fromkeys(LEFT, b"left by a system")
    if tar:
        (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    data = open_data(tmp_path / "x.tar" if tar else write(tmp_path / "x", files))
    assert found(data) == {name: name.partition("/")[0] for name in WORDS}
    assert "left out" not in capsys.readouterr().err


def test_an_imagenet_tar_packed_on_a_mac(tmp_path):
    ids = {"n90000001": 1, "n90000002": 2}
    write_devkit(tmp_path / "x_devkit_t12.tar.gz", ids, [1, 2, 1, 2])
    files = FLAT | {f"._{name}": b"\0\5\x16\7" for name in FLAT}
    (tmp_path / "x_img_val.tar").write_bytes(tar_bytes(files))
    assert len(open_data(tmp_path)) == 4


def test_nothing_vanishes_silently(tmp_path, capsys):
    write(tmp_path, WORDS | {"cat/notes.txt": "", "cat/x.heic": b"", "big dog/y.HEIC": b"", "loose.jpg": picture(0)})
    (tmp_path / "bird").mkdir()
    data = open_data(tmp_path)
    told = capsys.readouterr().err
    assert "1 file that is no image and 2 images in a format that cannot be read here (.heic)" in told
    assert "1 image outside the classes' folders, such as loose.jpg" in told
    assert data.classes == ["big dog", "bird", "cat"] and "1 class has no images, such as bird" in told
    with refused("holds no image", ".heic"):
        open_data(write(tmp_path / "heic", {"a/x.heic": b""}))


def test_a_damaged_file_in_each_of_1000_classes_is_a_row(tmp_path, imagenets):
    write(tmp_path, {f"{class_id}/{k}.jpg": b"damaged" for k, class_id in enumerate(imagenets.info.classes)})
    run = evaluate(convert(imagenets), open_data(tmp_path), progress=False)
    assert run.metrics["errors"] == len(run.rows) == 1000 and run.rows["error"].ne("").all()


# ---- whose output is which class


def as_words(vit_shapes20, tmp_path: Path, rename: Callable[[str], str]) -> Dataset:
    names = [rename(name.split(",")[0]) for name in vit_shapes20.info.class_names]
    return open_data(write(tmp_path / "set", {f"{name}/0.jpg": picture(k) for k, name in enumerate(names)}))


@pytest.mark.parametrize(
    "rename", [str, str.upper, lambda name: name.replace(" ", "_"), lambda name: name.replace(" ", "-").title()]
)
def test_names_decide_without_case_blanks_hyphens_and_underscores(tmp_path, vit_shapes20, rename):
    data = match_classes(vit_shapes20.info, as_words(vit_shapes20, tmp_path, rename))
    assert [vit_shapes20.info.class_names[s.label].split(",")[0] for s in data] == sorted(
        (name.split(",")[0] for name in vit_shapes20.info.class_names),
        key=lambda name: data.files.index(f"{rename(name)}/0.jpg"),
    )
    assert data.decided.startswith("by names")


def test_a_class_without_an_output_is_named_with_the_nearest(tmp_path, vit_shapes20):
    name = vit_shapes20.info.class_names[3].split(",")[0]
    data = open_data(write(tmp_path / "set", {f"{name}s/0.jpg": picture(0), f"{name}/0.jpg": picture(1)}))
    with refused(f"{name}s", "the nearest: ", name, "--class-map FILE"):
        match_classes(vit_shapes20.info, data)
    both = open_data(write(tmp_path / "both", {f"{name}/0.jpg": picture(0), f"{name.upper()}/0.jpg": picture(1)}))
    with refused(name, name.upper(), "are both output"):
        match_classes(vit_shapes20.info, both)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json"])
def test_a_class_map_may_give_several_classes_one_output(tmp_path, vit_shapes20, suffix):
    data = open_data(write(tmp_path / "set", {f"{name}/0.jpg": picture(0) for name in ("siamese", "tabby", "van")}))
    pairs = {
        "siamese": "3",
        "tabby": vit_shapes20.info.classes[3],
        "van": vit_shapes20.info.class_names[5].split(",")[0],
    }
    comma = {".csv": ",", ".tsv": "\t"}.get(suffix)
    text = (
        json.dumps(pairs)
        if comma is None
        else "\n".join(comma.join(pair) for pair in [("class", "output"), *pairs.items()])
    )
    write(tmp_path, {f"map{suffix}": text})
    matched = match_classes(vit_shapes20.info, data, tmp_path / f"map{suffix}")
    assert matched.labels == [3, 3, 5] and matched.decided == f"by the file map{suffix}"
    assert [s.class_id for s in matched] == ["siamese", "tabby", "van"]
    assert match_classes(vit_shapes20.info, matched) is matched
    write(tmp_path, {"other.csv": "siamese,7\ntabby,8\nvan,3\n"})
    assert match_classes(vit_shapes20.info, matched, tmp_path / "other.csv").labels == [7, 8, 3], "the last word counts"
    part = match_classes(vit_shapes20.info, data.take([1]), tmp_path / f"map{suffix}")  # one file for all parts
    assert part.labels == [3] and part.present == [3]


@pytest.mark.parametrize(
    "rows, line",
    [
        ("", "is empty"),
        ("cat,1,2\n", "has 3 columns"),
        ("cat,20\ndog,1\n", "row 1: '20' is no output"),
        ("cat,-1\ndog,1\n", "row 1: '-1' is no output"),
        ("cat,1\n", "has no row for the class 'dog'"),
        ("cat,1\ncat,2\ndog,3\n", "another output in a row before"),
        ("cat,1\ndgo,2\n", "has no row for the class 'dog'"),
        ("cat,1\ndgo,2\n", "is 'dgo', which"),
    ],
)
def test_class_maps_that_cannot_be(tmp_path, vit_shapes20, rows, line):
    data = open_data(write(tmp_path / "set", {"cat/0.jpg": picture(0), "dog/0.jpg": picture(1)}))
    write(tmp_path, {"m.csv": rows})
    with refused("m.csv", line):
        match_classes(vit_shapes20.info, data, tmp_path / "m.csv")
