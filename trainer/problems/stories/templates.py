"""Sentence templates of generated stories. generator.py chooses the templates and computes the numbers.

Fields in braces: {Name} is the person who owns the items, {he} and {He} are pronouns of this person, {units} are the items in
the plural, {a} is the opening number of items, and {b} and {k} are other numbers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Person:
    name: str
    he: str


PEOPLE = tuple(Person(name, "she") for name in ("Mia", "Ada", "Nora", "Zoe")) + tuple(
    Person(name, "he") for name in ("Tom", "Ben", "Leo", "Finn")
)
UNITS = ("shells", "apples", "eggs", "books", "coins", "cards", "stones", "pens")
OPENING = "{Name} has {a} {units}."


@dataclass(frozen=True)
class Event:
    """An event that changes the number of items, in one step or in two.

    `when` ends the sub-question about the new number: "How many {units} {when}?" The first of two steps multiplies {k} by
    {b}; the second step adds the product or subtracts it. `groups` ends the sub-question of the first step.
    """

    operation: str  # +, -, * or /
    sentence: str
    when: str
    groups: str = ""  # "": the event has one step
    looks_back: bool = False  # True: the second operand is the opening number


EVENTS = (
    *(Event("+", f"{{He}} {verb} {{b}}.", f"after {verbing} some") for verb, verbing in (
        ("finds", "finding"), ("buys", "buying"), ("wins", "winning"), ("makes", "making"),
    )),
    *(Event("-", f"{{He}} {verb} {{b}}.", f"after {verbing} some") for verb, verbing in (
        ("loses", "losing"), ("sells", "selling"), ("breaks", "breaking"), ("drops", "dropping"),
    )),
    Event("*", "By noon {he} has {k} times as many.", "by noon"),
    Event("*", "By night {he} has {k} times as many.", "by night"),
    Event("/", "{He} keeps one of {k} equal parts.", "in one part"),
    Event("/", "{k} friends share them all.", "for each friend"),
    Event("/", "{He} only takes the first of {k} equal rows.", "in one row"),
    Event("+", "{He} gets {k} bags of {b}.", "with the bags", "in the bags"),
    Event("+", "Later {he} gets as many as at first.", "later", looks_back=True),
)  # fmt: skip
