"""Map roles (planner, decomposer, solver, student) to models, build one rollout per problem, and solve the problems."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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


@dataclass(frozen=True)
class RoleModel:
    """A model, its training method (None: unknown), and its name in messages."""

    model: PreTrainedModel
    method: str | None
    name: str = "the model"


class Pipeline:
    """The models of an evaluation and the rollouts of its problems. Roles of one model share its sequences."""

    def __init__(
        self,
        role_models: Mapping[str, RoleModel],
        tokenizer: PreTrainedTokenizerBase,
        shards: Shards,
        decoding: Decoding,
        exemplars: Sequence[Problem] = (),
    ) -> None:
        """`role_models`: by role, all with the same tokenizer. `exemplars`: few-shot exemplars before every problem."""
        self.role_models, self.shards, self.decoding = role_models, shards, decoding
        self._tokenizer, self._exemplars = tokenizer, exemplar_tokens(exemplars, tokenizer)
        distinct = {id(role_model.model): role_model for role_model in role_models.values()}
        self.models = [role_model.model for role_model in distinct.values()]
        self.backends = [UNCHECKED] * len(self.models)
        self.context = RolloutContext(
            stop_tokens=StopTokens(tokenizer),
            models=[
                RolloutModel(
                    VIEWS[found.method].inputs if found.method in VIEWS else frozenset(),
                    context_length(found.model.config) or math.inf,
                    end_of_text_ids(found.model, tokenizer),
                )
                for found in distinct.values()
            ],
            roles={role: list(distinct).index(id(found.model)) for role, found in role_models.items()},
            max_new_tokens=decoding.max_new_tokens,
            calculator=decoding.calculator,
        )

    def rollout(self, index: int) -> Rollout:
        """Return a new rollout of problem `index`."""
        return Rollout(
            index, self.prompt(index), self.context, self._program(index), self._sampling_seeds(index)
        )

    def prompt(self, index: int) -> list[int]:
        """Return the tokens that every model's sequence starts with."""
        prompt: list[int] = self.shards.prompt(index).tolist()
        return insert_exemplars(prompt, self._exemplars, self._tokenizer) if self._exemplars else prompt

    def choose_backends(self, indices: Sequence[int], requested: str) -> list[BackendChoice]:
        """Return the backend of each model, checked on prompts of `indices`, which must not be empty.

        requested: "auto", "slots" or "transformers". Raises UserError if no backend passes the check.
        """
        chosen = shortest_middle_longest(indices, lambda index: len(self.shards.prompt(index)))
        prompts = [self.prompt(index) for index in chosen]
        names = {id(role_model.model): role_model.name for role_model in self.role_models.values()}
        return [
            choose_backend(
                model, check_texts(prompts, capacity, self.shared_prefix), names[id(model)], requested
            )
            for model, capacity in zip(self.models, self.capacities(indices), strict=True)
        ]

    def backend_of(self, role: str) -> BackendChoice:
        return self.backends[self.context.roles[role]]

    @property
    def shared_prefix(self) -> list[int]:
        """Tokens that all prompts start with; empty without exemplars."""
        if not self._exemplars:
            return []
        return insert_exemplars(bos_tokens(self._tokenizer), self._exemplars, self._tokenizer)

    def capacities(self, indices: Sequence[int]) -> list[int]:
        """Return for each model the maximum length in tokens of its sequences."""
        given = max(len(self.shards.prompt(index)) + sum(map(len, self._gold(index))) for index in indices)
        longest = (
            given
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
            plan = [token for tokens in self._gold(index) for token in tokens]
            guidance = partial(programs.gold_guidance, segment_role=segment_role, tokens=plan)
        elif segment_role:
            guidance = partial(programs.planner_guidance, segment_role=segment_role)
        iterative = programs.ahead if decoding.mode == AHEAD else programs.interleaved
        return partial(iterative, max_steps=decoding.max_steps, guidance=guidance)

    def _gold(self, index: int) -> list[list[int]]:
        """Return the data's segments that a model reads besides the problem: sub-questions, or the plan."""
        return [
            tokens.tolist()
            for segment_role, tokens in self.shards.segments(index)
            if segment_role == self.decoding.gold_segment_role
        ]

    def _sampling_seeds(self, index: int) -> list[int]:
        """Return one seed per model. The solver has the seed of a model that answers alone, so that one model in both
        roles samples the text that it would sample alone."""
        numbers = range(len(self.context.models))
        if not self.decoding.temperature:
            return [0] * len(numbers)
        problem_id = self.shards.problem(index).id
        names = {number: role for role, number in self.context.roles.items()}
        names[self.context.roles.get(SOLVER, 0)] = ""
        return [sampling_seed(self.decoding.seed, problem_id, names[number]) for number in numbers]


def predictions(
    pipeline: Pipeline, indices: Sequence[int], counter: SharedCounter
) -> Iterator[dict[str, Any]]:
    """Solve the problems `indices` together with the other ranks; yield this rank's predictions as they are made.

    A problem whose prompt fills the model's context gives a prediction with an empty text. `pipeline.backends` must hold
    the chosen backends.
    """
    if not indices:
        return
    shards, decoding = pipeline.shards, pipeline.decoding
    order = longest_first(shards, indices)
    # With more slots than problems the first rank would take all of them.
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
    """Return the indices, longest first, by the length of the whole problem in the shards (question, steps, answer).

    It predicts the generated length better than the length of the prompt does.
    """
    totals = shards.total_lengths()
    return sorted(indices, key=lambda index: -totals[index])


def _prediction(pipeline: Pipeline, rollout: Rollout) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "generated_tokens": rollout.generated.total(),
        "calculator_results_given": rollout.calculator_results,
        "finished": rollout.finished,
    }
    if pipeline.decoding.mode not in SINGLE_MODEL_MODES:
        fields["generated_by"] = {role: rollout.generated[role] for role in pipeline.context.roles}
        fields["stopped"] = rollout.stop_reason
    if pipeline.decoding.guidance:
        fields["plan"] = rollout.guidance_text
    return score_prediction(pipeline.shards.problem(rollout.index), rollout.text, fields)


def exemplar_tokens(exemplars: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of few-shot exemplars (Brown et al., 2020), between the tokenizer's prefix (BOS) and the problem.

    An exemplar has the text of the chain-of-thought view (question, solutions, `#### answer`), then an empty line. It is
    tokenised in the same pieces as training examples, so that base and distilled models read the same format.
    """
    if not exemplars:
        return []
    pieces = [
        text
        for problem in exemplars
        for text in (*(text for role, text in segment_texts(problem) if role in VIEWS["cot"].inputs), "\n\n")
    ]
    codec = segment_tokenizer(tokenizer)
    encoded = [*codec.encode_first(pieces[:1]), *codec.encode_next(pieces[1:])]
    return [token for tokens in encoded for token in tokens]


def insert_exemplars(
    prompt: Sequence[int], exemplars: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the prompt of a problem (prefix and problem, as in the shards) with the exemplars' tokens inserted.

    Some tokenizers encode a problem that starts a text, as in the shards, differently from one that continues a text.
    """
    prefix = len(bos_tokens(tokenizer))
    problem = list(prompt[prefix:])
    codec = segment_tokenizer(tokenizer)
    if exemplars and problem and codec.continues_differently:
        problem = codec.encode_next(codec.decode_texts([problem]))[0]
    return [*prompt[:prefix], *exemplars, *problem]
