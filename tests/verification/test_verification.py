"""verify: the measures against other people's, faults that are planted, and what is refused."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr
from torch import nn

from tests.native import native_or_skip, precisions_of
from vitdemo import (
    Engine,
    EngineFailure,
    Model,
    Preprocessing,
    VitdemoError,
    convert,
    find_engines,
    load_model,
    reference_crop,
)
from vitdemo.engines.calibration import calibration_for
from vitdemo.engines.eager import EagerEngine
from vitdemo.plots.verification import engine_look, plot_error_over_depth, plot_flips
from vitdemo.verification.comparison import LayerErrors, compare_answers, compare_logits
from vitdemo.verification.tolerances import TOLERANCES, loosened
from vitdemo.verification.verification import verify

PAIRS = [(name, p) for name, cls in find_engines().items() for p in cls.precisions if p in TOLERANCES]
NATIVE_PAIRS = [native_or_skip(*pair) for pair in PAIRS]
BRANCH = {"attn.qkv": "attn", "attn.proj": "attn", "mlp.fc1": "mlp", "mlp.fc2": "mlp"}
SCALE = {"fp32": 1.05, "bf16": 1.05, "int8": 1.5}


@pytest.fixture(scope="session")
def eager_reports(vit_shapes20, shapes20):
    return {p: verify(convert(vit_shapes20, "eager", p), vit_shapes20, shapes20, images=16) for p in ("fp32", "bf16")}


def changed(model: Model, change) -> Model:
    """A copy after ``change(module)``, under the same name."""
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        change(module)
    return Model(module, model.info)


def with_scaled_weight(model: Model, block: int, matrix: str, scale: float) -> Model:
    return changed(model, lambda module: module.get_submodule(f"blocks.{block}.{matrix}").weight.mul_(scale))


def with_norm_eps(model: Model, eps: float) -> Model:
    def change(module):
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):
                part.eps = eps

    return changed(model, change)


def with_mean_and_std(model: Model, mean, std) -> Model:
    preprocessing = replace(model.info.preprocessing, mean=mean, std=std)
    return Model(model.module, replace(model.info, preprocessing=preprocessing))


def test_logits_are_compared_as_numpy_and_scipy_do():
    generator = np.random.default_rng(0)
    a = generator.normal(size=(50, 7)) + 5 * generator.normal(size=7)
    b = a + 0.3 * generator.normal(size=a.shape)
    found = compare_logits(torch.tensor(a).float(), torch.tensor(b).float())
    centred = [(x - x.mean(axis=0)).ravel() for x in (a, b)]
    assert found["pearson"] == pytest.approx(pearsonr(*centred).statistic, rel=1e-5)
    assert found["relative_l2"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-5)
    assert found["max_abs"] == pytest.approx(np.abs(b - a).max(), rel=1e-5)
    assert found["mean_abs"] == pytest.approx(np.abs(b - a).mean(), rel=1e-5)
    assert found["top1_agree"] == (a.argmax(1) == b.argmax(1)).sum()
    fifth = np.sort(b, axis=1)[:, -5]
    assert found["top5_agree"] == (b[np.arange(50), a.argmax(1)] >= fifth).sum()
    assert found["images"] == 50 and found["not_finite"] == 0


def test_answers_are_counted_pairwise():
    """Ten images only the reference gets right, two only the candidate, eight both: p from the binomial by hand."""
    label = [0] * 20
    reference, candidate = [0] * 10 + [1] * 2 + [0] * 8, [1] * 10 + [0] * 2 + [0] * 8
    found = compare_answers(pd.DataFrame({"label": label, "reference": reference, "candidate": candidate}))
    assert (found["reference"]["correct"], found["candidate"]["correct"]) == (18, 10)
    assert (found["worse"], found["better"]) == (10, 2)
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    low, high = found["candidate"]["ci95"]
    assert (low, high) == (pytest.approx(0.299, abs=1e-3), pytest.approx(0.701, abs=1e-3))  # Wilson, of 10 in 20


def test_layer_sums_over_batches_are_the_whole():
    a, b = torch.randn(2, 24, 5, 3, generator=torch.Generator().manual_seed(0))
    whole, parts = LayerErrors(), LayerErrors()
    whole.add({"x": a}, {"x": b})
    for x, y in zip(a.split(7), b.split(7), strict=True):
        parts.add({"x": x}, {"x": y})
    assert parts.relative_l2()["x"] == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-6)
    assert parts.relative_l2() == pytest.approx(whole.relative_l2())
    nothing = LayerErrors()
    nothing.add({"same": a * 0, "all": a * 0, "nan": a}, {"same": a * 0, "all": a, "nan": b * torch.nan})
    assert nothing.relative_l2() == {"same": 0.0, "all": float("inf"), "nan": pytest.approx(float("nan"), nan_ok=True)}


def test_tolerances_follow_the_floor_and_never_far():
    assert [loosened(1.0, floor) for floor in (0.0, 0.4, 0.6, 5.0, float("inf"))] == [1.0, 1.0, 1.2, 2.0, 2.0]


def test_eager_passes_and_its_report_says_it_all(eager_reports):
    for precision, report in eager_reports.items():
        assert report.ok and report.first_bad_layer is None and report.failures == []
        assert list(report.overall["kind"]) == ["real", "random"] and list(report.overall["images"]) == [16, 16]
        assert report.accuracy["images"] == 16 and report.accuracy["reference"]["correct"] >= 12
        first_layers = ["patch_embed", "blocks.0.attn", "blocks.0.mlp", "blocks.0"]
        assert report.layers["layer"].unique().tolist()[:4] == first_layers
        assert report.layers["layer"].tolist()[-1] == "logits" and report.twin_l2 == 0
        text = str(report)
        assert f"eager {precision} against eager fp32" in text and text.endswith("passed")
        assert "noise floor, " in text and "McNemar's p" in text and "layers: nearest to its tolerance" in text
    assert (eager_reports["fp32"].overall["max_abs"] == 0).all()
    floor = eager_reports["fp32"].floors.groupby("way")["relative_l2"].max()
    assert set(floor.index) == {"one thread", "one by one", "plain attention"}
    assert 1e-8 < floor.max() < 1e-5  # there is one, and it is far below the tolerance
    layers = eager_reports["bf16"].layers
    pd.testing.assert_series_equal(layers["floor"], layers["relative_l2"], check_names=False)  # the same computation


@pytest.mark.parametrize("precision", precisions_of("eager"))
@pytest.mark.parametrize("block, matrix", [(0, "mlp.fc2"), (2, "attn.proj"), (3, "mlp.fc1"), (5, "attn.qkv")])
def test_scaled_weight_is_found_and_its_layer_named(vit_shapes20, shapes20, precision, block, matrix):
    faulty = convert(with_scaled_weight(vit_shapes20, block, matrix, SCALE[precision]), "eager", precision)
    report = verify(faulty, vit_shapes20, shapes20, images=8, progress=False)
    assert not report.ok and report.first_bad_layer == f"blocks.{block}.{BRANCH[matrix]}"
    assert f"FAILED: layer {report.first_bad_layer} is the first out of its tolerance" in str(report)


@pytest.mark.parametrize("precision", precisions_of("eager"))
def test_wrong_mean_and_std_are_caught_at_the_patch_embedding(vit_shapes20, shapes20, precision):
    imagenet = with_mean_and_std(vit_shapes20, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    report = verify(convert(imagenet, "eager", precision), vit_shapes20, shapes20, images=8, progress=False)
    assert not report.ok and report.first_bad_layer == "patch_embed"


def test_norm_eps_is_seen_in_fp32_alone(vit_shapes20, shapes20):
    """1e-5 for 1e-6 moves the layers by 2e-4 to 8e-4: above fp32's tolerance and far below the rounding of bf16."""
    other = with_norm_eps(vit_shapes20, 1e-5)
    fp32, bf16 = (verify(convert(other, "eager", p), vit_shapes20, shapes20, images=8) for p in ("fp32", "bf16"))
    assert not fp32.ok and fp32.first_bad_layer == "blocks.0.attn"
    assert fp32.layers["relative_l2"].max() > 1000 * fp32.layers["floor"].max()
    assert bf16.ok and bf16.layers["relative_l2"].max() < 1.5 * bf16.layers["floor"].max()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_fail_also_on_both_sides(vit_shapes20, shapes20, value):
    broken = changed(vit_shapes20, lambda module: module.head.bias[3].fill_(value))
    for reference in (vit_shapes20, broken):
        report = verify(convert(broken), reference, shapes20, images=2, progress=False)
        assert not report.ok and report.first_bad_layer == "logits"
        assert any("2 logits on real images are NaN or infinite" in failure for failure in report.failures)


