"""The words the demo's texts are made of: people, companies, places, money and time."""

from __future__ import annotations

from random import Random

# fmt: off
FIRST_NAMES = (
    "Clara", "Tom", "Mia", "Omar", "Lena", "Paul", "Nina", "Ivan", "Sara", "Hugo", "Eva", "Karim", "Julia",
    "Felix", "Rosa", "Daniel", "Amira", "Victor", "Greta", "Samuel", "Alice", "Marco", "Helen", "Peter", "Yuki",
    "David", "Lucia", "Adam", "Fatima", "George",
)
LAST_NAMES = (
    "Weber", "Rossi", "Novak", "Silva", "Martin", "Keller", "Haddad", "Jensen", "Moreau", "Schmidt", "Garcia",
    "Brown", "Tanaka", "Meyer", "Kowalski", "Smith", "Dubois", "Larsen", "Costa", "Fischer", "Bauer", "Lopez",
    "Wagner", "Klein", "Ferrari", "Horvat",
)
CITIES = (
    "Berlin", "Paris", "Madrid", "Vienna", "Lisbon", "Oslo", "Prague", "Rome", "Dublin", "Zurich", "Hamburg",
    "Milan", "Warsaw", "Athens", "Munich", "Brussels", "Geneva", "Porto", "Lyon", "Helsinki",
)
COMPANY_NAMES = (
    "Alpina", "Nordic", "Helios", "Aurora", "Delta", "Atlas", "Orion", "Vega", "Baltic", "Castello", "Meridian",
    "Solaris", "Tessa", "Lumen", "Borealis", "Granit", "Falken", "Marina", "Quanta", "Rivoli",
)
COMPANY_KINDS = ("Foods", "Bank", "Energy", "Motors", "Textiles", "Software", "Insurance", "Logistics")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
CURRENCIES = {"euros": "EUR", "dollars": "USD", "pounds": "GBP", "francs": "CHF"}
SECTORS = ("energy", "banking", "retail", "health", "software", "transport")
# fmt: on

AMOUNTS = tuple(str(amount) for amount in (*range(1000, 4000, 50), *range(4000, 10000, 250)))
"""Sums of money. Four digits are one token, so that a small model can copy an amount as it copies a name."""
YEARS = tuple(map(str, range(2010, 2026)))
NAMES = (
    FIRST_NAMES + LAST_NAMES + CITIES + COMPANY_NAMES + COMPANY_KINDS + MONTHS + WEEKDAYS + SECTORS + AMOUNTS + YEARS
)
"""What the base must be able to copy."""


def first_name(rng: Random) -> str:
    """A given name."""
    return rng.choice(FIRST_NAMES)


def last_name(rng: Random) -> str:
    """A family name."""
    return rng.choice(LAST_NAMES)


def person(rng: Random) -> str:
    """A given name and a family name."""
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def company(rng: Random) -> str:
    """The name of a company."""
    return f"{rng.choice(COMPANY_NAMES)} {rng.choice(COMPANY_KINDS)}"


def city(rng: Random) -> str:
    """The name of a city."""
    return rng.choice(CITIES)


def month(rng: Random) -> str:
    """The name of a month."""
    return rng.choice(MONTHS)


def year(rng: Random) -> str:
    """A recent year."""
    return rng.choice(YEARS)


def amount(rng: Random) -> str:
    """A sum of money from 1000 to 9750."""
    return rng.choice(AMOUNTS)
