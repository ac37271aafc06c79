"""Small tokenizer for the stories data set: byte-level BPE in which every number of a story is one token.

The space before a number is a separate token. Therefore "12" is the same token after a space, after `<<` and after `+`. A
student model learns to copy a number of one token in half the steps that it needs for a number of several digit tokens.
Decoding restores any text exactly.
"""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trainer.problems import stories

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 539  # all words and all numbers up to generator.MAX_NUMBER are tokens
_NUM_STORIES = 4_000
_MAX_TOKENS = 2048  # per example; an example of ten steps has about 700 tokens


def train_tokenizer(directory: Path, seed: int = 0) -> None:
    """Train a tokenizer on stories that `seed` generates. Save it into `directory`, for `AutoTokenizer.from_pretrained`.

    The same seed gives the same files, byte for byte. The tokenizer has VOCAB_SIZE tokens and adds no special token
    to a text. `<|endoftext|>` is token 0 and serves as BOS, EOS and padding.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    special_tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=_MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        **special_tokens,
    ).save_pretrained(str(directory))


def _texts(seed: int) -> Iterator[str]:
    sizes = {"num_problems": _NUM_STORIES, "min_steps": 2, "max_steps": 8}
    for problem in stories.generate_problems("train", seed=seed, **sizes):
        yield problem.question + "\n"
        for step in problem.steps:
            yield step.question + "\n"
            yield step.solution + "\n"
        yield "#### " + problem.answer
