"""Scores of sub-questions: BLEU, BERTScore, and the share of problems with the right number of sub-questions.

Shridhar et al. report these three scores for generated sub-questions ("Automatic Generation of Socratic
Subquestions for Teaching Math Word Problems", EMNLP 2022). The sub-questions of a problem are joined by spaces and
scored as one text. No score measures whether a differently worded sub-question is as good as the gold sub-question.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sacrebleu.metrics.bleu import BLEU

from trainer.errors import UserError


class Scorer:
    """BERTScore (Zhang et al. 2020) with a local model. Without a model, all scores are None."""

    def __init__(self, model: str = "") -> None:
        """Load a model from the local folder `model` ("": no model). Raises UserError if folder or bert-score is missing."""
        self.name = Path(model).name if model else ""
        self._scorer: Any = None
        if not model:
            return
        try:
            config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"bertscore_model {model!r} is not a local model folder ({error}); models are not downloaded"
            ) from None
        try:
            # bert_score imports torch, so this import is here and not at the top.
            from bert_score import BERTScorer
            from bert_score.utils import model2layers
        except ImportError:
            raise UserError(
                "bertscore_model needs the package bert-score: pip install 'socratic-trainer[bertscore]'"
            ) from None
        # Use the layer that bert-score recommends for a model of this name. If it recommends none, use the last layer.
        self.num_layers = model2layers.get(self.name, config.get("num_hidden_layers"))
        self._scorer = BERTScorer(model_type=model, num_layers=self.num_layers, device="cpu")
        # bert-score 0.3.13 fails if the tokenizer has no maximum length. RoBERTa reserves 2 of its positions.
        tokenizer, positions = self._scorer._tokenizer, config.get("max_position_embeddings", 512) - 2
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)

    def mean_f1(self, ours: Sequence[str], gold: Sequence[str]) -> float | None:
        """Return the mean F1 of `ours` against `gold`; None without a model.

        An empty text counts as F1 0. It is not passed to bert-score, which fails on empty texts with transformers 5.
        """
        if self._scorer is None:
            return None
        pairs = [(text, reference) for text, reference in zip(ours, gold, strict=True) if text]
        if not pairs:
            return 0.0
        _, _, f1 = self._scorer.score(*map(list, zip(*pairs, strict=True)))
        return float(f1.sum()) / len(ours)


def score_questions(pairs: Sequence[tuple[list[str], list[str]]], scorer: Scorer) -> dict[str, Any] | None:
    """Return the scores of sub-questions, or None if no problem has gold sub-questions.

    `pairs` has (generated sub-questions, gold sub-questions) of each problem. Keys: n, the number of problems with gold
    sub-questions; right_number, the number of these problems for which both lists have the same length; ours_mean and
    gold_mean, the mean numbers of generated and of gold sub-questions; bleu, the corpus BLEU, 0 to 100; signature, the
    settings of BLEU as sacrebleu prints them; bertscore, the mean F1 of BERTScore, or None without a model.
    """
    pairs = [(ours, gold) for ours, gold in pairs if gold]
    if not pairs:
        return None
    texts, references = ([" ".join(questions) for questions in side] for side in zip(*pairs, strict=True))
    metric, n = BLEU(), len(pairs)
    return {
        "n": n,
        "right_number": sum(len(ours) == len(gold) for ours, gold in pairs),
        "ours_mean": sum(len(ours) for ours, _ in pairs) / n,
        "gold_mean": sum(len(gold) for _, gold in pairs) / n,
        "bleu": float(metric.corpus_score(texts, [references]).score),
        "signature": str(metric.get_signature()),
        "bertscore": scorer.mean_f1(texts, references),
    }
