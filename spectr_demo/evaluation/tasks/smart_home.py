"""Voice commands for a home, answered with an intent and its slots as JSON.

The commands are sampled from the English sentence templates of Home Assistant (package
home-assistant-intents, parsed by hassil). Whole templates are held out. Intent names lose their
`Hass` prefix.
"""

from __future__ import annotations

import json
import random
from typing import Any

from spectr_demo.evaluation.tasks.task import Example, Item, Split, Task, make_split

WORDINGS = (
    "Smart home command: {text}",
    "Turn this into a home automation intent: {text}",
    "{text} (answer as an intent in JSON)",
    "Parse for the smart home: {text}",
)
HELDOUT_WORDINGS = ("The user tells the house: {text}", "Which intent is this? {text}")

HELDOUT_FRACTION = 0.15
SAMPLES_PER_TEMPLATE = 12
# Intents with many timer templates would otherwise be most of the data.
MAX_TEMPLATES_PER_INTENT = 24

AREAS = ("kitchen", "bedroom", "living room", "bathroom", "office", "garage", "hallway", "basement")
FLOORS = ("ground floor", "first floor", "upstairs", "attic")
# Device names by Home Assistant domain, so that a name fits its verb.
NAMES = {
    "light": ("desk lamp", "ceiling light", "night light", "porch light", "reading lamp"),
    "switch": ("coffee maker", "water heater", "christmas tree"),
    "fan": ("ceiling fan", "tower fan", "desk fan"),
    "cover": ("left curtain", "patio awning", "garage door", "roof blind"),
    "valve": ("sprinkler valve", "water valve", "pool valve"),
    "lock": ("front door", "back door", "garden gate"),
    "climate": ("thermostat", "heat pump", "air conditioner"),
    "media_player": ("TV", "soundbar", "radio", "record player"),
    "vacuum": ("robot vacuum", "roomba"),
    "lawn_mower": ("robot mower", "lawn mower"),
    "scene": ("movie night", "dinner time", "sunrise"),
    "script": ("bedtime routine", "morning routine"),
    "button": ("doorbell", "restart router"),
    "input_boolean": ("guest mode", "vacation mode"),
    "weather": ("London", "home forecast"),
    "person": ("Alice", "Bob", "Carol"),
    "todo": ("chores", "groceries", "packing"),
    "sensor": ("outdoor humidity", "power meter"),
    "binary_sensor": ("smoke alarm", "window sensor"),
}
# Slots whose value is free text.
WILDCARDS = {
    "message": ("dinner is ready", "the taxi is here", "good night everyone"),
    "search_query": ("Abbey Road", "jazz classics", "Queen", "Star Trek"),
    "zone": ("school", "work", "the gym"),
    "timer_name": ("pizza", "laundry", "tea"),
    "timer_command": ("turn off the lights", "lock the front door", "stop the music"),
    "shopping_list_item": ("milk", "apples", "bread", "olive oil"),
    "todo_list_item": ("mow the lawn", "call mom", "buy stamps"),
}
SLOTS_FIRST = ("domain", "device_class", "name", "area", "floor")


