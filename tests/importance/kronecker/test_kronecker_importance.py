"""KroneckerImportance: everything that an importance is, against its dense Fisher matrices."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
from dataclasses import replace

import pytest
import torch
from bad_input import each_of, refused
from damage import flipped
from kronecker_cases import dense, factors_of, importance_of
from safetensors.torch import load_file

from cl_optim import Importance, KroneckerImportance
from cl_optim.importance import sealed_safetensors, statistics
from cl_optim.importance.errors import DamagedError
from cl_optim.importance.kronecker.factors import Factors, Layout, Term, from_sums
from cl_optim.importance.kronecker.side import Side

NAMES = [
    "fc.weight", "fc.bias", "mlp.weight", "conv.weight", "conv.bias", "table.weight", "norm.weight",
]  # fmt: skip
SHAPES = [(5, 7), (5,), (6, 4), (3, 2, 2, 2), (3,), (9, 3), (6,)]


@pytest.fixture
def importance() -> KroneckerImportance:
    return importance_of(0)


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The matrices whose diagonals were made since."""
    calls = []
    for name in ("diagonal", "bias_diagonal"):
        original = getattr(Factors, name)
        monkeypatch.setattr(
            Factors, name, lambda self, of=original, n=name: calls.append(n) or of(self)
        )
    return calls


def assert_same(found: KroneckerImportance, expected: KroneckerImportance) -> None:
    """Bit for bit, factors and all."""
    assert type(found) is KroneckerImportance
    assert list(found) == list(expected)
    assert (found.samples, found.tokens) == (expected.samples, expected.tokens)
    assert found.metadata == expected.metadata
    for weight, one in expected.factors.items():
        other = found.factors[weight]
        assert other.layout == one.layout
        assert torch.equal(other.scale, one.scale)
        for here, there in ((other.output, one.output), (other.input, one.input)):
            assert (here.size, here.tail, here.kept) == (there.size, there.tail, there.kept)
            assert torch.equal(here.values, there.values)
            assert (here.basis is None) == (there.basis is None)
            assert here.basis is None or torch.equal(here.basis, there.basis)
    for name, value in expected.unfactored.items():
        assert torch.equal(found.unfactored[name], value)


def assert_close(found, expected):
    assert dict(found).keys() == dict(expected).keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * float(value.max()))


# --- as a mapping ---------------------------------------------------------------------------------


def test_it_reads_as_the_diagonal(importance):
    assert list(importance) == NAMES
    assert len(importance) == 7
    assert "fc.bias" in importance
    assert "other" not in importance
    assert [tuple(shape) for shape in importance.shapes.values()] == SHAPES
    for name, one in importance.factors.items():
        weight, bias = one.layout.parameters(
            dense(one).diagonal().view(one.layout.outputs, one.layout.inputs)
        )
        torch.testing.assert_close(importance[name].double(), weight, rtol=1e-4, atol=1e-6)
        if bias is not None:
            torch.testing.assert_close(
                importance[one.layout.bias].double(), bias, rtol=1e-4, atol=1e-6
            )
    for name, shape in zip(NAMES, SHAPES, strict=True):
        value = importance[name]
        assert value.shape == shape
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.nbytes
        torch.testing.assert_close(importance.sums[name], 4 * value)
        torch.testing.assert_close(importance.per_token()[name], value * 4 / 32)
    table = from_sums(Layout((3, 2)), [Term(torch.rand(2), torch.rand(3), 1)], 1, 2048, 1.0, "w")
    KroneckerImportance({"w": table}, {}, 1)["w"].zero_()
    assert table.scale.any()
    assert importance != importance_of(0)  # Mapping's != would fail
    assert importance.get("other") is None


def test_each_diagonal_is_made_once(importance, made):
    """A bias's without its weight's; names, shapes and what is printed make none."""
    repr(importance), list(importance), dict(importance.shapes), importance.effective_ranks()
    importance.normalize()
    assert made == []
    once = ["diagonal"] * 4 + ["bias_diagonal"] * 2
    for use in (
        lambda: dict(importance), importance.per_layer, importance.diagonal,
        lambda: importance.top(0.1), lambda: importance.quantile(0.5),
    ):  # fmt: skip
        made.clear()
        use()
        assert sorted(made) == sorted(once)
    made.clear()
    importance.overlap(importance_of(1))
    assert sorted(made) == sorted(2 * once)


def test_repr(importance):
    assert repr(importance) == (
        "KroneckerImportance(7 parameters with 124 weights, 4 samples of 32 tokens in all, "
        "labels='sample')"
    )


