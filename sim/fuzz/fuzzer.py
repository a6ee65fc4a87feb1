"""The fuzz loop: draws cases, runs them on implementations, judges, shrinks what fails.

A run is determined by its seed: example i of seed s is always the same case. The reference's global view
has to keep every property; every other implementation has to give the same bits; and, for a part of the
examples, each implementation has to keep a relation between them and others derived from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice

from deepep.sim.cases.case import Case, Limits, draw_case
from deepep.sim.cases.choices import Choices, RandomChoices
from deepep.sim.cases.options import SPACE, Coverage
from deepep.sim.cases.routing import PATTERNS
from deepep.sim.fuzz.shrinking import shrink
from deepep.sim.fuzz.subjects import Subject
from deepep.sim.rules import oracle
from deepep.sim.rules.checking import Missing, Property, Violation
from deepep.sim.rules.observed import RankView, first_difference, is_measured
from deepep.sim.rules.properties import RELATIONS, SIMPLE
from deepep.sim.worlds.outcomes import WorldError, WorldTimeout

#: Examples that are run at once, all with the same number of ranks.
BATCH = 16
#: One in so many examples is followed by those of a relation.
RELATION_EVERY = 4
#: Seconds to wait for a hung example while shrinking it.
PATIENCE = 5.0

#: Traits of a case that coverage counts besides its options.
TRAITS: dict[str, tuple[object, ...]] = {
    "origin": tuple(PATTERNS),
    "empty_ranks": ("none", "some", "all"),
    "tokens": ("equal", "uneven"),
    "topk_to_ranks": ("K<R", "K=R", "K>R"),
    "one_expert_per_rank": (False, True),
    "masked": (False, True),
}

Draw = Callable[[Choices, Limits], Case]

DIFFERS = "same bits as the reference"


@dataclass(frozen=True)
class Finding:
    """Something that failed.

    Attributes:
        subject: name of the implementation.
        rule: the property that does not hold, or the type of the error that a rank ended with.
        message: what was seen, where.
        cases: the examples to run, in this order, on a fresh world; the last one fails.
        views: what the ranks got in the last one, if it ran to its end.
    """

    subject: str
    rule: str
    message: str
    cases: tuple[Case, ...]
    views: list[RankView] | None = None

    @property
    def case(self) -> Case:
        return self.cases[-1]


@dataclass
class FuzzReport:
    """The outcome of a fuzz run."""

    coverage: Coverage
    examples: int = 0
    seconds: float = 0.0
    finding: Finding | None = None

    @property
    def examples_per_second(self) -> float:
        return self.examples / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Example:
    """A case, and the cases that a relation derives from it."""

    case: Case
    relation: Property | None = None

    def cases(self, subject: Subject) -> list[Case]:
        """The cases that the subject runs, the example's own first."""
        adapted = subject.adapt(self.case)
        relation = self.relation if subject.gives_views else None
        if relation is None or relation.derive is None or not relation.applies(adapted):
            return [adapted]
        return [adapted, *(subject.adapt(other) for other in relation.derive(adapted))]


