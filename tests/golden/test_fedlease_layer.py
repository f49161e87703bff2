"""The bank layer against the published FedLEASE layer: output and every gradient, elementwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from coterie.nn.attach import attach
from coterie.types import NO_EXPERT, Bank, GateSpec, Key, Part

HERE = Path(__file__).parent
F64 = sorted(HERE.glob("fedlease_layer_*_f64.npz"))
F32 = sorted(HERE.glob("fedlease_layer_*_f32.npz"))


def test_every_golden_layer_is_covered() -> None:
    cases = {p.stem.removeprefix("fedlease_layer_").removesuffix("_f64") for p in F64}
    assert cases == {p.stem.removeprefix("fedlease_layer_").removesuffix("_f32") for p in F32}
    assert len(cases) == 9
    assert {c[:2] for c in cases} == {"M1", "M2", "M3", "M4", "fi"}
    assert len(F64) + len(F32) == len(list(HERE.glob("fedlease_layer_*.npz"))) == 18


@pytest.mark.parametrize("path", F64, ids=lambda p: p.stem)
def test_float64_output_and_gradients_to_1e10(path: Path) -> None:
    """Against ``hp_*``: the published code with its softmax in the input's precision instead of float32."""
    golden, ours = run(path)
    for name, value in ours.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, golden[f"hp_{name}"], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("path", F32, ids=lambda p: p.stem)
def test_float32_output_and_gradients_to_2e6(path: Path) -> None:
    """Against ``out_*``, every element within 2e-6 of the array's largest magnitude.

    Not 2e-6 absolute: the arrays reach 1e2, where neighbouring float32 numbers are 8e-6 apart, so that two orders of
    the same sum (one product over all experts here, a loop over experts there) differ by more than 2e-6.
    """
    golden, ours = run(path)
    for name, value in ours.items():
        assert value.dtype == torch.float32
        wanted = golden[f"out_{name}"]
        atol = 2e-6 * float(wanted.abs().max())
        torch.testing.assert_close(value, wanted, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("path", F64, ids=lambda p: p.stem)
def test_weights_of_the_experts(path: Path) -> None:
    """``gates`` [b, t, M] in the files: the total weight of each expert per token."""
    golden, module, attached, _ = attach_golden(path)
    attached.now.usage = {}
    module(golden["x"])
    mean = golden["gates"].reshape(-1, golden["gates"].shape[-1]).sum(0)
    (sums,) = attached.now.usage.values()
    torch.testing.assert_close(sums[0], mean, rtol=0, atol=1e-10)
    picked = (golden["gates"].reshape(-1, len(mean)) > 0).double().sum(0)
    torch.testing.assert_close(sums[1], picked, rtol=0, atol=0)


def run(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The file's arrays, and our output ``y`` and gradients of sum(y * probe) by the file's names."""
    golden, module, attached, experts = attach_golden(path)
    x = golden["x"].clone().requires_grad_()
    y = module(x)
    (y * golden["probe"]).sum().backward()
    grads = {key: parameter.grad for key, parameter in attached.parameters.items()}
    return golden, {
        "y": y.detach(),
        "gx": x.grad,
        "gA": torch.stack([grads[Key("0", e, Part.A)] for e in range(experts)]),
        "gB": torch.stack([grads[Key("0", e, Part.B)] for e in range(experts)]),
        "gR": grads[Key("0", NO_EXPERT, Part.ROUTER)],
    }


def attach_golden(path: Path):
    file = np.load(path, allow_pickle=False)
    arrays = {
        name: torch.from_numpy(file[name]).to(tiny.DEVICE)
        for name in file.files
        if file[name].ndim and file[name].dtype.kind == "f"
    }
    experts, scaling = int(file["M"]), float(file["scaling"])
    gate = (
        GateSpec("slot_top_k", {"own": int(file["idx"])})
        if file["adaptive"]
        else GateSpec("top_k", {"k": int(file["k"])})
    )
    module = nn.Sequential(nn.Linear(12, 10, dtype=arrays["x"].dtype)).requires_grad_(False).to(tiny.DEVICE)
    module[0].weight.copy_(arrays["W"])
    module[0].bias.copy_(arrays["bias"])
    tensors = {Key("0", NO_EXPERT, Part.ROUTER): arrays["router"]}
    for e in range(experts):
        tensors |= {Key("0", e, Part.A): arrays["A"][e], Key("0", e, Part.B): arrays["B"][e]}
    return arrays, module, attach(module, Bank(tensors, gate, scaling), tensors), experts
