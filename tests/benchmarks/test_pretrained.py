"""The benchmark of a pretrained model, on a toy: texts, probes, losses, files, what it says."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.retention import __main__ as retention
from bench.retention.drift import Drift
from bench.retention.pretrained import base, runs
from bench.retention.pretrained.methods import ADAMW, LORA, METHODS, QUICK, Method
from bench.retention.pretrained.probes import ask, probes
from bench.retention.pretrained.results import Results, Run
from bench.retention.pretrained.runs import PROBES, Place, Reader, _Objective, domains
from bench.retention.pretrained.texts import Domain, german, manual, pieces, prose, sayings
from cl_optim.demo.scenarios import DataError
from cl_optim.retention import ReplayBuffer, top_k

PAGE = r""".\" a comment
.TH CP 1 "September 2022"
.SH BEZEICHNUNG
cp \- Dateien kopieren
.SH BESCHREIBUNG
.PP
\fBcp\fP kopiert {words} mit \fI\-\-hilfe\fP \(aqund\(aq mehr.
.TP
.B \-a
{words}
.TS
l l.
eine	Tabelle
.TE
.SH ÜBERSETZUNG
Die deutsche Übersetzung {words}
"""
SEED = 0


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Debian's packages, as small as can be."""
    folder = tmp_path_factory.mktemp("texts")
    share = folder / "usr" / "share"
    for name in ("man/de/man1", "doc/debian/FAQ", "games/fortunes"):
        (share / name).mkdir(parents=True)
    for number in range(20):
        words = " ".join(f"wort{number + i % 7}" for i in range(60))
        (share / f"man/de/man1/p{number:02}.1.gz").write_bytes(
            gzip.compress(PAGE.replace("{words}", words).encode())
        )
    chapter = "\n\n".join(f"    Answer {i}: {'some text ' * 50}" for i in range(60))
    faq = f"\n1. Contents\n\nChapter\xa01. Overview\n\n{chapter}\n"
    (share / "doc/debian/FAQ/debian-faq.en.txt.gz").write_bytes(gzip.compress(faq.encode()))
    for number in range(10):
        said = "\n%\n".join(f"Saying {number}.{i} is said." for i in range(5))
        (share / f"games/fortunes/f{number}").write_text(said + "\n%\n")
        (share / f"games/fortunes/f{number}.u8").write_text("")
    return folder


@pytest.fixture(scope="module")
def place(texts, tmp_path_factory):
    """A toy that is prepared."""
    place = Place(tmp_path_factory.mktemp("bench") / "toy", texts)
    place.folder.mkdir()
    runs.prepare(place, QUICK, SEED)
    return place


def test_a_page_becomes_the_paragraphs_of_its_sections_without_markup():
    words = "viele Wörter " * 20
    (piece,) = manual(PAGE.replace("{words}", words.strip()))
    first, second, third = piece.split("\n\n")
    assert first == "BESCHREIBUNG"
    assert second == f"cp kopiert {words.strip()} mit --hilfe 'und' mehr."
    assert third == f"-a {words.strip()}"


def test_pieces_are_the_text_and_not_short():
    text = "\n\n".join("x" * n for n in (10, 500, 30, 20, 600, 5))
    found = pieces(text)
    assert "\n\n".join(found) == text
    assert all(len(piece) >= 400 for piece in found[:-1])


def test_no_file_is_in_two_parts_and_windows_begin_with_documents():
    domain = Domain.of("d", ([f"{n}a", f"{n}b"] for n in range(30)))
    files = {part: {doc[:-1] for doc in found} for part, found in domain.documents.items()}
    assert files["test"] == {"9", "19", "29"}
    assert files["validation"] == {"8", "18", "28"}
    assert len(files["train"]) == 24
    tokens = base.byte_tokens()
    windows = domain.windows("test", 5, 8, tokens.of, tokens.start)
    text = ["".join(chr(t - 1) if t else "|" for t in window) for window in windows.tolist()]
    assert text[0] == "|9a|9b|1"
    assert all(one.startswith("|") for one in text)
    drawn = domain.windows("train", 50, 4, tokens.of, 0, torch.Generator().manual_seed(0))
    assert len({tuple(window) for window in drawn.tolist()}) > 20
    with pytest.raises(DataError, match="d has too little text for its test part"):
        Domain.of("d", [["a"]] * 9)


@pytest.mark.parametrize(
    ("read", "message"),
    [(german, "manpages-de"), (prose, "debian-faq"), (sayings, "fortunes")],
)
def test_texts_that_are_not_there_are_named(tmp_path, read, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_a_model_that_is_not_installed_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_PACKAGE", "no-such-package")
    with pytest.raises(DataError, match="no-such-package, which has the model, is not installed"):
        base.smollm2(tmp_path)


def test_probes_have_one_right_and_three_other_answers():
    assert len(probes()) == 48
    assert len({question for question, _ in probes()}) == 48
    assert all(len(set(answers)) == 4 for _, answers in probes())


def test_an_answer_is_as_probable_as_its_tokens(place):
    model, tokens = base.load(place.base), base.byte_tokens()
    right, nats = 0, 0.0
    for question, answers in probes():
        scores = []
        for answer in answers:
            asked = [tokens.start, *tokens.of(question)]
            ids = torch.tensor([[*asked, *tokens.of(answer)]])
            log_probs = torch.log_softmax(base.logits_of(model, ids)[0].detach().double(), -1)
            scores.append(
                sum(log_probs[i - 1, ids[0, i]].item() for i in range(len(asked), ids.shape[1]))
            )
        right += max(scores) == scores[0]
        total = math.log(sum(math.exp(score - scores[0]) for score in scores))
        nats += total
    found = ask(lambda ids: base.logits_of(model, ids), tokens.of, tokens.start)
    assert found.accuracy == right / 48
    assert found.nats == pytest.approx(nats / 48, rel=1e-5)


def test_a_base_is_healed_on_the_old_domains_only(place, tmp_path):
    texts, folder = domains(place.texts), tmp_path / "base"
    base.toy(folder, (texts.new,), 16)
    read = Reader(place, QUICK)
    old, new = (read(domain, "test", 4) for domain in (texts.old[1], texts.new))
    before = [base.nats(base.load(folder), windows) for windows in (old, new)]
    base.heal(folder, texts.old, base.byte_tokens(), 16, 8, 60)
    after = [base.nats(base.load(folder), windows) for windows in (old, new)]
    assert after[0] < before[0] - 0.05
    assert after[1] > after[0] - before[0] + before[1]


def test_names_of_files_differ():
    assert len({method.slug for method in METHODS}) == len(METHODS)
    assert len({method.label for method in METHODS}) == len(METHODS)


def kl(was, model, ids):
    p, q = (torch.log_softmax(base.logits_of(one, ids).double(), -1) for one in (was, model))
    return (p.exp() * (p - q)).sum(-1).mean()


def ce(model, windows):
    return base.cross_entropy(base.logits_of(model, windows[:, :-1]), windows[:, 1:])


@pytest.fixture
def changed(place):
    """The old model, and one that has gone on."""
    was, model = base.load(place.base), base.load(place.base)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1))
    return was, model


@pytest.fixture
def windows(place):
    return Reader(place, QUICK)(domains(place.texts).new, "train", 4)


@pytest.mark.parametrize("part", ["replay", "stored", "own", "lwf", "none"])
def test_a_loss_is_the_mean_of_its_parts_over_all_positions(
    place, changed, windows, part, monkeypatch
):
    monkeypatch.setattr(runs, "top_k", partial(top_k, k=257))
    was, model = changed
    share = {} if part == "none" else {part: 0.5}
    objective = _Objective(Method("m", **share), place, QUICK, SEED)
    with torch.no_grad():
        found = float(objective(model, windows))
        again = _Objective(Method("m", **share), place, QUICK, SEED)
        if part == "replay":
            old = again._old.sample(2)["windows"]
            expected = (ce(model, windows[2:]) + ce(model, old)) / 2
        elif part == "stored":
            old = again._old.sample(2)["input_ids"]
            expected = (ce(model, windows[2:]) + kl(was, model, old)) / 2
        elif part == "own":
            own = again._own.sample(2)["input_ids"]
            expected = (ce(model, windows[2:]) + kl(was, model, own)) / 2
        elif part == "lwf":
            expected = ce(model, windows) + 0.5 * kl(was, model, windows[:, :-1])
        else:
            expected = ce(model, windows)
    # bfloat16 autocast; and 64 outputs of those that are stored by self_written.
    assert found == pytest.approx(float(expected), rel=0.02)


def test_parts_of_a_window_are_right_on_average(place, windows):
    objective = _Objective(Method("m", replay=0.1), place, QUICK, SEED)
    numbers = [objective._number(0.1) for _ in range(2000)]
    assert set(numbers) == {0, 1}
    assert sum(numbers) / 2000 == pytest.approx(0.4, abs=0.05)


def test_replay_knows_the_old_domains_and_not_the_unseen_one(place):
    kept = _Objective(Method("m", replay=0.5), place, QUICK, SEED)._old.samples()["windows"]
    said = {"".join(chr(t - 1) for t in window if t) for window in kept.tolist()}
    assert len(kept) == QUICK.kept
    assert not any("Saying" in one for one in said)
    assert any("some text" in one for one in said)


def test_what_the_model_wrote_is_the_same_for_all_runs_of_a_seed(place):
    with ReplayBuffer(QUICK.own, path=place.own(SEED), read_only=True) as written:
        wrote = written.samples()["input_ids"]
    own = _Objective(Method("m", own=0.5), place, QUICK, SEED)._own.samples()["input_ids"]
    assert sorted(map(tuple, own.tolist())) == sorted(map(tuple, wrote.tolist()))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize(
    "method",
    [
        Method("EWC", strength=1e6, structure="diagonal"),
        Method("Kronecker", strength=1e6, structure="kronecker"),
        Method("L2-SP", strength=1e6),
        Method("LoRA", kind="lora", strength=1e6, structure="diagonal"),
    ],
    ids=lambda method: method.label,
)
def test_strong_protection_holds_the_model(place, method):
    free = replace(method, strength=None, structure=None)
    rate = 1e-2
    ends = [runs.learn(one, rate, place, QUICK, SEED)[0] for one in (free, method)]
    was = base.load(place.base)
    with ReplayBuffer(QUICK.own, path=place.own(SEED), read_only=True) as written:
        own = written.samples()["input_ids"]
    with torch.no_grad():
        far, near = (float(kl(was, model, own)) for model in ends)
    assert near < 0.2 * far


def results() -> Results:
    """AdamW loses 0.2, 0.1 and 0.3; another method half of it, at 2 % more cost."""
    names = ("old 1", "old 2", "unseen")
    drift = Drift(1.0, 1.0, 1.0, 1.0, 1.0)
    lost = dict(zip(names, (0.2, 0.1, 0.3), strict=True))

    def point(alpha, part, new):
        return {
            "alpha": alpha,
            "new": new,
            PROBES: 0.5,
            **{name: 2.0 + part * value for name, value in lost.items()},
        }

    other = Method("other", own=0.25)
    made = tuple(
        Run(method, 0, 1e-4, (point(0.0, 0.0, 3.0), point(1.0, part, new)), drift, 1.0, 2.0)
        for method, part, new in ((ADAMW, 1.0, 2.0), (other, 0.5, 2.04))
    )
    before = {0: {**dict.fromkeys(names, 2.0), "new": 3.0, PROBES: 0.6}}
    return Results(QUICK, "new", names[:2], names[2], before, made, "cpu")


def test_kept_lost_and_cost_are_what_their_formulas_say():
    one = results()
    other = one.methods[1]
    assert one.cost(other).mean == pytest.approx(0.02)
    assert one.lost(other, "unseen").mean == pytest.approx(0.15)
    assert one.kept(other).mean == pytest.approx(0.5)
    assert one.kept_at(other, 0.0201).mean == pytest.approx(0.5, abs=1e-3)
    assert math.isnan(one.kept_at(other, 0.01).mean)
    assert one.kept_at(ADAMW, 0.05).mean == pytest.approx(0.1)  # a tenth of the way back
    assert one.nats_lost == pytest.approx([0.2, 0.1])


def test_it_says_who_keeps_most():
    assert results().sentences[0] == (
        "Most kept on the way back at AdamW's cost, without old data: AdamW 0 %."
    )
    none = results()
    before = {0: {**none.before[0], "old 1": 9.0}}
    assert replace(none, before=before).sentences == [
        "AdamW did not forget: there is nothing to keep."
    ]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_the_command_takes_up_where_it_was_cut_short(texts, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    chosen = [METHODS[0].label, LORA.label, "replay 10%, stored outputs"]
    arguments = ["--quick", "--processes", "0", "--texts", str(texts), "--out", str(out)]
    command = ["pretrained", *arguments, "--methods", *chosen]
    assert retention.main(command) == 0
    rows = (out / "pretrained.md").read_text().splitlines()
    labels = [row.split("|")[1].strip() for row in rows if row.startswith("|")]
    assert labels[2:6] == [METHODS[0].label, ADAMW.label, LORA.label, chosen[2]]
    for name in ("pretrained.png", "pretrained-drift.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((out / "pretrained.json").read_text())["runs"]) == 4
    capsys.readouterr()

    done = []
    for name in ("prepare", "choose", "run"):
        function = getattr(runs, name)
        monkeypatch.setattr(
            f"bench.retention.pretrained.commands.{name}",
            lambda *given, function=function, name=name: (done.append(name), function(*given)),
        )
    assert retention.main(command) == 0
    assert done == []
    (file,) = (out / "toy").glob("run-0-LoRA.json")
    record = json.loads(file.read_text())
    assert record["method"] == asdict(LORA)
    file.write_text(json.dumps({**record, "setting": {**record["setting"], "steps": 1}}))
    assert retention.main(command) == 0
    assert done == ["run"]
    record = json.loads(file.read_text())
    assert record["setting"]["steps"] == QUICK.steps
    file.write_text(json.dumps({**record, "rate": 1.0}))  # another one was chosen then
    assert retention.main(command) == 0
    assert done == ["run"] * 2
    assert json.loads(file.read_text())["rate"] == record["rate"]
    capsys.readouterr()


def test_the_command_says_which_texts_are_missing(tmp_path, capsys):
    given = ["--texts", str(tmp_path), "--out", str(tmp_path / "out"), "--processes", "1"]
    with pytest.raises(SystemExit) as stopped:
        retention.main(["pretrained", "--quick", *given])
    assert stopped.value.code == 2
    assert (
        "has no German manual pages: unpack Debian's manpages-de there" in capsys.readouterr().err
    )
    assert not any(Path(tmp_path / "out" / "toy").glob("*.json"))
