"""Map roles (planner, decomposer, solver, student) to models, build one rollout per problem, and solve the problems."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.evaluation import programs
from trainer.evaluation.backend_check import check_texts, shortest_middle_longest
from trainer.evaluation.backends import Backend
from trainer.evaluation.backends.choice import UNCHECKED, BackendChoice, choose_backend, make_backend
from trainer.evaluation.decoding import AHEAD, FEW_SHOT, GOLD, SINGLE_MODEL_MODES, SOLVER, UNIFIED, Decoding
from trainer.evaluation.generate import generate, make_sampler
from trainer.evaluation.rollout import Rollout, RolloutContext, RolloutModel
from trainer.evaluation.sampling import sampling_seed
from trainer.evaluation.score import score_prediction
from trainer.evaluation.stop_tokens import StopTokens, end_of_text_ids
from trainer.evaluation.work_queue import SharedCounter, chunk_size, take_problems
from trainer.models.load import context_length
from trainer.models.segment_tokenizer import segment_tokenizer
from trainer.problems.problem import DELIMITER, Problem
from trainer.runtime import distributed
from trainer.shards.methods import VIEWS
from trainer.shards.read import Shards
from trainer.shards.segments import bos_tokens, segment_texts
from trainer.storage.manifest import Generation, Prediction


@dataclass(frozen=True)
class RoleModel:
    """A model, its training method (None: unknown), and its name in messages."""

    model: PreTrainedModel
    method: str | None
    name: str = "the model"


class Pipeline:
    """The models of an evaluation by role. Creates rollouts, in which roles with the same model share one sequence."""

    def __init__(
        self,
        role_models: Mapping[str, RoleModel],
        tokenizer: PreTrainedTokenizerBase,
        shards: Shards,
        decoding: Decoding,
        exemplars: Sequence[Problem] = (),
    ) -> None:
        """Create a pipeline. All models must use `tokenizer`. `exemplars`: few-shot examples that precede every problem."""
        self.role_models, self.shards, self.decoding = role_models, shards, decoding
        self._tokenizer, self._exemplars = tokenizer, exemplar_tokens(exemplars, tokenizer)
        distinct = {id(role_model.model): role_model for role_model in role_models.values()}
        self.models = [role_model.model for role_model in distinct.values()]
        self.backends = [UNCHECKED] * len(self.models)
        numbers = {key: number for number, key in enumerate(distinct)}
        rollout_models = [
            RolloutModel(
                VIEWS[role_model.method].inputs if role_model.method in VIEWS else frozenset(),
                context_length(role_model.model.config) or math.inf,
                end_of_text_ids(role_model.model, tokenizer),
            )
            for role_model in distinct.values()
        ]
        roles = {role: numbers[id(role_model.model)] for role, role_model in role_models.items()}
        self.context = RolloutContext(
            StopTokens(tokenizer), rollout_models, roles, decoding.max_new_tokens, decoding.calculator
        )

    def rollout(self, index: int) -> Rollout:
        program, seeds = self._program(index), self._sampling_seeds(index)
        return Rollout(index, self.prompt(index), self.context, program, seeds)

    def prompt(self, index: int) -> list[int]:
        """Return the tokens at the start of every model's sequence for problem `index`."""
        prompt: list[int] = self.shards.prompt(index).tolist()
        return insert_exemplars(prompt, self._exemplars, self._tokenizer) if self._exemplars else prompt

    def choose_backends(self, indices: Sequence[int], requested: str) -> list[BackendChoice]:
        """Return a checked backend for each model. The check uses prompts of the problems `indices` (at least one).

        requested: "auto", "slots" or "transformers". Raises UserError if no requested backend passes the check of a model.
        """
        checked = shortest_middle_longest(indices, lambda index: len(self.shards.prompt(index)))
        prompts = [self.prompt(index) for index in checked]
        names = {id(role_model.model): role_model.name for role_model in self.role_models.values()}
        prefix, capacities = self.shared_prefix, self.capacities(indices)
        return [
            choose_backend(model, check_texts(prompts, capacity, prefix), names[id(model)], requested)
            for model, capacity in zip(self.models, capacities, strict=True)
        ]

    def backend_of(self, role: str) -> BackendChoice:
        return self.backends[self.context.roles[role]]

    @property
    def shared_prefix(self) -> list[int]:
        """Tokens that all prompts start with: BOS and exemplars. Without exemplars, the list is empty."""
        if not self._exemplars:
            return []
        return insert_exemplars(bos_tokens(self._tokenizer), self._exemplars, self._tokenizer)

    def capacities(self, indices: Sequence[int]) -> list[int]:
        """Return the maximum sequence length of each model, in tokens, for the problems `indices`."""
        longest = (
            max(len(self.shards.prompt(index)) + sum(map(len, self._gold(index))) for index in indices)
            + len(self._exemplars)
            + len(self.context.stop_tokens.tokens(DELIMITER))
            + self.decoding.max_new_tokens
        )
        return [int(min(longest, model.context_length)) for model in self.context.models]

    def _program(self, index: int) -> programs.SolvingProgram:
        decoding = self.decoding
        if decoding.mode in UNIFIED:
            return partial(programs.unified, opening=DELIMITER if decoding.impose_answer else "")
        if decoding.mode == FEW_SHOT:
            return programs.few_shot
        if decoding.mode == GOLD:
            return partial(programs.gold_subquestions, questions=self._gold(index))
        guidance: programs.SolvingProgram = programs.without_guidance
        segment_role = decoding.guidance_segment_role
        if segment_role and decoding.guidance_from == "gold":
            plan_tokens = list(chain.from_iterable(self._gold(index)))
            guidance = partial(programs.gold_guidance, segment_role=segment_role, tokens=plan_tokens)
        elif segment_role:
            guidance = partial(programs.planner_guidance, segment_role=segment_role)
        iterative = programs.ahead if decoding.mode == AHEAD else programs.interleaved
        return partial(iterative, max_steps=decoding.max_steps, guidance=guidance)

    def _gold(self, index: int) -> list[list[int]]:
        """Return the tokens of each gold segment that a model reads: sub-questions, or the plan."""
        return [
            tokens.tolist()
            for segment_role, tokens in self.shards.segments(index)
            if segment_role == self.decoding.gold_segment_role
        ]

    def _sampling_seeds(self, index: int) -> list[int]:
        """Return one seed per model (0 for greedy decoding). A pair's solver gets the seed that a single model would get."""
        numbers = range(len(self.models))
        if not self.decoding.temperature:
            return [0] * len(numbers)
        problem_id = self.shards.problem(index).id
        names = {number: role for role, number in self.context.roles.items()}
        names[self.context.roles.get(SOLVER, 0)] = ""
        return [sampling_seed(self.decoding.seed, problem_id, names[number]) for number in numbers]


