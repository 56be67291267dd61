"""Small dialogues of the pretraining corpus: they teach the base model the shape of a chat."""

from __future__ import annotations

from random import Random

from weft.server.demo.tasks import words

Message = dict[str, str]

SMALL_TALK = (
    ("Hello!", "Hello! How can I help you today?"),
    ("Good morning.", "Good morning! What can I do for you?"),
    ("Who are you?", "I am a small language model that knows a little about finance."),
    ("Thank you!", "You are welcome."),
    ("What is a loan?", "A loan is money that a bank lends to a customer, who pays it back with interest."),
    ("What is a stock?", "A stock is a share in a company that can be bought and sold."),
    ("What is an invoice?", "An invoice is a list of goods or services with the sum to be paid for them."),
    ("What is a budget?", "A budget is a plan of how much money will come in and how much will be spent."),
    ("What is a savings account?", "A savings account is an account at a bank that pays interest."),
    ("Goodbye.", "Goodbye! Have a nice day."),
)


def turn(user: str, assistant: str) -> list[Message]:
    """What a user says and the reply."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def small_talk(rng: Random) -> list[Message]:
    """A greeting, a thank-you or a definition."""
    return turn(*rng.choice(SMALL_TALK))


def memory(rng: Random) -> list[Message]:
    """The user tells a fact and asks for it."""
    name, company, city = words.first_name(rng), words.company(rng), words.city(rng)
    told = f"My name is {name}. I work at {company} in {city}."
    asked, reply = rng.choice(
        (
            ("What is my name?", f"Your name is {name}."),
            ("Where do I work?", f"You work at {company}."),
            ("In which city do I work?", f"You work in {city}."),
        )
    )
    if rng.random() < 0.5:
        return turn(f"{told} {asked}", reply)
    return turn(told, f"Nice to meet you, {name}!") + turn(asked, reply)


def reading(rng: Random) -> list[Message]:
    """The user asks about one of several payments."""
    people = [words.person(rng) for _ in range(rng.randint(2, 3))]
    paid = {name: (words.amount(rng), words.company(rng)) for name in people}
    told = " ".join(f"{name} paid {amount} euros to {company}." for name, (amount, company) in paid.items())
    name = rng.choice(people)
    amount, company = paid[name]
    asked, reply = rng.choice(
        (
            (f"How much did {name} pay?", f"{name} paid {amount} euros."),
            (f"Whom did {name} pay?", f"{name} paid {company}."),
            (f"Who paid {company}?", f"{name} paid {company}."),
        )
    )
    return turn(f"{told} {asked}", reply)


def repeat(rng: Random) -> list[Message]:
    """The user asks for a text to be repeated."""
    text = f"{words.person(rng)} owes {words.amount(rng)} euros to {words.company(rng)}"
    return turn(f'Repeat this: "{text}"', text)


def dialogue(rng: Random) -> list[Message]:
    """One to three exchanges."""
    messages: list[Message] = []
    for _ in range(rng.randint(1, 2)):
        messages += rng.choice((small_talk, memory, reading, repeat))(rng)
    return messages
