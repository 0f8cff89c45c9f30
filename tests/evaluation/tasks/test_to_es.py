"""English to Spanish: reading translation files, which pairs are kept, a split without leaks."""

import json
import zipfile
from pathlib import Path

import pytest

from spectr_demo.evaluation.tasks import Example, to_es

# Each sentence stands twice, one word apart; two different sentences are further apart.
SENTENCES = {
    "the door is": "la puerta está",
    "all windows stay": "todas las ventanas quedan",
    "this old lamp looks": "esta lámpara vieja parece",
    "my keys were": "mis llaves estaban",
    "one curtain seems": "una cortina parece",
    "your kettle became": "tu hervidor se puso",
    "those two fans are": "esos dos ventiladores están",
    "her garden remained": "su jardín seguía",
}
COLOURS = {"red": "rojo", "white": "blanco"}
PAIRS = [
    (f"{english} {colour}", f"{spanish} {color}")
    for english, spanish in SENTENCES.items()
    for colour, color in COLOURS.items()
]


def example(answer: str) -> Example:
    return Example(
        prompt="", answer=answer, text="", key="k", wording="{text}", is_heldout_wording=False
    )


def test_reads_the_texts_that_both_languages_have(tmp_path: Path) -> None:
    files = {
        "kettle/translations/en.json": {
            "title": "Electric  kettle",
            "config": {"error": {"cold": "The water is cold", "dry": "There is no water"}},
        },
        "kettle/translations/es.json": {
            "title": "Hervidor eléctrico",
            "config": {"error": {"cold": "El agua está fría"}},
        },
        "kettle/translations/de.json": {"title": "Wasserkocher"},
        "kettle/manifest.json": {"title": "Kettle"},
        "toaster/translations/en.json": {"title": "Toaster oven"},
    }
    path = tmp_path / "homeassistant.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"homeassistant/components/{name}", json.dumps(content))
    assert list(to_es.read_pairs(path)) == [
        ("Electric kettle", "Hervidor eléctrico"),
        ("The water is cold", "El agua está fría"),
    ]


@pytest.mark.parametrize(
    ("english", "spanish", "usable"),
    [
        ("The water is cold", "El agua está fría", True),
        ("Camera ID", "ID de la cámara", True),
        ("Water", "Agua", False),
        ("Set up Logitech Harmony Hub", "Configurar Logitech Harmony Hub", False),
        ("Amazon Echo Dot", "Amazon Echo Dot", False),
        ("The water of {name} is cold", "El agua de {name} está fría", False),
        ("[%key:common::water%] is cold", "El agua está fría", False),
        ("See https://example.org for help", "Consulta https://example.org para ayuda", False),
        ("Open example.org for help", "Abre example.org para obtener ayuda", False),
        ("The **water** is cold", "El agua está **fría**", False),
        ("Set the water_level now", "Ajusta el nivel ahora", False),
        ("The water in the kettle is cold", "Fría", False),
        ("Is cold", "El agua del hervidor está fría", False),
        ("cold " * 17, "fría " * 17, False),
        ("very cold water " * 5, "agua muy fría " * 7, False),
    ],
)
def test_usable_pairs(english: str, spanish: str, usable: bool) -> None:
    assert to_es.is_usable(english, spanish) == usable


@pytest.mark.parametrize("seed", [0, 1])
def test_heldout_texts_are_more_than_a_word_away_from_training(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_es, "HELDOUT_FRACTION", 0.5)
    split = to_es.split_pairs(PAIRS, seed)
    assert split.train
    assert split.heldout
    # Some sentence was on both sides.
    assert len(split.train) + len(split.heldout) < len(PAIRS)
    trained = {e.text.rsplit(" ", 1)[0] for e in split.train}
    assert not trained & {e.text.rsplit(" ", 1)[0] for e in split.heldout}
    assert to_es.split_pairs(PAIRS, seed) == split
    assert to_es.split_pairs(PAIRS, seed + 1).train != split.train


@pytest.mark.parametrize(
    ("text", "other", "near"),
    [
        ("The water is cold", "The water is cold!", True),
        ("The water is cold", "The milk is cold", True),
        ("The water is cold", "The water is very cold", True),
        ("The water is very cold", "The water is cold", True),
        ("The water is cold", "The milk is warm", False),
        ("The water is cold", "Water is really cold today", False),
    ],
)
def test_near_means_one_word_changed_added_or_dropped(text: str, other: str, near: bool) -> None:
    assert bool(to_es._variants(text) & to_es._variants(other)) == near


def test_a_text_has_its_commonest_translation() -> None:
    pairs = [
        ("Invalid zone", "Zona inválida"),
        ("Invalid zone", "Zona no válida"),
        ("Invalid zone", "Zona no válida"),
        ("Invalid Zone.", "Zona errónea."),
    ]
    assert [e.answer for e in to_es.split_pairs(pairs, seed=0).train] == ["Zona no válida"]


def test_score_prefers_the_closer_text() -> None:
    reference = example("El agua está fría")
    assert to_es.score("El agua está fría", reference) == pytest.approx(1.0)
    assert to_es.score("", reference) == 0.0
    close = to_es.score("El agua es fría", reference)
    far = to_es.score("The water is cold", reference)
    assert 0 < far < close < 1


def test_wordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_es, "HELDOUT_FRACTION", 0.5)
    assert len(to_es.WORDINGS) >= 4
    assert not set(to_es.WORDINGS) & set(to_es.HELDOUT_WORDINGS)
    split = to_es.split_pairs(PAIRS, seed=0)
    assert {e.wording for e in split.train} <= set(to_es.WORDINGS)
    for e in (*split.train, *split.heldout):
        assert e.prompt == e.wording.replace("{text}", e.text)
        assert e.is_heldout_wording == (e.wording in to_es.HELDOUT_WORDINGS)


def test_longest_answer_fits_the_generation_limit() -> None:
    assert to_es.TO_ES.max_new_tokens > to_es.MAX_ANSWER_WORDS * 2.5
