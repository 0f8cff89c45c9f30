"""Questions about eight small tables, answered with a SQL query.

The questions are generated here: twelve forms of query over eight tables. Whole (table, form)
pairs are held out, so that a held-out question always combines a known table and a known form in a
way never seen. Both queries run in sqlite on filled tables, and the rows are compared.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

from spectr_demo.evaluation.tasks.task import Example, Item, Split, Task, make_split

WORDINGS = (
    "Translate to a SQL query: {text}",
    "Write SQL for this question: {text}",
    "{text} Answer with a SQL query.",
    "Which SQL query answers this? {text}",
)
HELDOUT_WORDINGS = ("I need a database query. {text}", "Turn this into SQL: {text}")

HELDOUT_FRACTION = 0.15
ROWS_PER_TABLE = 60


@dataclass(frozen=True, kw_only=True)
class Table:
    """`label` names a row, `classes` are text columns, `numbers` are (low, high, step) columns."""

    name: str
    label: str
    classes: dict[str, tuple[str, ...]]
    numbers: dict[str, tuple[int, int, int]]


TABLES = (
    Table(
        name="flights",
        label="code",
        classes={
            "origin": ("Lisbon", "Oslo", "Rome", "Vienna", "Dublin"),
            "airline": ("Iberia", "Finnair", "Swiss", "KLM"),
        },
        numbers={"distance": (300, 9000, 100), "price": (60, 1200, 20)},
    ),
    Table(
        name="employees",
        label="name",
        classes={
            "department": ("sales", "finance", "legal", "support"),
            "city": ("Paris", "Berlin", "Madrid", "Prague"),
        },
        numbers={"salary": (28000, 120000, 1000), "age": (20, 65, 1)},
    ),
    Table(
        name="books",
        label="title",
        classes={
            "genre": ("crime", "poetry", "fantasy", "history"),
            "language": ("English", "German", "French", "Spanish"),
        },
        numbers={"pages": (80, 900, 10), "year": (1950, 2024, 1)},
    ),
    Table(
        name="products",
        label="name",
        classes={
            "category": ("toys", "garden", "kitchen", "sports"),
            "brand": ("Acme", "Nova", "Orbit", "Zenith"),
        },
        numbers={"price": (5, 400, 5), "stock": (0, 300, 10)},
    ),
    Table(
        name="students",
        label="name",
        classes={
            "major": ("physics", "law", "biology", "music"),
            "country": ("Chile", "Japan", "Kenya", "Norway"),
        },
        numbers={"grade": (40, 100, 1), "credits": (10, 180, 5)},
    ),
    Table(
        name="movies",
        label="title",
        classes={
            "genre": ("comedy", "drama", "horror", "western"),
            "studio": ("Aurora", "Bluebird", "Summit", "Harbor"),
        },
        numbers={"rating": (20, 98, 1), "budget": (1, 200, 1)},
    ),
    Table(
        name="cars",
        label="model",
        classes={
            "maker": ("Fiat", "Honda", "Volvo", "Ford"),
            "color": ("red", "black", "white", "blue"),
        },
        numbers={"mileage": (1000, 200000, 1000), "power": (60, 400, 10)},
    ),
    Table(
        name="hotels",
        label="name",
        classes={
            "town": ("Nice", "Split", "Bergen", "Porto"),
            "style": ("modern", "rustic", "classic", "budget"),
        },
        numbers={"rooms": (10, 400, 10), "rate": (40, 600, 10)},
    ),
)

AGGREGATES = {
    "highest": "MAX",
    "lowest": "MIN",
    "average": "AVG",
    "total": "SUM",
    "maximum": "MAX",
    "minimum": "MIN",
    "mean": "AVG",
}
COMPARISONS = {"above": ">", "below": "<", "over": ">", "under": "<"}

# Form -> (questions, query). `t` is the table and `l` its label column, `n` a number column, `c` a
# class column with value `v`, `a` an aggregate word with function `A`, `w` a comparison word with
# sign `W`, `x` < `y` thresholds, `k` and `h` small counts.
FORMS: dict[str, tuple[tuple[str, ...], str]] = {
    "aggregate": (
        ("{a} {n} of all {t}?", "what is the {a} {n} of the {t}?"),
        "SELECT {A}({n}) FROM {t};",
    ),
    "aggregate_by": (
        ("{a} {n} of {t} for each {c}?", "{a} {n} of {t} per {c}?"),
        "SELECT {c}, {A}({n}) FROM {t} GROUP BY {c};",
    ),
    "aggregate_where": (
        ("{a} {n} of {t} with {c} {v}?", "what is the {a} {n} of {t} whose {c} is {v}?"),
        "SELECT {A}({n}) FROM {t} WHERE {c} = '{v}';",
    ),
    "count_by": (
        ("how many {t} for each {c}?", "number of {t} per {c}?"),
        "SELECT {c}, COUNT(*) FROM {t} GROUP BY {c};",
    ),
    "count_class": (
        ("how many {t} have {c} {v}?", "number of {t} whose {c} is {v}?"),
        "SELECT COUNT(*) FROM {t} WHERE {c} = '{v}';",
    ),
    "count_number": (
        ("how many {t} have {n} {w} {x}?", "number of {t} with {n} {w} {x}?"),
        "SELECT COUNT(*) FROM {t} WHERE {n} {W} {x};",
    ),
    "list_class": (
        ("which {t} have {c} {v}?", "list the {t} whose {c} is {v}."),
        "SELECT {l} FROM {t} WHERE {c} = '{v}';",
    ),
    "list_number": (
        ("which {t} have {n} {w} {x}?", "list the {t} with {n} {w} {x}."),
        "SELECT {l} FROM {t} WHERE {n} {W} {x};",
    ),
    "list_both": (
        ("which {t} with {c} {v} have {n} {w} {x}?", "list {c} {v} {t} with {n} {w} {x}."),
        "SELECT {l} FROM {t} WHERE {c} = '{v}' AND {n} {W} {x};",
    ),
    "list_between": (
        ("which {t} have {n} between {x} and {y}?", "list the {t} with {n} from {x} to {y}."),
        "SELECT {l} FROM {t} WHERE {n} BETWEEN {x} AND {y};",
    ),
    "top": (
        ("top {k} {t} by {n}?", "the {k} {t} with the highest {n}?"),
        "SELECT {l} FROM {t} ORDER BY {n} DESC LIMIT {k};",
    ),
    "having": (
        ("which {c} has more than {h} {t}?", "every {c} with over {h} {t}?"),
        "SELECT {c} FROM {t} GROUP BY {c} HAVING COUNT(*) > {h};",
    ),
}


def table_rows(table: Table, seed: int) -> list[tuple[str | int, ...]]:
    """Rows for `table`: label, classes, numbers. Numbers are distinct where the range allows it."""
    rng = random.Random(f"{seed}/{table.name}")
    columns: list[list[str | int]] = [[f"{table.label}-{i:02d}" for i in range(ROWS_PER_TABLE)]]
    for values in table.classes.values():
        # Unequal class sizes, so that counts differ from class to class.
        weights = [2.0 + i for i in range(len(values))]
        rng.shuffle(weights)
        columns.append(list(rng.choices(values, weights, k=ROWS_PER_TABLE)))
    for low, high, step in table.numbers.values():
        grid = range(low, high + 1, step)
        if len(grid) >= ROWS_PER_TABLE:
            columns.append(list(rng.sample(grid, ROWS_PER_TABLE)))
        else:
            columns.append(list(rng.choices(grid, k=ROWS_PER_TABLE)))
    return list(zip(*columns, strict=True))


@contextlib.contextmanager
def filled_database(seed: int = 0) -> Iterator[sqlite3.Connection]:
    """An in-memory sqlite with all tables filled, in which afterwards only reading is allowed."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        for table in TABLES:
            columns = [table.label, *table.classes, *table.numbers]
            connection.execute(f"CREATE TABLE {table.name} ({', '.join(columns)})")
            marks = ", ".join("?" * len(columns))
            connection.executemany(
                f"INSERT INTO {table.name} VALUES ({marks})", table_rows(table, seed)
            )
        connection.commit()
        # Answers come from a language model: they may read, and nothing else, and not for long.
        reading = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
        connection.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_OK if action in reading else sqlite3.SQLITE_DENY
        )
        connection.set_progress_handler(lambda: 1, 1_000_000)
        yield connection