class Altered(Engine):
    """Eager fp32 whose answers and layers go through a function each; says that it is of another precision."""

    name, precisions = "altered", ("fp32", "int8")

    def __init__(self, model, precision="fp32", logits=lambda logits, x: logits, layers=lambda layers, x: layers):
        super().__init__(model.info, precision, device="cpu", threads=2)
        self._eager = EagerEngine(model, "fp32", device="cpu", threads=2)
        self._change_logits, self._change_layers = logits, layers

    def _infer(self, x):
        return self._change_logits(self._eager(x), x)

    def layers(self, x):
        return self._change_layers(self._eager.layers(x), x)

    precision_ran = {"fp32": 1.0}


def flipped(model: Model, pixels: torch.Tensor) -> Altered:
    """An int8 engine that swaps the two leading logits of these images."""

    def flip(logits, x):
        logits = logits.clone()
        for row, image in zip(logits, x, strict=True):
            if any(torch.equal(image, other) for other in pixels):
                leading = row.topk(2)
                row[leading.indices] = leading.values.flip(0)
        return logits

    return Altered(model, "int8", flip, lambda layers, x: layers | {"logits": flip(layers["logits"], x)})


def test_flips_are_listed_and_one_is_always_allowed(eager, vit_shapes20, shapes20):
    spread = [i * 1000 // 16 for i in range(16)]
    pixels = torch.stack([reference_crop(shapes20[i].image, vit_shapes20.info.preprocessing) for i in spread])
    first, second = eager(pixels).topk(2).values.T
    close = (first - second).argsort()[:2]  # so that a swap hardly moves anything but the answer
    one, two = (
        verify(flipped(vit_shapes20, pixels[close[:n]]), vit_shapes20, shapes20, images=16, progress=False)
        for n in (1, 2)
    )
    indices = sorted(spread[k] for k in close)
    assert one.ok and two.failures == ["2 of 16 answers differ on real images, more than 2%"]
    assert two.flips["index"].tolist() == indices
    assert two.flips["file"].tolist() == [shapes20.files[i] for i in indices]
    assert two.overall["top1_agree"].tolist() == [14, 16] and two.overall["top5_agree"].tolist() == [16, 16]
    right = {"reference": 0, "candidate": 0}
    for flip in two.flips.to_dict("records"):
        for side in right:
            right[side] += flip[side] == flip["label"]
    assert (two.accuracy["worse"], two.accuracy["better"]) == (right["reference"], right["candidate"])
    captions = [text.get_text() for ax in plot_flips(two, shapes20).axes for text in ax.texts]
    assert len(captions) == 2 and all("\n→ " in caption and "\nis: " in caption for caption in captions)


def test_layers_of_another_computation_than_the_engines_own_fail(vit_shapes20, shapes20):
    """Where the artifact is at fault and the twin that is looked into is not, the layers testify to nothing."""
    engine = Altered(vit_shapes20, logits=lambda logits, x: logits * 1.001)
    report = verify(engine, vit_shapes20, shapes20, images=2, progress=False)
    assert report.first_bad_layer is None and report.twin_l2 == pytest.approx(1e-3, rel=1e-2)
    assert any("twin that shows the layers" in failure for failure in report.failures)


def test_engine_that_shows_no_layers(vit_shapes20, shapes20):
    report = verify(
        Altered(vit_shapes20, layers=lambda layers, x: {}), vit_shapes20, shapes20, images=2, progress=False
    )
    assert report.ok and report.twin_l2 is None and report.layers.empty and report.first_bad_layer is None
    assert "layers: this engine shows none" in str(report)
    with pytest.raises(VitdemoError, match="of engines that show their layers"):
        plot_error_over_depth([report])


def test_random_weights_have_no_accuracy_and_only_random_pixels():
    model = load_model("vit_tiny_patch16_224", "random")
    report = verify(convert(model, "eager", "bf16"), model, images=2, progress=False)
    assert report.ok and report.accuracy is None and report.flips.empty
    assert report.overall["kind"].tolist() == ["random"] and report.overall["images"].tolist() == [2]
    assert plot_error_over_depth([report]).axes[0].get_ylabel() == "relative L2 error, random images"


def test_bundled_images_are_the_default_for_their_classes(vit_shapes20, eager_reports):
    report = verify(convert(vit_shapes20), vit_shapes20, images=16, progress=False)
    assert report.accuracy == eager_reports["fp32"].accuracy


class Small(nn.Sequential):
    def __init__(self, outputs: int = 3):
        super().__init__()
        self.first, self.relu, self.pool = nn.Conv2d(3, 4, 3, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.flatten, self.last = nn.Flatten(), nn.Linear(4, outputs)


def small_model(seed: int = 0, **arguments) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model.from_module(Small(**arguments), PREPROCESSING, name="small")


PREPROCESSING = Preprocessing((3, 32, 32), 0.9, "center", "bicubic", (0.5,) * 3, (0.5,) * 3)


def test_any_module_without_known_classes(shapes20):
    model = small_model()
    report = verify(convert(model, "eager", "bf16"), model, shapes20, images=4, progress=False)
    assert report.layers["layer"].unique().tolist() == ["first", "logits"]
    assert report.accuracy is None and report.overall["kind"].tolist() == ["real", "random"]
    other = verify(convert(small_model(seed=1)), model, shapes20, images=4, progress=False)
    assert not other.ok and other.first_bad_layer == "first"
    assert plot_flips(other, shapes20).axes


@pytest.mark.parametrize(("side", "sizes"), [(32, [8, 2]), (448, [2] * 5), (1024, [1] * 10)])
def test_larger_images_come_in_smaller_batches(side, sizes):
    """All layers of a batch are in memory: those of 8 images in a ViT-B/14 at 518 px would take 5 GB."""
    model = Model.from_module(Small(), replace(PREPROCESSING, input_size=(3, side, side)), name="small")
    engine, seen = convert(model), []
    given = engine.layers
    engine.layers = lambda x: seen.append(len(x)) or given(x)
    assert verify(engine, model, images=10, progress=False).ok and seen == sizes


def test_images_that_cannot_be_read_are_left_out(eager, vit_shapes20, shapes20, tmp_path):
    folder = tmp_path / "val"
    for i in range(4):
        sample = shapes20[i]
        (folder / sample.class_id).mkdir(parents=True, exist_ok=True)
        (folder / sample.class_id / sample.file).write_bytes(sample.image if i != 2 else sample.image[:100])
    (tmp_path / "classes.csv").write_text(
        "label,wnid,ilsvrc_id,name\n"
        + "".join(f"{k},{wnid},{k + 1},{wnid}\n" for k, wnid in enumerate(shapes20.classes))
    )
    report = verify(eager, vit_shapes20, tmp_path, images=4, progress=False)
    assert report.overall["images"].tolist() == [3, 4] and report.accuracy["images"] == 3
    for path in folder.glob("*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(VitdemoError, match="none of 4 images can be read"):
        verify(eager, vit_shapes20, folder, images=4, progress=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(images=0), "images 0: must be a whole number of at least 1"),
        (dict(images=2.5), "images 2.5: must be"),
        (dict(data="/nowhere"), "/nowhere: no such file or folder"),
        (dict(engine=("null", "none")), "null none: there are tolerances for fp32, fp16, bf16, int8 only"),
        (dict(model="resnet18"), "eager fp32 was made from a model of other classes than resnet18"),
    ],
)
def test_bad_input_is_one_line(vit_shapes20, change, message):
    engine = convert(vit_shapes20, *change.pop("engine", ("eager", "fp32")))
    model = load_model(change.pop("model"), "random") if "model" in change else vit_shapes20
    with pytest.raises(VitdemoError, match=message) as error:
        verify(engine, model, **change)
    assert "\n" not in str(error.value)


def test_a_precision_of_an_unknown_noise_floor_is_refused(vit_shapes20, monkeypatch):
    """And not held against int8's, which is wider than that of any other."""
    monkeypatch.setitem(TOLERANCES, "fp12", TOLERANCES["bf16"])
    with pytest.raises(VitdemoError, match="fp12: no other way to compute in it is known, so no noise floor"):
        verify(Altered(vit_shapes20, "fp12"), vit_shapes20, images=1, progress=False)


def test_models_and_data_that_do_not_belong_together(eager, vit_shapes20, shapes20):
    resnet = load_model("resnet18", "random")
    info = replace(resnet.info, preprocessing=replace(resnet.info.preprocessing, crop_pct=0.5))
    cases = [
        (convert(resnet), resnet, shapes20, "no output of resnet18 is its class 'n90382915'"),
        (convert(resnet), Model(resnet.module, info), None, "images with crop_pct 0.95, resnet18 is for 0.5"),
        (convert(small_model(outputs=2)), small_model(), None, r"logits \[8, 2\] where the model gives \[8, 3\]"),
        (convert(small_model()), small_with_wide_first(), None, r"layer first: \[8, 4, 4, 4\] in the engine, \[8, 5"),
    ]
    for engine, model, data, message in cases:
        with pytest.raises(VitdemoError, match=message) as error:
            verify(engine, model, data, progress=False)
        assert "\n" not in str(error.value)


def small_with_wide_first() -> Model:
    module = Small()
    module.first, module.last = nn.Conv2d(3, 5, 3, stride=8), nn.Linear(5, 3)
    return Model.from_module(module, PREPROCESSING, name="small")


def test_an_engine_that_breaks_is_named(vit_shapes20):
    def broken(logits, x):
        raise RuntimeError("out of registers")

    with pytest.raises(EngineFailure, match="the altered engine failed: out of registers"):
        verify(Altered(vit_shapes20, logits=broken), vit_shapes20, images=1, progress=False)


def test_error_over_depth_figure(eager_reports):
    ax = plot_error_over_depth(list(eager_reports.values())).axes[0]
    assert [line.get_label() for line in ax.lines][:2] == ["eager fp32", "eager bf16"]
    assert ax.lines[1].get_ydata() == pytest.approx(eager_reports["bf16"].layers.query("kind == 'real'")["relative_l2"])
    assert (ax.lines[0].get_ydata() > 0).all() and ax.get_yscale() == "log"
    assert {text.get_text() for text in ax.texts} == {"fp32\ntolerance", "bf16\ntolerance"}
    assert len(ax.get_xticklabels()) == 1 + 3 * 6 + 2


def test_every_engine_looks_different():
    looks = [engine_look(*pair) for pair in PAIRS]
    assert len({(look["color"], look["marker"], look["linestyle"]) for look in looks}) == len(PAIRS)


def test_flips_figure_without_flips(eager_reports, shapes20):
    assert plot_flips(eager_reports["bf16"], shapes20).texts[0].get_text() == "no answer flipped in 16 images"


@pytest.fixture(scope="module")
def openvino(vit_shapes20):
    if ("openvino", "fp32") not in PAIRS:
        pytest.skip("no openvino engine")
    return convert(vit_shapes20, "openvino", "fp32")


def test_compiled_engine_passes_and_another_model_does_not(openvino, vit_shapes20, shapes20):
    report = verify(openvino, vit_shapes20, shapes20, images=8, progress=False)
    assert report.ok, str(report)
    assert 0 < report.layers["relative_l2"].max() < 1e-5
    module, own = copy.deepcopy(vit_shapes20.module), vit_shapes20.info.preprocessing
    module.norm.eps = 1.0
    for other in (  # of the same weights
        Model(module, vit_shapes20.info),
        Model(vit_shapes20.module, replace(vit_shapes20.info, preprocessing=replace(own, mean=(0.1,) * 3))),
    ):
        assert not verify(openvino, other, shapes20, images=8, progress=False).ok


@pytest.mark.soak
@pytest.mark.parametrize("engine, precision", NATIVE_PAIRS)
def test_every_pair_passes(vit_shapes20, shapes20, engine, precision):
    report = verify(convert(vit_shapes20, engine, precision), vit_shapes20, shapes20, progress=False)
    assert report.ok, str(report)


@pytest.mark.soak
@pytest.mark.parametrize("engine, precision", NATIVE_PAIRS)
@pytest.mark.parametrize("matrix", BRANCH)
@pytest.mark.parametrize("block", range(6))
def test_every_scaled_weight_is_found(vit_shapes20, shapes20, engine, precision, matrix, block):
    images = calibration_for(vit_shapes20).pixels[:32] if precision == "int8" else None
    model = with_scaled_weight(vit_shapes20, block, matrix, SCALE[precision])
    report = verify(convert(model, engine, precision, calibration=images), vit_shapes20, shapes20, images=16)
    assert report.first_bad_layer == f"blocks.{block}.{BRANCH[matrix]}", str(report)


@pytest.mark.soak
@pytest.mark.parametrize("engine, precision", NATIVE_PAIRS)
def test_mistakes_of_real_systems(vit_shapes20, shapes20, engine, precision):
    imagenet = with_mean_and_std(vit_shapes20, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = calibration_for(vit_shapes20).pixels[:32] if precision == "int8" else None
    report = verify(convert(imagenet, engine, precision, calibration=images), vit_shapes20, shapes20, images=16)
    assert report.first_bad_layer == "patch_embed", str(report)
    other = convert(with_norm_eps(vit_shapes20, 1e-5), engine, precision, calibration=images)
    report = verify(other, vit_shapes20, shapes20, images=16)
    assert report.first_bad_layer == ("blocks.0.attn" if precision == "fp32" else None), str(report)
