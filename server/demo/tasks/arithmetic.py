"""Word problems over one-digit numbers, answered with the calculation and its result."""

from __future__ import annotations

from random import Random

from weft.server.demo.tasks import words
from weft.server.demo.tasks.task import Pair, Task

PROBLEMS = {
    "+": (
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "{name} buys {a} {things} on {day} and {b} the day after. How many {things} is that?",
        "A shop in {city} has {a} {things} and orders {b} more. How many {things} are there then?",
    ),
    "-": (
        "{name} has {a} {things} and gives away {b}. How many {things} are left?",
        "A shop in {city} has {a} {things} and sells {b} on {day}. How many {things} are left?",
        "{name} needs {a} {things} and already has {b}. How many {things} are missing?",
    ),
    "*": (
        "{name} packs {a} boxes with {b} {things} each. How many {things} is that?",
        "A shop in {city} sells {a} {things} a day. How many {things} does it sell in {b} days?",
        "{a} friends bring {b} {things} each to {city}. How many {things} do they bring?",
    ),
}
THINGS = ("euros", "coins", "shares", "books", "tickets", "apples", "stamps", "pens")


def calculation(a: int, operator: str, b: int) -> str:
    """``6 * 7 = 42``."""
    result = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return f"{a} {operator} {b} = {result}"


def pair(rng: Random) -> Pair:
    """A problem and its calculation."""
    operator = rng.choice("+-*")
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    if operator == "-":
        a, b = max(a, b), min(a, b)
    values = {"name": words.first_name(rng), "things": rng.choice(THINGS), "city": words.city(rng)}
    day = rng.choice(words.WEEKDAYS)
    problem = rng.choice(PROBLEMS[operator]).format(a=a, b=b, day=day, **values)
    return Pair(problem, calculation(a, operator, b))


ARITHMETIC = Task("arithmetic", "a word problem to its calculation", "Problem: {}\nSolution:", pair)