class _Sampler:
    """Draws one sentence from a template: walks hassil's expression tree and notes the slots."""

    def __init__(self, intents: Any, rng: random.Random) -> None:
        self.rng = rng
        self.rules = intents.expansion_rules
        self.lists = intents.slot_lists

    def sample(self, sentence: Any, data: Any) -> tuple[str, dict[str, Any]]:
        from hassil.util import normalize_whitespace

        slots = dict(data.slots)
        domains = data.requires_context.get("domain", [])
        names = [name for domain in domains for name in NAMES.get(domain, ())]
        text = self._draw(sentence.expression, slots, names)
        return normalize_whitespace(text).strip(), slots

    def _draw(self, part: Any, slots: dict[str, Any], names: list[str]) -> str:
        from hassil import expression as ex

        if isinstance(part, ex.TextChunk):
            return str(part.original_text)
        if isinstance(part, ex.Alternative):
            # Half of the optional words are said.
            if part.is_optional and self.rng.random() < 0.5:
                return ""
            return self._draw(self.rng.choice(part.items), slots, names)
        if isinstance(part, ex.Permutation):
            items = self.rng.sample(part.items, len(part.items))
            return " ".join(self._draw(item, slots, names) for item in items)
        if isinstance(part, ex.Sequence):
            return "".join(self._draw(item, slots, names) for item in part.items)
        if isinstance(part, ex.RuleReference):
            return self._draw(self.rules[part.rule_name].expression, slots, names)
        if isinstance(part, ex.ListReference):
            text, value = self._value(part.list_name, names)
            slots[part.slot_name] = value
            return text
        raise TypeError(f"hassil template part {type(part).__name__}: unknown; pin hassil==3.12.1")

    def _value(self, list_name: str, names: list[str]) -> tuple[str, Any]:
        """(spoken text, slot value) of one entry of a list."""
        from hassil.intents import RangeSlotList, TextSlotList

        own = {"name": names, "area": AREAS, "floor": FLOORS, **WILDCARDS}.get(list_name)
        if own is not None:
            chosen = self.rng.choice(own)
            return chosen, chosen
        entries = self.lists[list_name]
        if isinstance(entries, RangeSlotList):
            number = self.rng.randrange(entries.start, entries.stop + 1, entries.step)
            return str(number), round(number * (entries.multiplier or 1))
        assert isinstance(entries, TextSlotList), list_name
        entry = self.rng.choice(entries.values)
        return self._draw(entry.text_in, {}, names), entry.value_out


def to_answer(intent: str, slots: dict[str, Any]) -> str:
    """The JSON of an intent; what is meant first, then the values in the order they were said."""
    first = {key: slots[key] for key in SLOTS_FIRST if key in slots}
    return json.dumps({"intent": intent.removeprefix("Hass"), **first, **slots}, ensure_ascii=False)


def build(seed: int) -> Split:
    """Build the split by sentence template: about 3,500 training and 400 held-out commands."""
    from hassil.intents import Intents
    from home_assistant_intents import get_intents

    sentences: Any = get_intents("en")
    intents = Intents.from_dict(sentences)
    rng = random.Random(seed)
    sampler = _Sampler(intents, rng)
    train: list[Item] = []
    heldout: list[Item] = []
    spoken: set[str] = set()
    for name, intent in intents.intents.items():
        # Some templates stand in two blocks; by text, so that one cannot be on both sides.
        by_text = {
            sentence.text: (data, sentence) for data in intent.data for sentence in data.sentences
        }
        templates = list(by_text.values())
        rng.shuffle(templates)
        templates = templates[:MAX_TEMPLATES_PER_INTENT]
        # An intent with a single template has nothing to generalise to: it stays in training.
        num_heldout = round(HELDOUT_FRACTION * len(templates))
        for i, (data, sentence) in enumerate(templates):
            side = heldout if i < num_heldout else train
            for _ in range(SAMPLES_PER_TEMPLATE):
                text, slots = sampler.sample(sentence, data)
                # Two templates can say the same sentence; the first one keeps it.
                if text not in spoken:
                    spoken.add(text)
                    key = f"{name}: {sentence.text}"
                    side.append(Item(text=text, answer=to_answer(name, slots), key=key))
    return make_split(train, heldout, WORDINGS, HELDOUT_WORDINGS, seed)


def score(answer: str, example: Example) -> float:
    """1.0 if the answer is JSON equal to the reference, whatever the order of keys, else 0.0."""
    try:
        return float(json.loads(answer) == json.loads(example.answer))
    except ValueError:
        return 0.0


SMART_HOME = Task(
    name="smart_home",
    title="Voice command to smart-home intent",
    licence="Apache-2.0 (home-assistant-intents)",
    licence_id="apache-2.0",
    source="Sentence templates of home-assistant-intents 2026.10.27, sampled with hassil 3.12.1",
    split_unit="sentence template",
    limits=(
        "It knows the intents of Home Assistant and a few dozen device names; it cannot know the "
        "devices of a real home."
    ),
    wordings=WORDINGS,
    heldout_wordings=HELDOUT_WORDINGS,
    build=build,
    score=score,
    metric="JSON equality",
    max_new_tokens=48,
    packages=("hassil", "home_assistant_intents"),
)
