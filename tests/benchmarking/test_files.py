"""Sweeps joined by column name, other projects' layouts of them, and what is refused."""

import re

import numpy as np
import pandas as pd
import pytest

from data.results import record as recorded_module
from data.results.record import BEGIN, END, NUMBERS, README, full_table, readme_table, recorded, shown
from vitdemo import VitdemoError, merge
from vitdemo.benchmarking.files import PATTERN, read_perf
from vitdemo.benchmarking.tables import aitemplate_table, laid_out, markdown, page, ttmetal_table
from vitdemo.cli import main
from vitdemo.paths import REPOSITORY, data_path


@pytest.fixture
def copied(sweep_folder, tmp_path):
    """The sweep's CSV in a folder of its own, to spoil."""
    (path,) = sweep_folder.glob(PATTERN)
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    return copy


def test_old_and_new_files_are_joined_by_name(copied, sweep_folder):
    old = read_perf(copied)
    old = old[[name for name in reversed(old.columns) if name not in ("std_ms", "turns")]]
    old.assign(machine="another", commit="0ld", setting="from long ago").to_csv(copied, index=False)
    both = merge([sweep_folder, copied.parent])
    assert len(both) == 2 * len(old) and list(both.columns)[:3] == ["model", "weights", "engine"]
    late = both[both["machine"] == "another"]
    assert set(late["commit"]) == {"0ld"} and set(late["setting"]) == {"from long ago"} and late["std_ms"].isna().all()
    ours = both[both["machine"] != "another"]
    assert (ours["p50_ms"].to_numpy() == late["p50_ms"].to_numpy()).all()
    assert merge([sweep_folder, sweep_folder]).equals(merge([sweep_folder])), "a folder named twice is read once"


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda text: text.replace("images_per_s", "fps", 1), "the column 'images_per_s' is missing"),
        (lambda text: text.replace("p50_ms,", "", 1), "its rows have more values"),
        (lambda text: "file,label\na,1\n", "the column 'model' is missing"),
        (lambda text: "", "not a table of vitdemo's"),
        (lambda text: text + 'a,"b\n' + "c" * 200_000, "not a table of vitdemo's"),
        (lambda text: "\x00\x01", "not a table of vitdemo's"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_by_its_name(spoil, what, copied, capsys):
    copied.write_text(spoil(copied.read_text()))
    with pytest.raises(VitdemoError, match=what) as refused:
        merge([copied.parent])
    assert str(refused.value).startswith(str(copied)) and "\n" not in str(refused.value)
    out = copied.with_name("perf.csv")
    assert main(["merge", str(copied.parent), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"vitdemo: {copied}") and not out.exists()


@pytest.mark.parametrize("commit", ["0123456", "12345e7"])
def test_a_commit_is_no_number(commit, copied):
    read_perf(copied).assign(commit=commit, artifact="00", model="12").to_csv(copied, index=False)
    found = merge([copied])
    assert set(found["commit"]) == {commit} and set(found["artifact"]) == {"00"} and set(found["model"]) == {"12"}


def test_a_table_for_a_page_shows_what_a_runtime_said(copied):
    rows = merge([copied])
    assert "failed: &lt;class x&gt;" in page(rows.assign(status="failed: <class x>"))


def test_the_last_sweep_is_the_one_with_the_latest_time(copied, tmp_path, monkeypatch):
    rows = read_perf(copied)
    copied.unlink()
    for name, rate in {"random-2-cores_2026-01-01": 1.0, "pretrained-16-cores_2026-02-01": 2.0}.items():
        rows.assign(images_per_s=rate).to_csv(tmp_path / f"perf_m_{name}_000000_1.csv", index=False)
    monkeypatch.setattr(recorded_module, "data_path", lambda _: tmp_path)
    assert set(recorded("here")["images_per_s"]) == {2.0}


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert main(["merge", str(tmp_path), "--out", str(tmp_path / "perf.csv")]) == 2
    assert f"{tmp_path}: holds no perf_*.csv" in capsys.readouterr().err


def test_bad_options_are_one_line(tmp_path, capsys):
    for options, what in [
        (["--device-batch-sizes", "one"], "'one': give whole numbers"),
        (["--against", str(tmp_path / "none.csv")], "none.csv: no such file"),
        (["--worse-by", "20"], "between 0 and 1"),
    ]:
        try:
            code = main(["benchmark", "vit_shapes20", *options, "--out", str(tmp_path)])
        except SystemExit as end:  # the parser's
            code = end.code
        said = capsys.readouterr().err
        assert (code, said.count("\n")) == (2, 1) and what in said, said


def test_tt_metals_row(rows):
    table = ttmetal_table(rows)
    assert list(table["Batch"]) == list(rows["batch"])
    cold = table[table["Compile Time (sec)"] != "warm"].astype({"First Run (sec)": float, "Compile Time (sec)": float})
    assert np.allclose(cold["First Run (sec)"] - cold["Second Run (sec)"], cold["Compile Time (sec)"])
    rate = table["Batch"] / table["Inference Time (sec)"]
    assert np.allclose(rate, table["Throughput (batch*inf/sec)"], rtol=1e-3)
    eager = rows[rows["engine"] == "eager"].set_index("batch")["images_per_s"]
    assert list(table["Throughput CPU (batch*inf/sec)"]) == [eager[batch] for batch in table["Batch"]]


def test_aitemplates_table(rows):
    table = aitemplate_table(rows).set_index(["Engine", "Batch size"])
    assert set(table.index) == {(f"openvino {p}", b) for p in ("fp32", "int8") for b in (1, 3)}
    assert set(table.loc["openvino fp32", "Precision"]) == {"equal"}
    assert set(table.loc["openvino int8", "Precision"]) == {"mixed (PT in fp32)"}
    for (engine, batch), line in table.iterrows():
        name, precision = engine.split()
        same = (rows["engine"] == name) & (rows["precision"] == precision) & (rows["batch"] == batch)
        ratio = "speedup_equal_precision" if precision == "fp32" else "speedup_over_eager_fp32"
        assert line["Speedup"] == rows.loc[same, ratio].item()


@pytest.mark.parametrize("layout", [[], ["--layout", "ttmetal"], ["--layout", "aitemplate"]])
@pytest.mark.parametrize("ending", ["csv", "md", "html"])
def test_each_layout_in_each_form(layout, ending, sweep_folder, tmp_path):
    out = tmp_path / f"perf.{ending}"
    assert main(["merge", str(sweep_folder), "--out", str(out), *layout]) == 0
    if ending == "csv":
        assert len(pd.read_csv(out)) == (4 if "aitemplate" in layout else 6)
    else:
        assert out.read_text().count("vit_shapes20") >= 4


def test_other_forms_are_refused(sweep_folder, tmp_path, capsys):
    assert main(["merge", str(sweep_folder), "--out", str(tmp_path / "perf.xlsx")]) == 2
    assert main(["merge", str(sweep_folder), "--out", str(tmp_path / "perf.csv"), "--layout", "mlperf"]) == 2
    assert main(["merge", str(sweep_folder), "--out", str(tmp_path / "perf_all.csv")]) == 2
    assert "is a sweep's; give the table another" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_sweeps_are_not_mixed_in_a_layout(rows):
    slower = rows.assign(file="perf_b.csv", mean_ms=10 * rows["mean_ms"], images_per_s=rows["images_per_s"] / 10)
    table = aitemplate_table(pd.concat([rows, slower], ignore_index=True))
    ratio = table["QPS (im/s)"] / table["PT QPS (im/s)"]
    assert np.allclose(ratio[:4], ratio[4:])


def test_a_column_that_a_layout_needs_is_named(rows):
    with pytest.raises(VitdemoError, match="no column 'mean_ms'"):
        laid_out(rows.drop(columns="mean_ms"), "ttmetal")


def test_numbers_for_people():
    assert "0.00432" in markdown(pd.DataFrame({"a": [0.00432]})), "tt-metal's tables print this as 0.00"


def test_the_two_ratios_that_are_told_are_those_of_the_recorded_rows():
    told = r"OpenVINO fp32 is ([\d.]+) times as fast as eager on .* but (?:only )?([\d.]+) times"
    readme, numbers = ((REPOSITORY / path).read_text() for path in ("README.md", "docs/numbers.md"))
    here, there, low, high = re.search(told + r" \(([\d.]+) to ([\d.]+)\)", numbers).groups()
    assert re.search(told, readme).groups() == (here, there)
    for name, ratios in (("intel-xeon-amx-2-cores", (there, low, high)), (shown(), (here,))):
        rows = recorded(name)
        own = (rows["engine"] == "openvino") & (rows["precision"] == "fp32") & (rows["model"] == "vit_base_patch16_224")
        (found,) = rows[own & (rows["device_batch_size"] == 8)].to_dict("records")
        names = ("speedup_equal_precision", "speedup_equal_precision_low", "speedup_equal_precision_high")
        assert all(f"{found[name]:.2f}" == ratio for name, ratio in zip(names, ratios, strict=False))


def test_the_readmes_findings_are_recorded():
    text = (REPOSITORY / "README.md").read_text()
    real = pd.read_csv(data_path("results/amd-epyc-avx2-2-cores/real_models.csv")).set_index(
        ["model", "engine", "precision"]
    )
    row = real.loc[("tf_efficientnet_lite0.real", "onnx", "int8")]
    assert f"agreement {row['agreement'] + 1e-6:.1f} % on {row['crops']} crops" in text
    assert round(1 / (1 - row["agreement"] / 100)) == 13
    rows = pd.read_csv(data_path(f"results/{shown()}/single_device.csv"))
    rates = rows[rows["part"].str.startswith("vit_shapes20")].set_index("what")["median"]
    told = [f"{rates[what]:.0f}" for what in ("openvino int8, random input", "openvino int8, files", "baseline")]
    assert re.search(r"computes (\d+) images/s on .* and (\d+) from .* reaches (\d+) ", text).groups() == tuple(told)


def test_the_tables_that_are_shown_are_those_of_the_recorded_rows():
    rows = recorded(shown())
    for path, table in ((README, readme_table), (NUMBERS, full_table)):
        assert BEGIN.format(shown()) + table(rows) + END in path.read_text()
    assert rows["agreement"].min() >= 0.98
