from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sacrebleu

from trainer.errors import UserError
from trainer.report.subquestions import Scorer, score_questions

GOLD = [["How many apples does Tom have?", "How many are left?"], ["How much is it?"], []]


def test_bleu_and_the_number_of_questions() -> None:
    ours = [["How many apples has Tom?", "How many are left?"], ["How much is it?", "And then?"], ["What?"]]
    quality = score_questions(list(zip(ours, GOLD, strict=True)), Scorer())
    assert quality is not None and quality["n"] == 2, "a problem without gold sub-questions does not count"
    texts = [" ".join(questions) for questions in ours[:2]]
    expected = sacrebleu.corpus_bleu(texts, [[" ".join(questions) for questions in GOLD[:2]]])
    assert quality["bleu"] == pytest.approx(expected.score) and 20 < quality["bleu"] < 90
    assert (quality["right_number"], quality["ours_mean"], quality["gold_mean"]) == (1, 2.0, 1.5)
    assert "tok:13a" in quality["signature"] and "version:" in quality["signature"]
    assert quality["bertscore"] is None


def test_gold_against_itself_and_nothing_to_compare() -> None:
    quality = score_questions([(questions, questions) for questions in GOLD], Scorer())
    assert (
        quality is not None
        and quality["bleu"] == pytest.approx(100)
        and quality["right_number"] == quality["n"] == 2
    )
    silent = score_questions([([], questions) for questions in GOLD], Scorer())
    assert silent is not None and (silent["bleu"], silent["right_number"]) == (0, 0)
    assert score_questions([(["What?"], [])], Scorer()) is None


def test_a_missing_bertscore_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a local model folder"):
        Scorer(str(tmp_path / "roberta"))


def test_error_without_the_package_bert_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    monkeypatch.setitem(sys.modules, "bert_score", None)  # importing it fails, installed or not
    with pytest.raises(UserError, match=r"pip install 'socratic-trainer\[bertscore\]'"):
        Scorer(str(tmp_path))


def test_bertscore_with_a_local_model(tmp_path: Path) -> None:
    """A tiny model with random weights: the same text scores 1, another less, an empty text 0."""
    pytest.importorskip("bert_score", reason="the extra 'bertscore' is not installed")
    transformers = pytest.importorskip("transformers")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "how",
        "many",
        "apples",
        "does",
        "tom",
        "have",
        "?",
        "is",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    scorer = Scorer(str(tmp_path))
    found = [score_questions([([text], GOLD[0][:1])], scorer) for text in (GOLD[0][0], "is it left ?", "")]
    same, other, silent = (quality["bertscore"] for quality in found if quality is not None)
    assert same == pytest.approx(1, abs=1e-5) and silent == 0 and 0 < other < same
