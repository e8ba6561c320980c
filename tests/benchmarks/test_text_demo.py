"""The text demo: its texts, its measure, its methods, what it says."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from bench.retention import __main__ as retention
from bench.retention.drift import Drift
from bench.retention.text.corpora import SMALLEST, corpus, english, from_file, python_code
from bench.retention.text.model import ByteTransformer, Sizes, bits_per_byte, loss
from bench.retention.text.results import Before, Results, most_kept
from bench.retention.text.runs import (
    ADAMW,
    ALPHAS,
    METHODS,
    REPLAY,
    Method,
    Run,
    _batches,
    _kept,
    _objective,
    learn_new,
    learn_old,
)
from cl_optim.demo.scenarios import DataError
from cl_optim.retention import ReplayBuffer

SIZES = Sizes(
    width=8, layers=1, heads=2, context=16, batch=8, old_steps=6, new_steps=4, kept=32, held_out=9
)


def text(seed: int, size: int = SMALLEST) -> bytes:
    """Bytes of all values: not UTF-8."""
    generator = torch.Generator().manual_seed(seed)
    return bytes(torch.randint(0, 256, (size,), generator=generator).tolist())


def test_every_byte_is_either_learned_or_held_out_in_blocks():
    content = text(0, SMALLEST + 5000)
    one = corpus("x", content)
    assert len(one.train) + len(one.held_out) == len(content)
    assert bytes(one.held_out[:4096].tolist()) == content[9 * 4096 : 10 * 4096]
    assert bytes(one.train[: 9 * 4096].tolist()) == content[: 9 * 4096]
    assert bytes(one.train[9 * 4096 : 10 * 4096].tolist()) == content[10 * 4096 : 11 * 4096]


def test_windows_are_pieces_of_their_part():
    one = corpus("x", text(0))
    train, held_out = bytes(one.train.tolist()), bytes(one.held_out.tolist())
    windows = one.windows(20, 30, torch.Generator().manual_seed(0))
    assert windows.shape == (20, 30)
    assert all(bytes(window.tolist()) in train for window in windows)
    measured = one.held_out_windows(7, 30)
    assert measured.shape == (7, 30)
    assert all(bytes(window.tolist()) in held_out for window in measured)
    assert len({bytes(window.tolist()) for window in measured}) == 7
    assert len(one.held_out_windows(10**6, 30)) == (len(held_out) - 1) // 30


def test_the_texts_are_cpythons_own():
    old, new = english(), python_code()
    assert 'The "if" statement is used for conditional execution' in bytes(
        old.train.tolist()
    ).decode() + bytes(old.held_out.tolist()).decode(errors="replace")
    assert b"def __init__(self" in bytes(new.train.tolist())
    assert len(old.train) > 300_000
    assert len(new.train) > 1_000_000


def test_texts_that_are_missing_or_too_short_are_sentences(tmp_path):
    with pytest.raises(DataError, match=r"cannot read text .*nothing\.txt: No such file"):
        from_file(tmp_path / "nothing.txt")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"text empty\.txt must have at least 81,920 bytes .* 0"):
        from_file(tmp_path / "empty.txt")


def test_bits_per_byte_is_minus_log2_of_the_probability():
    model = ByteTransformer(SIZES)
    windows = corpus("x", text(1)).held_out_windows(70, 17)  # more than one part of 64
    total = 0.0
    for window in windows:
        probabilities = model(window[None, :-1])[0].double().softmax(-1)
        total -= sum(math.log2(p[b].item()) for p, b in zip(probabilities, window[1:], strict=True))
    assert bits_per_byte(model, windows) == pytest.approx(total / (70 * 16), rel=1e-5)
    assert loss(model, windows).item() / math.log(2) == pytest.approx(total / (70 * 16), rel=1e-5)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    assert bits_per_byte(model, windows) == pytest.approx(8.0)


def test_a_byte_is_predicted_from_those_before_it_only():
    model = ByteTransformer(SIZES)
    x = torch.randint(0, 256, (1, 16))
    changed = x.clone()
    changed[0, 9] = (x[0, 9] + 1) % 256
    same = (model(x) == model(changed)).all(-1)[0]
    assert same.tolist() == [True] * 9 + [False] * 7


@pytest.mark.parametrize("fraction", [0.05, 0.10, 0.25])
def test_replay_replaces_that_part_of_the_batches_by_kept_windows(fraction):
    old, new = corpus("old", text(0)), corpus("new", text(1))
    kept = {bytes(w.tolist()) for w in _kept(0, old, SIZES).samples()}
    plain = _batches(ADAMW, 0, old, new, SIZES)
    mixed = _batches(Method("r", "r", replay=fraction), 0, old, new, SIZES)
    replayed, count = 0, 500
    for _ in range(count):
        for a, b in zip(next(plain), next(mixed), strict=True):
            is_old = bytes(b.tolist()) in kept
            replayed += is_old
            assert is_old or torch.equal(a, b)
    share = replayed / (count * SIZES.batch)
    deviation = 0.5 / SIZES.batch / math.sqrt(count)  # of a coin per batch, at most
    assert abs(share - fraction) < 4 * deviation


def objective_of(method):
    """Its loss, the model as it was, and as it is after a change."""
    old, new = corpus("old", text(0)), corpus("new", text(1))
    learned = learn_old(old, new, SIZES, seed=0)
    was, model = (ByteTransformer(SIZES) for _ in range(2))
    for one in (was, model):
        one.load_state_dict(learned.weights)
    with torch.no_grad():
        model.head.bias += torch.randn(256)
    windows = new.windows(SIZES.batch, SIZES.context + 1, torch.Generator().manual_seed(0))
    return _objective(method, model, learned, SIZES), was.eval(), model.eval(), learned, windows


def divergence(was, model, x):
    p, q = (torch.log_softmax(one(x).double(), -1) for one in (was, model))
    return (p.exp() * (p - q)).sum(-1)


def test_learning_without_forgetting_adds_the_divergence_on_the_new_text():
    objective, was, model, _, windows = objective_of(Method("LwF", "LwF", lwf=0.3))
    with torch.no_grad():
        expected = loss(model, windows) + 0.3 * divergence(was, model, windows[:, :-1]).mean()
        assert float(objective(windows)) == pytest.approx(float(expected), rel=1e-4)


def test_self_written_windows_take_the_place_of_new_ones(monkeypatch):
    monkeypatch.setattr("bench.retention.text.runs.TOP", 256)  # all, so that nothing is rounded off
    objective, was, model, learned, windows = objective_of(Method("own", "own", own=0.25))
    drawn = ReplayBuffer(SIZES.kept, seed=0)
    drawn.add(learned.own)
    own = drawn.sample(2)["input_ids"]  # a quarter of 8
    with torch.no_grad():
        sums = [loss(model, windows[2:]) * 6 * SIZES.context, divergence(was, model, own).sum()]
        expected = sum(map(float, sums)) / (8 * SIZES.context)
        assert float(objective(windows)) == pytest.approx(expected, rel=1e-3)


def test_methods_begin_alike_and_a_run_is_repeatable():
    old, new = corpus("old", text(0)), corpus("new", text(1))
    learned = learn_old(old, new, SIZES, seed=0)
    sizes = replace(SIZES, new_steps=20)
    runs = {m: learn_new(m, learned, old, new, sizes) for m in METHODS}
    again = learn_new(ADAMW, learned, old, new, sizes)
    assert (again.old, again.new) == (runs[ADAMW].old, runs[ADAMW].new)
    assert len({(run.old, run.new) for run in runs.values()}) == len(METHODS)  # each does something
    forgotten = abs(runs[ADAMW].old[0] - learned.old_bpb)
    for structure in ("diagonal", "kronecker"):
        strong = Method("EWC", "EWC", 1e6, structure)
        end = learn_new(strong, learned, old, new, sizes).old[0]
        assert abs(end - learned.old_bpb) < 0.5 * forgotten


def test_a_run_is_measured_on_its_way_back_to_the_old_weights():
    old, new = corpus("old", text(0)), corpus("new", text(1))
    learned = learn_old(old, new, SIZES, seed=0)
    run = learn_new(ADAMW, learned, old, new, SIZES)
    assert len(run.old) == len(run.new) == len(ALPHAS)
    distances = [abs(bits - learned.old_bpb) for bits in run.old]
    assert distances[-1] < distances[0]


def test_the_most_that_is_kept_is_read_from_the_line_between_points():
    assert most_kept([0.0, 1.0], [0.0, 0.04], 0.01) == pytest.approx(0.25)
    assert most_kept([0.0, 1.0], [0.0, 0.04], 0.05) == 1.0
    assert most_kept([0.2, 0.6, 1.0], [0.02, 0.005, 0.015], 0.01) == pytest.approx(0.8)
    assert math.isnan(most_kept([0.0, 1.0], [0.03, 0.04], 0.01))


def results(kronecker_kept: float, adamw_old: float = 3.0) -> Results:
    """Two seeds; before: 2 bits. Most keep 50 % at a cost of 1 %, and the way back changes none."""
    runs, draw = [], torch.Generator().manual_seed(0)
    for seed in (0, 1):
        noise = 0.001 * seed
        for method in METHODS:
            kept, cost = 0.5, 0.01
            if method == ADAMW:
                kept, cost = 0.0, 0.0
            elif method.structure == "kronecker":
                kept = kronecker_kept + noise
            old = adamw_old - kept * (adamw_old - 2.0)
            along = [(old, 4.0 * (1 + cost))] * len(ALPHAS)
            drift = Drift(old, old, *torch.rand(3, generator=draw).tolist())
            runs.append(Run(method, seed, *map(tuple, zip(*along, strict=True)), drift))
    before = tuple(Before(seed, 2.0, 5.0) for seed in (0, 1))
    return Results("old", "new", SIZES, before, tuple(runs), "report", 1.0)


def test_kept_and_cost_are_what_their_formulas_say():
    one = results(0.8)
    assert one.kept(REPLAY).mean == pytest.approx(0.5)
    assert one.cost(REPLAY).mean == pytest.approx(0.01)
    assert one.kept(ADAMW).mean == one.cost(ADAMW).mean == 0.0
    assert one.kept_at(REPLAY, 0.011).mean == pytest.approx(0.5)
    assert math.isnan(one.kept_at(REPLAY, 0.009).mean)


def test_what_is_written_is_read_as_it_was():
    one = results(0.8)
    assert Results.from_record(json.loads(json.dumps(asdict(one)))) == one


@pytest.mark.parametrize(
    ("kept", "how"), [(0.8, "more"), (0.2, "less"), (0.4995, "neither more nor less")]
)
def test_a_verdict_says_more_only_where_its_interval_does(kept, how):
    sentences = results(kept).verdicts
    (at_two_percent,) = (
        s for s in sentences if "2%, EWC, Kronecker, λ = 1 keeps" in s and "EWC, λ" in s
    )
    assert f"keeps {how}" in at_two_percent


def test_where_nothing_is_forgotten_there_is_nothing_to_keep():
    one = results(0.5, adamw_old=1.9)
    assert math.isnan(one.kept(METHODS[1]).mean)
    assert one.verdicts == ["AdamW did not forget old with every seed: there is nothing to keep."]


def test_some_families_only(tmp_path, capsys):
    old, new, out = tmp_path / "old.bin", tmp_path / "new.bin", tmp_path / "out"
    old.write_bytes(text(0))
    new.write_bytes(text(1))
    sizes = ["--width", "8", "--layers", "1", "--context", "16", "--batch", "4"]
    steps = ["--old-steps", "4", "--new-steps", "5", "--seeds", "2", "--processes", "1"]
    chosen = ["--families", "LwF", "EWC + self-written"]
    arguments = [str(old), str(new), *sizes, *steps, *chosen, "--out", str(out)]
    assert retention.main(["text", *arguments]) == 0
    rows = [line for line in (out / "text-demo.md").read_text().splitlines() if "|" in line]
    labels = [row.split("|")[1].strip() for row in rows]
    assert labels[2:6] == ["AdamW", "LwF, 0.3", "LwF, 1", "EWC, Kronecker + self-written 25%"]
    capsys.readouterr()


def test_the_command_writes_table_json_and_picture_for_any_two_files(tmp_path, capsys):
    old, new, out = tmp_path / "old.bin", tmp_path / "new.bin", tmp_path / "out"
    old.write_bytes(text(0))
    new.write_bytes(b"def f(x):\n    return x + 1\n\n" * 4000)
    sizes = ["--width", "8", "--layers", "1", "--context", "16", "--batch", "4"]
    steps = ["--old-steps", "4", "--new-steps", "15", "--seeds", "1", "--processes", "1"]
    assert retention.main(["text", str(old), str(new), *sizes, *steps, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "The guard at work" in printed
    record = json.loads((out / "text-demo.json").read_text())
    assert len(record["runs"]) == len(METHODS)
    assert record["old"] == "old.bin"
    adamw, replay = (
        next(r for r in record["runs"] if r["method"] == asdict(method))
        for method in (ADAMW, REPLAY)
    )
    before = record["before"][0]
    assert adamw["new"][0] < before["new_bpb"]
    rows = (out / "text-demo.md").read_text().splitlines()
    cells = next(row for row in rows if row.startswith("| replay 10%")).split("|")
    kept = (adamw["old"][0] - replay["old"][0]) / (adamw["old"][0] - before["old_bpb"])
    shown = f"{100 * kept:.1f}" if adamw["old"][0] > before["old_bpb"] else "–"
    cost = 100 * (replay["new"][0] / adamw["new"][0] - 1)
    assert [cell.strip() for cell in cells[2:4]] == [shown, f"{cost:.2f}"]
    for name in ("text-demo.png", "text-drift.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert adamw["drift"]["own_kl"] > 0.0
    assert any(row.startswith("| KL on self-written text") for row in rows)
