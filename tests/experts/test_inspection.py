"""Inspection: overlaps of all pairs at once, and warnings about experts that will not work."""

import numpy as np
import pytest

from spectr_demo.experts import inspection
from spectr_demo.experts.inspection import overlap_of, overlaps, to_json
from spectr_demo.routing.spectr import subspace_overlap
from tests.conftest import BuildModel, SaveExpert


def test_overlaps_are_the_mean_of_each_layers(
    build_model: BuildModel, expert_folders: list[str], save_expert: SaveExpert
) -> None:
    small = save_expert("small", seed=7, r=2, target_modules=["q_proj"])
    library = build_model([*expert_folders, small]).library
    matrix = overlaps(library)
    for i, one in enumerate(library.aligned):
        for j, other in enumerate(library.aligned):
            layers = [subspace_overlap(one[p].A, other[p].A) for p in one if p in other]
            assert matrix[i, j] == pytest.approx(np.mean(layers), abs=1e-5)
        np.testing.assert_allclose(overlap_of(library, i), matrix[i], atol=1e-5)


def test_experts_without_a_shared_layer_have_no_overlap(
    build_model: BuildModel, save_expert: SaveExpert
) -> None:
    folders = [save_expert(name, target_modules=[name]) for name in ("q_proj", "v_proj")]
    library = build_model(folders).library
    result = to_json(library)
    assert result["subspace_overlap"]["q_proj"]["v_proj"] is None
    assert np.isnan(overlap_of(library, 0)[1])
    assert result["warnings"] == []


def test_sound_experts_give_no_warning(build_model: BuildModel, expert_folders: list[str]) -> None:
    assert inspection.warnings(build_model(expert_folders).library) == []


def test_twins_are_named(
    build_model: BuildModel, expert_folders: list[str], save_expert: SaveExpert
) -> None:
    twin = save_expert("twin", seed=0)  # the seed of red
    (warning,) = inspection.warnings(build_model([*expert_folders, twin]).library)
    assert "'red' and 'twin'" in warning
    assert "1.00" in warning


def test_a_weak_expert_is_named(
    build_model: BuildModel, expert_folders: list[str], save_expert: SaveExpert
) -> None:
    weak = save_expert("weak", seed=9, size=0.05)
    (warning,) = inspection.warnings(build_model([*expert_folders, weak]).library)
    assert "'weak'" in warning
    assert "undertrained" in warning


def test_an_empty_library_has_nothing_to_say(build_model: BuildModel) -> None:
    assert inspection.warnings(build_model([]).library) == []
