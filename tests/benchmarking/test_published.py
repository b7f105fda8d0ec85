"""The published performance tables: whole, with the digits and units they should have, and adding up."""

import pytest

from tests.benchmarking.arithmetic import arithmetic_errors
from vitdemo.benchmarking.tables import published_performance

AITEMPLATE = "AITemplate examples/04_vit/README.md"
FX2AIT = "AITemplate fx2ait/fx2ait/example/02_vision_model/README.md"
FLAGPERF = "FlagPerf inference/benchmarks/vit_l_16/README.md"
TT_METAL = "tt-metal docs/source/ttnn/tt_metal_models/get_performance.rst"
T3000 = "tt-metal models/demos/t3000/vit/README.md"
GCD, GCDS = "AMD MI-250, 1 GCD", "AMD MI-250, 2 GCDs"


@pytest.fixture
def table():
    return published_performance()


def only(table, **values) -> int:
    """The index of the one row with these values."""
    (index,) = table.index[(table[list(values)] == list(values.values())).all(axis=1)]
    return index


def found(errors) -> list[tuple]:
    return [(index, row.what) for index, row in zip(errors.index, errors.itertuples(), strict=True)]


# the table


def test_there_is_a_row_for_each_side_of_each_published_row(table):
    batches = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    ours = table[table["source"] == AITEMPLATE]
    for hardware in ("NVIDIA A100-40GB", GCD, GCDS):
        for model in ("vit_base_patch16_224", "vit_large_patch16_384"):
            for system in ("PyTorch 1.12 eager", "AITemplate"):
                rows = ours[(ours["hardware"] == hardware) & (ours["model"] == model) & (ours["system"] == system)]
                assert rows["batch"].tolist() == batches
                assert (rows["baseline"] == (system != "AITemplate")).all()
                assert (rows["devices"] == (2 if hardware == GCDS else 1)).all()
    fx2ait = table[table["source"] == FX2AIT]
    assert fx2ait.groupby("system")["batch"].apply(list).to_dict() == dict.fromkeys(
        ["FX2AIT", "PyTorch 1.12 eager"], [1, 8, 16, 32, 256, 512]
    )
    flagperf = table[table["source"] == FLAGPERF]
    assert flagperf[~flagperf["baseline"]]["precision"].tolist() == ["fp16", "fp32", "W32A16"]
    assert flagperf[flagperf["baseline"]]["precision"].tolist() == ["fp16", "fp32", ""]
    assert table[table["source"] == TT_METAL]["hardware"].tolist() == ["CPU", "Grayskull"]
    assert table["source"].value_counts().to_dict() == {AITEMPLATE: 108, FX2AIT: 12, FLAGPERF: 6, TT_METAL: 2, T3000: 1}


def test_every_published_number_is_there(table):
    numbers = table.select_dtypes("float64").columns
    filled = {source: rows[numbers].notna().sum() for source, rows in table.groupby("source")}
    assert {source: counts[counts > 0].to_dict() for source, counts in filled.items()} == {
        AITEMPLATE: {"latency_ms": 104, "images_per_s": 104},  # 108 rows, 4 of them blank
        FX2AIT: {"latency_ms": 12, "images_per_s": 12, "speedup": 6},
        FLAGPERF: {
            "images_per_s": 5,
            "mfu_percent": 3,
            "top1_percent": 6,
            "memory_gib": 2,
            "memory_total_gib": 2,
            "e2e_s": 3,
            "images_per_s_whole": 5,
        },
        TT_METAL: {"latency_ms": 2, "images_per_s": 2, "first_run_s": 1, "second_run_s": 1, "compile_s": 1},
        T3000: {},
    }
    blank = table[table[numbers].isna().all(axis=1)]
    assert (blank.loc[blank["source"] == AITEMPLATE, ["hardware", "batch"]] == [GCDS, 1]).all(axis=None)
    assert blank["note"].tolist() == ["left blank in the source"] * 4 + ["not published"]


