"""README.md of an export: what the model is, how it was made, how to load it."""

from __future__ import annotations

import json
import re
from typing import Any

_METHODS = {
    "answer_only": "the final answer alone",
    "cot": "the solution steps and the final answer (chain of thought)",
    "socratic": "sub-questions, their solutions and the final answer (Socratic chain of thought)",
    "decomposer": "sub-questions, given the problem",
    "decomposer_interleaved": "sub-questions, given the problem and the earlier solutions",
    "solver": "solutions and the final answer, given the sub-questions",
}

_CARD = """\
# {title}

A {class_name} with {parameters} parameters, trained to write {learned}.

| | |
| --- | --- |
| base model | {base_model} |
| method | `{method}` |
| data | {data} |
| optimizer steps | {step} |
| packs seen | {packs} |
| seed | {seed} |
| trained in | {dtype}, DeepSpeed ZeRO stage {stage}, {ranks} |
| weights stored in | {export_dtype} |
| digest of the training tokens | `{shards}` |

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

The prompt is the question and a line break. The text ends with `#### ` and the final answer.{calculator}

## How it was made

`tools/convert_checkpoint.py` of Socratic Trainer copied the fp32 master weights of the checkpoint `{checkpoint}` into
these safetensors files{rounding}. MANIFEST.json has the SHA-256 of every file, and of the checkpoint's manifest.
"""


def text(facts: dict[str, Any], class_name: str, export_dtype: str) -> str:
    """The model card. `facts`: those of the export's manifest; `export_dtype`: "float32" or "bfloat16"."""
    base_model = str(facts.get("base_model") or facts.get("model_name", "unknown"))
    front_matter = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    lines = [f"{key}: {value}" for key, value in front_matter.items()]
    if facts.get("pretrained") and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model):  # a hub name, not a path
        lines.append(f"base_model: {json.dumps(base_model)}")
    lines += ["tags:", "- reasoning", "- distillation", "- deepspeed", "- socratic-trainer"]
    method = str(facts.get("method", ""))
    world_size = facts["world_size"]
    calculator = (
        " The model writes calculator results itself."
        if facts.get("learn_calculator_results")
        else " Between `<<` and `>>` the model leaves the result to a calculator: after `<<3*4=` the text `12>>` is to be"
        "\nput in for it, as `tools/evaluate.py` does."
    )
    trained_in = "bfloat16" if facts["dtype"] == "bf16" else "float32"
    card = _CARD.format(
        title=f"{facts.get('model_name', 'model')}, {method} on {facts.get('data', 'unknown data')}",
        class_name=class_name,
        parameters=f"{facts['num_parameters']:,}",
        learned=_METHODS.get(method, "what its training data shows"),
        base_model=f"`{base_model}`{'' if facts.get('pretrained') else ', random weights'}",
        method=method,
        data=facts.get("data", "unknown"),
        step=f"{facts['step']:,}",
        packs=f"{facts.get('packs_consumed', 0):,}",
        seed=facts.get("seed", "unknown"),
        dtype=trained_in,
        stage=facts["zero_stage"],
        ranks=f"{world_size} rank{'s' if world_size > 1 else ''}",
        export_dtype=export_dtype,
        shards=facts.get("shards_fingerprint", "unknown"),
        calculator=calculator,
        checkpoint=facts["checkpoint"],
        rounding=", rounded to bfloat16" if export_dtype == "bfloat16" else "",
    )
    return "---\n" + "\n".join(lines) + "\n---\n\n" + card
