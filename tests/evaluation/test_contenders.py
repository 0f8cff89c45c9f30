"""The rows of the tables."""

from spectr_demo.config import RouterConfig
from spectr_demo.evaluation.contenders import CONTENDERS, QUICK, Contender


def test_quick_takes_known_labels() -> None:
    assert set(QUICK) <= {contender.label for contender in CONTENDERS}


def test_own_is_the_expert_of_the_prompts_domain() -> None:
    oracle = Contender(label="oracle", router="single:{own}")
    names = ("sql", "chords")
    assert [oracle.config(own, names).expert for own in names] == ["sql", "chords"]
    config = RouterConfig(name="uniform", composition="parameters")
    assert Contender(label="x", router=config).config("sql", names) == config
