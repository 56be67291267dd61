"""A sentence about a payment to JSON."""

from __future__ import annotations

import json
from random import Random

from weft.server.demo.tasks import words
from weft.server.demo.tasks.task import Pair, Task

SENTENCES = (
    "In {date} {payer} paid {amount} {currency} to {payee}.",
    "{payer} sent {amount} {currency} to {payee} in {date}.",
    "{payee} received {amount} {currency} from {payer} in {date}.",
    "In {date} {payee} got a payment of {amount} {currency} from {payer}.",
    "{payer} transferred {amount} {currency} to {payee}, and the bank confirmed it in {date}.",
    "The invoice from {payee} over {amount} {currency} was settled by {payer} in {date}.",
    "A payment of {amount} {currency} from {payer} reached {payee} in {date}.",
)


def pair(rng: Random) -> Pair:
    """A payment told in a sentence, and its fields."""
    month, year = rng.randint(1, 12), words.year(rng)
    currency = rng.choice(list(words.CURRENCIES))
    payer, payee, amount = words.person(rng), words.company(rng), words.amount(rng)
    date = f"{words.MONTHS[month - 1]} {year}"
    text = rng.choice(SENTENCES).format(payer=payer, payee=payee, amount=amount, currency=currency, date=date)
    fields = {
        "payer": payer,
        "payee": payee,
        "amount": int(amount),
        "currency": words.CURRENCIES[currency],
        "date": f"{year}-{month:02}",
    }
    return Pair(text, json.dumps(fields))


EXTRACT = Task("extract", "a sentence about a payment to JSON", "Text: {}\nJSON:", pair)
