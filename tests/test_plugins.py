"""One plug-in of each kind, from files and from entry points; what is refused, and what their code decides on."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest
import torch

from lora_trainer import plugins
from lora_trainer.captioning.base import Settings
from lora_trainer.captioning.registry import Sources, open_captioner
from lora_trainer.config import from_mapping, load, to_yaml
from lora_trainer.errors import ConfigError, UserError
from lora_trainer.jobs.submitting import check_settings
from lora_trainer.models.families import get_family
from lora_trainer.training.optim import create_optimizer, create_scheduler
from tests.jobs.fakes import FakeHost
from tests.training.fakes import FakeModel, Run, configuration, same


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    """Each test begins without plug-ins, and leaves none."""
    monkeypatch.setattr(plugins, "_registered", {})
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setattr(plugins, "_configured", False)
    monkeypatch.setattr(plugins, "_entry_points", list)
    monkeypatch.delenv(plugins.VARIABLE, raising=False)


def write(path: Path, code: str) -> Path:
    path.write_text("from lora_trainer.plugins import register\n" + textwrap.dedent(code))
    return path


OPTIMIZER = """
import torch

@register("optimizer", "signs")
class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr, strength=1.0):
        super().__init__(params, {"lr": lr, "strength": strength})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"] * group["strength"])
