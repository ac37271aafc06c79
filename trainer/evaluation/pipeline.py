"""Who is on the stage: the models by part, and by which method they solve each problem."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.evaluation import programs
from trainer.evaluation.backend_check import check_texts, shortest_middle_longest
from trainer.evaluation.backends.choice import UNCHECKED, BackendChoice, choose_backend
from trainer.evaluation.decoding import AHEAD, FEW_SHOT, GOLD, SOLVER, UNIFIED, Decoding
from trainer.evaluation.few_shot import after_exemplars, exemplar_tokens
from trainer.evaluation.rollout import ModelSlot, Rollout, RolloutContext
from trainer.evaluation.sampling import sampling_seed
from trainer.evaluation.stop_tokens import StopTokens, end_of_text_ids
from trainer.models.load import context_length
from trainer.problems.problem import DELIMITER, Problem
from trainer.shards.methods import VIEWS, Role
from trainer.shards.read import Shards
from trainer.shards.segments import bos_tokens


@dataclass(frozen=True)
class RoleModel:
    """A model, the method it was taught by (None: unknown), and its name in messages."""

    model: PreTrainedModel
    method: str | None
    name: str = "the model"


class Pipeline:
    """Makes the solutions of an evaluation. Parts that one model plays share a seat: it reads every problem once."""

    def __init__(
        self,
        actors: Mapping[str, RoleModel],
        tokenizer: PreTrainedTokenizerBase,
        shards: Shards,
        decoding: Decoding,
        exemplars: Sequence[Problem] = (),
    ) -> None:
        """`actors` by part; the models' tokenizers are all the same. `exemplars`: what comes before every problem."""
        self.role_models, self.shards, self.decoding = actors, shards, decoding
        self._tokenizer, self._exemplars = tokenizer, exemplar_tokens(exemplars, tokenizer)
        seated = {id(actor.model): actor for actor in actors.values()}
        self.models = [actor.model for actor in seated.values()]
        self.backends = [UNCHECKED] * len(self.models)  # how each model is decoded
        self.context = RolloutContext(
            stop_tokens=StopTokens(tokenizer),
            models=[_model_slot(actor, tokenizer) for actor in seated.values()],
            roles={part: list(seated).index(id(actor.model)) for part, actor in actors.items()},
            max_new_tokens=decoding.max_new_tokens,
            calculator=decoding.calculator,
        )

    def rollout(self, index: int) -> Rollout:
        """The problem, about to be solved."""
        return Rollout(
            index, self.prompt(index), self.context, self._program(index), self._sampling_seeds(index)
        )

    def prompt(self, index: int) -> list[int]:
        """Return the tokens that every model reads first."""
        prompt: list[int] = self.shards.prompt(index).tolist()
        return after_exemplars(prompt, self._exemplars, self._tokenizer) if self._exemplars else prompt

    def choose_backends(self, indices: Sequence[int], requested: str) -> list[BackendChoice]:
        """Return for each model the backend that a check on prompts of `indices`, at least one, finds right.

        requested: "auto", "slots" or "transformers". Raises UserError for a model that none is right for.
        """
        chosen = shortest_middle_longest(indices, lambda index: len(self.shards.prompt(index)))
        prompts = [self.prompt(index) for index in chosen]
        names = {id(actor.model): actor.name for actor in self.role_models.values()}
        return [
            choose_backend(
                model, check_texts(prompts, capacity, self.shared_prefix), names[id(model)], requested
            )
            for model, capacity in zip(self.models, self.capacities(indices), strict=True)
        ]

    def backend_of(self, part: str) -> BackendChoice:
        """Return how the model that plays `part` is decoded."""
        return self.backends[self.context.roles[part]]

    @property
    def shared_prefix(self) -> list[int]:
        """What the prompts of all problems begin with."""
        if not self._exemplars:
            return []
        return after_exemplars(bos_tokens(self._tokenizer), self._exemplars, self._tokenizer)

    def capacities(self, indices: Sequence[int]) -> list[int]:
        """Longest sequence in tokens that each seat may have to hold."""
        given = max(len(self.shards.prompt(index)) + sum(map(len, self._gold(index))) for index in indices)
        longest = (
            given
            + len(self._exemplars)
            + len(self.context.stop_tokens.tokens(DELIMITER))
            + self.decoding.max_new_tokens
        )
        return [int(min(longest, seat.context)) for seat in self.context.models]

    def _program(self, index: int) -> programs.SolvingProgram:
        decoding = self.decoding
        if decoding.mode in UNIFIED:
            return partial(programs.unified, opening=DELIMITER if decoding.impose_answer else "")
        if decoding.mode == FEW_SHOT:
            return programs.few_shot
        if decoding.mode == GOLD:
            return partial(programs.gold_subquestions, questions=self._gold(index))
        guidance: programs.SolvingProgram = programs.without_guidance
        if decoding.guidance_role and decoding.guidance_from == "gold":
            plan = [token for tokens in self._gold(index) for token in tokens]
            guidance = partial(programs.gold_guidance, role=decoding.guidance_role, tokens=plan)
        elif decoding.guidance_role:
            guidance = partial(programs.planner_guidance, role=decoding.guidance_role)
        asking = programs.ahead if decoding.mode == AHEAD else programs.interleaved
        return partial(asking, max_steps=decoding.max_steps, guidance=guidance)

    def _gold(self, index: int) -> list[list[int]]:
        """Segments of the data that are shown to a model: sub-questions, or the plan."""
        return [
            tokens.tolist() for role, tokens in self.shards.segments(index) if role == self.decoding.gold_role
        ]

    def _sampling_seeds(self, index: int) -> list[int]:
        """Noise of its own for every seat. The solver's is that of a student alone, so that one student in both parts
        draws what it would draw alone."""
        seats = range(len(self.context.models))
        if not self.decoding.temperature:
            return [0] * len(seats)
        problem_id = self.shards.problem(index).id
        names = {seat: part for part, seat in self.context.roles.items()}
        names[self.context.roles.get(SOLVER, 0)] = ""
        return [sampling_seed(self.decoding.seed, problem_id, names[seat]) for seat in seats]


def _model_slot(actor: RoleModel, tokenizer: PreTrainedTokenizerBase) -> ModelSlot:
    reads = VIEWS[actor.method].inputs if actor.method in VIEWS else frozenset[Role]()
    return ModelSlot(
        reads, context_length(actor.model.config) or math.inf, end_of_text_ids(actor.model, tokenizer)
    )
