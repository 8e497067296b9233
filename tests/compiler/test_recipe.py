"""Recipes: the short form, the file form, what is refused and with which suggestion."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from dcompile.compiler.errors import RecipeError
from dcompile.compiler.recipe import (
    Recipe,
    build_passes,
    options_of,
    parse_passes,
    parse_recipe,
    read_recipe,
)
from dcompile.passes import PASSES, SHORT_NAMES
from dcompile.passes.cache_steps import CacheSteps
from dcompile.passes.fold_timestep import FoldTimestep
from dcompile.passes.prune_layers import PruneLayers
from dcompile.passes.quantize import Quantize


def build(text: str) -> tuple[Any, ...]:
    return build_passes(parse_passes(text), PASSES, SHORT_NAMES)


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        call(*arguments)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ("prune", [("prune", {})]),
        (" prune , cache,,quant ", [("prune", {}), ("cache", {}), ("quant", {})]),
        ("prune:ratio=0.25,method=greedy,cache", [("prune", {"ratio": 0.25, "method": "greedy"}), ("cache", {})]),
        ("cache:interval=3,warmup=1", [("cache", {"interval": 3, "warmup": 1})]),
        ("prune:count=null", [("prune", {"count": None})]),
        ("prune:blocks=[blocks.1, blocks.2],fold", [("prune", {"blocks": ["blocks.1", "blocks.2"]}), ("fold", {})]),
        ("prune,prune:count=1", [("prune", {}), ("prune", {"count": 1})]),
    ],
)
def test_short_form(text: str, steps: list[Any]) -> None:
    assert parse_passes(text) == steps


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ratio=0.25", "starts with the option 'ratio=0.25'; name the pass first, as in prune:ratio=0.25"),
        ("prune:", "'' is no option; write name=value"),
        ("prune:0.25", "'0.25' is no option; write name=value"),
        ("prune:=0.25", "'=0.25' is no option"),
        ("prune:ratio={", "'ratio={' has a value that is no YAML"),
    ],
)
def test_short_form_that_is_none(text: str, words: str) -> None:
    message = refusal(parse_passes, text)
    assert words in message
    assert repr(text) in message


def test_passes_by_short_and_by_full_name_with_their_options() -> None:
    assert build("prune:ratio=0.25,cache:site=branch,quant,fold") == (
        PruneLayers(ratio=0.25),
        CacheSteps(site="branch"),
        Quantize(),
        FoldTimestep(),
    )
    assert build("prune_layers:blocks=[a.1,a.2]") == (PruneLayers(blocks=("a.1", "a.2")),)


def test_every_pass_has_its_name_and_one_short_name() -> None:
    assert {name: cls.name for name, cls in PASSES.items()} == {name: name for name in PASSES}
    assert sorted(SHORT_NAMES.values()) == sorted(PASSES)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prune,chache", "step 2: no pass is called 'chache'; did you mean 'cache'?"),
        ("quantise", "step 1: no pass is called 'quantise'; did you mean 'quantize'?"),
        ("xyzzy", "known: prune, moe, recover, elastic, steps, cache, quant, fold, prune_layers"),
        ("prune:ration=0.1", "step 1 ('prune'): unknown option 'ration'; did you mean 'ratio'?"),
        ("cache,cache:name=x", "step 2 ('cache'): unknown option 'name'"),
        ("prune:ratio=1.5", "step 1: prune_layers: ratio is 1.5, needed 0 to 1"),
        ("prune:ratio=-0.1", "step 1: prune_layers: ratio is -0.1, needed 0 to 1"),
        ("prune:ratio=.nan", "ratio is nan, needed 0 to 1"),
        ("prune:count=-1", "prune_layers: count is -1, needed 0 or more"),
        ("prune:ratio=much", "step 1 ('prune'): ratio is 'much': Input should be a valid number"),
        ("prune:method=random", "step 1 ('prune'): method is 'random': Input should be 'greedy', 'influence', "),
        ("prune:blocks=a.1", "step 1 ('prune'): blocks is 'a.1': Input should be a valid list, as in [a,b]"),
        ("cache:interval=0", "cache_steps: interval is 0, needed 1 or more"),
        ("cache:warmup=0", "cache_steps: warmup is 0, needed 1 or more"),
        ("cache:last=-1", "cache_steps: last is -1, needed 0 or more"),
        ("cache:predictor=guess", "predictor is 'guess': Input should be 'copy', 'delta', 'taylor1', 'taylor2', "),
        ("cache:predictor=delta,site=branch", "predictor 'delta' needs site 'range'"),
        ("quant:max_error=2", "quantize: max_error is 2.0, needed 0 to 1"),
        ("quant:activations=int4", "activations is 'int4': Input should be 'static', 'dynamic' or 'none'"),
    ],
)
def test_pass_or_option_that_is_none(text: str, words: str) -> None:
    assert words in refusal(build, text)


def test_options_of_a_pass_are_complete_and_json() -> None:
    assert options_of(PruneLayers(blocks=("a.1",))) == {
        "ratio": 0.1,
        "count": None,
        "method": "greedy",
        "blocks": ["a.1"],
        "keep": 1,
        "of": 2,
        "steps": 400,
        "batch": 16,
        "seed": 0,
    }
    for cls in PASSES.values():
        options = options_of(cls())
        assert build_passes([(cls.name, json.loads(json.dumps(options)))], PASSES, SHORT_NAMES) == (cls(),)


# ---- files --------------------------------------------------------------------------------------------------------

RECIPE = """\
model: models:dit
target: onnx
passes:
  - prune:ratio=0.25,method=influence
  - cache: {interval: 4, predictor: delta}
  - quant:
  - fold
steps: 20
guidance: 3.5
shape: [4, 8, 8]
gate: psnr>20
"""


def test_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert (recipe.model, recipe.steps, recipe.guidance, recipe.shape) == ("models:dit", 20, 3.5, (4, 8, 8))
    assert (recipe.target, recipe.gate, recipe.calibration_samples) == ("onnx", "psnr>20", 8)
    assert build_passes(recipe.steps_of_passes(), PASSES, SHORT_NAMES) == (
        PruneLayers(ratio=0.25, method="influence"),
        CacheSteps(interval=4, predictor="delta"),
        Quantize(),
        FoldTimestep(),
    )


def test_passes_on_one_line() -> None:
    assert parse_recipe({"passes": "prune,cache:interval=2"}, "r").steps_of_passes() == [
        ("prune", {}),
        ("cache", {"interval": 2}),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pases: [prune]\n", "unknown key 'pases'; did you mean 'passes'?"),
        ("passes: 3\n", "passes: "),
        ("passes: [3]\n", "passes.0"),
        ("steps: 0\n", "steps: Input should be greater than or equal to 1"),
        ("calibration_samples: 65\n", "calibration_samples: Input should be less than or equal to 64"),
        ("guidance: strong\n", "guidance: Input should be a valid number"),
        ("- prune\n", "needs a mapping such as `passes: [prune, cache, quant]`; found list"),
        ("", "found NoneType"),
        ("passes: [prune\n", "cannot be read (line 2, column 1"),
    ],
)
def test_file_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    message = refusal(read_recipe, path)
    assert message.startswith(f"recipe {path}: ")
    assert words in message


def test_missing_file(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refusal(read_recipe, tmp_path / "none.yaml")


def test_a_step_of_a_file_names_one_pass() -> None:
    recipe = Recipe(passes=({"prune": {}, "cache": {}},))
    assert "a step names one pass, found prune, cache; write one list item for each" in refusal(recipe.steps_of_passes)