"""
SCHEDULER = """
@register("scheduler", "halves")
def halves(step, total_steps, config):
    return 0.5 ** (step // max(1, config.lr_warmup_steps))
"""
LOSS = """
@register("loss", "absolute")
def absolute(difference, c):
    return difference.abs()
"""
AUGMENTATION = """
from PIL import Image, ImageEnhance

@register("augmentation", "brightness")
def brightness(image, random):
    return ImageEnhance.Brightness(image).enhance(random.uniform(0.5, 1.5))
"""
REGULARISER = """
@register("regulariser", "small")
def small(adapters):
    return sum(adapter.delta_weight().square().sum() for _, adapter in adapters.items())
"""
CAPTIONER = """
from lora_trainer.captioning.base import Description, Kind, Weights

class Sizes:
    def describe(self, images):
        return [Description(sentence=f"a picture of {image.width} by {image.height}") for image in images]

    def close(self):
        pass

register("captioner", "sizes", Kind("sizes", "Sizes", Weights("none", (), "0"), lambda folder, settings: Sizes()))
"""
FAMILY = """
from lora_trainer.models.families.sd import SD1

class Twin(SD1):
    name, title = "twin", "Twin"

    def claims(self, shapes):
        return "twin" in shapes

register("family", "twin", Twin())
"""


def test_an_optimizer_with_its_arguments(tmp_path):
    plugins.load([write(tmp_path / "o.py", OPTIMIZER)])
    config = from_mapping({"optimizer": "signs", "learning_rate": 0.5, "optimizer_args": {"strength": 2.0}})
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = create_optimizer(config, [{"params": [weight], "lr": 0.5, "name": "unet"}])
    weight.grad = torch.tensor([3.0, -0.1, 0.0])
    optimizer.step()
    assert weight.tolist() == [-1.0, 1.0, 0.0]
    with pytest.raises(UserError, match="has no argument 'strenght'"):
        create_optimizer(dataclasses.replace(config, optimizer_args={"strenght": 1.0}), [])


def test_a_scheduler_is_a_function_of_the_step(tmp_path):
    plugins.load([write(tmp_path / "s.py", SCHEDULER)])
    config = from_mapping({"lr_scheduler": "halves", "learning_rate": 1.0, "lr_warmup_steps": 2})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = create_scheduler(config, optimizer, 10)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.25]


def trained(folder: Path, **settings) -> Run:
    run = Run(configuration(folder, epochs=1, **settings))
    run.trainer.run()
    return run


def test_a_loss_is_what_is_learned(tmp_path):
    plugins.load([write(tmp_path / "l.py", LOSS)])
    config = from_mapping({"loss": "absolute"})
    assert config.loss == "absolute"
    model, losses = FakeModel(), {}
    for name in ("mse", "absolute"):
        run = Run(configuration(tmp_path, loss=name, dropout=0.0), model=model)
        objective = run.trainer.train_step.objective
        drawn = objective.draw(run.source.micro_batches(0, 0)[0], torch.Generator().manual_seed(0))
        with torch.no_grad():
            losses[name] = objective.loss(objective.inputs(drawn)).item() / drawn.count
    assert losses["absolute"] > 0 and losses["absolute"] <= losses["mse"] ** 0.5 and losses["absolute"] != losses["mse"]


def test_an_augmentation_changes_every_visit_alike_on_every_run(tmp_path):
    plugins.load([write(tmp_path / "a.py", AUGMENTATION)])
    run = Run(configuration(tmp_path, augmentations=["brightness"], latent_sampling="mean"))
    plain = Run(configuration(tmp_path, latent_sampling="mean"))

    def moments(run: Run, epoch: int) -> torch.Tensor:
        assert run.source.prepare_epoch(epoch, run.turns, run.recorder, run.commands)
        batches = [batch for position in range(2) for batch in run.source.micro_batches(epoch, position)]
        return torch.cat([batch.moments.mean((2, 3)) for batch in batches if batch.moments.shape[-1] == 8])

    first, second = moments(run, 0), moments(run, 1)
    assert not torch.allclose(first.sort(0)[0], second.sort(0)[0])
    assert not torch.allclose(first, moments(plain, 0))
    again = Run(configuration(tmp_path, augmentations=["brightness"], latent_sampling="mean"))
    assert torch.equal(moments(again, 0), first)
    # Other code, other latents: the cache knows it by its fingerprint.
    before = set(Path(run.config.output_dir).rglob("*.cache"))
    plugins.load([write(tmp_path / "a.py", AUGMENTATION.replace("0.5, 1.5", "0.4, 0.4"))])
    darker = moments(Run(configuration(tmp_path, augmentations=["brightness"], latent_sampling="mean")), 0)
    assert darker[:, :3].mean() < first[:, :3].mean() and set(Path(run.config.output_dir).rglob("*.cache")) > before


def test_a_regulariser_pulls_the_weights(tmp_path):
    plugins.load([write(tmp_path / "r.py", REGULARISER)])
    free = trained(tmp_path / "free")
    held = trained(tmp_path / "held", regularisers={"small": 100.0})
    none = trained(tmp_path / "none", regularisers={"small": 0.0})

    def size(run: Run) -> float:
        return sum(adapter.delta_weight().square().sum().item() for _, adapter in run.adapters.items())

    assert size(held) < size(free) and same(none.final, free.final)


def test_a_captioner_can_be_chosen(tmp_path):
    from PIL import Image

    plugins.load([write(tmp_path / "c.py", CAPTIONER)])
    sources = Sources(folders=[tmp_path])
    captioner = open_captioner("sizes", Settings(), sources)
    assert captioner.describe([Image.new("RGB", (8, 4))])[0].sentence == "a picture of 8 by 4"
    with pytest.raises(UserError, match=r"no captioner 'seizes'.*sizes"):
        open_captioner("seizes", Settings(), sources)


def test_a_family_is_asked_first(tmp_path):
    plugins.load([write(tmp_path / "f.py", FAMILY)])
    assert get_family("twin").title == "Twin"
    from lora_trainer.models.families import claiming

    assert claiming({"twin": (1,)}).name == "twin"


def test_entry_points(tmp_path, monkeypatch):
    (tmp_path / "installed_plugin.py").write_text(
        "from lora_trainer.plugins import register\n\n"
        "def setup():\n    register('loss', 'zero', lambda difference, c: difference * 0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = metadata.EntryPoint("any", "installed_plugin:setup", plugins.GROUP)
    monkeypatch.setattr(plugins, "_entry_points", lambda: [point])
    assert from_mapping({"loss": "zero"}).loss == "zero" and plugins.names("loss") == ["zero"]
    assert plugins.fingerprint("loss", "zero")
    sys.modules.pop("installed_plugin")


@pytest.mark.parametrize("entry", ["pack13:setup", "pack13.main:setup", "space13.pack13.main"])
def test_every_module_of_an_installed_package_counts(tmp_path, monkeypatch, entry):
    package = tmp_path / "space13" / "pack13" if entry.startswith("space13") else tmp_path / "pack13"
    (package / "losses").mkdir(parents=True)
    for name in ("__init__.py", "main.py", "losses/__init__.py"):
        write(package / name, "")
    monkeypatch.syspath_prepend(tmp_path)
    point = metadata.EntryPoint("any", entry, plugins.GROUP)
    before = plugins._code_of(point)
    write(package / "losses" / "__init__.py", "SCALE = 2\n")
    assert plugins._code_of(point) != before and "pack13" not in sys.modules
    sys.modules.pop("space13", None)


def test_a_broken_installed_package_is_named(monkeypatch):
    point = metadata.EntryPoint("any", "no_such_module:setup", plugins.GROUP)
    monkeypatch.setattr(plugins, "_entry_points", lambda: [point])
    with pytest.raises(UserError, match="no_such_module") as caught:
        from_mapping({"loss": "zero"})
    assert caught.value.field == "plugins"


def test_the_yaml_file_names_its_plugins(tmp_path):
    path = write(tmp_path / "l.py", LOSS)
    settings = tmp_path / "run.yaml"
    settings.write_text(f"plugins: [{path}]\nloss: absolute\n")
    config = load(settings)
    assert config.loss == "absolute" and config.plugins == [str(path)]
    assert "absolute" in to_yaml(config)


def test_the_environment_names_plugins(tmp_path, monkeypatch):
    monkeypatch.setenv(plugins.VARIABLE, str(write(tmp_path / "l.py", LOSS)))
    assert from_mapping({"loss": "absolute"}).loss == "absolute"


def test_a_folder_is_a_plugin_and_all_its_files_count(tmp_path):
    folder = tmp_path / "pack"
    folder.mkdir()
    write(folder / "__init__.py", "from . import more\n")
    write(folder / "more.py", LOSS)
    plugins.load([folder])
    mark = plugins.fingerprint("loss", "absolute")
    write(folder / "more.py", LOSS.replace("abs()", "square()"))
    plugins.load([folder])
    assert plugins.fingerprint("loss", "absolute") != mark
    assert plugins.get("loss", "absolute")(torch.tensor(-3.0), None) == 9


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def (", "SyntaxError"),
        ("\n\nraise RuntimeError('no luck')", "line 4: RuntimeError: no luck"),
        ("register('loss', 'mse', abs)\nimport nowhere_at_all", "nowhere_at_all"),
        ("register('losses', 'x', abs)", "no kind of plug-in 'losses'"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path, code, said):
    path = write(tmp_path / "broken.py", code)
    with pytest.raises(UserError) as caught:
        plugins.load([path])
    assert str(path) in str(caught.value) and said in str(caught.value) and caught.value.field == "plugins"
    assert not plugins.names("loss") and not plugins.is_loaded(path)
    with pytest.raises(UserError, match="There is no plug-in"):
        plugins.load([tmp_path / "missing.py"])


def test_two_plugins_cannot_have_one_name(tmp_path):
    plugins.load([write(tmp_path / "one.py", LOSS)])
    with pytest.raises(UserError, match="has registered a loss named 'absolute' already"):
        plugins.load([write(tmp_path / "two.py", LOSS)])


def test_unknown_names_are_answered_with_the_known(tmp_path):
    plugins.load([write(tmp_path / "l.py", LOSS), write(tmp_path / "a.py", AUGMENTATION)])
    with pytest.raises(ConfigError) as caught:
        from_mapping({"loss": "absolut", "augmentations": ["brightnes"], "regularisers": {"small": 1}})
    text = str(caught.value)
    assert "did you mean absolute?" in text and "Did you mean brightness?" in text and "regulariser 'small'" in text


def test_the_code_decides_on_the_run(tmp_path):
    from lora_trainer.run.engine import plugin_fingerprints

    path = write(tmp_path / "l.py", LOSS)
    plugins.load([path])
    config = from_mapping({"loss": "absolute"})
    first = plugin_fingerprints(config, "sd1")
    assert list(first) == ["loss absolute"] and plugin_fingerprints(from_mapping({}), "sd1") == {}
    write(path, LOSS.replace("abs()", "abs() * 2"))
    plugins.load([path])
    assert plugin_fingerprints(config, "sd1") != first


def test_what_comes_over_http_runs_no_code(tmp_path):
    path, trace = tmp_path / "evil.py", tmp_path / "trace"
    write(path, f"open({str(trace)!r}, 'w').close()\n" + LOSS)
    host = FakeHost(tmp_path / "host")
    settings = {"train_data_dir": str(tmp_path), "plugins": [str(path)]}
    for given in (settings, {**settings, "loss": "absolute"}, f"train_data_dir: {tmp_path}\nplugins: ['{path}']"):
        with pytest.raises(UserError, match=r"plugins|not one of the choices"):
            check_settings(given, host)
    assert not trace.exists()
    plugins.load([path])  # by whoever runs the trainer
    assert check_settings({**settings, "loss": "absolute"}, host).plugins == [str(path)]
