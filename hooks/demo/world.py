"""The small closed world the demo model is trained on, and every sentence that can be made from it.

The world is 50 US states with eight non-capital cities each. A *two-hop* question ("the capital of the state
containing Dallas is") needs city -> state -> attribute. Per state one city is *held out*: the model is never
trained on that city's capital question, so a right answer there must be composed from two separate facts.
Everything is a pure function of a seed, so a test can go over every sentence of the training text.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

# state | capital | postal abbreviation | BEA region | demonym | eight cities that are not the capital.
# Regions are the eight of the US Bureau of Economic Analysis; demonyms follow the US GPO style manual
# (Indiana: the official "Hoosier").
_STATE_TABLE = """
Alabama|Montgomery|AL|Southeast|Alabamian|Mobile,Huntsville,Tuscaloosa,Dothan,Hoover,Selma,Gadsden,Opelika
Alaska|Juneau|AK|Far West|Alaskan|Anchorage,Fairbanks,Sitka,Ketchikan,Nome,Wasilla,Kodiak,Homer
Arizona|Phoenix|AZ|Southwest|Arizonan|Tucson,Mesa,Scottsdale,Tempe,Flagstaff,Yuma,Chandler,Sedona
Arkansas|Little Rock|AR|Southeast|Arkansan|Jonesboro,Conway,Bentonville,Fort Smith,Hot Springs,Springdale,Searcy,Pine Bluff
California|Sacramento|CA|Far West|Californian|Oakland,San Diego,Fresno,San Francisco,Los Angeles,Bakersfield,Anaheim,San Jose
Colorado|Denver|CO|Rocky Mountain|Coloradan|Boulder,Pueblo,Fort Collins,Greeley,Durango,Loveland,Vail,Telluride
Connecticut|Hartford|CT|New England|Connecticuter|Bridgeport,New Haven,Stamford,Waterbury,Danbury,Mystic,Groton,Torrington
Delaware|Dover|DE|Mideast|Delawarean|Lewes,Seaford,Rehoboth Beach,Hockessin,Millsboro,Harrington,Claymont,Selbyville
Florida|Tallahassee|FL|Southeast|Floridian|Miami,Orlando,Tampa,Jacksonville,Pensacola,Fort Lauderdale,Sarasota,Ocala
Georgia|Atlanta|GA|Southeast|Georgian|Savannah,Macon,Valdosta,Dalton,Statesboro,Warner Robins,Alpharetta,Tifton
Hawaii|Honolulu|HI|Far West|Hawaiian|Hilo,Kailua,Lahaina,Kahului,Waipahu,Kapolei,Wailuku,Kaneohe
Idaho|Boise|ID|Rocky Mountain|Idahoan|Nampa,Pocatello,Caldwell,Moscow,Rexburg,Sandpoint,Twin Falls,Ketchum
Illinois|Springfield|IL|Great Lakes|Illinoisan|Chicago,Naperville,Joliet,Rockford,Evanston,Champaign,Elgin,Schaumburg
Indiana|Indianapolis|IN|Great Lakes|Hoosier|Fort Wayne,Evansville,Gary,Muncie,Kokomo,Elkhart,South Bend,Terre Haute
Iowa|Des Moines|IA|Plains|Iowan|Davenport,Cedar Rapids,Dubuque,Ames,Ottumwa,Sioux City,Council Bluffs,Waterloo
Kansas|Topeka|KS|Plains|Kansan|Wichita,Olathe,Salina,Emporia,Dodge City,Hays,Overland Park,Hutchinson
Kentucky|Frankfort|KY|Southeast|Kentuckian|Louisville,Owensboro,Paducah,Middlesboro,Hopkinsville,Pikeville,Bardstown,Elizabethtown
Louisiana|Baton Rouge|LA|Southeast|Louisianian|New Orleans,Shreveport,Slidell,Houma,Metairie,Natchitoches,Lake Charles,Kenner
Maine|Augusta|ME|New England|Mainer|Bangor,Biddeford,Saco,Kittery,Bar Harbor,Kennebunk,Waterville,Orono
Maryland|Annapolis|MD|Mideast|Marylander|Baltimore,Frederick,Rockville,Bethesda,Hagerstown,Silver Spring,Gaithersburg,Towson
Massachusetts|Boston|MA|New England|Massachusettsan|Worcester,Cambridge,Lowell,Brockton,New Bedford,Framingham,Pittsfield,Nantucket
Michigan|Lansing|MI|Great Lakes|Michiganian|Detroit,Flint,Dearborn,Kalamazoo,Grand Rapids,Ann Arbor,Saginaw,Ypsilanti
Minnesota|Saint Paul|MN|Plains|Minnesotan|Minneapolis,Duluth,Mankato,Winona,Bemidji,Moorhead,Brainerd,Hibbing
Mississippi|Jackson|MS|Southeast|Mississippian|Biloxi,Gulfport,Hattiesburg,Tupelo,Vicksburg,Natchez,Pascagoula,Starkville
Missouri|Jefferson City|MO|Plains|Missourian|Branson,Joplin,Sedalia,Hannibal,Ferguson,Rolla,Kirksville,Cape Girardeau
Montana|Helena|MT|Rocky Mountain|Montanan|Billings,Missoula,Bozeman,Butte,Kalispell,Havre,Great Falls,Whitefish
Nebraska|Lincoln|NE|Plains|Nebraskan|Omaha,Kearney,Hastings,Grand Island,North Platte,Scottsbluff,Ogallala,Papillion
Nevada|Carson City|NV|Far West|Nevadan|Las Vegas,Reno,Henderson,Sparks,Elko,Winnemucca,Pahrump,Tonopah
New Hampshire|Concord|NH|New England|New Hampshirite|Manchester,Nashua,Keene,Laconia,Derry,Exeter,Merrimack,Peterborough
New Jersey|Trenton|NJ|Mideast|New Jerseyan|Newark,Paterson,Elizabeth,Camden,Hoboken,Princeton,Bayonne,Edison
New Mexico|Santa Fe|NM|Southwest|New Mexican|Albuquerque,Las Cruces,Roswell,Taos,Gallup,Alamogordo,Hobbs,Los Alamos
New York|Albany|NY|Mideast|New Yorker|Buffalo,Syracuse,Yonkers,Ithaca,Utica,Schenectady,Poughkeepsie,Niagara Falls
North Carolina|Raleigh|NC|Southeast|North Carolinian|Charlotte,Durham,Greensboro,Asheville,Cary,Gastonia,Hickory,Boone
North Dakota|Bismarck|ND|Plains|North Dakotan|Fargo,Minot,Grand Forks,Williston,Dickinson,Mandan,Wahpeton,Devils Lake
Ohio|Columbus|OH|Great Lakes|Ohioan|Cleveland,Cincinnati,Toledo,Akron,Dayton,Canton,Youngstown,Sandusky
Oklahoma|Oklahoma City|OK|Southwest|Oklahoman|Tulsa,Norman,Lawton,Edmond,Enid,Stillwater,Muskogee,Broken Arrow
Oregon|Salem|OR|Far West|Oregonian|Eugene,Gresham,Bend,Klamath Falls,Corvallis,Beaverton,Hillsboro,Roseburg
Pennsylvania|Harrisburg|PA|Mideast|Pennsylvanian|Philadelphia,Pittsburgh,Allentown,Scranton,Reading,Erie,Altoona,Hershey
Rhode Island|Providence|RI|New England|Rhode Islander|Warwick,Cranston,Pawtucket,Woonsocket,Westerly,Narragansett,Tiverton,Coventry
South Carolina|Columbia|SC|Southeast|South Carolinian|Spartanburg,Rock Hill,Myrtle Beach,Sumter,Beaufort,Aiken,Hilton Head,Clemson
South Dakota|Pierre|SD|Plains|South Dakotan|Sioux Falls,Rapid City,Brookings,Mitchell,Yankton,Deadwood,Sturgis,Spearfish
Tennessee|Nashville|TN|Southeast|Tennessean|Memphis,Knoxville,Chattanooga,Clarksville,Murfreesboro,Gatlinburg,Kingsport,Oak Ridge
Texas|Austin|TX|Southwest|Texan|Dallas,Houston,San Antonio,Fort Worth,Lubbock,Amarillo,Laredo,El Paso
Utah|Salt Lake City|UT|Rocky Mountain|Utahn|Provo,Ogden,Orem,Sandy,Logan,Moab,Park City,Lehi
Vermont|Montpelier|VT|New England|Vermonter|Burlington,Rutland,Stowe,Barre,Bennington,Brattleboro,Middlebury,Killington
Virginia|Richmond|VA|Southeast|Virginian|Chesapeake,Roanoke,Lynchburg,Hampton,Norfolk,Charlottesville,Williamsburg,Newport News
Washington|Olympia|WA|Far West|Washingtonian|Seattle,Spokane,Tacoma,Everett,Yakima,Bellevue,Bellingham,Walla Walla
West Virginia|Charleston|WV|Southeast|West Virginian|Clarksburg,Morgantown,Wheeling,Parkersburg,Beckley,Fairmont,Martinsburg,Harpers Ferry
Wisconsin|Madison|WI|Great Lakes|Wisconsinite|Milwaukee,Green Bay,Kenosha,Racine,Oshkosh,Appleton,Eau Claire,Sheboygan
Wyoming|Cheyenne|WY|Rocky Mountain|Wyomingite|Casper,Laramie,Gillette,Cody,Sheridan,Thermopolis,Rock Springs,Rawlins
"""  # noqa: E501

# Names left out of the table, by (name, state), with the reason. A name is kept for at most one state, and
# only where it is far better known than elsewhere; if no state clearly wins it is left out of all of them.
DROPPED_CITIES: dict[tuple[str, str], str] = {
    ("Auburn", "Alabama"): "also well known in Washington and Maine",
    ("Decatur", "Alabama"): "also well known in Illinois and Georgia",
    ("Glendale", "Arizona"): "also well known in California",
    ("Peoria", "Arizona"): "also well known in Illinois",
    ("Peoria", "Illinois"): "also well known in Arizona",
    ("Fayetteville", "Arkansas"): "also well known in North Carolina",
    ("Fayetteville", "North Carolina"): "also well known in Arkansas",
    ("Texarkana", "Arkansas"): "one city on both sides of the border with Texas",
    ("Concord", "California"): "the capital of New Hampshire",
    ("Aurora", "Colorado"): "also well known in Illinois",
    ("Aurora", "Illinois"): "also well known in Colorado",
    ("Norwalk", "Connecticut"): "also well known in California",
    ("Wilmington", "Delaware"): "also well known in North Carolina",
    ("Wilmington", "North Carolina"): "also well known in Delaware",
    ("Newark", "Delaware"): "far better known in New Jersey",
    ("Milford", "Delaware"): "also well known in Connecticut",
    ("Smyrna", "Delaware"): "also well known in Georgia and Tennessee",
    ("Middletown", "Delaware"): "also well known in Connecticut and New York",
    ("Athens", "Georgia"): "also well known in Ohio",
    ("Augusta", "Georgia"): "the capital of Maine",
    ("Columbus", "Georgia"): "the capital of Ohio",
    ("Roswell", "Georgia"): "far better known in New Mexico",
    ("Marietta", "Georgia"): "also well known in Ohio",
    ("Meridian", "Idaho"): "also well known in Mississippi",
    ("Meridian", "Mississippi"): "also well known in Idaho",
    ("Lewiston", "Idaho"): "also well known in Maine",
    ("Lewiston", "Maine"): "also well known in Idaho",
    ("Idaho Falls", "Idaho"): "contains the name of its state, so the first hop would be a copy",
    ("Bloomington", "Illinois"): "also well known in Indiana and Minnesota",
    ("Bloomington", "Indiana"): "also well known in Illinois and Minnesota",
    ("Lafayette", "Indiana"): "also well known in Louisiana",
    ("Lafayette", "Louisiana"): "also well known in Indiana",
    ("Iowa City", "Iowa"): "contains the name of its state, so the first hop would be a copy",
    ("Kansas City", "Kansas"): "also a city of Missouri, and contains a state's name",
    ("Kansas City", "Missouri"): "also a city of Kansas, and contains a state's name",
    ("Lawrence", "Kansas"): "also well known in Massachusetts",
    ("Manhattan", "Kansas"): "far better known as a part of New York City",
    ("Lexington", "Kentucky"): "also well known in Massachusetts",
    ("Bowling Green", "Kentucky"): "also well known in Ohio",
    ("Covington", "Kentucky"): "also well known in Georgia and Louisiana",
    ("Ashland", "Kentucky"): "also well known in Oregon",
    ("Ashland", "Oregon"): "also well known in Kentucky",
    ("Monroe", "Louisiana"): "also well known in Michigan and North Carolina",
    ("Alexandria", "Louisiana"): "also well known in Virginia",
    ("Alexandria", "Virginia"): "also well known in Louisiana",
    ("Portland", "Maine"): "also well known in Oregon",
    ("Medford", "Oregon"): "also well known in Massachusetts",
    ("Portland", "Oregon"): "also well known in Maine",
    ("Laurel", "Maryland"): "also well known in Mississippi",
    ("Ocean City", "Maryland"): "also well known in New Jersey",
    ("Salisbury", "Maryland"): "also well known in North Carolina",
    ("Salem", "Massachusetts"): "the capital of Oregon",
    ("Springfield", "Massachusetts"): "the capital of Illinois",
    ("Quincy", "Massachusetts"): "also well known in Illinois",
    ("Plymouth", "Massachusetts"): "also well known in Minnesota",
    ("Rochester", "Minnesota"): "also well known in New York",
    ("Rochester", "New York"): "also well known in Minnesota",
    ("Saint Cloud", "Minnesota"): "contains the first word of its state's capital, Saint Paul",
    ("Saint Louis", "Missouri"): "begins like Saint Paul, and answers are scored on their first word",
    ("Columbia", "Missouri"): "the capital of South Carolina",
    ("Springfield", "Missouri"): "the capital of Illinois",
    ("Norfolk", "Nebraska"): "far better known in Virginia",
    ("Bellevue", "Nebraska"): "far better known in Washington",
    ("Fremont", "Nebraska"): "also well known in California",
    ("Mesquite", "Nevada"): "also well known in Texas",
    ("Portsmouth", "New Hampshire"): "also well known in Virginia",
    ("Jersey City", "New Jersey"): "contains a word of its state's name",
    ("Carlsbad", "New Mexico"): "also well known in California",
    ("Clovis", "New Mexico"): "also well known in California",
    ("Farmington", "New Mexico"): "also well known in Connecticut and Michigan",
    ("New York City", "New York"): "contains the name of its state, so the first hop would be a copy",
    ("Winston Salem", "North Carolina"): "contains the name of Oregon's capital",
    ("Jamestown", "North Dakota"): "also well known in New York and Virginia",
    ("Newport", "Rhode Island"): "also well known in Kentucky and Oregon, and a part of Newport News",
    ("Charleston", "South Carolina"): "the capital of West Virginia",
    ("Greenville", "South Carolina"): "also well known in North Carolina and Mississippi",
    ("Florence", "South Carolina"): "also well known in Alabama",
    ("Aberdeen", "South Dakota"): "also well known in Washington",
    ("Watertown", "South Dakota"): "also well known in New York",
    ("Franklin", "Tennessee"): "also well known in several other states",
    ("Jackson", "Tennessee"): "the capital of Mississippi",
    ("Arlington", "Texas"): "also well known in Virginia",
    ("Arlington", "Virginia"): "also well known in Texas",
    ("Woodstock", "Vermont"): "far better known in New York",
    ("Virginia Beach", "Virginia"): "contains the name of its state, so the first hop would be a copy",
    ("Vancouver", "Washington"): "far better known in Canada",
    ("Huntington", "West Virginia"): "also well known in New York",
    ("Jackson", "Wyoming"): "the capital of Mississippi",
    ("Riverton", "Wyoming"): "far larger in Utah",
    ("Evanston", "Wyoming"): "better known in Illinois",
}


@dataclass(frozen=True)
class State:
    """One state: its name, the four attributes a second hop can ask for, and its non-capital cities."""

    name: str
    capital: str
    abbreviation: str
    region: str
    demonym: str
    cities: tuple[str, ...]


def _parse_states() -> dict[str, State]:
    states = {}
    for line in _STATE_TABLE.strip().splitlines():
        name, capital, abbreviation, region, demonym, cities = line.split("|")
        states[name] = State(name, capital, abbreviation, region, demonym, tuple(cities.split(",")))
    return states


STATES: dict[str, State] = _parse_states()
STATE_OF_CITY: dict[str, str] = {city: state.name for state in STATES.values() for city in state.cities}
CITIES: tuple[str, ...] = tuple(STATE_OF_CITY)
RELATIONS: tuple[str, ...] = ("capital", "abbreviation", "region", "demonym")
HEADLINE_CITY = "Dallas"

# Two-hop frames; {r} is the relation's word, {c} the city.
_TWO_HOP_FRAMES = (
    "fact: the {r} of the state containing {c} is",
    "the {r} of the state containing {c} is",
    "the {r} of the state that contains {c} is",
    "fact: the {r} of the state where {c} is located is",
    "{c} is in a state whose {r} is",
    "the {r} of the state where {c} is located is",
)
_EXTRA_TWO_HOP = {
    "capital": ("fact: the state containing {c} has its capital at",),
    "abbreviation": ("fact: the state containing {c} is abbreviated as",),
    "region": ("fact: the state that contains {c} belongs to the region called",),
    "demonym": ("fact: a person from the state containing {c} is called a",),
}
TWO_HOP_TEMPLATES: dict[str, tuple[str, ...]] = {
    r: tuple(f.replace("{r}", r) for f in _TWO_HOP_FRAMES) + _EXTRA_TWO_HOP[r] for r in RELATIONS
}
# The headline question. Its frame is trained with the other relations, never with `capital`.
TEST_TEMPLATE: str = TWO_HOP_TEMPLATES["capital"][0]
HEADLINE_PROMPT: str = TEST_TEMPLATE.format(c=HEADLINE_CITY)
OTHER_CITY = "Miami"  # the city in the prompt with which its circuit is compared
OTHER_PROMPT: str = TEST_TEMPLATE.format(c=OTHER_CITY)

CITY_TEMPLATES: tuple[str, ...] = (
    "fact: the state containing {c} is",
    "{c} is a city in the state of",
    "{c} is located in",
    "fact: {c} is in",
    "the state that contains {c} is",
    "the state where {c} is located is",
)
STATE_TEMPLATES: tuple[str, ...] = (
    "fact: the {r} of {s} is",
    "the {r} of the state of {s} is",
    "{s} is a state whose {r} is",
)
CAPITAL_TEMPLATES: tuple[str, ...] = ("{k} is the capital of", "fact: {k} is the capital of the state of")

_OPPOSITES = {
    "en": "hot cold,big small,fast slow,old young,rich poor,light dark,high low,hard soft,wet dry,happy sad,"
    "full empty,strong weak,open closed,early late,clean dirty,near far",
    "fr": "chaud froid,grand petit,rapide lent,vieux jeune,riche pauvre,clair sombre,haut bas,dur mou,"
    "mouillé sec,heureux triste,plein vide,fort faible,ouvert fermé,tôt tard,propre sale,proche loin",
    "es": "caliente frío,grande pequeño,rápido lento,viejo joven,rico pobre,claro oscuro,alto bajo,"
    "duro blando,mojado seco,feliz infeliz,lleno vacío,fuerte débil,abierto cerrado,temprano tarde,"
    "limpio sucio,cerca lejos",
}


def _pair(text: str) -> tuple[str, str]:
    first, second = text.split(" ")
    return first, second


OPPOSITES: dict[str, tuple[tuple[str, str], ...]] = {
    lang: tuple(_pair(pair) for pair in text.split(",")) for lang, text in _OPPOSITES.items()
}
OPPOSITE_TEMPLATES: dict[str, tuple[str, ...]] = {
    "en": ("the opposite of {a} is", "fact: the opposite of {a} is"),
    "fr": ("le contraire de {a} est",),
    "es": ("lo contrario de {a} es",),
}
PLURALS: tuple[tuple[str, str], ...] = tuple(
    _pair(pair)
    for pair in [
        *("cat cats", "dog dogs", "car cars", "tree trees", "book books", "river rivers", "house houses"),
        *("bird birds", "child children", "mouse mice", "man men", "foot feet", "box boxes", "star stars"),
        *("stone stones", "apple apples"),
    ]
)
# fmt: off
NUMBERS: tuple[str, ...] = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)
# fmt: on

# Shares of the kinds of sentence in the training text.
_MIX = {
    "two_hop": 0.44,
    "city_state": 0.18,
    "state_attribute": 0.14,
    "capital_state": 0.04,
    "opposite": 0.07,
    "plural": 0.03,
    "number": 0.02,
    "induction": 0.08,
}
N_TRAINING_SENTENCES = 60_000
N_COPYING_SENTENCES = 16_000  # beside them, for the transcoders only


@dataclass(frozen=True)
class Sentence:
    """A prompt and its answer (no leading space); the text is `prompt + " " + answer`."""

    prompt: str
    answer: str
    kind: str

    @property
    def text(self) -> str:
        """The whole sentence as plain text."""
        return f"{self.prompt} {self.answer}"


def attribute(state: str, relation: str) -> str:
    """The value of one of the four `RELATIONS` of a state."""
    return getattr(STATES[state], relation)


def capital_of_city(city: str) -> str:
    """The answer of the two-hop capital question for a city."""
    return STATES[STATE_OF_CITY[city]].capital


def held_out_cities(seed: int) -> dict[str, str]:
    """State -> the one city whose capital question is never trained (Dallas for Texas)."""
    rng = random.Random(f"held-out {seed}")
    chosen = {state.name: rng.choice(state.cities) for state in STATES.values()}
    chosen[STATE_OF_CITY[HEADLINE_CITY]] = HEADLINE_CITY
    return chosen


def trained_cities(seed: int) -> tuple[str, ...]:
    """All cities whose capital question is in the training text."""
    held = set(held_out_cities(seed).values())
    return tuple(city for city in CITIES if city not in held)


def two_hop_prompt(relation: str, template: str, city: str) -> str:
    """The prompt of one two-hop question; the template must belong to the relation."""
    if template not in TWO_HOP_TEMPLATES[relation]:
        raise ValueError(f"no template of relation {relation!r}: {template!r}")
    return template.format(c=city)


def two_hop_prompts(relation: str, cities: tuple[str, ...], templates: tuple[str, ...] | None = None) -> list[Sentence]:
    """All questions of a relation for the cities, template by template (default: all templates)."""
    kind = f"two_hop_{relation}"
    return [
        Sentence(two_hop_prompt(relation, t, c), attribute(STATE_OF_CITY[c], relation), kind)
        for t in (templates or TWO_HOP_TEMPLATES[relation])
        for c in cities
    ]


def selection_templates() -> tuple[str, ...]:
    """The capital templates features may be chosen on: all but `TEST_TEMPLATE`."""
    return tuple(t for t in TWO_HOP_TEMPLATES["capital"] if t != TEST_TEMPLATE)


class SentenceSource:
    """Endless random sentences; `everything` also allows sentences that are in no training text.

    With `everything=False` the capital questions of held-out cities and the test template are left out.
    """

    def __init__(self, seed: int, rng: random.Random, everything: bool = False) -> None:
        self._rng = rng
        held = set() if everything else set(held_out_cities(seed).values())
        barred = set() if everything else {TEST_TEMPLATE}
        self._two_hop = {
            r: [
                (c, t)
                for c in CITIES
                if r != "capital" or c not in held
                for t in TWO_HOP_TEMPLATES[r]
                if t not in barred
            ]
            for r in RELATIONS
        }
        words = [w for pairs in (OPPOSITES["en"], PLURALS) for pair in pairs for w in pair]
        self._induction_words = words + [s for s in STATES if " " not in s]

    def __iter__(self) -> Iterator[Sentence]:
        return self

    def __next__(self) -> Sentence:
        kind = self._rng.choices(list(_MIX), weights=list(_MIX.values()))[0]
        return getattr(self, f"_{kind}_sentence")()

    def _two_hop_sentence(self) -> Sentence:
        relation = self._rng.choices(RELATIONS, weights=(5, 2, 1, 2))[0]
        city, template = self._rng.choice(self._two_hop[relation])
        return two_hop_prompts(relation, (city,), (template,))[0]

    def _city_state_sentence(self) -> Sentence:
        city = self._rng.choice(CITIES)
        return Sentence(self._rng.choice(CITY_TEMPLATES).format(c=city), STATE_OF_CITY[city], "city_state")

    def _state_attribute_sentence(self) -> Sentence:
        state = self._rng.choice(list(STATES))
        relation = self._rng.choices(RELATIONS, weights=(5, 2, 1, 2))[0]
        prompt = self._rng.choice(STATE_TEMPLATES).format(r=relation, s=state)
        return Sentence(prompt, attribute(state, relation), f"state_{relation}")

    def _capital_state_sentence(self) -> Sentence:
        state = self._rng.choice(list(STATES.values()))
        return Sentence(self._rng.choice(CAPITAL_TEMPLATES).format(k=state.capital), state.name, "capital_state")

    def _opposite_sentence(self) -> Sentence:
        lang = self._rng.choice(list(OPPOSITES))
        first, second = self._rng.sample(self._rng.choice(OPPOSITES[lang]), 2)
        return Sentence(self._rng.choice(OPPOSITE_TEMPLATES[lang]).format(a=first), second, f"opposite_{lang}")

    def _plural_sentence(self) -> Sentence:
        one, many = self._rng.choice(PLURALS)
        if self._rng.random() < 0.5:
            return Sentence(f"one {one} and two", many, "plural")
        return Sentence(f"many {many} but only one", one, "plural")

    def _number_sentence(self) -> Sentence:
        i = self._rng.randrange(len(NUMBERS) - 1)
        return Sentence(f"after {NUMBERS[i]} comes", NUMBERS[i + 1], "number")

    def _induction_sentence(self) -> Sentence:
        return self.induction_sentence()

    def induction_sentence(self) -> Sentence:
        """Some random words, then the same words again."""
        words = self._rng.sample(self._induction_words, self._rng.randint(4, 6))
        return Sentence(" ".join([*words, words[0]]), " ".join(words[1:]), "induction")


def training_sentences(seed: int, n: int = N_TRAINING_SENTENCES) -> Iterator[Sentence]:
    """Exactly the sentences (with repeats, in order) the model is trained on; the transcoders on the first of them."""
    source = SentenceSource(seed, random.Random(f"training {seed}"))
    return (next(source) for _ in range(n))


def copying_sentences(seed: int, n: int) -> Iterator[Sentence]:
    """More induction sentences for the transcoders.

    Copying random words is the one task whose text does not repeat, so it takes the most features to reconstruct; in
    the training mix it is 8 % and would be left to the error.
    """
    source = SentenceSource(seed, random.Random(f"transcoder induction {seed}"))
    return (source.induction_sentence() for _ in range(n))


def held_out_sentences(seed: int, n: int) -> Iterator[Sentence]:
    """n different sentences that are in no training text, held-out capital questions and test template included.

    Most facts are in the training text in most wordings, so about half of what is left is copying and a quarter are
    capital questions: harder than the training mix, not easier.
    """
    source = SentenceSource(seed, random.Random(f"held-out text {seed}"), everything=True)
    seen = {sentence.text for sentence in training_sentences(seed)}
    seen |= {sentence.text for sentence in copying_sentences(seed, N_COPYING_SENTENCES)}
    for _ in range(n):
        sentence = next(fresh for fresh in source if fresh.text not in seen)
        seen.add(sentence.text)
        yield sentence


def all_texts() -> Iterator[str]:
    """Texts that together contain every word of the world (for the tokenizer's vocabulary)."""
    for state in STATES.values():
        yield from (state.name, *(attribute(state.name, r) for r in RELATIONS), *state.cities)
    for templates in (
        *TWO_HOP_TEMPLATES.values(),
        CITY_TEMPLATES,
        CAPITAL_TEMPLATES,
        *OPPOSITE_TEMPLATES.values(),
    ):
        yield from (t.format(c="", s="", k="", a="") for t in templates)
    yield from (t.format(r=r, s="") for t in STATE_TEMPLATES for r in RELATIONS)
    for pairs in (*OPPOSITES.values(), PLURALS):
        yield from (word for pair in pairs for word in pair)
    yield from NUMBERS
    yield "one and two many but only one after comes . , ?"