def test_the_diagonal_alone(importance):
    diagonal = importance.diagonal()
    assert type(diagonal) is Importance
    assert diagonal.diagonal() is diagonal
    assert (diagonal.samples, diagonal.tokens) == (4, 32)
    assert diagonal.metadata == {"labels": "sample", "reduced": "diagonal"}
    assert_close(diagonal, importance)
    diagonal.sums["norm.weight"].zero_()
    assert importance["norm.weight"].all()


def test_statistics_are_those_of_the_diagonal(importance):
    diagonal, other = importance.diagonal(), importance_of(1)
    assert importance.per_layer() == diagonal.per_layer()
    assert importance.quantile(0.7) == diagonal.quantile(0.7)
    for name, mask in importance.top(0.3).items():
        assert torch.equal(mask, diagonal.top(0.3)[name])
    found = importance.overlap(other)
    assert found == diagonal.overlap(other.diagonal()) == diagonal.overlap(other)
    expected = statistics.overlap([dict(importance), dict(other)], 0.05)
    assert found["cosine"] == pytest.approx(float(expected.cosine[0, 1]))


def test_effective_ranks(importance):
    ranks = importance.effective_ranks()
    assert list(ranks) == list(importance.factors)
    for weight, found in ranks.items():
        one = importance.factors[weight]
        for side, rank in zip((one.output, one.input), found, strict=True):
            shares = side.values.double() / side.values.double().sum()
            entropy = -sum(share * math.log(share) for share in shares.tolist() if share)
            assert rank == pytest.approx(math.exp(entropy))


def test_to_another_device(importance):
    there = importance.to("meta")
    assert {value.device.type for value in there.unfactored.values()} == {"meta"}
    for one in there.factors.values():
        tensors = [one.scale, one.output.values, one.input.values, one.input.basis]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert there.metadata == importance.metadata
    assert there["fc.weight"].shape == (5, 7)
    assert_same(importance.to("cpu"), importance)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies(importance, copied):
    other = copied(importance)
    assert_same(other, importance)
    other.factors["fc.weight"].scale.zero_()
    assert importance["fc.weight"].any()


# --- arithmetic -----------------------------------------------------------------------------------


def test_normalize_scales_factors_and_sums(importance):
    normal = importance.normalize()
    assert type(normal) is KroneckerImportance
    assert torch.cat([value.flatten() for value in normal.values()]).mean() == pytest.approx(1.0)
    expected = importance.diagonal().normalize()
    assert_close(normal, expected)
    assert normal.samples == 1
    factor = normal.metadata["normalized_by"]
    assert factor == pytest.approx(expected.metadata["normalized_by"], rel=1e-6)
    for weight, one in normal.factors.items():
        whole = dense(importance.factors[weight])
        torch.testing.assert_close(
            dense(one) * factor, whole, rtol=1e-5, atol=1e-6 * float(whole.max())
        )
        assert torch.equal(one.input.values, importance.factors[weight].input.values)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_merge(importance, decay):
    newer = importance_of(1)
    merged = importance.merge(newer, decay, energy=1.0)
    assert type(merged) is KroneckerImportance
    assert list(merged) == NAMES
    assert merged.samples == 1
    assert [source["weight"] for source in merged.metadata["merged"]] == [decay, 1.0]
    for weight, one in importance.factors.items():
        expected = one.merged(newer.factors[weight], decay, 1.0, weight)
        assert torch.equal(merged.factors[weight].scale, expected.scale)
    torch.testing.assert_close(
        merged["norm.weight"], decay * importance["norm.weight"] + newer["norm.weight"]
    )
    again = merged.merge(importance_of(2))
    assert [source["weight"] for source in again.metadata["merged"]] == [decay, 1.0, 1.0]


def test_merge_keeps_what_one_of_them_has(importance):
    counts = (4, 32)
    factors = dict(importance.factors)
    fc = {"fc.weight": factors.pop("fc.weight")}
    old = KroneckerImportance(fc, {}, *counts)
    newer = KroneckerImportance(factors, importance.unfactored, *counts)
    merged = old.merge(newer, 0.5)
    assert list(merged)[:2] == ["fc.weight", "fc.bias"]
    assert set(merged) == set(NAMES)
    torch.testing.assert_close(merged["fc.weight"], 0.5 * importance["fc.weight"])
    torch.testing.assert_close(merged["norm.weight"], importance["norm.weight"])
    torch.testing.assert_close(merged["conv.bias"], importance["conv.bias"])
    # As if a task without any of it had come between.
    later = merged.merge(old, 1.0, energy=1.0)
    torch.testing.assert_close(later["fc.bias"], 1.5 * importance["fc.bias"])
    torch.testing.assert_close(
        newer.merge(old, 0.5)["norm.weight"], 0.5 * importance["norm.weight"]
    )


