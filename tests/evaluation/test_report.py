"""The report is made of the results' numbers."""

from dataclasses import replace

from spectr_demo.evaluation.evaluate import Evaluation
from spectr_demo.evaluation.report import scores_table
from tests.conftest import BuildModel
from tests.evaluation.conftest import SETTINGS


def test_a_table_has_one_row_for_each_router(build_engine: BuildModel) -> None:
    settings = replace(SETTINGS, labels=("base", "oracle"))
    table = scores_table(Evaluation(build_engine(), settings).run())
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 4