def test_numbers_are_the_published_ones_in_the_units_of_their_columns(table):
    def row(**values):
        return table.loc[only(table, **values)]

    a100 = {"source": AITEMPLATE, "hardware": "NVIDIA A100-40GB", "model": "vit_base_patch16_224", "batch": 8}
    eager, engine = row(**a100, baseline=True), row(**a100, baseline=False)
    assert (eager["latency_ms"], eager["images_per_s"]) == (5.56, 1439.03)
    assert (engine["latency_ms"], engine["images_per_s"]) == (2.20, 3642.16)
    fx2ait = row(source=FX2AIT, system="FX2AIT", batch=512)
    assert (fx2ait["latency_ms"], fx2ait["speedup"], fx2ait["note"]) == (23.47752, 1.39548442, "printed as ms, is s")
    assert row(source=FX2AIT, baseline=True, batch=512)["latency_ms"] == 32.76252
    validation, engine = row(source=FLAGPERF, batch=64, baseline=True), row(source=FLAGPERF, batch=64, baseline=False)
    assert validation[["images_per_s_whole", "images_per_s", "top1_percent"]].tolist() == [777.8, 796.7, 79.3]
    assert engine[["images_per_s_whole", "images_per_s", "top1_percent"]].tolist() == [825.8, 1329.2, 79.0]
    assert engine[["e2e_s", "mfu_percent", "memory_gib", "memory_total_gib"]].tolist() == [1009.7, 26.2, 35.0, 40.0]
    cpu, grayskull = row(hardware="CPU"), row(hardware="Grayskull")
    assert (cpu["latency_ms"], grayskull["latency_ms"]) == (290, 16050)
    assert grayskull["images_per_s"] / cpu["images_per_s"] == pytest.approx(0.018, abs=0.0005)
    assert row(hardware="T3000")[["devices", "batch"]].tolist() == [8, 64]


# its arithmetic


def test_every_published_table_adds_up_within_the_rounding_of_its_digits(table):
    assert arithmetic_errors(table).empty


def test_a_wrong_latency_is_found_in_every_row_that_has_one(table):
    table["latency_ms"] *= 1.05
    errors = arithmetic_errors(table)
    assert found(errors) == [(index, "images_per_s") for index in table.index[table["latency_ms"].notna()]]
    assert len(errors) == 104 + 12 + 2
    # The quotient of two latencies, and so the speedup, is as before. The coarsest latency, 0.29 s, may be 2 % off.
    assert errors["off"].between(1 / 1.05 - 1 - 0.02, 1 / 1.05 - 1 + 0.02).all()


def test_an_error_says_where_it_is_and_how_large(table):
    row = only(table, hardware=GCDS, model="vit_base_patch16_224", batch=8, baseline=False)
    table.loc[row, "latency_ms"] = 4.23 * 1.05
    errors = arithmetic_errors(table)
    assert found(errors) == [(row, "images_per_s")]
    error = errors.loc[row]
    where = ["source", "system", "hardware", "model", "batch"]
    assert error[where].tolist() == [AITEMPLATE, "AITemplate", GCDS, "vit_base_patch16_224", 8]
    assert error["printed"] == 1889.44
    assert error["recomputed"] == pytest.approx(8 / (4.23e-3 * 1.05))
    assert error["off"] == pytest.approx(8 / (4.23e-3 * 1.05) / 1889.44 - 1)


def test_a_printed_zero_counts_as_a_digit(table):
    # 2.20 ms may be 2.195 to 2.205; as 2.2 it might be 2.15 to 2.25, and an error of 1 % would pass.
    row = only(table, hardware="NVIDIA A100-40GB", model="vit_base_patch16_224", batch=8, system="AITemplate")
    table.loc[row, "latency_ms"] = 2.20 * 1.01
    assert found(arithmetic_errors(table.loc[[row]])) == [(row, "images_per_s")]
    table.loc[row, "latency_ms"] = 2.195
    assert arithmetic_errors(table.loc[[row]]).empty


def test_a_wrong_speedup_or_either_side_of_it_is_found(table):
    sides = {"source": FX2AIT, "batch": 32}
    baseline, engine = only(table, **sides, baseline=True), only(table, **sides, baseline=False)

    def errors(row, column):
        wrong = table.copy()
        wrong.loc[row, column] *= 1.0001
        return found(arithmetic_errors(wrong))

    assert errors(engine, "speedup") == [(engine, "speedup")] * 2  # neither latencies nor rates give it
    for column in ("latency_ms", "images_per_s"):
        assert errors(engine, column) == [(engine, "images_per_s"), (engine, "speedup")]
        assert errors(baseline, column) == [(baseline, "images_per_s"), (engine, "speedup")]


def test_a_wrong_compile_time_is_found(table):
    row = only(table, hardware="Grayskull")
    table.loc[row, "compile_s"] = 14.47  # 30.514 - 16.046 would be printed like this
    assert arithmetic_errors(table).empty
    table.loc[row, "compile_s"] = 14.48
    (error,) = arithmetic_errors(table).itertuples()
    assert (error.Index, error.what, error.printed) == (row, "compile_s", 14.48)
    assert error.recomputed == pytest.approx(14.46)
