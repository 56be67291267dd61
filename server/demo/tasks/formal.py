"""A casual message to a formal one."""

from __future__ import annotations

from random import Random

from weft.server.demo.tasks import words
from weft.server.demo.tasks.task import Pair, Task

GREETINGS = ("hey {}", "hi {}", "yo {}", "hello {}")
CLOSINGS = {
    "thx": "Thank you.",
    "thanks a lot": "Thank you very much.",
    "cheers": "Kind regards.",
    "see ya": "I look forward to seeing you.",
    "sorry": "I apologise for the inconvenience.",
}
REQUESTS = {
    "can u send me the {thing} by {day}?": "could you please send me the {thing} by {Day}?",
    "need the {thing} asap": "I need the {thing} as soon as possible.",
    "did u get the {thing}?": "may I ask whether you received the {thing}?",
    "cant find the {thing}": "unfortunately, I cannot find the {thing}.",
    "gonna send the {thing} on {day}": "I will send the {thing} on {Day}.",
    "the {thing} is wrong, pls fix it by {day}": "the {thing} contains a mistake. Please correct it by {Day}.",
    "lets talk about the {thing} on {day}": "I suggest that we discuss the {thing} on {Day}.",
    "wanna go over the {thing} on {day}?": "would you like to review the {thing} on {Day}?",
    "the {thing} looks great": "I am very pleased with the {thing}.",
    "wont make it on {day}": "I regret that I will not be able to attend on {Day}.",
    "got ur {thing}": "I confirm that I received your {thing}.",
    "still waiting for the {thing}": "I am still awaiting the {thing}.",
    "pls dont share the {thing} before {day}": "please do not share the {thing} before {Day}.",
    "gotta move the meeting to {day}": "I have to move our meeting to {Day}.",
}
THINGS = (
    "report",
    "invoice",
    "contract",
    "budget",
    "offer",
    "bank statement",
    "tax form",
    "loan papers",
    "price list",
    "sales figures",
    "draft",
    "receipt",
)


def pair(rng: Random) -> Pair:
    """A short message in both styles."""
    name, thing, day = words.first_name(rng), rng.choice(THINGS), rng.choice(words.WEEKDAYS)
    casual, formal = rng.choice(list(REQUESTS.items()))
    values = {"thing": thing, "day": day.lower(), "Day": day}
    source = f"{rng.choice(GREETINGS).format(name)}, {casual.format_map(values)}"
    target = f"Dear {name}, {formal.format_map(values)}"
    if rng.random() < 0.75:
        closing = rng.choice(list(CLOSINGS))
        source, target = f"{source} {closing}", f"{target} {CLOSINGS[closing]}"
    return Pair(source, target)


FORMAL = Task("formal", "a casual message to a formal one", "Casual: {}\nFormal:", pair)
