"""Laws of the settings: what is written is read, what is wrong is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pisces.config import (
    ALGORITHMS,
    DraftConfig,
    LoraConfig,
    OneStepConfig,
    TrainConfig,
    load_config,
    resolve_path,
)
from pisces.rewards import Transport

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))


def write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Settings whose files are there."""
    (tmp_path / "prompts.txt").write_text("a red square\n")
    for name in ("wan", "encoder"):
        (tmp_path / name).mkdir()
    return {
        "pipeline": {"path": str(tmp_path / "wan")},
        "data": {"prompts": str(tmp_path / "prompts.txt")},
        "rewards": {"encoder": str(tmp_path / "encoder")},
        "algorithm": {"name": "draft"},
    }


def test_the_defaults_are_the_papers_recipe() -> None:
    config = TrainConfig()
    assert config.algorithm == OneStepConfig(steps=50, anchor_weight=1.0, phases=1, huber_c=0.001)
    assert config.lora == LoraConfig(rank=256, alpha=32.0)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (1e-6, (0.9, 0.999), 1e-3)
    assert (config.optimizer.accumulation, config.data.batch_size, config.optimizer.grad_clip) == (32, 1, 1.0)
    assert config.rewards.transport == Transport(epsilon=0.05, tau=0.9, gamma=0.2, eta=0.2)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_settings_survive_a_round_trip(name: str) -> None:
    values = {"algorithm": {"name": name}, "lora": None, "optimizer": {"betas": [0.9, 0.98]}}
    config = TrainConfig.from_dict(values)
    assert TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert config.algorithm.name == name
    assert config.lora is None


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path: Path, files: dict[str, Any]) -> None:
    path = write(tmp_path / "c.yaml", files)
    path.write_text(path.read_text() + "optimizer: {lr: 1e-4, ema_decay: 0}\n")
    config = load_config(path)
    assert (config.optimizer.lr, config.optimizer.ema_decay) == (1e-4, 0.0)


