"""README.md of an export: the model, its training, and how to load it."""

import json
import re
from pathlib import PurePath

from trainer.storage.manifest import ExportFacts

_OUTPUTS = {
    "answer_only": "the final answer alone",
    "cot": "the solution step by step, then the final answer (chain of thought)",
    "socratic": "sub-questions, their solutions and the final answer (Socratic chain of thought)",
    "decomposer": "all sub-questions of a problem",
    "decomposer_interleaved": "the next sub-question of a problem, given the solutions so far",
    "solver": "the solution of each sub-question, and the final answer",
}
_PROMPT = "The prompt is the question and a line break. The text ends with `####` and the final answer."
_HALF = (
    "This is one model of a pair: `tools/evaluate.py` runs a decomposer and a solver alternately. The prompt is the question,"
    "\na line break, and the text that both models have written so far."
)
_CALCULATOR = {
    True: "The model writes the results of its calculations, `<<3*4=12>>`, itself.",
    False: "The model was not trained on results of calculations: after `<<3*4=` a calculator must insert `12>>`, as\n"
    "`tools/evaluate.py` does. Without a calculator the model guesses the results.",
}

_CARD = """\
# {title}

A {class_name} with {parameters} parameters, trained to write {writes}.

| | |
| --- | --- |
| base model | {base_model}{text_part} |
| method | `{method}` |
| data | {data} |
| optimizer steps | {step} |
| packs seen | {packs} |
| seed | {seed} |
| trained in | {dtype}, DeepSpeed ZeRO stage {stage}, {ranks} |
| weights stored in | {export_dtype} |
| training tokens | `{shards}` (fingerprint of the shards) |

## How to load

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.{export_dtype})
prompt = tokenizer("A farmer has 3 boxes with 12 eggs each. How many eggs are there?\\n", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=256)[0]))
```

{prompt}
{calculator}

## How it was made

`tools/convert_checkpoint.py` of Socratic Trainer copied the master weights of `{checkpoint}`
into these safetensors files{rounding}.
`MANIFEST.json` has the SHA-256 of every file and of the checkpoint's manifest.
"""


def text(facts: ExportFacts, class_name: str, export_dtype: str) -> str:
    """Return the text of the model card. `export_dtype`: "float32" or "bfloat16"."""
    name, method = str(facts.get("model_name", "model")), str(facts.get("method", "unknown"))
    base_model, pretrained = str(facts.get("base_model", name)), bool(facts.get("pretrained"))
    text_part_of = facts.get("text_part_of")
    front_matter = ["library_name: transformers", "pipeline_tag: text-generation"]
    if pretrained and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model):  # has the form of a Hub name
        front_matter.append(f"base_model: {json.dumps(base_model)}")
    front_matter += ["tags:", "- reasoning", "- distillation", "- deepspeed", "- socratic-trainer"]
    card = _CARD.format(
        title=f"{name}, {method} on {facts.get('data', 'unknown data')}",
        class_name=class_name,
        parameters=f"{facts['num_parameters']:,}",
        writes=_OUTPUTS.get(method, "what its training data shows"),
        base_model=f"`{base_model}`{'' if pretrained else ', random weights'}",
        text_part=f", its text part alone (of `{text_part_of}`)" if text_part_of else "",
        method=method,
        data=facts.get("data", "unknown"),
        step=f"{facts['step']:,}",
        packs=f"{facts.get('packs_consumed', 0):,}",
        seed=facts.get("seed", "unknown"),
        dtype="bfloat16" if facts["dtype"] == "bf16" else "float32",
        stage=facts["zero_stage"],
        ranks="1 rank" if facts["world_size"] == 1 else f"{facts['world_size']} ranks",
        export_dtype=export_dtype,
        shards=facts.get("shards_fingerprint", "unknown"),
        prompt=_HALF if method in ("decomposer", "decomposer_interleaved", "solver") else _PROMPT,
        calculator=_CALCULATOR[bool(facts.get("train_on_calculator_results"))],
        checkpoint="/".join(PurePath(facts["checkpoint"]).parts[-3:]),
        rounding=", rounded to bfloat16" if export_dtype == "bfloat16" else "",
    )
    return "\n".join(["---", *front_matter, "---", "", card])