def predictions(pipeline: Pipeline, indices: Sequence[int], counter: SharedCounter) -> Iterator[Prediction]:
    """Solve the problems `indices` together with the other ranks; yield each prediction of this rank once it is complete.

    No text is generated for a problem whose prompt fills the model's context. The caller must have set `pipeline.backends`.
    """
    if not indices:
        return
    decoding, order = pipeline.decoding, longest_first(pipeline.shards, indices)
    # Limit the slots to a rank's share of the problems. Otherwise the first rank to start would take other ranks' problems.
    num_slots = min(decoding.batch_size, -(-len(order) // distributed.environment().world_size))
    rollouts = map(pipeline.rollout, take_problems(counter, order, chunk_size(len(order), num_slots)))
    sampler = make_sampler(decoding.temperature, decoding.top_p)
    backends: list[Backend[Rollout]] = []
    models = zip(pipeline.backends, pipeline.models, pipeline.capacities(order), strict=True)
    for number, (choice, model, capacity) in enumerate(models):
        settings = (number, model, num_slots, capacity, sampler, pipeline.shared_prefix)
        backends.append(make_backend(choice, *settings, num_models=len(pipeline.models)))
    for rollout in generate(backends, rollouts, Rollout.on_token, num_slots, counter.serve):
        yield _prediction(pipeline, rollout)


def longest_first(shards: Shards, indices: Iterable[int]) -> list[int]:
    """Return the indices of problems, sorted by descending number of tokens of all segments (question, steps, answer, ...).

    This number predicts the number of generated tokens better than the length of the prompt does.
    """
    totals = shards.total_lengths()
    return sorted(indices, key=lambda index: -totals[index])


def _prediction(pipeline: Pipeline, rollout: Rollout) -> Prediction:
    generation: Generation = {
        "generated_tokens": rollout.generated.total(),
        "calculator_results_given": rollout.calculator_results,
        "finished": rollout.finished,
    }
    if pipeline.decoding.mode not in SINGLE_MODEL_MODES:
        generation["generated_by"] = {role: rollout.generated[role] for role in pipeline.context.roles}
        generation["stopped"] = rollout.stop_reason
    if pipeline.decoding.guidance:
        generation["plan"] = rollout.guidance_text
    return score_prediction(pipeline.shards.problem(rollout.index), rollout.text, generation)


def exemplar_tokens(exemplars: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of few-shot exemplars (Brown et al., 2020), which follow BOS and precede the problem.

    An exemplar has the format of the training method `cot` (question, solutions, `#### answer`), followed by an empty line.
    Like training examples, exemplars are tokenised segment by segment, so base and distilled models read the same format.
    """
    segments: list[str] = []
    for problem in exemplars:
        segments += [text for role, text in segment_texts(problem) if role in VIEWS["cot"].inputs] + ["\n\n"]
    codec = segment_tokenizer(tokenizer)
    return list(chain(*codec.encode_first(segments[:1]), *codec.encode_next(segments[1:])))


def insert_exemplars(
    prompt: Sequence[int], exemplars: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return `prompt` (BOS and a problem) with the tokens of the exemplars inserted after BOS.

    In the shards, each problem is tokenised as the start of a text. Some tokenizers encode a problem differently if other
    text precedes it. For these tokenizers, the problem is encoded again.
    """
    num_bos = len(bos_tokens(tokenizer))
    problem = list(prompt[num_bos:])
    codec = segment_tokenizer(tokenizer)
    if exemplars and problem and codec.continues_differently:
        problem = codec.encode_next(codec.decode_texts([problem]))[0]
    return [*prompt[:num_bos], *exemplars, *problem]
