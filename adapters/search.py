"""LoRAHub's search for weights (arXiv 2307.13269): gradient-free, from a loss on a few examples the caller measures.

As in the authors' ``lorahub/algorithm.py``: every weight starts at 0 and stays within ±1.5, what is minimised is the
loss plus 0.05 times the mean of the weights' sizes, and the optimizer is nevergrad's. Equal settings and losses give
equal weights. nevergrad is imported when a search is made, and not before: it takes seconds.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

OPTIMIZERS: Final = ("NGOpt", "Shiwa", "CMA")
BOUND: Final = 1.5
NOISY: Final = r"(nevergrad|cma|scipy|bayes_opt|sklearn)\b"
"""Modules whose warnings are of no use to who searches."""

Weights = tuple[float, ...]


class SearchError(Exception):
    """The search cannot go on; the message says why."""


@dataclass(frozen=True)
class SearchSettings:
    """How to search. The defaults are the reference's.

    Attributes:
        budget: how many candidates are scored.
        seed: of the optimizer's random numbers.
        l1: what the mean size of the weights counts beside the loss.
        round_size: candidates that are asked for together, to be scored together. 1 is the reference's search; more
            make NGOpt and Shiwa take evolution strategies (CMA), NGOpt's with a surrogate model of the losses, which
            need a larger budget but fewer rounds.
    """

    budget: int = 40
    seed: int = 42
    optimizer: str = "NGOpt"
    l1: float = 0.05
    round_size: int = 1

    def problem(self) -> tuple[str, str] | None:
        """What is wrong, as the field and a sentence; None: nothing."""
        if self.optimizer not in OPTIMIZERS:
            return "optimizer", f"'optimizer' must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}"
        return None


@dataclass(frozen=True)
class Trial:
    """A candidate that was scored; ``score``, which is minimised, is its loss and what its weights cost."""

    weights: Weights
    loss: float
    score: float


class WeightSearch:
    """One search, as questions and answers: ``ask`` for candidates, ``tell`` their losses, until there are none.

    ``close`` it: some of nevergrad's optimizers run in a thread, which ends then and would keep the process alive.
    """

    def __init__(self, count: int, settings: SearchSettings) -> None:
        """``count``: how many weights. Takes seconds. Raises ``SearchError`` where nevergrad is missing."""
        if problem := settings.problem():
            raise SearchError(problem[1])
        self.settings = settings
        self.trials: list[Trial] = []
        self._asked: list[Any] = []
        self._optimizer: Any = _made(count, settings)

    def ask(self) -> list[Weights]:
        """The candidates of the next round; none once the budget is spent."""
        wanted = min(self.settings.round_size, self.settings.budget - len(self.trials))
        self._asked = self._run(lambda: [self._optimizer.ask() for _ in range(wanted)])
        return [_weights(candidate.value) for candidate in self._asked]

    def tell(self, losses: Sequence[float]) -> list[Trial]:
        """The losses of the candidates asked for last, in their order. One that is no finite number is the worst."""
        trials = []
        for candidate, loss in zip(self._asked, losses, strict=True):
            weights = _weights(candidate.value)
            loss = loss if math.isfinite(loss) else math.inf
            trials.append(Trial(weights, loss, loss + penalty(weights, self.settings.l1)))
        self._run(lambda: [self._optimizer.tell(c, t.score) for c, t in zip(self._asked, trials, strict=True)])
        self.trials += trials
        return trials

    def recommendation(self) -> Weights:
        """What the optimizer recommends after all that it was told; not always one of the trials.

        Raises:
            SearchError: there is nothing to go by.
        """
        if not any(math.isfinite(trial.loss) for trial in self.trials):
            raise SearchError("under no weights that were tried is the loss a finite number")
        return _weights(self._run(lambda: self._optimizer.provide_recommendation().value))

    def close(self) -> None:
        self._optimizer, self._asked = None, []
        gc.collect()  # the optimizer is part of cycles, and stops its thread as it goes

    def _run(self, work: Callable[[], Any]) -> Any:
        problem = None
        try:
            return work()
        except Exception as error:
            problem = f"{self.settings.optimizer} failed: {type(error).__name__}: {error}"
        raise SearchError(problem)  # without the traceback, whose frames would keep the optimizer


def penalty(weights: Sequence[float], l1: float) -> float:
    """``l1`` times the mean of the weights' sizes."""
    return l1 * sum(map(abs, weights)) / len(weights)


def find_weights(
    count: int, score: Callable[[list[Weights]], Sequence[float]], settings: SearchSettings
) -> tuple[Weights, list[Trial]]:
    """The whole search with a ``score`` that gives the losses of a round's candidates: the weights, and all trials."""
    search = WeightSearch(count, settings)
    try:
        while candidates := search.ask():
            search.tell(score(candidates))
        return search.recommendation(), search.trials
    finally:
        search.close()


def _made(count: int, settings: SearchSettings) -> Any:
    """nevergrad's optimizer, with the random state that numpy's global seed gives it in the reference."""
    # About their own defaults. The optimizers' threads warn as well, so this cannot be for a while only.
    warnings.filterwarnings("ignore", module=NOISY)
    try:
        import nevergrad
        import numpy
        from nevergrad.optimization import metamodel
    except ImportError as error:
        raise SearchError(f"the search for weights needs nevergrad: pip install 'weft[fit]' ({error})") from None
    _mend(metamodel)
    space = nevergrad.p.Array(init=[0.0] * count, lower=[-BOUND] * count, upper=[BOUND] * count)
    seed = numpy.random.RandomState(settings.seed).randint(2**32, dtype=numpy.uint32)
    space.random_state = numpy.random.RandomState(seed)
    kind = nevergrad.optimizers.registry[settings.optimizer]
    return kind(parametrization=space, budget=settings.budget, num_workers=settings.round_size)


def _mend(metamodel: Any) -> None:
    """Let NGOpt's surrogate model, which it takes in rounds, run with numpy 2.4.

    nevergrad 1.0.12, its newest, has ``float(model.predict(...))`` in this module, of an array of one element, which
    numpy took for a number up to 2.3 and refuses since. This is the one use of ``float`` in that module; its own takes
    the element out, as numpy did: the weights are those that nevergrad finds with numpy 2.3, which a test has.
    """
    metamodel.float = lambda prediction: float(prediction.item())


def _weights(value: Sequence[float]) -> Weights:
    return tuple(float(weight) for weight in value)
