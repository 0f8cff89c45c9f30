"""Splits without leaks, scorers by hand-made answers, queries that depend on the data."""

import json
import re
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import pytest

from spectr_demo.evaluation.tasks import (
    TASKS,
    Example,
    Item,
    Split,
    arpabet,
    category,
    cron,
    get_task,
    icd10,
    kjv,
    make_split,
    sentiment,
    smart_home,
    sql,
    to_es,
)
from tests.evaluation.tasks.test_arpabet import made_up_words
from tests.evaluation.tasks.test_category import GLOSSES
from tests.evaluation.tasks.test_icd10 import FAR
from tests.evaluation.tasks.test_sentiment import snippets
from tests.evaluation.tasks.test_to_es import PAIRS

# (book, modern, archaic), made for the tests: kjv's own texts would have to be fetched.
VERSES = [
    (
        book,
        f"You are the {noun} of my father and my house.",
        f"Thou art the {noun} of my father.",
    )
    for book in ("Genesis", "Ruth", "Acts", "Jonah")
    for noun in ("servant", "stone", "lamp", "well", "door")
]


# Every verse once, so that no pair stands in two books.
UNIQUE_VERSES = [(book, f"{book}: {new}", f"{book}: {old}") for book, new, old in VERSES]
# Two sentences each: any two of these texts are more than a word apart.
TWO_SENTENCES = [
    (f"{one} and {other}", f"{uno} y {otro}")
    for (one, uno), (other, otro) in permutations(PAIRS[::2], 2)
]
# Splits of data made for the tests, where a task's own would have to be fetched.
MADE_UP: dict[str, Callable[[int], Split]] = {
    "kjv": lambda seed: kjv.split_verses(iter(UNIQUE_VERSES), seed),
    "to_es": lambda seed: to_es.split_pairs(TWO_SENTENCES, seed),
    "sentiment": lambda seed: sentiment.split_snippets(snippets(), seed),
    "category": lambda seed: category.split_glosses(GLOSSES, seed),
    "arpabet": lambda seed: arpabet.split_words(made_up_words(), seed),
    "icd10": lambda seed: icd10.split_titles(FAR, seed),
}


def build(name: str, seed: int = 0) -> Split:
    """The split of a task, without network."""
    with pytest.MonkeyPatch.context() as patch:
        # A tenth of the data keeps the tests fast ...
        patch.setattr(cron, "NUM_EXPRESSIONS", 400)
        patch.setattr(smart_home, "SAMPLES_PER_TEMPLATE", 2)
        # ... and of what little was made up, at least ten are held out.
        patch.setattr(category, "TRAIN_PER_CLASS", 3)
        patch.setattr(category, "HELDOUT_PER_CLASS", 2)
        for module in (to_es, arpabet):
            patch.setattr(module, "HELDOUT_FRACTION", 0.3)
        return MADE_UP.get(name, TASKS[name].build)(seed)


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return {name: build(name) for name in TASKS}


def example(name: str, answer: str, text: str = "") -> Example:
    return Example(
        prompt=text, answer=answer, text=text, key="k", wording="{text}", is_heldout_wording=False
    )


@pytest.mark.parametrize("name", TASKS)
class TestEveryTask:
    def test_nothing_heldout_was_trained_on(self, splits: dict[str, Split], name: str) -> None:
        train, heldout = splits[name].train, splits[name].heldout
        assert train
        assert len(heldout) >= 10
        assert not {e.key for e in train} & {e.key for e in heldout}
        assert not {e.text for e in train} & {e.text for e in heldout}

    def test_heldout_wordings_are_never_trained_on(
        self, splits: dict[str, Split], name: str
    ) -> None:
        task, split = TASKS[name], splits[name]
        assert {e.wording for e in split.train} <= set(task.wordings)
        assert len(task.wordings) >= 4
        for e in split.heldout:
            assert e.is_heldout_wording == (e.wording in task.heldout_wordings)
        share = sum(e.is_heldout_wording for e in split.heldout) / len(split.heldout)
        assert share == pytest.approx(0.5, abs=0.05)

    def test_prompt_is_the_wording_with_the_text_in_it(
        self, splits: dict[str, Split], name: str
    ) -> None:
        for e in (*splits[name].train, *splits[name].heldout):
            assert e.prompt == e.wording.replace("{text}", e.text)

    def test_same_seed_same_split_other_seed_other_split(
        self, splits: dict[str, Split], name: str
    ) -> None:
        assert build(name) == splits[name]
        assert build(name, seed=1).train != splits[name].train

    def test_reference_scores_one_and_copying_less(
        self, splits: dict[str, Split], name: str
    ) -> None:
        for e in splits[name].heldout[:30]:
            assert TASKS[name].score(e.answer, e) == pytest.approx(1.0)
            assert TASKS[name].score(e.text, e) < 1.0
            assert TASKS[name].score("", e) == 0.0

    def test_answers_fit_the_generation_limit(self, splits: dict[str, Split], name: str) -> None:
        # A word is a token or two, and each digit and sign is a token of its own.
        for e in splits[name].heldout:
            words, rest = re.findall(r"[A-Za-z]+", e.answer), re.findall(r"[^A-Za-z\s]", e.answer)
            assert len(words) + len(rest) / 2 < TASKS[name].max_new_tokens

    def test_baselines_answer_every_heldout_example_without_its_answer(
        self, splits: dict[str, Split], name: str
    ) -> None:
        train, heldout = splits[name].train, splits[name].heldout
        for baseline in TASKS[name].baselines.values():
            answers = baseline(train, heldout)
            assert len(answers) == len(heldout)
            assert answers == baseline(train, [replace(e, answer="") for e in heldout])


