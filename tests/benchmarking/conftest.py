"""One small sweep that the tests of its files, tables and figures share."""

import pytest

from vitdemo import benchmark

PAIRS = ["eager:fp32", "openvino:fp32", "openvino:int8"]
OPTIONS = dict(engines=PAIRS, device_batch_sizes=[3, 1], row_budget_s=2.0, images=40)


@pytest.fixture(scope="session")
def sweep_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    benchmark("vit_shapes20", out=folder, **OPTIONS)
    return folder


@pytest.fixture(scope="session")
def rows(sweep_folder):
    from vitdemo import merge

    return merge([sweep_folder])
