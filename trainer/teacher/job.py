"""Annotation job: problems, prompts, requests, and a fingerprint of all inputs that decide the result."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.problems.jsonl import record_from_problem
from trainer.problems.problem import Problem, RejectedRecord
from trainer.problems.sources import read_problems, source_digest
from trainer.runtime import terminal
from trainer.teacher.decontaminate import HeldOutQuestions
from trainer.teacher.filter import FilterConfig, FilterResult, filter_sample
from trainer.teacher.prompts import (
    BUILT_IN_PROMPTS,
    PromptBuilder,
    choose_exemplars,
    dataset_options,
    parse_source,
    stop_texts,
)
from trainer.teacher.responses import Response, ResponseLog, TeacherRequest, make_request
from trainer.teacher.settings import RESULT_SETTINGS, SAMPLING_SETTINGS, AnnotateSettings


@dataclass(frozen=True)
class AnnotationJob:
    """Problems to annotate, and everything needed to build their requests and filter the responses."""

    settings: AnnotateSettings
    problems: list[Problem]
    # Problems that are left out, each with the name of the test problem that matches it.
    contaminated: list[tuple[Problem, str]]
    bad_records: list[RejectedRecord]
    prompt_builder: PromptBuilder
    teacher: dict[str, Any]  # the model's name, and all settings that determine its responses
    fingerprint_fields: dict[str, Any]  # equal fields and equal responses give equal result files

    @cached_property
    def requests(self) -> dict[str, list[TeacherRequest]]:
        """Mapping from problem id to the problem's requests, one per sample, in order."""
        samples = range(self.settings.num_samples)
        prompts = {problem.id: self.prompt_builder.build(problem) for problem in self.problems}
        return {
            id: [make_request(id, sample, prompt, self.teacher) for sample in samples]
            for id, prompt in prompts.items()
        }

    @cached_property
    def _by_id(self) -> dict[str, Problem]:
        return {problem.id: problem for problem in self.problems}

    def filter(self, request: TeacherRequest, response: Response) -> FilterResult:
        s = self.settings
        config = FilterConfig(s.style, s.min_steps, s.max_steps, s.require_annotations)
        problem = self._by_id[request.problem_id]
        return filter_sample(response.text, response.finish_reason, problem, config)

    def needs_no_more_samples(self, request: TeacherRequest, response: Response) -> bool:
        """Return whether no further sample of the problem is needed after this response."""
        return not self.settings.keep_all and self.filter(request, response).is_kept

    def num_answered(self, log: ResponseLog) -> int:
        return sum(log.get(request.key) is not None for queue in self.requests.values() for request in queue)

    def queues(self, log: ResponseLog) -> list[list[TeacherRequest]]:
        """Return one list of requests for each problem that needs more samples. The requests of a list are sent in order.

        With `keep_all`, each request without a response is in a list of its own.
        """
        queues = []
        for requests in self.requests.values():
            if self.settings.keep_all:
                queues += [[request] for request in requests if log.get(request.key) is None]
                continue
            for index, request in enumerate(requests):
                response = log.get(request.key)
                if response is None:
                    queues.append(requests[index:])  # some of these may have a response in the log already
                    break
                if self.needs_no_more_samples(request, response):
                    break
        return queues


def prepare_job(settings: AnnotateSettings, model_digest: str = "") -> AnnotationJob:
    """Read all data and return the job. `model_digest`: digest of a local model's files. Raises UserError for bad data."""
    held_out, test_sets = _held_out(settings)
    problems: list[Problem] = []
    contaminated: list[tuple[Problem, str]] = []
    bad_records: list[RejectedRecord] = []
    options = dataset_options(settings.data, settings.seed)
    for record in read_problems(settings.data, settings.split, settings.data_path, **options):
        if isinstance(record, RejectedRecord):
            bad_records.append(record)
            continue
        if settings.max_problems and len(problems) + len(contaminated) == settings.max_problems:
            break
        match = held_out.match(record.question)
        if match is None:
            problems.append(record)
        else:
            contaminated.append((record, match))
    if not problems:
        matches = f"{len(contaminated)} match test questions"
        raise UserError(f"{settings.data_path}: there is no problem to annotate, {matches}")
    file = Path(settings.prompt) if settings.prompt else BUILT_IN_PROMPTS / f"{settings.style}.j2"
    exemplars = choose_exemplars(settings, held_out)
    prompt_builder = PromptBuilder(file, settings.style, exemplars, settings.gold_hint, settings.with_facts)
    exemplar_text = "\n".join(json.dumps(record_from_problem(p), sort_keys=True) for p in exemplars)
    teacher = _teacher(settings, model_digest)
    fingerprint = {name: getattr(settings, name) for name in RESULT_SETTINGS}
    fingerprint |= {
        "source": source_digest(settings.data, settings.split, settings.data_path, **options),
        "prompt": prompt_builder.digest,
        "exemplars": hashlib.sha256(exemplar_text.encode()).hexdigest(),
        "decontaminate": test_sets,
        **teacher,
    }
    return AnnotationJob(settings, problems, contaminated, bad_records, prompt_builder, teacher, fingerprint)


def _teacher(settings: AnnotateSettings, model_digest: str) -> dict[str, Any]:
    """Return the model's name and the settings that determine the response to a prompt. The endpoint's URL is left out."""
    if settings.base_url:
        teacher: dict[str, Any] = {"model": settings.model, "api": settings.api}
    else:
        teacher = {"model": Path(settings.model_name_or_path).name, "model_digest": model_digest}
        sampling_seed = settings.seed if settings.temperature else 0
        teacher |= {"dtype": settings.dtype, "sampling_seed": sampling_seed}
    sampling = {name: getattr(settings, name) for name in SAMPLING_SETTINGS}
    return teacher | sampling | {"stop": stop_texts(settings)}


def _held_out(settings: AnnotateSettings) -> tuple[HeldOutQuestions, list[list[str]]]:
    """Return an index of all test questions, and [data, split, digest] of each test set."""
    questions: list[tuple[str, str]] = []
    digests = []
    for text in settings.decontaminate:
        data, path, split = parse_source(text, "decontaminate")
        options = dataset_options(data, settings.seed)
        before = len(questions)
        for record in read_problems(data, split, path or None, **options):
            if isinstance(record, Problem):
                questions.append((f"{data}:{split}:{record.id}", record.question))
        terminal.info(f"test set {data} {split}: {len(questions) - before} questions must not be annotated")
        digests.append([data, split, source_digest(data, split, path or None, **options)])
    return HeldOutQuestions(questions, settings.decontaminate_ngram), digests
