"""Patterns of layers' names: what PEFT's own functions say, in bounded time."""

import random
import time
from collections import deque
from contextlib import suppress

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from spectr_demo.experts.patterns import (
    Clock,
    Expression,
    PatternError,
    Targets,
    Values,
    check_expression,
    is_plain,
    of_value,
)

NAMES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 11)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.experts.2.w1")
] + ["lm_head", "layersX1"]
PARTS = ["q_proj", "layers", ".", "1", r"\.", ".*", "[qv]", "(up|q)_proj", "self_attn", "^", "$"]


@pytest.mark.parametrize("seed", range(20))
def test_the_first_pattern_that_matches_is_that_of_peft(seed: int) -> None:
    chosen = random.Random(seed)
    patterns = {"".join(chosen.choices(PARTS, k=chosen.randint(1, 4))): i for i in range(12)}
    patterns |= dict.fromkeys(chosen.choices(["layers.1", "layers.1.mlp.up_proj", *NAMES], k=3), 99)
    values = Values(patterns, Clock())
    found = {name: values.of([name], -1) for name in NAMES}
    assert found == {
        name: patterns.get(get_pattern_key(list(patterns), name), -1) for name in NAMES
    }


def test_a_dot_is_any_character_and_the_first_of_several_names_counts() -> None:
    values = Values({"layers.1": "dot", "w1": "name"}, Clock())
    assert values.of(["layersX1"], "none") == "dot"
    assert values.of(["model.layers.1.w2", "w1"], "none") == "name"
    assert values.of(["model.layers.1.w2"], "none") == "none"


TARGETS = [
    {"target_modules": ["q_proj", "up_proj"]},
    {"target_modules": ["q_proj", "w1"], "layers_to_transform": [1, 2]},
    {"target_modules": ["q_proj", NAMES[0]], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["w1"], "layers_to_transform": [2], "layers_pattern": ["blocks", "experts"]},
    {"target_modules": ["w1"], "layers_to_transform": []},
    {"target_modules": r".*\.1\..*_proj"},
    {"target_modules": r".*", "exclude_modules": r".*\.mlp\..*"},
    {"target_modules": ["q_proj", "w1"], "exclude_modules": ["experts.2.w1"]},
    {"target_modules": r"^(?!.*mlp).*(q|v)_proj$"},
]


@pytest.mark.parametrize("settings", TARGETS)
def test_the_layers_are_those_of_peft(settings: dict[str, object]) -> None:
    config = LoraConfig(**settings)
    layers, places = config.layers_to_transform, config.layers_pattern
    targets = Targets(
        config.target_modules,
        config.exclude_modules or [],
        [layers] if isinstance(layers, int) else layers or [],
        [places] if isinstance(places, str) else places or [],
        Clock(),
    )
    expected = [name for name in NAMES if check_target_module_exists(config, name)]
    assert [name for name in NAMES if targets.has(name)] == expected
    assert 0 < len(expected) < len(NAMES)


@pytest.mark.filterwarnings("ignore:Possible nested set")
@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "a{99999999999}",
        "(" * 900 + ")" * 900,
        "(?:(?:(?:a{1000}){1000}){1000}){1000}",
        "(?:a{110}){1000}",
        "(?i)" + "[a-\uffff]" * 300,
        r"(?i)[a-\uffff]",
        "(?:q_prjo){e<=1}",
        "[[:alpha:]]",
        "x" * 20_001 + "+",
    ],
)
def test_what_is_no_expression_or_a_large_one_is_refused_at_once(pattern: str) -> None:
    begin = time.thread_time()
    with pytest.raises(PatternError):
        check_expression(of_value(pattern), pattern, Clock())
    assert time.thread_time() - begin < 0.5


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.\d+\.(self_attn|mlp)\..*_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj))|(?:\bmodel\.layers\.[\d]{1,}\.)",
        r"^(?!.*vision).*(?:q_proj|v_proj)$",
        r"layers\.\d{1,2}\.",
        r"(?i:Q_PROJ)",
        r"q_proj\{",
        "|".join(rf"model\.layers\.{i}\.mlp\.up_proj" for i in range(500)),
    ],
)
def test_expressions_that_people_write_are_taken(pattern: str) -> None:
    check_expression(of_value(pattern), pattern, Clock())


SLOW = [
    r"(([a-z_.0-9])+)+#",
    r"(([a-z_.0-9])+)+(?!.)(?!x|$)y",
    r"(a|a|b|[a-z_.0-9])*(?<=[#])",
    r"(?:(?:.*.*.*.*.*.*)(?=[#]))",
]


@pytest.mark.parametrize("pattern", SLOW)
def test_an_expression_that_takes_for_ever_ends(pattern: str) -> None:
    names, begin = [name * 8 for name in NAMES], time.thread_time()
    values = Values({pattern: 1}, Clock(seconds=0.3))
    with suppress(PatternError):
        assert {values.of([name], 0) for name in names} == {0}
    assert time.thread_time() - begin < 1


def test_the_time_is_that_of_all_expressions_together() -> None:
    with pytest.raises(PatternError, match="take too long; name the layers instead"):
        Expression("a", Clock(seconds=-1))
    clock = Clock(seconds=0.2)
    slow = Expression(r"(?:(?:a|b|ab)*)*(?<=[#])$|(a+|b+)*c\1[#]", clock)
    with pytest.raises(PatternError, match="take too long; name the layers instead"):
        deque((slow.match("ab" * 200) for _ in range(10_000)), maxlen=0)


@pytest.mark.parametrize("escape", [False, True])
def test_thousands_of_honest_patterns_take_a_moment(escape: bool) -> None:
    names = [f"model.layers.{layer}.mlp.{part}_proj" for layer in range(126) for part in "abcdefg"]
    patterns = {
        "^" + name.replace(".", r"\.") if escape else name: i for i, name in enumerate(names)
    }
    assert is_plain(next(iter(patterns))) != escape
    begin = time.thread_time()
    values = Values(patterns, Clock())
    assert [values.of([name], -1) for name in names] == list(range(len(names)))
    assert time.thread_time() - begin < 3


def test_a_number_that_is_in_a_part_that_did_not_match_is_none() -> None:
    config = LoraConfig(target_modules=["w1"], layers_to_transform=[1], layers_pattern=".*|x")
    targets = Targets(["w1"], [], [1], [".*|x"], Clock())
    assert [name for name in NAMES if targets.has(name)] == [
        name for name in NAMES if check_target_module_exists(config, name)
    ]
