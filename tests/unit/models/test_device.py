"""The device, and what an allocation that fails becomes."""

from __future__ import annotations

import pytest
import torch

from pocl_cli.errors import ConfigError, ResourceError
from pocl_cli.models.device import Hardware, memory_errors_explained, set_up_hardware
from pocl_cli.schema import HardwareConfig

CPU = Hardware(torch.device("cpu"), "float32", 4096, 256)


def config(**changes: object) -> HardwareConfig:
    values = {
        "name": "cpu", "device": "cpu", "precision": "float32", "num_threads": None,
        "max_tokens_per_micro_batch": None, "objective_memory_mb": 256,
        "num_processes": 1, "num_nodes": 1, "parallel": "none", "timeout_seconds": 600,
    }  # fmt: skip
    return HardwareConfig.model_validate({**values, **changes})


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), MemoryError()],
)
def test_memory_errors_when_an_allocation_fails_then_the_advice_names_the_two_keys(error: Exception) -> None:
    with pytest.raises(ResourceError) as caught, memory_errors_explained(CPU, "training"):
        raise error
    assert caught.value.exit_code == 5
    assert "hardware.max_tokens_per_micro_batch below 4096" in str(caught.value)
    assert "hardware.objective_memory_mb below 256" in str(caught.value)
    assert "training on cpu" in str(caught.value)


def test_memory_errors_when_a_real_allocation_fails_then_it_is_recognised() -> None:
    with pytest.raises(ResourceError, match="out of memory"), memory_errors_explained(CPU, "training"):
        torch.empty(2**60, dtype=torch.uint8)


def test_memory_errors_when_another_error_comes_then_it_goes_on() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_errors_explained(CPU, "training"):
        raise RuntimeError("shape mismatch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_set_up_when_the_device_is_not_there_then_says_what_to_use() -> None:
    with pytest.raises(ConfigError, match=r"no device 'cuda'.*hardware\.device=cpu"):
        set_up_hardware(config(device="cuda"))


def test_set_up_when_nothing_is_chosen_then_a_budget_is() -> None:
    assert set_up_hardware(config()).max_tokens_per_micro_batch == 4096
    assert set_up_hardware(config(max_tokens_per_micro_batch=99)).max_tokens_per_micro_batch == 99


def test_autocast_when_bfloat16_then_products_are_and_parameters_are_not() -> None:
    layer = torch.nn.Linear(4, 4)
    with set_up_hardware(config(precision="bfloat16")).autocast():
        product = layer(torch.ones(2, 4))
    assert (product.dtype, layer.weight.dtype) == (torch.bfloat16, torch.float32)
