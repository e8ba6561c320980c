"""The codecs: what each promises, on values of many orders of magnitude."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bad_input import each_of, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl_optim.importance import codecs
from cl_optim.importance.errors import LogError


def fisher_like(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(1.5).exp() * 1e-5


VALUES = {
    "linear": fisher_like(70, 90),
    "conv": fisher_like(8, 4, 3, 3, seed=1),
    "bias": fisher_like(77, seed=2),
    "scalar": fisher_like(seed=3),
    "empty": torch.zeros(0, 5),
    "zeros": torch.zeros(600),
}
SHAPES = [(), (0,), (1,), (255,), (256,), (257,), (0, 3), (3, 0), (17, 31), (5, 4, 3)]


def decoded(name: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    how = codecs.codec(name)
    encode = how.encoder(values)
    result = {}
    for key, value in values.items():
        parts = encode(value)
        assert tuple(parts) == how.parts
        result[key] = how.decode(parts, value.shape)
        assert result[key].dtype == torch.float32
        assert result[key].shape == value.shape
    return result


@pytest.mark.parametrize(
    ("name", "error"), [("float32", 0.0), ("bfloat16", 2**-8), ("log8", 0.045)]
)
def test_every_weight_is_within_the_codecs_error(name, error):
    for key, value in decoded(name, VALUES).items():
        torch.testing.assert_close(value, VALUES[key], rtol=error, atol=0)


@pytest.mark.parametrize("name", codecs.NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(name, shape):
    value = fisher_like(*shape)
    found = decoded(name, {"a": value})["a"]
    assert found.isfinite().all()
    if value.dim() < 2 and name == "rank1":
        torch.testing.assert_close(found, value)  # a vector is its own row
    assert found.double().sum().item() == pytest.approx(value.double().sum().item(), rel=0.05)


def test_topk_keeps_the_top_set_and_each_blocks_sum():
    found = decoded("topk", VALUES)
    every = np.concatenate([value.reshape(-1).numpy() for value in VALUES.values()])
    count = int(np.ceil(0.05 * len(every)))
    threshold = np.sort(every)[::-1][count - 1]
    for key, value in VALUES.items():
        kept = found[key][value >= threshold]
        rest = found[key][value < threshold]
        assert (kept >= threshold * (1 - 1e-6)).all()
        assert (rest <= threshold).all()
        for block, original in zip(
            found[key].reshape(-1).split(256), value.reshape(-1).split(256), strict=True
        ):
            torch.testing.assert_close(block.sum(), original.sum(), rtol=1e-5, atol=0)


def test_rank1_keeps_the_sums_of_rows_and_columns():
    found = decoded("rank1", VALUES)["conv"].view(8, -1)
    expected = VALUES["conv"].view(8, -1)
    torch.testing.assert_close(found.sum(0), expected.sum(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.sum(1), expected.sum(1), rtol=1e-5, atol=0)
    product = torch.outer(fisher_like(9), fisher_like(7, seed=5))
    torch.testing.assert_close(decoded("rank1", {"a": product})["a"], product, rtol=1e-5, atol=0)


@given(
    name=st.sampled_from(codecs.NAMES),
    values=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40),
    rows=st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_any_values_stay_finite_and_at_least_0(name, values, rows):
    value = torch.tensor(values).repeat(rows).view(rows, -1)
    found = decoded(name, {"a": value})["a"]
    assert found.isfinite().all()
    assert (found >= 0).all()
    if not value.any():
        assert not found.any()


@pytest.mark.parametrize("name", codecs.NAMES)
def test_measure(name):
    how = codecs.codec(name)
    error = codecs.measure(how, VALUES)
    found = torch.cat([value.reshape(-1) for value in decoded(name, VALUES).values()]).double()
    given = torch.cat([value.reshape(-1) for value in VALUES.values()]).double()
    size = sum(t.nbytes for v in VALUES.values() for t in how.encoder(VALUES)(v).values())
    assert error.bytes_per_weight == size / len(given)
    assert error.relative == pytest.approx(((found - given).norm() / given.norm()).item(), abs=1e-9)
    nonzero = given > 0
    largest = ((found - given).abs() / given)[nonzero].max().item()
    assert error.largest == pytest.approx(largest, rel=1e-6)
    tops = [set(np.argsort(-v.float().numpy(), kind="stable")[: round(0.05 * len(v))])
            for v in (given, found)]  # fmt: skip
    assert error.top_overlap == pytest.approx(len(tops[0] & tops[1]) / len(tops[0]))
    assert error.underflows == 0


def test_measure_counts_underflows():
    value = torch.tensor([1.0, 1e-12, 0.0])
    assert codecs.measure(codecs.codec("log8"), {"a": value}).underflows == 1


def test_codes_of_an_earlier_version_are_refused():
    log8, shape = codecs.codec("log8"), torch.Size([300])
    parts = log8.encode(torch.rand(300))
    scales = parts["blocks"][:, :4].contiguous().view(torch.float32) * 1.001
    parts["blocks"][:, :4] = scales.view(torch.uint8)
    with pytest.raises(LogError, match=r"^log8 codes of an earlier .* record the"):
        log8.decode(parts, shape)


BAD = [
    ("zip", {"name": "zip"}, ValueError, r"^codec must be one of \('float32', .* not 'zip'"),
    ("float16", {"name": torch.float16}, ValueError, "not 'float16'"),
    *((f"topk of {bad}", {"name": "topk", "fraction": bad},
       ValueError, r"^fraction must be in \(0, 1\), not") for bad in (0.0, 1.0, math.nan)),
]  # fmt: skip


def test_a_dtype_is_as_good_as_its_name():
    assert codecs.codec(torch.bfloat16).name == "bfloat16"


@each_of(BAD)
def test_bad_codecs_are_refused(given, error, message):
    with refused(error, message):
        codecs.codec(**given)
