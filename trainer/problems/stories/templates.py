"""Sentence templates of generated stories: people, themes (kinds of items), phrases about containers, money and goods.

generator.py chooses the phrases and computes the numbers. A phrase is a pair: a sentence that describes an event, and a few
words ("after the visit of the gull") that end the sub-question about the new amount. Fields in braces:

    {Name}                         the main person, who owns the counted units
    {he} {his} {him} {He} {His}    pronouns of the main person
    {Friend}                       a second person
    {units}                        the counted units, in the plural
    {a} {b} {k}                    numbers: {a} is the opening amount, {b} another amount, {k} a small factor or divisor
    {result}                       a calculation with its result, e.g. 3*4 = <<3*4=12>>12
"""

from dataclasses import dataclass

Phrase = tuple[str, str]  # sentence about an event; end of the sub-question about the new amount
# Sentence about {k} groups of {b}; sub-question about k * b; its solution; end of the sub-question about the new amount.
Groups = tuple[str, str, str, str]


@dataclass(frozen=True)
class Person:
    name: str
    he: str
    his: str
    him: str


PEOPLE = tuple(
    Person(name, "she", "her", "her") for name in ("Mia", "Ada", "Ruth", "Nora", "Lena", "Zoe")
) + tuple(Person(name, "he", "his", "him") for name in ("Tom", "Ben", "Omar", "Leo", "Finn", "Ivan"))


@dataclass(frozen=True)
class Theme:
    """Phrases about one kind of item, for example shells."""

    units: str
    containers: str
    openings: tuple[str, ...]
    opening_in_groups: Phrase  # first sentence with {k} groups of {b} items; sub-question about k * b
    gains: tuple[Phrase, ...]
    losses: tuple[Phrase, ...]
    growth: Phrase  # the number of items is multiplied by {k}
    groups_in: Groups  # the main person gets {k} groups of {b} items
    groups_out: Groups  # the main person loses {k} groups of {b} items
    packing: str  # all items are put into containers, {b} per container