def test_overrides_replace_and_add(tmp_path: Path, files: dict[str, Any]) -> None:
    path = write(tmp_path / "c.yaml", files)
    overrides = ["algorithm.last_k=2", "optimizer.lr=3e-4", "lora=null", "rewards.transport.tau=0.8", "steps=5"]
    config = load_config(path, overrides)
    assert config.algorithm == DraftConfig(last_k=2)
    assert (config.optimizer.lr, config.lora, config.steps) == (3e-4, None, 5)
    assert config.rewards.transport == Transport(tau=0.8)
    for wrong in ("steps", "=3", "a..b=1"):
        with pytest.raises(ValueError, match=r"expected the form section\.key=value"):
            load_config(path, [wrong])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimiser": {}}, "optimiser: unknown key. Did you mean optimizer?"),
        ({"optimizer": {"warmup": 1}}, "optimizer.warmup: unknown key. Did you mean optimizer.warmup_steps?"),
        ({"rewards": {"transport": {"epsilom": 1}}}, "Did you mean rewards.transport.epsilon?"),
        ({"algorithm": {"name": "drat"}}, "unknown algorithm 'drat'. Did you mean draft?"),
        ({"algorithm": {"steps": 4}}, "expected a section with a name out of one_step, draft"),
        ({"algorithm": {"name": "one_step", "last_k": 1}}, "algorithm.last_k: unknown key."),
        ({"steps": "many"}, "steps: got 'many', expected a whole number."),
        ({"steps": 2.5}, "steps: got 2.5, expected a whole number."),
        ({"steps": 0}, "steps: got 0, expected at least 1."),
        ({"data": {"batch_size": True}}, "data.batch_size: got True, expected a whole number."),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr: got 'fast', expected a number."),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: got nan, expected a finite number."),
        ({"optimizer": {"lr": -1}}, "optimizer.lr: got -1.0, expected a positive number."),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas: got [0.9], expected a list of 2 values."),
        ({"optimizer": {"betas": [0.9, "x"]}}, "optimizer.betas[1]: got 'x', expected a number."),
        ({"optimizer": {"ema_decay": 1}}, "optimizer.ema_decay: got 1.0"),
        ({"rewards": {"standardize": 1}}, "rewards.standardize: got 1, expected true or false."),
        ({"rewards": {"quality": 0, "semantic": 0}}, "expected a positive weight"),
        ({"pipeline": {"path": 3}}, "pipeline.path: got 3, expected text."),
        ({"pipeline": {"decode": {"memory": "x"}}}, "pipeline.decode.memory: got 'x', expected chunked or plain."),
        ({"pipeline": {"decode": {"states": "x"}}}, "pipeline.decode.states: got 'x', expected keep or offload or"),
        ({"pipeline": {"decode": {"chunk": 0}}}, "pipeline.decode.chunk: got 0, expected at least 1."),
        (
            {"algorithm": {"name": "draft", "last_k": 5}},
            "algorithm.last_k: got 5, expected 1 to 4 (the steps)",
        ),
        ({"algorithm": {"name": "one_step", "phases": 51}}, "algorithm.phases: got 51, expected 1 to 50"),
        ({"algorithm": {"name": "consistency", "huber_c": 0}}, "algorithm.huber_c: got 0.0, expected a positive"),
        ({"algorithm": {"name": "flow_matching", "caption_dropout": 2}}, "algorithm.caption_dropout: got 2.0"),
        ({"algorithm": {"name": "grpo", "group_size": 1}}, "algorithm.group_size: got 1, expected at least 2."),
        ({"optimizer": {"schedule": "step"}}, "optimizer.schedule: got 'step', expected constant or linear or cosine."),
        ({"pipeline": {"vae_dtype": "int8"}}, "pipeline.vae_dtype: got 'int8', expected float32 or bfloat16."),
        ({"pipeline": {"dtype": "int8"}}, "pipeline.dtype: got 'int8', expected float32 or bfloat16."),
        ({"data": None}, "data: got None, expected a section with keys."),
        ({"lora": 3}, "lora: got 3, expected a section with keys."),
        ({"lora": {"targets": "to_q"}}, "lora.targets: got 'to_q', expected a list"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "c.yaml", values)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_missing_files_are_named(tmp_path: Path, files: dict[str, Any]) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    path = write(tmp_path / "c.yaml", files)
    load_config(path)
    for key in ("pipeline.path", "data.prompts", "rewards.encoder", "rewards.ot_map"):
        with pytest.raises(FileNotFoundError, match=f"{re.escape(key)}: no such file or directory: .*gone"):
            load_config(path, [f"{key}={tmp_path}/gone"])
    for name, missing in (("gone", "gone"), ("{0..3}.tar", "0.tar"), ("gone.tar", "gone.tar")):
        with pytest.raises(FileNotFoundError, match=rf"data\.videos: .*{re.escape(missing)}"):
            load_config(path, ["data.prompts=null", f"data.videos='{tmp_path}/{name}'"])
    for n in range(3):
        (tmp_path / f"{n}.tar").touch()
    load_config(path, ["data.prompts=null", f"data.videos='{tmp_path}/{{0..2}}.tar'"])
    with pytest.raises(ValueError, match=r"data\.videos: .*braces"):
        load_config(path, ["data.prompts=null", f"data.videos='{tmp_path}/{{0..'"])
    # An algorithm without rewards does not look at them.
    overrides = ["algorithm={name: flow_matching}", "data.prompts=null", f"data.videos={tmp_path}"]
    load_config(path, [*overrides, f"rewards.encoder={tmp_path}/gone"])
    with pytest.raises(FileNotFoundError, match="no packaged checkpoint 'nonesuch'"):
        load_config(path, ["pipeline.path=packaged:nonesuch"])


def test_data_must_fit_the_algorithm(tmp_path: Path, files: dict[str, Any]) -> None:
    path = write(tmp_path / "c.yaml", files)
    with pytest.raises(ValueError, match="one_step needs a folder of captioned videos"):
        load_config(path, ["algorithm={name: one_step}"])
    with pytest.raises(ValueError, match="neither prompts nor videos"):
        load_config(path, ["data.prompts=null"])
    with pytest.raises(ValueError, match="expected one of the two"):
        load_config(path, [f"data.videos={tmp_path}"])


@pytest.mark.parametrize("text", ["a: [", "- 1", "3"])
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_config(path)


def test_paths_know_the_package_and_home() -> None:
    assert resolve_path("~/x") == Path.home() / "x"
    assert resolve_path("a/b") == Path("a/b")


def test_there_is_an_example_for_each_algorithm() -> None:
    configs = [TrainConfig.from_dict(yaml.safe_load(path.read_text())) for path in EXAMPLES]
    assert {config.algorithm.name for config in configs} == set(ALGORITHMS)


def test_a_tracker_that_is_not_installed_is_named(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pisces.config.find_spec", lambda name: None)
    config = TrainConfig.from_dict(files | {"output": {"trackers": ["wandb"]}})  # settings of others can be read
    with pytest.raises(ValueError, match=r"output\.trackers: wandb is not installed"):
        config.check_inputs()
    TrainConfig.from_dict(files).check_inputs()
    with pytest.raises(ValueError, match="tensorboard"):
        TrainConfig.from_dict({"output": {"trackers": ["tensorbord"]}})
