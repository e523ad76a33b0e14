"""Settings: unknown names, wrong values, and all mistakes at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fitune.core.config import build, merge, parse_assignments, read_yaml
from fitune.core.errors import ConfigError, Problems

pytestmark = pytest.mark.unit


def test_defaults_and_nested_values() -> None:
    config = build({"model": "m", "data": ["d"], "lora": {"rank": 4}})
    assert (config.lora.rank, config.lora.alpha, config.method) == (4, 16.0, "lora")


def test_an_unknown_setting_says_what_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'lora.rnak'\n  fix:      did you mean 'rank'\?"):
        build({"model": "m", "data": ["d"], "lora": {"rnak": 4}})


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(Problems) as caught:
        build({"data": ["d"], "bathc_size": 3, "lr": -1, "max_length": "long"})
    text = str(caught.value)
    assert text.startswith("4 problems:")
    for part in (
        "model is missing",
        "did you mean 'batch_size'?",
        "lr: wrong value",
        "max_length: wrong value",
        "'auto'",
    ):
        assert part in text


def test_assignments_are_read_as_yaml_and_nest() -> None:
    assert parse_assignments(["lora.rank=16", "lr=1e-4", "lora.targets=[q_proj, v_proj]"]) == {
        "lora": {"rank": 16, "targets": ["q_proj", "v_proj"]},
        "lr": 1e-4,
    }
    with pytest.raises(ConfigError, match="key=value"):
        parse_assignments(["seed"])


def test_later_values_win_group_by_group() -> None:
    assert merge({"lora": {"rank": 8, "alpha": 1}}, {"lora": {"rank": 4}}) == {"lora": {"rank": 4, "alpha": 1}}


def test_a_yaml_file_must_hold_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="a mapping of settings"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "b.yaml")


def test_a_file_that_is_read_twice_gives_settings_of_ones_own(tmp_path: Path) -> None:
    """It is parsed once; what a caller does to the values, the next one does not meet. A changed file is read anew."""
    path = tmp_path / "a.yaml"
    path.write_text("lora: {targets: [q_proj]}\n")
    first = read_yaml(path)
    first["lora"]["targets"].append("v_proj")
    assert read_yaml(path) == {"lora": {"targets": ["q_proj"]}}
    path.write_text("lora: {targets: [k_proj]}\n")
    assert read_yaml(path) == {"lora": {"targets": ["k_proj"]}}