THEMES = (
    Theme(
        units="shells",
        containers="jars",
        openings=(
            "Early in the morning {Name} finds {a} shells on the beach.",
            "{Name} walks along the sea and picks up {a} shells.",
        ),
        opening_in_groups=(
            "{Name} comes home from the sea with {k} nets of {b} shells each.",
            "How many shells does {he} bring home?",
        ),
        gains=(
            ("Behind the old pier {he} finds {b} more shells.", "after the walk to the pier"),
            ("A kind fisherman gives {him} {b} shells.", "after meeting the fisherman"),
            ("A big wave washes {b} more shells to {his} feet.", "after the big wave"),
        ),
        losses=(
            ("A cheeky gull flies off with {b} of the shells.", "after the visit of the gull"),
            ("{He} throws {b} broken shells back into the sea.", "without the broken ones"),
            ("{He} leaves {b} shells at the door of {his} aunt.", "after passing the aunt"),
        ),
        growth=("At low tide the sand is full, and soon {he} has {k} times as many shells.", "at low tide"),
        groups_in=(
            "Two divers bring {him} {k} buckets with {b} shells in each.",
            "How many shells do the divers bring?",
            "The divers bring {result} shells.",
            "after meeting the divers",
        ),
        groups_out=(
            "{He} gives {b} shells to each of {k} children.",
            "How many shells do the children get?",
            "The children get {result} shells.",
            "after giving to the children",
        ),
        packing="{He} puts all the shells into jars, {b} shells to a jar.",
    ),
    Theme(
        units="apples",
        containers="baskets",
        openings=(
            "{Name} climbs the tallest tree and picks {a} apples.",
            "On the first day of autumn {Name} picks {a} apples.",
        ),
        opening_in_groups=(
            "{Name} shakes {k} trees, and {b} apples fall from each tree.",
            "How many apples fall down?",
        ),
        gains=(
            ("Then the wind blows down {b} more apples.", "after the wind"),
            ("The neighbour hands {him} {b} apples over the fence.", "with those of the neighbour"),
            ("Under the leaves {he} discovers {b} more apples.", "after looking under the leaves"),
        ),
        losses=(
            ("A hungry goat eats {b} of the apples.", "after the goat has eaten"),
            ("{He} bakes a cake with {b} of the apples.", "after baking the cake"),
            ("{b} apples turn out to be sour, and {he} throws them away.", "without the sour ones"),
        ),
        growth=("The harvest goes on, and by evening {he} has {k} times as many apples.", "by evening"),
        groups_in=(
            "{His} cousins bring {k} bags with {b} apples in each.",
            "How many apples do the cousins bring?",
            "The cousins bring {result} apples.",
            "with the bags of the cousins",
        ),
        groups_out=(
            "{He} feeds {b} apples to each of {k} ponies.",
            "How many apples do the ponies eat?",
            "The ponies eat {result} apples.",
            "after feeding the ponies",
        ),
        packing="{He} packs all the apples into baskets, {b} apples to a basket.",
    ),
    Theme(
        units="muffins",
        containers="boxes",
        openings=(
            "{Name} gets up at dawn and bakes {a} muffins.",
            "For the school fair {Name} bakes {a} muffins.",
        ),
        opening_in_groups=(
            "{Name} bakes {k} trays of muffins with {b} muffins on each tray.",
            "How many muffins does {he} bake?",
        ),
        gains=(
            ("{His} grandmother sends {b} muffins with raisins.", "with those of the grandmother"),
            ("There is dough left for {b} more muffins, so {he} bakes them too.", "after using up the dough"),
            ("The baker next door adds {b} muffins.", "with those of the baker"),
        ),
        losses=(
            ("{He} burns {b} of the muffins.", "without the burnt ones"),
            ("{His} little brother secretly eats {b} muffins.", "after the brother has eaten"),
            ("The dog steals {b} muffins from the table.", "after the dog has been there"),
        ),
        growth=("The oven stays hot, and at noon {he} has {k} times as many muffins.", "at noon"),
        groups_in=(
            "The parents bring {k} plates with {b} muffins on each.",
            "How many muffins do the parents bring?",
            "The parents bring {result} muffins.",
            "with the plates of the parents",
        ),
        groups_out=(
            "{He} serves {b} muffins at each of {k} tables.",
            "How many muffins do the tables get?",
            "The tables get {result} muffins.",
            "after serving the tables",
        ),
        packing="{He} packs all the muffins into boxes, {b} muffins to a box.",
    ),
    Theme(
        units="books",
        containers="crates",
        openings=(
            "{Name} opens a tiny library with {a} books.",
            "In the attic {Name} discovers {a} old books.",
        ),
        opening_in_groups=(
            "{Name} inherits {k} trunks with {b} books in each trunk.",
            "How many books does {he} inherit?",
        ),
        gains=(
            ("A retired captain donates {b} books about the sea.", "with those of the captain"),
            ("At the flea market {he} finds {b} more books.", "after the flea market"),
            ("The postman delivers {b} new books.", "after the post has come"),
        ),
        losses=(
            ("The rain ruins {b} of the books.", "after the rain"),
            ("{He} lends {b} books to the village school.", "after lending to the school"),
            ("Mice nibble at {b} books, and {he} throws them out.", "without the nibbled ones"),
        ),
        growth=("Word gets around, and after a year {he} has {k} times as many books.", "after a year"),
        groups_in=(
            "A museum sends {k} parcels with {b} books in each.",
            "How many books does the museum send?",
            "The museum sends {result} books.",
            "with the parcels of the museum",
        ),
        groups_out=(
            "{He} lends {b} books to each of {k} readers.",
            "How many books do the readers take?",
            "The readers take {result} books.",
            "after lending to the readers",
        ),
        packing="{He} packs all the books into crates, {b} books to a crate.",
    ),
    Theme(
        units="eggs",
        containers="cartons",
        openings=(
            "{Name} looks after the hens and gathers {a} eggs.",
            "Before breakfast {Name} gathers {a} eggs in the barn.",
        ),
        opening_in_groups=(
            "{Name} visits {k} henhouses and takes {b} eggs from each.",
            "How many eggs does {he} take?",
        ),
        gains=(
            ("In the hay {he} spots {b} more eggs.", "after searching the hay"),
            ("The proud geese lay {b} eggs as well.", "with those of the geese"),
            ("A farmer across the river sends {b} eggs.", "with those of the farmer"),
        ),
        losses=(
            ("{He} stumbles over the cat and breaks {b} eggs.", "after stumbling over the cat"),
            ("A fox sneaks in and takes {b} eggs.", "after the fox has been there"),
            ("{He} fries {b} of the eggs for the family.", "after frying some"),
        ),
        growth=("Spring comes, and {he} now has {k} times as many eggs.", "in spring"),
        groups_in=(
            "The ducks fill {k} nests with {b} eggs each.",
            "How many eggs do the ducks lay?",
            "The ducks lay {result} eggs.",
            "with the nests of the ducks",
        ),
        groups_out=(
            "{He} sends {b} eggs to each of {k} inns.",
            "How many eggs do the inns get?",
            "The inns get {result} eggs.",
            "after sending to the inns",
        ),
        packing="{He} puts all the eggs into cartons, {b} eggs to a carton.",
    ),
    Theme(
        units="lanterns",
        containers="chests",
        openings=(
            "For the winter festival {Name} folds {a} paper lanterns.",
            "{Name} hangs {a} lanterns over the market square.",
        ),
        opening_in_groups=(
            "{Name} decorates {k} bridges with {b} lanterns on each bridge.",
            "How many lanterns does {he} use?",
        ),
        gains=(
            ("The mayor pays for {b} more lanterns.", "with those of the mayor"),
            ("{He} stays up late and folds {b} more lanterns.", "after staying up late"),
            ("An old sailor brings {b} lanterns from his ship.", "with those of the sailor"),
        ),
        losses=(
            ("A storm carries off {b} of the lanterns.", "after the storm"),
            ("{b} lanterns catch fire and are lost.", "after the fire"),
            ("{He} presents {b} lanterns to the hospital.", "after the present to the hospital"),
        ),
        growth=(
            "The whole town helps, and soon {he} has {k} times as many lanterns.",
            "with the help of the town",
        ),
        groups_in=(
            "The school sends {k} classes with {b} lanterns each.",
            "How many lanterns do the classes bring?",
            "The classes bring {result} lanterns.",
            "with those of the classes",
        ),
        groups_out=(
            "{He} lends {b} lanterns to each of {k} streets.",
            "How many lanterns do the streets get?",
            "The streets get {result} lanterns.",
            "after lending to the streets",
        ),
        packing="{He} stores all the lanterns in chests, {b} lanterns to a chest.",
    ),
)

