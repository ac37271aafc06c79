"""Small tokenizer for the stories data set: byte-level BPE in which every digit is a token of its own.

The space before a number is a token too, so "12" is the same two tokens after a space, after `<<` and after `+`, and a
student need not learn that " 1" and "1" are the same digit. Byte-level: any text survives the round trip.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trainer.problems import stories

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 1024
_NUM_STORIES = 4_000
_MAX_TOKENS = 2048  # of an example; ten steps take about 700


def train_tokenizer(directory: Path, seed: int = 0) -> None:
    """Train on training stories of `seed` and save into `directory`, for `AutoTokenizer.from_pretrained`.

    The same seed gives the same bytes. At most VOCAB_SIZE tokens; `<|endoftext|>` is token 0 and BOS, EOS and padding.
    Encoding adds no special token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=_MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(str(directory))


def _texts(seed: int) -> Iterator[str]:
    for problem in stories.generate_problems(
        "train", seed=seed, num_problems=_NUM_STORIES, min_steps=2, max_steps=8
    ):
        yield problem.question + "\n"
        for step in problem.steps:
            yield step.question + "\n"
            yield step.solution + "\n"
        yield "#### " + problem.answer
