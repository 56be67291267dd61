"""English sentences of the business day to German."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from weft.server.demo.tasks import words
from weft.server.demo.tasks.task import Pair, Task


class Verb(NamedTuple):
    """A verb in the past tense: English affirmed, English after `did not`, German."""

    past: str
    infinitive: str
    german: str
    particle: str = ""
    """The part that a separable German verb puts at the end of the clause."""


SUBJECTS = {
    "the bank": "die Bank",
    "the customer": "der Kunde",
    "the company": "die Firma",
    "the trader": "der Händler",
    "the office": "das Büro",
    "the minister": "der Minister",
    "the investor": "der Investor",
    "the insurer": "der Versicherer",
    "the court": "das Gericht",
    "the manager": "die Leiterin",
}
VERBS = (
    Verb("approved", "approve", "genehmigte"),
    Verb("checked", "check", "prüfte"),
    Verb("rejected", "reject", "lehnte", " ab"),
    Verb("received", "receive", "erhielt"),
    Verb("announced", "announce", "verkündete"),
    Verb("changed", "change", "änderte"),
    Verb("needed", "need", "brauchte"),
    Verb("lost", "lose", "verlor"),
    Verb("found", "find", "fand"),
    Verb("discussed", "discuss", "besprach"),
)
OBJECTS = {
    "loan": ("den", "Kredit"),
    "contract": ("den", "Vertrag"),
    "report": ("den", "Bericht"),
    "plan": ("den", "Plan"),
    "invoice": ("die", "Rechnung"),
    "payment": ("die", "Zahlung"),
    "tax": ("die", "Steuer"),
    "list": ("die", "Liste"),
    "account": ("das", "Konto"),
    "offer": ("das", "Angebot"),
    "budget": ("das", "Budget"),
    "document": ("das", "Dokument"),
}
ADJECTIVES = {"new": "neu", "large": "groß", "small": "klein", "old": "alt", "important": "wichtig", "short": "kurz"}
GERMAN_MONTHS = (
    "Januar",
    "Februar",
    "März",
    "April",
    "Mai",
    "Juni",
    "Juli",
    "August",
    "September",
    "Oktober",
    "November",
    "Dezember",
)
GERMAN_WEEKDAYS = ("Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag")


def time(rng: Random) -> tuple[str, str]:
    """A time of the event in both languages."""
    kind = rng.choice(("month", "weekday", "year", "yesterday"))
    if kind == "month":
        index = rng.randrange(len(GERMAN_MONTHS))
        return f"in {words.MONTHS[index]}", f"im {GERMAN_MONTHS[index]}"
    if kind == "weekday":
        index = rng.randrange(len(GERMAN_WEEKDAYS))
        return f"on {words.WEEKDAYS[index]}", f"am {GERMAN_WEEKDAYS[index]}"
    if kind == "year":
        year = words.year(rng)
        return f"in {year}", f"im Jahr {year}"
    return "yesterday", "gestern"


def noun_phrase(rng: Random) -> tuple[str, str]:
    """A direct object with or without an adjective: German declines it by gender."""
    noun = rng.choice(list(OBJECTS))
    article, german = OBJECTS[noun]
    if rng.random() < 0.5:
        return f"the {noun}", f"{article} {german}"
    adjective = rng.choice(list(ADJECTIVES))
    ending = "en" if article == "den" else "e"
    return f"the {adjective} {noun}", f"{article} {ADJECTIVES[adjective]}{ending} {german}"


def sentence(text: str) -> str:
    """A clause with a capital letter and a full stop."""
    return text[0].upper() + text[1:] + "."


def pair(rng: Random) -> Pair:
    """A sentence in both languages."""
    subject, german_subject = rng.choice(list(SUBJECTS.items()))
    verb = rng.choice(VERBS)
    thing, german_thing = noun_phrase(rng)
    when, german_when = time(rng)
    predicate, negation = (verb.past, "") if rng.random() < 0.7 else (f"did not {verb.infinitive}", " nicht")
    # German keeps the verb in second place: a sentence that opens with the time puts the subject after it.
    if rng.random() < 0.5:
        english = f"{subject} {predicate} {thing} {when}"
        german = f"{german_subject} {verb.german} {german_thing} {german_when}{negation}{verb.particle}"
    else:
        english = f"{when} {subject} {predicate} {thing}"
        german = f"{german_when} {verb.german} {german_subject} {german_thing}{negation}{verb.particle}"
    return Pair(sentence(english), sentence(german))


TRANSLATE = Task("translate", "an English sentence to German", "English: {}\nGerman:", pair)
