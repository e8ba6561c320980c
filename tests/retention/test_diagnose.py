"""The diagnosis of new data: its figures, its verdict, its files."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from bad_input import each_of, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr
from scipy.stats import entropy

from cl_optim import cli
from cl_optim.retention import diagnose, read_corpus
from cl_optim.retention.diagnosis import compare
from cl_optim.retention.diagnosis.corpora import words

IDS = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9), min_size=1, max_size=9)


def scipy_kl(p_tokens, q_tokens, smoothing):
    p, q = Counter(p_tokens), Counter(q_tokens)
    both = sorted(p.keys() | q.keys())
    p_counts, q_counts = (np.array([c[t] for t in both]) + smoothing for c in (p, q))
    return entropy(p_counts, q_counts)  # scipy normalises


class TestFigures:
    @settings(deadline=None, max_examples=60)
    @given(IDS, IDS, st.sampled_from([0.5, 1.0, 1e-3]))
    def test_equal_scipys_and_sets(self, old, new, smoothing):
        found = diagnose(old, new, smoothing=smoothing)
        a, b = list(chain(*old)), list(chain(*new))
        assert found.kl_new_old == pytest.approx(scipy_kl(b, a, smoothing), abs=1e-12)
        assert found.kl_old_new == pytest.approx(scipy_kl(a, b, smoothing), abs=1e-12)
        assert found.jaccard == len(set(a) & set(b)) / len(set(a) | set(b))
        assert found.tokens == (len(a), len(b))
        assert found.vocabulary == (len(set(a)), len(set(b)))

    def test_streaming_is_in_memory(self, monkeypatch):
        old = [f"word{i % 97} and word{i % 31}" for i in range(500)]
        new = [f"Word{i % 53} or word{i % 7}." for i in range(500)]
        whole = diagnose([" ".join(old)], [" ".join(new)])
        monkeypatch.setattr(compare, "_PENDING", 3)
        assert diagnose(iter(old), (text for text in new)) == whole

    def test_a_tokenizer_and_tensors_of_ids(self):
        old, new = ["abca", "ab"], ["abd"]
        ids = [[[ord(c) for c in text] for text in corpus] for corpus in (old, new)]

        class Encoder:
            def encode(self, text):
                return [ord(c) for c in text]

        expected = diagnose(*ids)
        assert diagnose(old, new, tokenizer=Encoder()) == expected
        assert diagnose(old, new, tokenizer=Encoder().encode) == expected
        assert diagnose([torch.tensor(i) for i in ids[0]], map(np.array, ids[1])) == expected

    @settings(deadline=None, max_examples=40)
    @given(IDS, IDS, st.integers(1, 8))
    def test_a_full_vocabulary_merges_tokens_the_same_way_on_both_sides(self, old, new, limit):
        a, b = list(chain(*old)), list(chain(*new))
        known = list(dict.fromkeys([*a, *b]))[:limit]
        merged = [[t if t in known else -1 for t in tokens] for tokens in (a, b)]
        found = diagnose(old, new, max_vocabulary=limit)
        assert found.kl_new_old == pytest.approx(scipy_kl(merged[1], merged[0], 0.5), abs=1e-12)
        assert found.uncounted == sum(t not in known for t in [*a, *b])
        assert any("vocabulary was full" in note for note in found.notes) == (found.uncounted > 0)

    def test_words_of_any_script_and_form(self):
        assert words("Don't: a_b") == ["don", "'", "t", ":", "a_b"]
        assert words("हिन्दी भाषा।") == ["हिन्दी", "भाषा", "।"]
        assert words("cafe\u0301") == words("CAFÉ") == ["café"]
        assert [len(word) for word in words("ä" * 100)] == [64, 36]

    def test_integers_of_numpy_and_encodings(self):
        ids = [[1, 2, 3], [2, 3]]
        arrays = [list(np.arange(1, 4)), np.array([2, 3])]
        assert diagnose(ids, arrays).kl_new_old == 0
        as_tensor = diagnose(["ab"], ["ab"], lambda text: torch.tensor([ord(c) for c in text]))
        assert as_tensor.jaccard == 1
        ids_of_numpy = diagnose(["ab"], ["ab"], lambda text: [np.int64(ord(c)) for c in text])
        assert ids_of_numpy.jaccard == 1
        labels = diagnose([("a", np.int64(1)), ("b", True)], [("a", 1)]).labels
        assert labels.classes == 1

    def test_labels(self):
        old = [("a", 0)] * 6 + [("a", 1)] * 2
        new = [("a", 1)] * 1 + [("a", 2)] * 3
        drift = diagnose(old, new).labels
        p, q = np.array([0.75, 0.25, 0]), np.array([0, 0.25, 0.75])
        assert drift.distance == pytest.approx(np.abs(p - q).sum() / 2)
        assert (drift.appeared, drift.vanished, drift.classes) == (("2",), ("0",), 3)
        assert diagnose(["a"], ["a"]).labels is None
        assert "one class only" in diagnose(old[:6], old[:6]).notes[0]

    def test_labels_that_are_texts(self, tmp_path):
        names = {0: "sad", 1: "glad", 2: "mad"}
        pairs = [("a", 0)] * 6 + [("a", 1)] * 2, [("a", 1)] * 1 + [("a", 2)] * 3
        rows = [[{"text": t, "label": names[y], "idx": 3} for t, y in side] for side in pairs]
        found = diagnose(*rows)
        expected = diagnose(*pairs)
        assert found.labels.distance == pytest.approx(expected.labels.distance)
        assert (found.labels.appeared, found.labels.vanished) == (("mad",), ("sad",))
        assert (found.tokens, found.kl, found.conflict_count) == (expected.tokens, expected.kl, 0)
        paths = [tmp_path / name for name in ("old.jsonl", "new.jsonl")]
        for path, side in zip(paths, rows, strict=True):
            path.write_text("".join(json.dumps(row) + "\n" for row in side))
        assert diagnose(*map(read_corpus, paths)) == found
        as_numbers = [[{"text": t, "label": np.int64(y)} for t, y in side] for side in pairs]
        assert diagnose(*as_numbers) == expected
        asked = [{"prompt": "2 + 2", "answer": "4"}], [{"prompt": "2 + 2", "answer": "5"}]
        assert diagnose(*asked) == diagnose([("2 + 2", "4")], [("2 + 2", "5")])


class TestConflicts:
    OLD = (
        ("What is the capital of France?", "Paris"),
        ("2 + 2", "4"),
        ("Colour of the sky", "blue"),
        ("Colour of the sky", "grey"),
    )

    def test_same_or_near_same_prompts_with_other_answers(self):
        new = [
            ("what is  the CAPITAL of France", "Lyon"),  # near-same
            ("2 + 2", " 4. "),  # the same answer
            ("2 + 2", "5"),
            ("Colour of the sky", "Grey!"),
            ("Colour of the sea", "green"),
        ]
        found = diagnose(self.OLD, new)
        assert found.conflict_count == 2
        assert [(c.prompt, c.old, c.new) for c in found.conflicts] == [
            ("what is  the CAPITAL of France", ("Paris",), "Lyon"),
            ("2 + 2", ("4",), "5"),
        ]
        assert found.verdict != "low"
        assert found.prompts_examined == 1

    def test_a_prompt_with_many_answers_has_none_to_contradict(self):
        stories = [("Continue the story.", f"story {word}") for word in "abcdefghij"]
        assert diagnose(stories, stories).conflict_count == 0
        assert diagnose(stories, [("Continue the story.", "another")]).conflict_count == 0
        assert diagnose(stories[:8], [("Continue the story!", "another")]).conflict_count == 1

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("-5", "5"),
            ("x > 5", "x < 5"),
            ("का", "की"),
            ("2.5", "25"),
            ("C++", "C"),
            ("2+2", "2-2"),
            (".5", "5"),
        ],
    )
    def test_what_differs_by_a_sign_differs(self, one, other):
        assert diagnose([("p", one)], [("p", other)]).conflict_count == 1
        assert diagnose([(one, "a")], [(other, "b")]).conflict_count == 0

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("Yes.", "yes!"),
            ("“What is C++?”", "what is  C++"),
            ("ｆｕｌｌ", "full"),
            ("don't", "Don't"),
        ],
    )
    def test_what_differs_in_case_or_punctuation_is_the_same(self, one, other):
        assert diagnose([("p", one)], [("p", other)]).conflict_count == 0
        assert diagnose([(one, "a")], [(other, "b")]).conflict_count == 1

    def test_symbols_alone_are_not_the_same(self):
        assert diagnose([("+", "plus")], [("-", "minus")]).conflict_count == 0

    def test_many_prompts_are_sampled(self):
        old = [(f"prompt {i}", "a") for i in range(4000)]
        new = [(f"prompt {i}", "b") for i in range(4000)]
        found = diagnose(old, new, max_prompts=1000)
        assert 250 <= found.conflict_count <= 1000
        # Hashes are uniform: 5 standard deviations of a binomial.
        share = found.prompts_examined
        expected = 4000 * share
        assert abs(found.conflict_count - expected) < 5 * np.sqrt(expected * (1 - share))
        assert len(found.conflicts) == 100
        assert "sample of" in found.notes[0]


class TestVerdict:
    def test_low(self):
        found = diagnose(["a b c d"] * 50, ["a b c d"] * 40)
        assert (found.verdict, found.reasons) == ("low", ())
        assert "L2-SP" in found.strategy
        assert "decays to 0" in found.recipe[0]  # the cheapest first
        assert "interpolate" in found.recipe[1]

    def test_medium(self):
        old = [" ".join(f"w{i}" for i in range(20))]
        new = [" ".join(f"w{i}" for i in range(15, 35))]
        found = diagnose(old, new)
        assert found.jaccard < 0.3
        assert found.kl < 2.0
        assert found.verdict == "medium"
        assert "EWC" in found.strategy

    def test_high(self):
        found = diagnose(["one two three"] * 100, ["un deux trois"] * 100)
        assert found.kl > 2.0
        assert found.verdict == "high"
        assert "Replay" in found.strategy
        assert "Progressive" in found.strategy

    def test_a_small_sample_of_the_same_is_low(self):
        """Smoothing alone makes it diverge, and most of the vocabulary is not in it."""
        old = [[0] * 600_000 + list(range(1, 200_001)) * 2]
        found = diagnose(old, [[0] * 600 + list(range(1, 401))])
        assert found.kl > 2.0
        assert found.jaccard < 0.05
        assert (found.verdict, found.reasons) == ("low", ())
        assert diagnose([[0] * 600 + list(range(1, 401))], old).verdict == "low"
        other = diagnose(old, [list(range(300_000, 301_000))])
        assert other.verdict == "high"
        assert "nats more than sizes make them" in other.reasons[0]

    def test_kl_is_the_larger(self):
        found = diagnose([[0] * 100 + [1]], [[0, 1, 1, 1]])
        p, q = (np.array([100.5, 1.5]) / 102), np.array([1.5, 3.5]) / 5
        assert found.kl_new_old == pytest.approx(rel_entr(q, p).sum())
        assert found.kl == max(found.kl_new_old, found.kl_old_new)


TEXT = ["a"]
BAD = [
    ("no old token", ([], TEXT, {}), ValueError, "old must contain at least one token"),
    ("no new token", (TEXT, ["", " "], {}), ValueError, "new must contain at least one token"),
    ("ids beside texts", (TEXT, [[1, 2]], {}), TypeError, "new must have .* token ids or texts"),
    ("an id", ([[1.5]], TEXT, {}), TypeError, "old, item 1: must be a text"),
    ("a label", (["a", ("b", 1.5)], TEXT, {}), TypeError, "old, item 2: beside its text"),
    ("a label by name", ([{"text": "a", "label": 1.5}], TEXT, {}),
     TypeError, "old, item 1: must have texts"),
    ("no text", ([{"body": "a"}], TEXT, {}), TypeError, "old, item 1: .* not {'body': 'a'}"),
    ("a path", ("old.txt", TEXT, {}),
     TypeError, "old must be an iterable of texts, not one text"),
    ("tokens", (TEXT, TEXT, {"tokenizer": lambda _: [1.5]}), TypeError, "tokenizer .* not float"),
    ("smoothing", (TEXT, TEXT, {"smoothing": 0.0}), ValueError, "smoothing must be positive"),
    ("max_prompts", (TEXT, TEXT, {"max_prompts": 0}), ValueError, "max_prompts must be"),
    ("labels", (TEXT, [("a", i) for i in range(10_001)], {}),
     ValueError, "10,000 different labels"),
]  # fmt: skip


@each_of(BAD)
def test_bad_input_is_one_sentence(given, error, message):
    old, new, options = given
    with refused(error, message):
        diagnose(old, new, **options)


class TestFiles:
    def test_text_in_chunks(self, tmp_path, monkeypatch):
        path = tmp_path / "a.txt"
        text = "äöü €𝄞 é" * 50
        path.write_text(text + "\nnext\n\n", encoding="utf-8")
        assert list(read_corpus(path)) == [text + "\n", "next\n"]
        for size in (5, 6, 7, 11):
            monkeypatch.setattr("cl_optim.retention.diagnosis.corpora._CHUNK", size)
            assert "".join(read_corpus(path)).strip().replace("\n", "") == text + "next"

    def test_jsonl(self, tmp_path):
        path = tmp_path / "a.jsonl"
        lines = ['{"prompt": "p", "answer": "ä"}', '{"text": "t", "label": 3}', '"s"']
        lines += ['{"text": "only"}', ""]
        path.write_text("\n".join(lines), encoding="utf-8")
        assert list(read_corpus(path)) == [("p", "ä"), ("t", 3), "s", "only"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", b"fine\nno\xff\n", "a.txt, line 2: must be UTF-8, but has the byte 0xff"),
            ("a.txt", b"cut \xe2\x82", "a.txt, line 1: must be UTF-8, but has the byte 0xe2"),
            ("a.jsonl", b'"a"\n{"text"}', "a.jsonl, line 2: must be JSON"),
            ("a.jsonl", b'{"body": "x"}', "a.jsonl, line 1: must be a JSON string or an object"),
            ("a.txt", b"", "old must contain at least one token"),
            ("A.JSONL", b"no", "A.JSONL, line 1: must be JSON"),
            ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: must be JSON, but maximum recursion"),
            ("a.jsonl", b'"a\\ud800"', "a.jsonl, line 1: must be JSON, but .* surrogates"),
            ("a.jsonl", b'{"text": "a", "label": ' + b"1" * 5000 + b"}", "line 1: must be JSON"),
        ],
    )
    def test_bad_files(self, tmp_path, capsys, name, content, message):
        (tmp_path / name).write_bytes(content)
        (tmp_path / "new.txt").write_text("new")
        with pytest.raises(SystemExit) as exit_:
            cli.main(["diagnose", str(tmp_path / name), str(tmp_path / "new.txt")])
        assert exit_.value.code == 2
        assert re.search(message, capsys.readouterr().err)

    def test_a_record_that_is_too_long(self, tmp_path, monkeypatch):
        monkeypatch.setattr("cl_optim.retention.diagnosis.corpora._LONGEST_LINE", 1 << 20)
        (tmp_path / "a.jsonl").write_text('"a"\n"' + "b" * (1 << 20) + '"\n')
        with pytest.raises(ValueError, match=r"a.jsonl, line 2: is longer than 1 MB"):
            list(read_corpus(tmp_path / "a.jsonl"))

    def test_a_byte_order_mark(self, tmp_path):
        for name in ("a.txt", "a.jsonl"):
            (tmp_path / name).write_text('"a"', encoding="utf-8-sig")
        assert list(read_corpus(tmp_path / "a.txt")) == ['"a"']
        assert list(read_corpus(tmp_path / "a.jsonl")) == ["a"]

    def test_no_file(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            cli.main(["diagnose", str(tmp_path / "x"), str(tmp_path / "y")])
        assert capsys.readouterr().err == f"cl-optim diagnose: {tmp_path / 'x'} is not a file.\n"

    def test_command(self, tmp_path, capsys):
        old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
        old.write_text('{"prompt": "Capital of France?", "answer": "Paris"}\n')
        new.write_text('{"prompt": "capital of france", "answer": "Lyon"}\n')
        assert cli.main(["diagnose", str(old), str(new)]) == 0
        text = capsys.readouterr().out
        assert "Risk of forgetting: medium" in text
        assert "'capital of france' was answered 'Paris', now 'Lyon'" in text
        assert cli.main(["diagnose", str(old), str(new), "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        expected = diagnose(read_corpus(old), read_corpus(new))
        assert record["kl_new_old"] == expected.kl_new_old
        assert record["verdict"] == "medium"
        assert record["conflicts"][0]["new"] == "Lyon"
