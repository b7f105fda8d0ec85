"""One device, one thread: what replicas of one core each have to repeat; and an end for Ray."""

import pytest

from vitdemo import convert, evaluate, stop_ray


@pytest.fixture(scope="session", autouse=True)
def ray():
    """The session's own, if any test starts it."""
    yield
    stop_ray()


@pytest.fixture(scope="session")
def one_thread(vit_shapes20):
    """The engine that each of two replicas has on two cores."""
    return convert(vit_shapes20, "eager", "fp32", device="cpu", threads=1)


@pytest.fixture(scope="session")
def alone(one_thread, shapes20, tmp_path_factory):
    """The same images on one device, one thread."""
    return evaluate(one_thread, shapes20, limit=203, out=tmp_path_factory.mktemp("alone") / "out", progress=False)