def test_split_refuses_a_key_on_both_sides() -> None:
    with pytest.raises(ValueError, match=r"keys are in both.*'k'"):
        Split(train=(example("t", "a"),), heldout=(example("t", "b"),))


def test_task_refuses_a_wording_without_text() -> None:
    with pytest.raises(ValueError, match="'Say it'"):
        replace(TASKS["sql"], wordings=("Say it",))


def test_make_split_keeps_at_most_num_heldout() -> None:
    items = [Item(text=str(i), answer="", key=str(i)) for i in range(9)]
    split = make_split(items[:2], items[2:], ["{text}"], ["? {text}"], seed=0, num_heldout=4)
    assert (len(split.train), len(split.heldout)) == (2, 4)


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'corn'.*cron"):
        get_task("corn")


class TestSql:
    def test_every_form_and_table_is_trained_on(self, splits: dict[str, Split]) -> None:
        trained = {e.key for e in splits["sql"].train}
        assert {key.split("/")[0] for key in trained} == {table.name for table in sql.TABLES}
        assert {key.split("/")[1] for key in trained} == set(sql.FORMS)

    def test_rows_depend_on_the_data(self, splits: dict[str, Split]) -> None:
        queries = [e.answer for e in splits["sql"].heldout]
        with sql.filled_database(0) as one, sql.filled_database(1) as other:
            rows = [one.execute(query).fetchall() for query in queries]
            other_rows = [other.execute(query).fetchall() for query in queries]
        assert all(rows)
        same = sum(sorted(a) == sorted(b) for a, b in zip(rows, other_rows, strict=True))
        # A count can be the same by chance.
        assert same / len(queries) < 0.2

    def test_thresholds_keep_some_rows_and_drop_some(self, splits: dict[str, Split]) -> None:
        with sql.filled_database() as connection:
            for e in splits["sql"].train[:300]:
                if "WHERE" in e.answer and "COUNT" not in e.answer and "(" not in e.answer:
                    assert 0 < len(connection.execute(e.answer).fetchall()) < sql.ROWS_PER_TABLE

    @pytest.mark.parametrize(
        ("answer", "right"),
        [
            ("SELECT genre, MAX(pages) FROM books GROUP BY genre;", 1.0),
            ("select genre, max(pages) as longest from books group by genre order by 2", 1.0),
            ("```sql\nSELECT genre, MAX(pages) FROM books GROUP BY genre;\n```", 1.0),
            ("SELECT MAX(pages), genre FROM books GROUP BY genre;", 0.0),
            ("SELECT genre, MIN(pages) FROM books GROUP BY genre;", 0.0),
            ("SELECT genre, MAX(pages) FROM book GROUP BY genre;", 0.0),
            ("The longest book of each genre.", 0.0),
            ("", 0.0),
        ],
    )
    def test_score_compares_rows(self, answer: str, right: float) -> None:
        reference = example("sql", "SELECT genre, MAX(pages) FROM books GROUP BY genre;")
        assert sql.score(answer, reference) == right

    def test_order_counts_only_where_it_was_asked_for(self) -> None:
        top = example("sql", "SELECT code FROM flights ORDER BY price DESC LIMIT 3;")
        reordered = (
            "SELECT * FROM (SELECT code FROM flights ORDER BY price DESC LIMIT 3) ORDER BY 1"
        )
        assert sql.score(top.answer, top) == 1.0
        assert sql.score(reordered, top) == 0.0

    @pytest.mark.parametrize(
        "attack",
        [
            "DROP TABLE flights;",
            "DELETE FROM flights;",
            "ATTACH DATABASE 'made-by-a-model.db' AS x;",
            "PRAGMA writable_schema = 1;",
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT COUNT(*) FROM n;",
        ],
    )
    def test_answers_may_only_read_and_not_for_long(self, attack: str) -> None:
        with sql.filled_database() as connection, pytest.raises(sqlite3.Error):
            connection.execute(attack).fetchall()
        assert sql.score(attack, example("sql", "SELECT COUNT(*) FROM flights;")) == 0.0