def _questions(table: Table, form: str, rng: random.Random, count: int) -> Iterator[Item]:
    phrasings, query = FORMS[form]
    rows = table_rows(table, 0)
    columns = [table.label, *table.classes, *table.numbers]
    for _ in range(count):
        n = rng.choice(list(table.numbers))
        c = rng.choice(list(table.classes))
        values = sorted(row[columns.index(n)] for row in rows)
        # Thresholds between the 15th and the 85th percentile: never no row, never every row.
        x, y = sorted(rng.sample(values[9:51], 2))
        a = rng.choice(list(AGGREGATES))
        w = rng.choice(list(COMPARISONS))
        slots = {
            "t": table.name,
            "l": table.label,
            "n": n,
            "c": c,
            "v": rng.choice(table.classes[c]),
            "a": a,
            "A": AGGREGATES[a],
            "w": w,
            "W": COMPARISONS[w],
            "x": x,
            "y": y,
            "k": rng.randint(2, 9),
            "h": rng.randint(8, 18),
        }
        yield Item(
            text=rng.choice(phrasings).format(**slots),
            answer=query.format(**slots),
            key=f"{table.name}/{form}",
        )


def heldout_pairs(seed: int) -> set[tuple[str, str]]:
    """(table, form) pairs to hold out: HELDOUT_FRACTION of them, at most 3 of any form or table."""
    rng = random.Random(seed)
    pairs = [(table.name, form) for table in TABLES for form in FORMS]
    rng.shuffle(pairs)
    chosen: set[tuple[str, str]] = set()
    for table, form in pairs:
        if len(chosen) >= round(HELDOUT_FRACTION * len(pairs)):
            break
        if max(sum(t == table for t, _ in chosen), sum(f == form for _, f in chosen)) < 3:
            chosen.add((table, form))
    return chosen


