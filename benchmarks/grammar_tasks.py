"""Tool calls and extractions for `benchmarks.grammar`: five tools to choose from, and paragraphs of facts."""

import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

_TEXT, _NUMBER, _COUNT, _SWITCH = ({"type": kind} for kind in ("string", "number", "integer", "boolean"))
_CITIES = ("Paris", "New York", "San Francisco", "Berlin", "Tokyo", "Buenos Aires", "Cape Town", "Oslo", "Lima", "Rome")
_PEOPLE = ("Anna Smith", "Bob Jones", "Carla Gomez", "Deniz Kaya", "Emeka Obi", "Fumiko Sato", "Greta Lind", "Hugo Roy")
_THINGS = ("office chair", "desk lamp", "water bottle", "travel bag", "wool blanket", "garden table", "coffee grinder")
_TOPICS = ("quarterly budget", "hiring plan", "product launch", "security review", "customer feedback", "travel policy")
_JOBS = ("physicist", "carpenter", "nurse", "software engineer", "high school teacher", "pastry chef", "journalist")
_HOBBIES = ("chess", "trail running", "photography", "fishing", "bird watching", "playing the cello", "gardening")
_SYSTEM = "You are a helpful assistant with these functions:\n{tools}\nAnswer with a JSON {form}, and nothing else."


class GrammarTask(NamedTuple):
    """A request that has to be answered in JSON.

    Attributes:
        category: ``named`` or ``required`` (tool calls), or ``extraction``.
        system, user: its messages.
        schema: of the answer.
    """

    category: str
    system: str
    user: str
    schema: dict[str, Any]


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


# The name, what it does, its parameters, and a question for it.
_TOOLS = (
    (
        "get_weather_forecast",
        "Get the weather forecast for a city.",
        _object(city=_TEXT, days=_COUNT, temperature_unit={"enum": ["celsius", "fahrenheit"]}),
        "What will the weather in {city} be like in the next {count} days? I think in celsius.",
    ),
    (
        "search_flights",
        "Search for flights between two cities.",
        _object(departure_city=_TEXT, arrival_city=_TEXT, departure_date=_TEXT, number_of_passengers=_COUNT),
        "Find me flights from {city} to {other_city} on {date} for {count} people.",
    ),
    (
        "create_calendar_event",
        "Create an event in the calendar.",
        _object(
            title=_TEXT,
            date=_TEXT,
            start_time=_TEXT,
            duration_minutes=_COUNT,
            attendees={"type": "array", "items": _TEXT},
        ),
        "Put the {topic} into my calendar on {date} at 14:30, {minutes} minutes, with {person} and {other}.",
    ),
    (
        "send_email",
        "Send an email.",
        _object(recipient=_TEXT, subject=_TEXT, body=_TEXT, is_urgent=_SWITCH),
        "Write to {mail} that the meeting about the {topic} is moved to {date}. It is urgent.",
    ),
    (
        "add_to_shopping_cart",
        "Add a product to the shopping cart.",
        _object(
            product_name=_TEXT,
            quantity=_COUNT,
            maximum_price=_NUMBER,
            shipping={"enum": ["standard", "express", "pickup"]},
        ),
        "I need {count} of the {thing}, at most {price} dollars each, as express delivery.",
    ),
)
_PERSON = _object(
    full_name=_TEXT,
    age=_COUNT,
    occupation=_TEXT,
    email_address=_TEXT,
    home_city=_TEXT,
    hobbies={"type": "array", "items": _TEXT},
)
_ORDER = _object(
    order_number=_TEXT,
    customer=_object(name=_TEXT, email_address=_TEXT),
    items={"type": "array", "items": _object(product_name=_TEXT, quantity=_COUNT, unit_price=_NUMBER)},
    delivery_date=_TEXT,
)
_EXTRACTIONS = (
    (
        _PERSON,
        "{person} is a {age} year old {job} from {city}. After work, it is mostly {hobby} and {other_hobby}. Who "
        "wants to join may write to {mail}.",
    ),
    (
        _ORDER,
        "Order A-{minutes}{age}: {person} ({mail}) has bought {count} times the {thing} for {price} dollars each and "
        "one {other_thing} for {age}.50 dollars. All of it is to be delivered on {date}.",
    ),
)


def _facts(rng: random.Random) -> dict[str, Any]:
    pairs = {"city": _CITIES, "person": _PEOPLE, "thing": _THINGS, "hobby": _HOBBIES}
    facts: dict[str, Any] = {}
    for name, values in pairs.items():
        facts[name], facts["other" if name == "person" else f"other_{name}"] = rng.sample(values, 2)
    return facts | {
        "topic": rng.choice(_TOPICS),
        "job": rng.choice(_JOBS),
        "mail": facts["person"].lower().replace(" ", ".") + "@example.com",
        "count": rng.randint(2, 9),
        "age": rng.randint(20, 79),
        "minutes": rng.choice((15, 30, 45, 60, 90)),
        "price": rng.randint(10, 99) + 0.95,
        "date": f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
    }


def tasks(seed: int = 0) -> Iterator[GrammarTask]:
    """Tasks without end, two tool calls (one named, one required) and two extractions in turn."""
    rng = random.Random(seed)
    functions = [{"name": name, "description": doc, "parameters": schema} for name, doc, schema, _ in _TOOLS]
    called = [_object(name={"const": name}, parameters=schema) for name, _, schema, _ in _TOOLS]
    array = {"type": "array", "minItems": 1, "maxItems": 1, "items": {"type": "object", "anyOf": called}}
    while True:
        for category in ("named", "required"):
            name, _, schema, question = rng.choice(_TOOLS)
            tools = "\n".join(map(json.dumps, rng.sample(functions, len(functions))))
            is_named = category == "named"
            form = f"object of the parameters of {name}" if is_named else "array of one call: its name and parameters"
            system = _SYSTEM.format(tools=tools, form=form)
            yield GrammarTask(category, system, question.format(**_facts(rng)), schema if is_named else array)
        for schema, text in _EXTRACTIONS:
            system = f"Extract what the text says as JSON of this schema: {json.dumps(schema)}"
            yield GrammarTask("extraction", system, text.format(**_facts(rng)), schema)
