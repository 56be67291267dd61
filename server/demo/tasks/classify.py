"""A serialised table row to a class: a lender's decision about a loan applicant."""

from __future__ import annotations

from random import Random

from weft.server.demo.tasks import words
from weft.server.demo.tasks.task import Pair, Task

JOBS = ("salaried", "self-employed", "student", "retired", "unemployed")
HOMES = ("rent", "own", "family")
INCOMES = ("low", "middle", "high")
MANY_LATE_PAYMENTS = 3


def decision(income: str, late: int) -> str:
    """The lender's rule that the adapter has to find out from examples."""
    if late >= MANY_LATE_PAYMENTS:
        return "decline"
    return "approve" if late == 0 and income != "low" else "review"


def pair(rng: Random) -> Pair:
    """One applicant and the decision."""
    age, job, home, city = rng.randint(19, 79), rng.choice(JOBS), rng.choice(HOMES), words.city(rng)
    income = rng.choice(INCOMES)
    # Late payments lean to the small values that a lender sees most: the classes are of about the same size.
    late = rng.choice((0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 5))
    row = f"age {age}, city {city}, job {job}, home {home}, income {income}, late payments {late}"
    return Pair(row, decision(income, late))


CLASSIFY = Task("classify", "a loan applicant's row to a decision", "Applicant: {}\nDecision:", pair)