# Key: kind of quantity in the story. Value: phrases that fit every theme.
GAINS: dict[str, tuple[Phrase, ...]] = {
    "containers": (
        (
            "In the cellar there are {b} more {units} like these, and {he} adds them.",
            "with those from the cellar",
        ),
        ("{Friend} brings {b} more {units} of the same kind.", "with those of {Friend}"),
    ),
    "money": (
        ("{His} uncle adds {b} dollars.", "with the money of the uncle"),
        ("On the way home {he} finds {b} dollars.", "after finding some on the way"),
        ("{He} sings in the street and earns {b} dollars.", "after singing"),
    ),
    "goods": (
        ("The shopkeeper smiles and adds {b} {units} for free.", "with those of the shopkeeper"),
        ("At home {he} finds {b} more {units} in a drawer.", "with those from the drawer"),
    ),
}
LOSSES: dict[str, tuple[Phrase, ...]] = {
    "containers": (
        ("{He} drops {b} of the {units} on the stairs.", "without the dropped ones"),
        ("{He} gives {b} of the {units} to {Friend}.", "after giving to {Friend}"),
    ),
    "money": (
        ("{He} pays {b} dollars for the train.", "after paying for the train"),
        ("A new hat costs {him} {b} dollars.", "after buying the hat"),
        ("{He} pays back {b} dollars to {Friend}.", "after paying {Friend} back"),
    ),
    "goods": (
        ("{He} gives {b} {units} to {his} teacher.", "after giving to the teacher"),
        ("{He} loses {b} {units} on the bus.", "after the bus ride"),
    ),
}
MONEY_GROWTH: Phrase = (
    "{His} rich aunt is so proud that she makes it {k} times as many dollars.",
    "thanks to the aunt",
)
MONEY_GROUPS_IN: Groups = (
    "Then {he} works for {k} days and earns {b} dollars a day.",
    "How many dollars does {he} earn in these days?",
    "{He} earns {result} dollars.",
    "after the days of work",
)
MONEY_GROUPS_OUT: Groups = (
    "{He} buys {k} tickets for the circus at {b} dollars each.",
    "How many dollars do the tickets cost?",
    "The tickets cost {result} dollars.",
    "after buying the tickets",
)
FRIEND_GIVES = {
    "*": "{Friend} has {b} times as many {units} as {Name} and gives {him} all of them.",
    "+": "{Friend} has {b} more {units} than {Name} and gives {him} all of them.",
    "-": "{Friend} has {b} fewer {units} than {Name} and gives {him} all of them.",
}
AS_AT_THE_START = "As a present {Friend} brings {him} as many {units} as {he} had at the start."
SHARE = (
    "Then {Friend} shares the {units} equally among {k} friends. One of them, {Name}, takes {his} share home."
)
SELL = "At the market {he} sells all the {units} for {b} dollars each."
BUY = "With all the money {he} buys {units} for {b} dollars each."
GOODS = ("roses", "pencils", "marbles", "kites")
