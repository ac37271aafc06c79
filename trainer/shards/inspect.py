"""Print the examples of a training method, with inputs, targets and calculator results in different colours."""

from rich.console import Console
from rich.text import Text

from trainer.errors import UserError
from trainer.models.segment_tokenizer import segment_tokenizer
from trainer.models.tokenizer import load_tokenizer
from trainer.shards.methods import SegmentRole, view_of
from trainer.shards.read import Shards

_STYLES = {"input": "dim", "target": "bold green", "calculator": "magenta"}


def print_examples(directory: str, method_name: str, count: int) -> None:
    """Print up to `count` examples, decoded from the tokens on disk. Raises UserError if the method has no example."""
    shards = Shards.open(directory, verify=True)
    codec = segment_tokenizer(load_tokenizer(shards.tokenizer_path))
    view = view_of(method_name)
    lengths = shards.lengths(view)
    usable = [index for index in range(len(shards)) if lengths[index]]
    if not usable:
        reason = "its problems lack the steps that the method needs"
        raise UserError(f"{directory} has no example for method {method_name}: {reason}")
    console = Console()
    legend = Text("method ").append(method_name, "bold").append(": ")
    for name, style in _STYLES.items():
        legend.append(name, style).append("  ")
    console.print(legend)
    for index in usable[:count]:
        shown = Text()
        for role, tokens in shards.segments(index):
            if role in view.inputs:
                input_style = "calculator" if role == SegmentRole.CALCULATOR else "input"
                style = _STYLES["target" if role in view.targets else input_style]
                shown.append(codec.decode_next(tokens.tolist()), style)
        num_targets = int(shards.target_lengths(view)[index])
        title = f"{shards.problem(index).id}: {lengths[index]} tokens, {num_targets} targets"
        console.rule(title, align="left")
        console.print(shown)
