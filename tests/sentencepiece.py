"""Small tokenizers of the SentencePiece kind, with the steps of Llama 2's tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

KINDS = ("legacy", "always", "first")
_SPECIAL = ["<unk>", "<s>", "</s>"]


def save_tokenizer(
    kind: str, texts: Iterable[str], folder: Path, tokenizer_class: str = "LlamaTokenizer"
) -> Path:
    """Save a tokenizer trained on `texts` in `folder` and return it: BPE with byte fallback, a space before every text, BOS.

    `kind`: "legacy" (a normalizer puts `▁` before the text), or the prepend scheme of a Metaspace pre-tokenizer.
    """
    learner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=[*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=70,
        show_progress=False,
    )
    learner.train_from_iterator((text.replace("\n", " ") for text in texts), trainer)
    rules = json.loads(learner.to_str())
    rules["pre_tokenizer"] = None
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] in _SPECIAL]
    made = Tokenizer.from_str(json.dumps(rules))
    if kind == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    strip = decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**written, "tokenizer_class": tokenizer_class}))
    return folder
