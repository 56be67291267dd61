"""A record to a sentence: people, quarterly results and restaurants."""

from __future__ import annotations

from random import Random

from weft.server.demo.tasks import words
from weft.server.demo.tasks.task import Pair, Task

JOBS = {
    "analyst": "an analyst",
    "engineer": "an engineer",
    "manager": "a manager",
    "lawyer": "a lawyer",
    "accountant": "an accountant",
    "designer": "a designer",
    "trader": "a trader",
}
QUARTERS = {"Q1": "first", "Q2": "second", "Q3": "third", "Q4": "fourth"}
FOODS = ("Italian", "French", "Indian", "Japanese", "Greek", "English")
PRICES = {"low": "cheap", "medium": "moderately priced", "high": "expensive"}
AREAS = {"market": "at the market square", "river": "by the river", "station": "near the station"}
PLACES = ("Swan", "Eagle", "Garden", "Lion", "Harbour", "Mill")
COLOURS = ("Golden", "Blue", "Green", "Red", "Old", "Silver")


def record(fields: dict[str, str]) -> str:
    """Fields in the form `name: Clara Weber | job: analyst`."""
    return " | ".join(f"{key}: {value}" for key, value in fields.items())


def employee(rng: Random) -> Pair:
    """Where somebody works, with or without the year of the start."""
    name, job, company, city = words.person(rng), rng.choice(list(JOBS)), words.company(rng), words.city(rng)
    fields = {"name": name, "job": job, "company": company, "city": city}
    if rng.random() < 0.5:
        return Pair(record(fields), f"{name} works as {JOBS[job]} at {company} in {city}.")
    since = words.year(rng)
    text = f"{name} has worked as {JOBS[job]} at {company} in {city} since {since}."
    return Pair(record(fields | {"since": since}), text)


def result(rng: Random) -> Pair:
    """A company's revenue in one quarter and how it changed."""
    company, quarter, year = words.company(rng), rng.choice(list(QUARTERS)), words.year(rng)
    revenue, change = words.amount(rng), rng.choice(("up", "down"))
    fields = {
        "company": company,
        "quarter": f"{quarter} {year}",
        "revenue": f"{revenue} million",
        "change": change,
    }
    moved = "rose" if change == "up" else "fell"
    text = f"In the {QUARTERS[quarter]} quarter of {year}, revenue at {company} {moved} to {revenue} million euros."
    return Pair(record(fields), text)


def restaurant(rng: Random) -> Pair:
    """A restaurant's kitchen, prices and place, and whether it suits families."""
    name = f"The {rng.choice(COLOURS)} {rng.choice(PLACES)}"
    food, price, area = rng.choice(FOODS), rng.choice(list(PRICES)), rng.choice(list(AREAS))
    city, families = words.city(rng), rng.choice(("yes", "no"))
    fields = {"name": name, "food": food, "price": price, "area": area, "city": city, "families": families}
    article = "an" if price == "high" else "a"
    verb = "welcomes" if families == "yes" else "does not welcome"
    text = f"{name} is {article} {PRICES[price]} {food} restaurant {AREAS[area]} in {city} and {verb} families."
    return Pair(record(fields), text)


def pair(rng: Random) -> Pair:
    """A record of any kind and its sentence."""
    return rng.choice((employee, result, restaurant))(rng)


DATA2TEXT = Task("data2text", "a record to an English sentence", "Record: {}\nSentence:", pair)