def test_merge_matches_names_across_wrappers(importance):
    wrapped = importance_of(1, "module.")
    merged = importance.merge(wrapped)
    assert_close(merged, importance.merge(importance_of(1)))
    assert merged.factors["fc.weight"].layout.bias == "fc.bias"
    other = wrapped.merge(importance)
    assert list(other) == [f"module.{name}" for name in NAMES]
    assert other.factors["module.fc.weight"].layout.bias == "module.fc.bias"
    assert importance.overlap(wrapped) == importance.overlap(importance_of(1))
    assert wrapped.factors["module.fc.weight"].layout.bias == "module.fc.bias"  # as it was


def test_merge_of_another_shape_keeps_the_newer_matrix(importance, caplog):
    """With its bias, which has no importance apart from the matrix's."""
    wider = {**importance_of(1).factors, "fc.weight": factors_of(Layout((5, 8), bias="fc.bias"))}
    newer = KroneckerImportance(wider, {"norm.weight": torch.rand(7)}, 4)
    with refused(
        ValueError, r"^'fc.weight' cannot be merged: its shapes are \(5, 7\) and \(5, 8\) "
    ):
        importance.merge(newer)
    with caplog.at_level(logging.WARNING):
        merged = importance.merge(newer, strict=False)
    assert "new shapes of 'fc.weight', 'norm.weight'" in caplog.text
    for name in ("fc.weight", "fc.bias", "norm.weight"):
        torch.testing.assert_close(merged[name], newer[name])
    assert_close(
        {"a": merged["mlp.weight"]}, {"a": importance.merge(importance_of(1))["mlp.weight"]}
    )


def test_merge_of_another_shape_and_kind_keeps_the_newer(importance):
    """A layer that has got factors, or has lost them, with its new shape."""
    factors = dict(importance.factors)
    del factors["fc.weight"]
    plain = {"fc.weight": torch.rand(5, 9), "fc.bias": torch.rand(5)}
    unfactored = KroneckerImportance(factors, plain, 1)
    merged = importance.merge(unfactored, strict=False)
    assert set(merged.unfactored) == {"fc.weight", "fc.bias", "norm.weight"}
    torch.testing.assert_close(merged["fc.bias"], plain["fc.bias"])
    back = KroneckerImportance(factors, {"fc.weight": torch.rand(5, 9)}, 1)
    merged = back.merge(importance, strict=False)
    assert "fc.weight" in merged.factors
    torch.testing.assert_close(merged["fc.weight"], importance["fc.weight"])
    alone = KroneckerImportance({}, {"fc.bias": torch.rand(3)}, 1)
    assert "fc.weight" not in importance.merge(alone, strict=False)


# --- on disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2, 2048])
def test_save_and_load(tmp_path, block):
    importance = importance_of(0, block=block)
    path = tmp_path / "task.safetensors"
    importance.save(path)
    assert_same(Importance.load(path), importance)
    assert_same(KroneckerImportance.load(str(path), "cpu"), importance)
    merged = importance.merge(importance_of(1, block=block))
    merged.save(path)
    assert_same(Importance.load(path), merged)
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    described = json.loads(json.loads(header)["__metadata__"]["factors"])
    assert described["fc.weight"]["bias"] == "fc.bias"
    importance.diagonal().save(path)
    assert type(Importance.load(path)) is Importance


def test_each_damaged_byte_and_cut_of_a_file_is_noticed(tmp_path):
    path = tmp_path / "x"
    KroneckerImportance({"w": factors_of(Layout((2, 1), bias="b"))}, {"n": torch.rand(2)}, 1).save(
        path
    )
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 7)]
    damaged += [flipped(whole, place, 1 << place % 8) for place in range(len(whole))]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)) as caught:
            Importance.load(path)
        assert caught.type in (ValueError, DamagedError)


