"""A finished run's LoRAs drawn in a grid, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lora_trainer.cli import main
from lora_trainer.comparison.drawing import comparisons, draw
from lora_trainer.comparison.plan import MOST_STEPS, Wish, make_plan
from lora_trainer.comparison.runs import find_run, saved_loras
from lora_trainer.config import from_mapping
from lora_trainer.errors import UserError
from lora_trainer.host.base import LenderOptions
from lora_trainer.models.base import ModelInfo
from tests.jobs.fakes import FakeHost
from tests.pictures import draw_dataset

PROMPTS = ["a [trigger] disc --s 2 --l 2", "a blue disc --s 2 --w 96"]
INFO = ModelInfo("sd1", "epsilon", "tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base):
    """A run's output folder: saved at steps 4 and 8, with previews there and before the first."""
    folder = tmp_path_factory.mktemp("run")
    values = {
        "train_data_dir": str(draw_dataset(folder / "data")),
        "base_model": str(tiny_base),
        "output_dir": str(folder / "out"),
        "output_name": "disc",
        "trigger_word": "zwx",
        "resolution": 64,
        "lora_rank": 2,
        "max_train_steps": 8,
        "save_steps": 4,
        "learning_rate": 3e-2,
        "preview_prompts": PROMPTS,
        "tensorboard": False,
        "export_diffusers": False,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(folder / "run.yaml")]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def compared(run):
    assert main(["compare", str(run), "--weights", "0.5,1"]) == 0
    return run / "compare" / "0001"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_each_cell_is_what_the_run_itself_drew_at_that_step(run, compared):
    """The base, and the LoRA read back from its file at weight 1, with the noise of the previews."""
    for index in range(2):
        for step, cell in ((0, "base"), (4, "step00000004-weight1"), (8, "step00000008-weight1")):
            preview = pixels(run / "previews" / f"disc-step{step:08d}-{index}.png")
            drawn = pixels(compared / "cells" / f"{cell}-prompt{index}.png")
            assert preview.shape == drawn.shape and np.abs(preview - drawn).max() <= 2
        whole, half = (
            pixels(compared / "cells" / f"step00000008-weight{weight}-prompt{index}.png") for weight in ("1", "0.5")
        )
        assert np.abs(whole - half).max() > 5


def test_the_grid_has_the_base_first_then_every_step_and_a_row_for_each_weight(run, compared):
    (facts,) = comparisons(run)
    assert facts["steps"] == [4, 8] and facts["weights"] == [0.5, 1] and facts["complete"]
    assert [one["text"] for one in facts["prompts"]] == PROMPTS
    order = [(one["prompt"], one["step"], one["weight"]) for one in facts["cells"]]
    of_one = [(None, None), (4, 0.5), (4, 1), (8, 0.5), (8, 1)]
    assert order == [(index, *rest) for index in range(2) for rest in of_one]
    for one in facts["cells"]:
        assert (run / facts["folder"] / one["file"]).is_file()
    grid = Image.open(run / facts["folder"] / facts["grid"])
    base = Image.open(compared / "cells" / "base-prompt0.png").convert("RGB")
    # The first cell stands left of the others, in both rows; text is above and beside it.
    where = [
        (x, y) for y in range(grid.height - 64) for x in (grid.width - 3 * 100,)
        if np.array_equal(np.asarray(grid.crop((x, y, x + 64, y + 64))), np.asarray(base))
    ]  # fmt: skip
    assert len(where) == 2
    dark = np.asarray(grid.convert("L"))[: where[0][1]] < 100
    assert dark.any(axis=0)[where[0][0] :].any(), "the columns have their labels above them"


@pytest.mark.parametrize(
    ("arguments", "field", "words"),
    [
        (["--weights", "0.5,much"], "weights", "'much' is no number"),
        (["--weights", "0"], "weights", "no weight to compare"),
        (["--weights", "nan"], "weights", "no weight to compare"),
        (["--steps", "4,5"], "steps", "No LoRA of step 5"),
        (["--prompts", " "], "prompts", "no prompt"),
        (["--prompts", "a cat --q 3"], "prompts", "--q"),
        (["--weights", ",".join(str(1 + n / 100) for n in range(200))], "steps", "at most 400"),
    ],
)
def test_bad_input_is_one_sentence_with_its_field(run, capsys, arguments, field, words):
    assert main(["compare", str(run), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {field}: ") and words in said and said.count("\n") == 1


def test_a_run_is_found_by_its_folder_its_jobs_folder_and_its_settings(run, tmp_path):
    for path in (run, run / "disc.config.yaml"):
        assert find_run(path)[0] == run
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "output").symlink_to(run)
    assert find_run(tmp_path / "job")[1].output_name == "disc"
    with pytest.raises(UserError, match="no run") as error:
        find_run(tmp_path)
    assert error.value.field == "run"
    assert list(saved_loras(run, "disc")) == [4, 8] and saved_loras(run, "dis") == {}


class Host(FakeHost):
    """Says how many pictures it was asked for, and fails at one of them."""

    fails_at = None

    def draw(self, request):
        if len(self.requests) == self.fails_at:
            raise UserError("The preview was interrupted in the WebUI.")
        return super().draw(request)


def plan_of(steps, tmp_path, wish, **values):
    config = from_mapping({"resolution": 64, "output_name": "cat", **values})
    return make_plan(config, {step: tmp_path / f"{step}.safetensors" for step in steps}, INFO, wish)


def test_stopped_it_shows_what_was_drawn_and_says_so(tmp_path):
    host, told = Host(tmp_path), []
    plan = plan_of([5], tmp_path, Wish(prompts=["a cat"]))

    def progress(done, total):
        told.append((done, total))

    draw(host, plan, tmp_path, LenderOptions(), on_progress=progress, stopped=lambda: len(host.requests) == 2)
    (facts,) = comparisons(tmp_path)
    assert told == [(0, 4), (1, 4), (2, 4)] and len(facts["cells"]) == 2 and not facts["complete"]
    assert draw(host, plan, tmp_path, LenderOptions(), stopped=lambda: True) is None
    assert len(comparisons(tmp_path)) == 1


def test_a_failure_keeps_what_was_drawn_before(tmp_path):
    host = Host(tmp_path)
    host.fails_at = 1
    with pytest.raises(UserError, match="interrupted"):
        draw(host, plan_of([5], tmp_path, Wish(prompts=["猫"])), tmp_path, LenderOptions())
    (facts,) = comparisons(tmp_path)
    assert [one["step"] for one in facts["cells"]] == [None] and not list(tmp_path.rglob(".*"))
    assert json.loads((tmp_path / "compare" / "0001" / "compare.json").read_text(encoding="utf-8"))["name"] == "cat"


def test_of_many_steps_a_few_are_chosen_with_the_last_and_the_recommended(tmp_path):
    config = from_mapping({"resolution": 64, "output_name": "cat", "trigger_word": "zwx"})
    loras = {step: tmp_path / f"{step}" for step in range(10, 510, 10)}
    plan = make_plan(config, loras, INFO, Wish(), recommended=130)
    assert len(plan.steps) == MOST_STEPS and {130, 500} < set(plan.steps) and plan.steps == tuple(sorted(plan.steps))
    assert plan.prompts == ("zwx",), "without a preview prompt it is the word that was taught"
    assert plan.cells[0].request.lora is None
