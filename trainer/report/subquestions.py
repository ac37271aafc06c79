"""Quality of a decomposer's sub-questions by their words: BLEU, share of right numbers of questions, BERTScore.

Shridhar et al. report these three for generated sub-questions ("Automatic Generation of Socratic
Subquestions for Teaching Math Word Problems", EMNLP 2022). The sub-questions of a problem are one text, joined by
spaces. None of the scores measures whether a sub-question in other words would be as good.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sacrebleu.metrics.bleu import BLEU

from trainer.errors import UserError


class Scorer:
    """BERTScore (Zhang et al. 2020) with a local model; without a model all scores are None."""

    def __init__(self, model: str = "") -> None:
        """Load the model of a local folder. Raises UserError if folder or package is missing."""
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
            # Imports torch, so it is imported only for BERTScore.
            from bert_score import BERTScorer
            from bert_score.utils import model2layers
        except ImportError:
            raise UserError(
                "bertscore_model needs the package bert-score: pip install 'socratic-trainer[bertscore]'"
            ) from None
        # The layer that the authors found best for a model of this name, else the last one.
        self.num_layers = model2layers.get(self.name, config.get("num_hidden_layers"))
        self._scorer = BERTScorer(model_type=model, num_layers=self.num_layers, device="cpu")
        # bert-score 0.3.13 fails if the tokenizer has no maximum length; RoBERTa reserves 2 positions.
        tokenizer, positions = self._scorer._tokenizer, config.get("max_position_embeddings", 512) - 2
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)

    def mean_f1(self, ours: Sequence[str], gold: Sequence[str]) -> float | None:
        """Return the mean F1; an empty text has 0 (the package cannot score one with transformers 5)."""
        if self._scorer is None:
            return None
        pairs = [(text, reference) for text, reference in zip(ours, gold, strict=True) if text]
        if not pairs:
            return 0.0
        _, _, f1 = self._scorer.score(*map(list, zip(*pairs, strict=True)))
        return float(f1.sum()) / len(ours)


def score_questions(pairs: Sequence[tuple[list[str], list[str]]], scorer: Scorer) -> dict[str, Any] | None:
    """Return the quality of (our sub-questions, gold sub-questions) of each problem, None if gold has none.

    n: problems with gold sub-questions, whether the answer is right or wrong. right_number: of these, with as many
    sub-questions as gold. ours_mean, gold_mean: sub-questions per problem. bleu: 0 to 100, over the whole set.
    signature: sacrebleu's. bertscore: mean F1 in [0, 1], None without a model.
    """
    counted = [(ours, gold) for ours, gold in pairs if gold]
    if not counted:
        return None
    texts = [" ".join(ours) for ours, _ in counted]
    references = [" ".join(gold) for _, gold in counted]
    metric = BLEU()
    n = len(counted)
    return {
        "n": n,
        "right_number": sum(len(ours) == len(gold) for ours, gold in counted),
        "ours_mean": sum(len(ours) for ours, _ in counted) / n,
        "gold_mean": sum(len(gold) for _, gold in counted) / n,
        "bleu": float(metric.corpus_score(texts, [references]).score),
        "signature": str(metric.get_signature()),
        "bertscore": scorer.mean_f1(texts, references),
    }