def build(seed: int) -> Split:
    """Build the split: about 2,400 training and 300 held-out questions."""
    rng = random.Random(seed)
    heldout_by = heldout_pairs(seed)
    train: list[Item] = []
    heldout: list[Item] = []
    with filled_database() as connection:
        for table in TABLES:
            for form in FORMS:
                side = heldout if (table.name, form) in heldout_by else train
                unique = {item.text: item for item in _questions(table, form, rng, 60)}
                side += [i for i in unique.values() if connection.execute(i.answer).fetchall()]
    return make_split(train, heldout, WORDINGS, HELDOUT_WORDINGS, seed)


def score(answer: str, example: Example) -> float:
    """1.0 if the answer returns the rows of the reference query, else 0.0.

    The order of rows counts only where the reference has ORDER BY; column names never count.
    """
    query = answer.strip().removeprefix("```sql").removeprefix("```").removesuffix("```").strip()
    with filled_database() as connection:
        expected = connection.execute(example.answer).fetchall()
        try:
            found = connection.execute(query).fetchall()
        except (sqlite3.Error, sqlite3.Warning, ValueError, UnicodeEncodeError):
            return 0.0
    if "ORDER BY" not in example.answer:
        expected, found = sorted(expected, key=repr), sorted(found, key=repr)
    return float(found == expected)


SQL = Task(
    name="sql",
    title="Question to SQL",
    licence="Apache-2.0 (this project's own)",
    licence_id="apache-2.0",
    source=(
        "Generated by `spectr_demo/evaluation/tasks/sql.py`: twelve forms of query, eight tables"
    ),
    split_unit="pair of table and query form",
    limits="It knows eight tables by heart and is not given a schema, so it cannot query others.",
    wordings=WORDINGS,
    heldout_wordings=HELDOUT_WORDINGS,
    build=build,
    score=score,
    metric="same rows in sqlite",
    max_new_tokens=48,
)
