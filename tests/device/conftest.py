"""The simulated CUDA device, and tiny models for it. Where it cannot be built, tests are skipped with the reason."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from device import building
from device.client import Device
from tiny_families import tiny_config


@pytest.fixture(scope="session")
def built():
    """The library of the device."""
    if reason := building.reason_against():
        pytest.skip(f"the CUDA device cannot be simulated: {reason}")
    building.build()


@pytest.fixture(scope="session")
def device(built, tmp_path_factory):
    """One simulated GPU."""
    own = Device(tmp_path_factory.mktemp("device"))
    yield own
    own.close()


@pytest.fixture(scope="session")
def two_devices(built, tmp_path_factory):
    """Two simulated GPUs."""
    own = Device(tmp_path_factory.mktemp("devices"), devices=2)
    yield own
    own.close()


@pytest.fixture
def launch(two_devices):
    """Runs a command in several processes, each with a GPU of its own; see `Device.launch`."""
    return two_devices.launch


@pytest.fixture(scope="session")
def family(tmp_path_factory, tokenizer):
    """Writes a tiny random model of a family, once for each dtype and other sizes."""
    made: dict[object, Path] = {}

    def make(model_type: str, dtype: str = "float32", **sizes: int) -> Path:
        key = (model_type, dtype, *sizes.items())
        if key not in made:
            torch.manual_seed(0)
            config = tiny_config(model_type)
            config.update(sizes)
            model = AutoModelForCausalLM.from_config(config).eval()
            folder = tmp_path_factory.mktemp("families") / f"{model_type}-{dtype}"
            model.to(getattr(torch, dtype)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make