def rewritten(path, change):
    """Write a file anew, sealed, with tensors and metadata that were changed."""
    tensors, header, _ = sealed_safetensors.load(path)
    change(tensors, header)
    own = {key: value for key, value in header.items() if "checksum" not in key}
    sealed_safetensors.save(tensors, path, own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, _: tensors["input.basis/mlp.weight"].mul_(1.1), "must be orthonormal"),
        (lambda tensors, _: tensors["scale/mlp.weight"].neg_(), "must be finite and at least 0"),
        (lambda tensors, _: tensors.pop("scale/mlp.weight"), "scale/mlp.weight"),
        (lambda _, header: header.pop("factors"), "factors"),
        (lambda _, header: header.update(factors=header["factors"].replace("[6, 4]", "[7, 4]")),
         "the input directions of the Kronecker factors of 'mlp.weight' must be .blocks"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_fisher_information_is_damaged(tmp_path, importance, change, message):
    path = tmp_path / "x"
    importance.save(path)
    rewritten(path, change)
    with pytest.raises(DamagedError, match=rf"^the file '.*/x' is damaged: .*{message}"):
        Importance.load(path)


def test_other_tools_read_the_tensors(tmp_path, importance):
    importance.save(tmp_path / "x")
    tensors = load_file(tmp_path / "x")
    assert torch.equal(tensors["sum/norm.weight"], importance.unfactored["norm.weight"])
    assert torch.equal(
        tensors["input.basis/fc.weight"], importance.factors["fc.weight"].input.basis
    )


# --- lazy -----------------------------------------------------------------------------------------


def test_lazy_reads_nothing_until_it_is_asked(importance):
    class Counting(dict):
        read = 0

        def __getitem__(self, key):
            self.read += 1
            return super().__getitem__(key)

    factors, sums = Counting(importance.factors), Counting(importance.unfactored)
    layouts = {weight: one.layout for weight, one in importance.factors.items()}
    lazy = KroneckerImportance.lazy(sums, 4, 32, {}, factors, layouts)
    assert list(lazy) == NAMES
    assert repr(lazy.renamed({"fc.bias": "other"}))
    assert "fc.weight" in lazy.factors
    assert lazy.shapes["conv.bias"] == (3,)
    assert (factors.read, sums.read) == (0, 0)
    assert torch.equal(lazy["fc.bias"], importance["fc.bias"])
    assert (factors.read, sums.read) == (1, 0)
    plain = KroneckerImportance.lazy({"a": torch.ones(2)}, 2, None, {})
    assert torch.equal(plain["a"], torch.full((2,), 0.5))
    assert plain.tokens is None


# --- bad input ------------------------------------------------------------------------------------


def changed(which, **values):
    """An importance whose factors have another side or scale."""
    one = factors_of(Layout((4, 3), bias="b"))
    if which == "scale":
        return KroneckerImportance({"w": replace(one, **values)}, {}, 1)
    side = replace(getattr(one, which), **values)
    return KroneckerImportance({"w": replace(one, **{which: side})}, {}, 1)


def without_fc(importance):
    factors = {name: one for name, one in importance.factors.items() if name != "fc.weight"}
    sums = {"fc.weight": torch.rand(5, 7), "fc.bias": torch.rand(5), **importance.unfactored}
    return KroneckerImportance(factors, sums, 1)


W = {"w": factors_of(Layout((4, 3), bias="b"))}
BAD = [
    ("a parameter twice", lambda *_: KroneckerImportance(W, {"w": torch.ones(4, 3)}, 1),
     ValueError, "^parameter 'w' has importance twice"),
    ("a bias twice", lambda *_: KroneckerImportance(W, {"b": torch.ones(4)}, 1),
     ValueError, "^parameter 'b' has importance twice"),
    ("a bias in two matrices", lambda *_: KroneckerImportance({**W, "v": W["w"]}, {}, 1),
     ValueError, "^parameter 'b' has importance twice"),
    ("no factors", lambda *_: KroneckerImportance({"w": torch.ones(2, 2)}, {}, 1),
     TypeError, r"^factors\['w'\] must be Factors"),
    ("no name", lambda *_: KroneckerImportance({0: W["w"]}, {}, 1),
     TypeError, r"^factors\[0\] must be Factors, with a text"),
    ("a sum that is none", lambda *_: KroneckerImportance(W, {"c": 1}, 1),
     TypeError, r"^sums\['c'\] must be a float32 or float64 tensor"),
    ("no samples", lambda *_: KroneckerImportance(W, {}, 0),
     ValueError, "^samples must be positive"),
    ("a side of another size", lambda *_: changed("input", size=5),
     ValueError, r"^the input side of the Kronecker factors of 'w' must have size 4, not 5"),
    ("a basis of another size", lambda *_: changed("input", basis=torch.eye(5)[None]),
     ValueError, r"^the input directions of .* 'w' must be \[blocks, .* not \[1, 5, 5\]"),
    ("fewer values than directions", lambda *_: changed("output", values=torch.ones(3)),
     ValueError, r"^the output directions of .* for 4 coordinates and 3 eigenvalues"),
    ("values without a basis", lambda *_: changed("output", values=torch.ones(3), basis=None),
     ValueError, r"output directions .* must be 4, with as many eigenvalues, not 3 and 4"),
    ("other directions than are kept", lambda *_: changed("input", kept=3),
     ValueError, r"^the input directions .* must be as many as are kept, 3, not 4"),
    *((f"a tail of {bad}", lambda *_, bad=bad: changed("output", tail=bad),
       ValueError, r"^the output tail of .* 'w' must be finite and at least 0")
      for bad in (-1.0, math.inf, math.nan)),
    ("negative values", lambda *_: changed("output", values=-torch.ones(4)),
     ValueError, r"^the output eigenvalues of 'w' must be finite and at least 0"),
    ("NaN values", lambda *_: changed("output", values=torch.full((4,), math.nan)),
     ValueError, r"^the output eigenvalues of 'w' must be finite"),
    ("directions that are not orthonormal", lambda *_: changed("input", basis=torch.ones(1, 4, 4)),
     ValueError, r"^the input directions .* of 'w' must be orthonormal; they are off by 4"),
    ("NaN directions", lambda *_: changed("input", basis=torch.full((1, 4, 4), math.nan)),
     ValueError, r"must be orthonormal; they are off by nan"),
    ("a direction beyond the side",
     lambda *_: KroneckerImportance({"w": Factors(Layout((3, 1)), Side(
         3, torch.ones(4), torch.eye(2).repeat(2, 1, 1), 0.0, 3), Side(
         1, torch.ones(1), None, 0.0, 1), torch.ones(5, 2))}, {}, 1),
     ValueError, r"^the output directions of the Kronecker factors of 'w' must be 0 beyond"),
    ("a scale of another shape", lambda *_: changed("scale", scale=torch.ones(4, 4)),
     ValueError, r"^the scale of .* 'w' must have shape \(5, 5\), .* not \(4, 4\)"),
    ("a negative scale", lambda *_: changed("scale", scale=-torch.ones(5, 5)),
     ValueError, r"^the scale of 'w' must be finite and at least 0; they reach from -1"),
    ("an infinite scale", lambda *_: changed("scale", scale=torch.full((5, 5), math.inf)),
     ValueError, r"^the scale of 'w' must be finite"),
    ("a transposed kernel",
     lambda *_: KroneckerImportance({"w": replace(W["w"], layout=Layout((2, 2, 4), True))}, {}, 1),
     ValueError, r"'w' must be a matrix's to be transposed: \(2, 2, 4\)"),
    ("another parameter", lambda importance, _: importance["other"], KeyError, "other"),
    ("per_token() without tokens", lambda *_: KroneckerImportance(W, {}, 1).per_token(),
     ValueError, r"^per_token\(\) needs a sequence model"),
    ("merge() with a diagonal", lambda importance, _: importance.merge(importance.diagonal()),
     ValueError, r"^a diagonal and a Kronecker-factored .* be merged: .* \.diagonal\(\), or"),
    ("merge() with a mapping", lambda importance, _: importance.merge(dict(importance)),
     ValueError, r"^a diagonal and a Kronecker-factored importance cannot be merged"),
    ("merge() of a diagonal with it", lambda importance, _: importance.diagonal().merge(importance),
     ValueError, r"^a diagonal and a Kronecker-factored importance cannot be merged"),
    ("merge() with factors in one alone",
     lambda importance, _: importance.merge(without_fc(importance)),
     ValueError, r"^'fc.weight' cannot be merged: .* in one of .* \.diagonal\(\) returns of both"),
    ("merge() into factors", lambda importance, _: without_fc(importance).merge(importance),
     ValueError, r"^'fc.weight' cannot be merged: its Kronecker factors"),
    ("merge() of another block=", lambda importance, _: importance.merge(importance_of(1, block=2)),
     ValueError, r"^the Kronecker factors of 'fc.weight' were made with different block="),
    ("merge() with decay 2", lambda importance, _: importance.merge(importance, 2),
     ValueError, r"^decay must be in \[0, 1\], not 2"),
    ("merge() with energy 0", lambda importance, _: importance.merge(importance, energy=0.0),
     ValueError, r"^energy must be in \(0, 1\], not 0"),
    ("normalize() of zeros",
     lambda *_: KroneckerImportance({}, {"a": torch.zeros(3)}, 1).normalize(),
     ValueError, "0 everywhere cannot be normalized"),
    ("load() of a diagonal",
     lambda importance, path: (importance.diagonal().save(path), KroneckerImportance.load(path)),
     ValueError, r"holds a diagonal importance, not .*: load it with Importance\.load"),
]  # fmt: skip


@each_of(BAD)
def test_bad_input_is_one_sentence(tmp_path, importance, given, error, message):
    with refused(error, message):
        given(importance, tmp_path / "x")
