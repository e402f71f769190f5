"""How an accelerator is made to compute. None is here: its settings are PyTorch's own, wherever they are read."""

import torch

from adapruner.model.layers import decoder_layers, share_out
from adapruner.model.loading import computing_repeatably
from adapruner.run.memory import Memory, room_for_moments


def settings() -> tuple[str, bool, bool, bool]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def test_a_run_on_an_accelerator_computes_repeatably_and_leaves_the_settings_as_they_were():
    torch.set_float32_matmul_precision("high")
    before = settings()
    try:
        with computing_repeatably(torch.device("cuda")):
            assert settings() == ("highest", False, True, True)
        assert settings() == before
        with computing_repeatably(torch.device("cpu")):
            assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_moments_take_no_memory_that_a_stage_needs():
    cpu = torch.device("cpu")
    everything = room_for_moments(cpu, Memory(0, 0, "seq_len"))[cpu]
    some = room_for_moments(cpu, Memory(everything, 0, "seq_len"))[cpu]
    assert 0 < some < 0.7 * everything
    assert room_for_moments(cpu, Memory(2**60, 0, "seq_len")) == {cpu: 0}


def test_devices_share_the_layers_in_their_order(model):
    layers = decoder_layers(model)
    sizes = [sum(weight.nbytes for weight in layer.parameters()) for layer in layers]
    total = sum(weight.nbytes for weight in model.parameters())
    assert share_out(model, [torch.device("cpu")]) == [torch.device("cpu")] * len(layers)
    for count in (2, 3):
        devices = [torch.device("cuda", number) for number in range(count)]
        shares = share_out(model, devices)
        assert shares == sorted(shares, key=devices.index)
        outside = total - sum(sizes)
        held = [
            sum(size for size, own in zip(sizes, shares, strict=True) if own == device) + outside * (not number)
            for number, device in enumerate(devices)
        ]
        assert sum(held) == total
        assert max(held) <= max(total / count, outside) + max(sizes)
