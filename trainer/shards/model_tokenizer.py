"""Check that a model fits the tokens of a shard directory, before the model is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.errors import UserError
from trainer.models import load
from trainer.models.source import check_trainable
from trainer.models.tokenizer import check_saved_tokenizer, fingerprint, load_tokenizer
from trainer.runtime import terminal
from trainer.shards.read import Shards
from trainer.shards.segments import bos_tokens, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_NUM_COMPARED = 100  # maximum number of problems that are encoded again with the model's own tokenizer


def check_model_fits_shards(
    config: PreTrainedConfig, name: str, shards: Shards, tokenizer: PreTrainedTokenizerBase, pretrained: bool
) -> None:
    """Raise UserError if the model `name` cannot be trained on the shards.

    This is the case if the weights are quantised, if a token has no embedding, if the model was pretrained with a tokenizer
    that gives other tokens, or if transformers would load another tokenizer from a folder with `config` and `tokenizer`.
    `tokenizer`: the tokenizer of the shards. `pretrained`: True if the weights are loaded, False if they are random.
    """
    if pretrained:
        check_trainable(config, name)
    load.check_vocabulary(config, shards.max_token_id, name)
    if pretrained:
        check_same_tokens(name, shards, tokenizer)
    check_saved_tokenizer(config, tokenizer)


def check_same_tokens(name: str, shards: Shards, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the tokenizer of the model `name` encodes problems as other tokens than the shards hold.

    `tokenizer`: the tokenizer of the shards. At most _NUM_COMPARED problems are compared, without EOS. Logs a warning if
    the model's tokenizer cannot be loaded, or if its EOS token is not the EOS token of the shards.
    """
    try:
        own = load_tokenizer(name)
    except UserError as error:
        terminal.warning(f"the shards' tokens could not be compared with the model's: {error}")
        return
    if fingerprint(own) == shards.facts["tokenizer_fingerprint"]:
        return
    problems = [shards.problem(index) for index in range(min(_NUM_COMPARED, len(shards)))]
    if own.eos_token_id is None:
        own.eos_token = tokenizer.eos_token
    with_facts = bool(shards.facts["recipe"].get("with_facts"))
    for index, (segments, _) in enumerate(tokenise(problems, own, bos_tokens(own), with_facts)):
        expected = [token for segment in segments for token in segment.tokens][:-1]
        stored = [token for _, tokens in shards.segments(index) for token in tokens.tolist()][:-1]
        if expected != stored:
            at = next((i for i, (a, b) in enumerate(zip(expected, stored, strict=False)) if a != b), 0)
            raise UserError(
                f"{shards.path} was not made with the tokenizer of {name}: {problems[index].id} has tokens "
                f"{_shown(tokenizer, stored[at : at + 4])} there, {_shown(own, expected[at : at + 4])} with the model's own; "
                f"prepare the shards with --tokenizer_name {name}"
            )
    if own.eos_token_id != tokenizer.eos_token_id:
        terminal.warning(
            f"{name} ends texts with {own.eos_token!r}, the shards with {tokenizer.eos_token!r}: the model learns to write {tokenizer.eos_token!r}"
        )


def _shown(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    named = tokenizer.convert_ids_to_tokens(tokens)
    return ", ".join(f"{token} {name!r}" for token, name in zip(tokens, named, strict=True))