class TestCron:
    @pytest.mark.parametrize(
        ("answer", "right"),
        [
            ("30 4 * * 1-5", 1.0),
            ("30  4 * * 1-5\n", 1.0),
            ("30 04 * * MON-FRI", 1.0),
            ("4 30 * * 1-5", 0.0),
            ("30 4 * * 1-6", 0.0),
            ("0 30 4 * * 1-5", 0.0),
            ("30 4 * *", 0.0),
            ("every morning", 0.0),
            ("a b c d e", 0.0),
        ],
    )
    def test_score_is_exact_or_same_description(self, answer: str, right: float) -> None:
        assert cron.score(answer, example("cron", "30 4 * * 1-5")) == right

    def test_description_is_in_24_hour_time(self) -> None:
        assert cron.describe("58 13 1 6-8 *") == (
            "At 13:58, on day 1 of the month, June through August"
        )


class TestSmartHome:
    def test_names_fit_the_verb(self, splits: dict[str, Split]) -> None:
        for e in (*splits["smart_home"].train, *splits["smart_home"].heldout):
            slots = json.loads(e.answer)
            if slots["intent"].startswith("Vacuum") and "name" in slots:
                assert slots["name"] in smart_home.NAMES["vacuum"]
            if slots["intent"] == "LightSet" and "name" in slots:
                assert slots["name"] in smart_home.NAMES["light"]

    def test_spoken_values_are_in_the_answer(self, splits: dict[str, Split]) -> None:
        for e in splits["smart_home"].train:
            slots = json.loads(e.answer)
            for key in ("name", "area", "floor", "item"):
                if key in slots:
                    assert slots[key] in e.text

    @pytest.mark.parametrize(
        ("answer", "right"),
        [
            ('{"intent": "TurnOff", "domain": "light", "area": "attic"}', 1.0),
            ('{"area":"attic","domain":"light","intent":"TurnOff"}', 1.0),
            ('{"intent": "TurnOff", "domain": "light"}', 0.0),
            ('{"intent": "TurnOn", "domain": "light", "area": "attic"}', 0.0),
            ('{"intent": "TurnOff", "domain": "light", "area": "attic"', 0.0),
            ("Lights off.", 0.0),
        ],
    )
    def test_score_is_json_equality(self, answer: str, right: float) -> None:
        reference = example("s", '{"intent": "TurnOff", "domain": "light", "area": "attic"}')
        assert smart_home.score(answer, reference) == right

    def test_number_and_text_differ(self) -> None:
        reference = example("s", '{"intent": "SetVolume", "volume_level": 40}')
        assert smart_home.score('{"intent": "SetVolume", "volume_level": "40"}', reference) == 0.0


class TestKjv:
    @pytest.mark.parametrize(
        ("modern", "archaic", "usable"),
        [
            ("You shall not steal from your brother.", "Thou shalt not steal from thy kin.", True),
            ("Jesus wept.", "Jesus wept.", False),
            (
                "The same words stand in both of them.",
                "The same words stand in both of them.",
                False,
            ),
            (
                "In the beginning, Godcreated the heavens.",
                "In the beginning God created all.",
                False,
            ),
            ("He conceived,and gave birth to a son.", "He begat a son and was very glad.", False),
            ("word " * 40, "word " * 39, False),
        ],
    )
    def test_usable_pairs(self, modern: str, archaic: str, usable: bool) -> None:
        assert kjv.is_usable(modern, archaic) == usable

    def test_split_is_by_book_and_drops_repeated_verses(self) -> None:
        split = kjv.split_verses(iter(VERSES), seed=0)
        assert {e.key for e in split.heldout} == {"Acts", "Jonah"}
        assert not split.train  # each of these verses stands in Acts too

    def test_score_prefers_the_closer_verse(self) -> None:
        reference = example("kjv", "Thou shalt not steal from thy brother.")
        close = kjv.score("Thou shalt not steal from your brother.", reference)
        far = kjv.score("You should never take what is not yours.", reference)
        assert 0 < far < close < 1

    def test_a_machine_without_apt_is_told_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: object
    ) -> None:
        monkeypatch.setattr(kjv, "INSTALLED", tmp_path)
        monkeypatch.setenv("SPECTR_CACHE", str(tmp_path))
        monkeypatch.setenv("PATH", "")
        with pytest.raises(RuntimeError, match="apt install sword-text-web sword-text-kjv"):
            kjv.fetch_modules()
