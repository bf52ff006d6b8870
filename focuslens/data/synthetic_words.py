"""Word lists and sentence templates of the synthetic corpus.

Names and values are pairs of words ("Alden" + "Marsh", "Port" + "Ashby", "18" + "74"), so that a held-out pair
consists of words from the training data. A word of a value list does not occur in any other value list, in a name or in
a filler sentence. Words that differ in capitalisation count as different. An answer therefore occurs only in the
sentence that states its fact.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = [
    "ATTRIBUTES",
    "FILLER_ENDS",
    "FILLER_STARTS",
    "FIRST_NAMES",
    "LEADS",
    "MENTIONS",
    "PLACE_KINDS",
    "PLACE_NAMES",
    "PRONOUNS",
    "QUESTION_FRAMES",
    "SURNAMES",
    "TITLES",
    "UNKNOWN",
    "VALUES",
    "Attribute",
    "words",
]


@dataclass(frozen=True)
class Attribute:
    """An attribute of an entity, with templates for facts and questions about the attribute.

    Args:
        noun: Noun for the attribute in a response, such as "birthplace" in "The birthplace of Alden Marsh was Port
            Ashby."
        value: Kind of the attribute's values: a key of :data:`VALUES`, or ``person`` for names of persons.
        facts: Templates for the core of a sentence that states a fact. ``{s}`` is the subject, and ``{v}`` is the
            value.
        questions: Templates for the core of a question. ``{s}`` is the full name of the entity.
    """

    noun: str
    value: str
    facts: tuple[str, ...]
    questions: tuple[str, ...]


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Women's names have even indices (pronoun "she"), and men's names have odd indices (pronoun "he").
FIRST_NAMES = _list(
    """Ada Alden Agnes Amos Alma Arthur Anita Basil Beatrix Bruno Bertha Caleb Bridget Cedric Cecily Clement Clara Cyril
    Cora Damon Daphne Desmond Delia Duncan Dora Edgar Edith Edmund Elena Elias Elsa Emil Emma Enoch Esther Ernest Eva
    Ezra Fanny Felix Flora Floyd Freda Gideon Greta Gilbert Hanna Gordon Hattie Harold Hazel Hector Helen Henry Hilda
    Herman Ida Homer Inga Hugo Irene Isaac Iris Ivan Ivy Jasper Jane Jerome Joan Jonas Judith Julian Julia Kasper Karen
    Kurt Laura Lars Lena Leo Lily Leon Lois Lionel Lucy Luther Lydia Magnus Mabel Marcus Marta Martin Matilda Miles
    Mina Morris Myra Nathan Nadia Nelson Nina Nigel Nora Norman Olga Oliver Opal Oscar Pearl Otto Petra Percy Phoebe
    Philip Rhoda Quentin Rosa Ralph Ruth Rufus"""
)
SURNAMES = _list(
    """Abbot Alcott Barlow Barrett Baxter Beckett Bellamy Bishop Blake Bolton Bowen Brandt Briggs Burke Calder Carver
    Chandler Clay Colby Corbin Crane Dalton Darrow Dawson Denby Dexter Doyle Drake Dunn Eaton Ellery Emerson Farrow
    Fenton Finch Fisk Fleming Foster Frost Gage Garner Gibbs Glover Grady Grimes Hale Hardy Hawkins Hayes Heller Hobbs
    Holt Hooper Hume Irwin Jarvis Jensen Judd Keane Keller Kemp Kirby Knox Lamb Larkin Lawson Lowell Lyman Maddox Marsh
    Mercer Merritt Monroe Morrow Nash Newell Nolan Norris Odell Orton Osborn Paley Parrish Paxton Penn Pierce Pratt
    Quimby Quincy Ramsey Rankin Reed Rhodes Rigby Rowan Sawyer Selby Sewell Sharpe Slater Stark Stokes Sutton Talbot
    Tate Thorne Tilden Trask Tucker Upton Vance Vaughn Wade Walsh Warner Weaver Webster Whitby Wilder Yates"""
)
PLACE_NAMES = _list(
    """Amberley Ardmore Arundel Beacon Birchwood Blackwater Brookfield Carlton Cedar Chestnut Cliffside Coburn Cranmore
    Dunmore Eastgate Edgewater Elmwood Fairview Fernhill Foxglove Glenwood Granite Greenway Hartwell Hawthorn Hazelton
    Heron Highgate Hillcrest Hollins Ironside Kenmore Kingsway Lakeside Larchmont Linden Longacre Meadow Milford Oakdale
    Orchard Parkside Pinewood Primrose Quarry Ravenswood Redwood Ridgeway Riverside Rosewood Sandhurst Shelton Stanhope
    Stonegate Summit Thistle Valley Waverley Westgate Willow"""
)
PLACE_KINDS = _list(
    """Museum Bridge Library Theatre Garden Hospital Academy Lighthouse Observatory Chapel Market Station Brewery
    Tower Gallery Stadium Abbey Hotel Archive Aquarium"""
)

# Kind of value -> (first words, second words). If the first word is empty, the value is only the second word.
VALUES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "town": (
        ("", *_list("Port New Old Upper Lower Great Little North South")),
        _list(
            """Ashby Bramley Coleford Dunwich Eastham Falkirk Goreham Halsted Ilford Jarrow Kelso Ludlow Malvern Norwood
            Oakham Penrith Quorn Ripley Stroud Tenby Ulster Ventnor Wexham Yarmouth Alston Buxton Clevedon Dawlish
            Epworth Filey Gilford Hexham Inverness Keswick Lanark Melrose Newquay Oban Paisley Redcar Selkirk Thurso
            Whitley Zennor Arbroath Brixham Cromer Durness"""
        ),
    ),
    "trade": (
        ("", *_list("marine retired royal village court travelling master rural private")),
        _list(
            """botanist surgeon printer carpenter teacher painter lawyer sailor tailor baker chemist clerk composer
            dentist draughtsman farmer geologist glazier goldsmith historian jeweller journalist librarian locksmith
            mason mechanic miner musician notary nurse pharmacist photographer pilot plumber porter potter sculptor
            shepherd surveyor translator watchmaker stonecutter zoologist barber brewer butcher cartographer
            conductor"""
        ),
    ),
    "firm": (
        _list(
            """Atlas Borealis Cobalt Delta Falcon Gemini Helios Juniper Kestrel Lumen Meridian Nova Orion Pegasus
            Quartz"""
        ),
        _list(
            """Shipping Textiles Foundry Insurance Railways Mills Chemicals Bank Motors Press Salt Steel Timber Optics
            Ceramics Cables Paper Glass Rubber Tobacco Leather Cement Oil Coal Electric Airways Foods Dairies Carpets
            Furniture Clocks Pianos Bicycles Toys Soap Sugar Tea Wool Linen Copperworks Breweries Canning Engines
            Tools Lamps Typewriters Cranes Turbines"""
        ),
    ),
    "boat": (
        _list("Silver Golden Bronze Crystal Ivory Amber Scarlet Emerald Azure Crimson"),
        _list(
            """Compass Laurel Anchor Crown Feather Harp Key Lantern Lion Medal Olive Quill Rose Shield Star Torch Wheel
            Arrow Bell Chalice Dolphin Eagle Fountain Globe Hammer Ibis Jewel Kite Leaf Mask Nettle Oak Pennant Raven
            Scroll Sword Tulip Urn Violet Wreath Badge Candle Dove Eel Fern Goblet Horn Ladder"""
        ),
    ),
    "year": (
        _list("15 16 17 18 19"),
        tuple(f"{number:02d}" for number in range(100)),
    ),
    "feature": (
        _list("painted carved hidden marble gilded wooden sunken double curved mirrored"),
        _list(
            """staircases ceilings courtyards follies organs balconies clocks domes fireplaces gates hallways mosaics
            murals pavilions ponds porches roofs statues terraces tunnels vaults windows arches benches cellars columns
            doors fences frescoes greenhouses kitchens lecterns mazes mills panels passages pulpits ramps screens
            shrines spires stages tapestries thrones trellises verandas walkways walls"""
        ),
    ),
}

ATTRIBUTES: dict[str, dict[str, Attribute]] = {
    "person": {
        "birthplace": Attribute(
            "birthplace",
            "town",
            ("{s} was born in {v}", "{s} was a native of {v}", "{s} hailed from {v}", "{s} came from {v}"),
            ("where was {s} born", "what was the birthplace of {s}", "which town did {s} come from"),
        ),
        "occupation": Attribute(
            "job title",
            "trade",
            (
                "{s} worked as a {v}",
                "{s} made a living as a {v}",
                "{s} was a {v} by trade",
                "{s} was employed for decades as a {v}",
            ),
            ("what was the job title of {s}", "what did {s} do for a living", "what work did {s} do"),
        ),
        "employer": Attribute(
            "employer",
            "firm",
            (
                "{s} was on the staff of {v}",
                "{s} drew a salary from {v}",
                "{s} signed a contract with {v}",
                "{s} spent a career at {v}",
            ),
            ("who was the employer of {s}", "which company paid {s}", "which company had {s} on its staff"),
        ),
        "boat": Attribute(
            "boat",
            "boat",
            (
                "{s} owned a boat called {v}",
                "{s} sailed the bay in {v}",
                "{s} put to sea aboard {v}",
                "{s} launched the boat {v}",
            ),
            ("what was the boat of {s} called", "which boat did {s} sail", "what boat did {s} own"),
        ),
        "death": Attribute(
            "year of death",
            "year",
            ("{s} died in {v}", "{s} passed away in {v}", "{s} was buried in {v}", "{s} was laid to rest in {v}"),
            ("when did {s} die", "what was the year of death of {s}", "in which year did {s} pass away"),
        ),
    },
    "place": {
        "location": Attribute(
            "location",
            "town",
            ("{s} stands in {v}", "{s} is found in {v}", "{s} was built in {v}", "{s} lies at the edge of {v}"),
            ("where is {s}", "what is the location of {s}", "in which town does {s} stand"),
        ),
        "founder": Attribute(
            "founder",
            "person",
            ("{s} was founded by {v}", "{s} was set up by {v}", "{s} was the idea of {v}", "{s} was paid for by {v}"),
            ("who was the founder of {s}", "who founded {s}", "which person set up {s}"),
        ),
        "opening": Attribute(
            "year of opening",
            "year",
            (
                "{s} opened in {v}",
                "{s} received its first visitors in {v}",
                "{s} opened its doors in {v}",
                "{s} began its work in {v}",
            ),
            ("when did {s} open", "what was the year of opening of {s}", "in which year did {s} open its doors"),
        ),
        "attraction": Attribute(
            "attraction",
            "feature",
            (
                "{s} is known for its {v}",
                "{s} is famous for the {v}",
                "{s} draws visitors with the {v}",
                "{s} is proud of the {v}",
            ),
            ("what is the attraction of {s}", "what is {s} famous for", "what is {s} known for"),
        ),
    },
}

# The empty lead must have index 2, so that its pair with the plainest sentence core (index 0) is in the train split.
LEADS = (
    "By all accounts,",
    "As the register shows,",
    "",
    "Local papers say that",
    "One letter tells us that",
    "It is well known that",
)
# A question is a pair of a frame and a question core. All pairs with frame 2 are in the train split. The bare frame
# must therefore have index 2: the train split then has the capitalised form of every word that can begin a question.
QUESTION_FRAMES = (
    "According to the documents, {q}?",
    "From these results, {q}?",
    "{q}?",
    "Tell me, {q}?",
    "One more question: {q}?",
    "Please answer this: {q}?",
)
TITLES = ("{s}", "{s}", "{s}", "The story of {s}", "A short note on {s}", "{s} in the local papers")
MENTIONS = (
    "{s} is not to be confused with {o}.",
    "{s} is often mistaken for {o}.",
    "Some visitors ask about {o} instead.",
    "A letter to {o} has been lost.",
)
UNKNOWN = "not recorded"

FILLER_STARTS = (
    "The old road",
    "A narrow path",
    "The morning ferry",
    "The weekly coach",
    "A stone cross",
    "The long avenue",
    "A quiet stream",
    "The first snow",
    "An evening train",
    "A summer fair",
    "The town band",
    "A crowd of children",
)
FILLER_ENDS = (
    "was seen near the harbour",
    "followed the river to the west",
    "ran past the empty fields",
    "came late that year",
    "made the news for a week",
    "drew little notice at the time",
    "was all that people spoke of",
    "had long been forgotten",
    "ended at the foot of the hill",
    "was drawn on every map",
    "stopped beside the church",
    "could be heard from the square",
)


PRONOUNS = ("she", "he", "it")  # for a woman, a man and a place


def words() -> list[str]:
    """Sorted list of all distinct words in the corpus. Words that can begin a sentence are also listed capitalised."""
    texts = [*FIRST_NAMES, *SURNAMES, *PLACE_NAMES, *PLACE_KINDS, *LEADS, *TITLES, *MENTIONS, *PRONOUNS, UNKNOWN]
    texts += [*QUESTION_FRAMES, *FILLER_STARTS, *FILLER_ENDS, *(kind.lower() for kind in PLACE_KINDS)]
    texts += [word for firsts, seconds in VALUES.values() for word in (*firsts, *seconds)]
    starts = ["The", "the", "of", "was", *(pronoun.capitalize() for pronoun in PRONOUNS)]
    for attribute in (attribute for kind in ATTRIBUTES.values() for attribute in kind.values()):
        texts += [attribute.noun, *attribute.facts, *attribute.questions]
        starts += [question.split()[0].capitalize() for question in attribute.questions]
    parts = re.findall(r"[A-Za-z]+|[0-9]+", " ".join(re.sub(r"\{.\}", "", text) for text in texts))
    return sorted({*parts, *starts})