class Fuzzer:
    """Fuzzes implementations against the reference.

    Args:
        subjects: the implementations.
        seed: of the whole run.
        limits: bounds of the cases. Each batch of examples has one number of ranks out of `limits.ranks`.
        draw: draws one case; default: `draw_case`.
        rules, relations: the properties to check.
        shrink_seconds: how long to shrink a failing case.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        *,
        seed: int = 0,
        limits: Limits | None = None,
        draw: Draw = draw_case,
        rules: Sequence[Property] = SIMPLE,
        relations: Sequence[Property] = RELATIONS,
        shrink_seconds: float = 20.0,
    ) -> None:
        self.subjects = list(subjects)
        self.seed = seed
        self.limits = limits or Limits()
        self.rules = list(rules)
        self.relations = list(relations)
        self.shrink_seconds = shrink_seconds
        self._draw = draw
        self._expected = lru_cache(maxsize=8 * BATCH)(oracle.observe)

    def run(
        self,
        *,
        examples: int | None = None,
        seconds: float | None = None,
        progress: Callable[[FuzzReport], None] | None = None,
        shrink: bool = True,
    ) -> FuzzReport:
        """Fuzzes until so many examples or seconds are over, or something fails.

        With `shrink` a failing example is found out among those run with it, and made small.
        """
        started = time.monotonic()
        space = {**SPACE, **TRAITS, "num_ranks": tuple(sorted(set(self.limits.ranks)))}
        report = FuzzReport(Coverage(space))
        for batch in self._batches(examples):
            report.finding = self._judge_batch(batch)
            report.examples += len(batch)
            for example in batch:
                report.coverage.add(example.case.features())
            report.seconds = time.monotonic() - started
            if progress is not None:
                progress(report)
            if report.finding is not None or (seconds is not None and report.seconds >= seconds):
                break
        if report.finding is not None and shrink:
            report.finding = self.shrunk(self._located(report.finding))
        return report

    def replay(self, cases: Sequence[Case], rule: str | None = None) -> Finding | None:
        """Runs given examples in order on every implementation; what fails first, not shrunk.

        `rule` names the property that failed, in case it is a relation.
        """
        for subject in self.subjects:
            subject.reset()
            for end, case in enumerate(cases, 1):
                finding = self._run_one(subject, Example(case, self._relation(rule)))
                if finding is not None:
                    return replace(finding, cases=tuple(cases[:end]))
        return None

    def shrunk(self, finding: Finding) -> Finding:
        """The finding with the smallest case that still breaks the same rule by itself.

        A case that needs those before it to fail is kept with all of them.
        """
        subject = self._subject(finding)
        relation = self._relation(finding.rule)
        found: dict[Case, Finding] = {}

        def fails(case: Case) -> bool:
            subject.reset()
            failure = self._run_one(subject, Example(case, relation))
            if failure is None or failure.rule != finding.rule:
                return False
            found[case] = failure
            return True

        patience = subject.timeout
        if finding.rule == WorldTimeout.__name__:
            subject.timeout = min(patience, PATIENCE)
        try:
            if not fails(finding.case):
                return finding
            return found[shrink(finding.case, fails, seconds=self.shrink_seconds)]
        finally:
            subject.timeout = patience

    def _batches(self, examples: int | None) -> Iterator[list[Example]]:
        first = 0
        while examples is None or first < examples:
            last = first + BATCH if examples is None else min(first + BATCH, examples)
            ranks = RandomChoices(f"{self.seed}/ranks/{first}").pick(self.limits.ranks)
            yield [
                self._example(number, replace(self.limits, ranks=(ranks,))) for number in range(first, last)
            ]
            first = last

    def _example(self, number: int, limits: Limits) -> Example:
        case = self._draw(RandomChoices(f"{self.seed}/{number}"), limits)
        turn, remainder = divmod(number, RELATION_EVERY)
        due = remainder == 0 and self.relations
        return Example(case, self.relations[turn % len(self.relations)] if due else None)

    def _relation(self, name: str | None) -> Property | None:
        return next((relation for relation in self.relations if relation.name == name), None)

    # judging

    def _judge_batch(self, batch: list[Example]) -> Finding | None:
        plans = {subject: [example.cases(subject) for example in batch] for subject in self.subjects}
        # Worlds begin first and work while this process runs and judges the others.
        started = {subject: subject.start(list(chain(*plan))) for subject, plan in plans.items()}
        try:
            for subject, plan in plans.items():
                try:
                    views = iter(subject.finish(started.pop(subject)))
                except (WorldError, Violation) as error:
                    return Finding(subject.name, _rule_of(error), str(error), tuple(chain(*plan)))
                for number, (example, cases) in enumerate(zip(batch, plan, strict=True)):
                    finding = self._judge(subject, example, cases, list(islice(views, len(cases))))
                    if finding is not None:
                        before = chain(*plan[:number])
                        return replace(finding, cases=(*before, cases[0]))
            return None
        finally:
            for subject, token in started.items():
                subject.cancel(token)

    def _judge(
        self, subject: Subject, example: Example, cases: list[Case], views: list[list[RankView]]
    ) -> Finding | None:
        case, got = cases[0], views[0]
        if not subject.gives_views:
            return None  # it has judged itself
        difference = None
        if subject.name != "oracle":
            difference = first_difference(self._expected(case), got, subject.may_lack)
        judge = subject.name == "oracle" or difference is not None or is_measured(got)
        broken = self._broken_rule(case, got) if judge else None
        if broken is None and difference is not None:
            broken = (DIFFERS, str(difference))
        if broken is None and example.relation is not None and len(cases) > 1:
            try:
                example.relation.verify(case, got, views[1:])
            except Missing:
                pass
            except Violation as violation:
                broken = (example.relation.name, str(violation))
        return None if broken is None else Finding(subject.name, *broken, (case,), got)

    def _broken_rule(self, case: Case, views: list[RankView]) -> tuple[str, str] | None:
        """The first property that does not hold: it says more than a differing bit."""
        for rule in self.rules:
            try:
                rule.verify(case, views)
            except Missing:
                continue
            except Violation as violation:
                return rule.name, str(violation)
        return None

    def _located(self, finding: Finding) -> Finding:
        """For a batch that ended with an error: the case that fails by itself; all of them if none does."""
        subject = self._subject(finding)
        if finding.views is None:
            for case in finding.cases:
                subject.reset()
                alone = self._run_one(subject, Example(case))
                if alone is not None:
                    return alone
        return finding

    def _subject(self, finding: Finding) -> Subject:
        return next(s for s in self.subjects if s.name == finding.subject)

    def _run_one(self, subject: Subject, example: Example) -> Finding | None:
        cases = example.cases(subject)
        try:
            views = subject.observe(cases)
        except (WorldError, Violation) as error:
            return Finding(subject.name, _rule_of(error), str(error), (cases[0],))
        return self._judge(subject, example, cases, views)


def _rule_of(error: Exception) -> str:
    """A short name of what happened: shrinking keeps to it."""
    if isinstance(error, WorldError) and error.failures:
        return " and ".join(sorted({type(failure).__name__ for failure in error.failures.values()}))
    return (error.rule if isinstance(error, Violation) else "") or type(error).__name__
