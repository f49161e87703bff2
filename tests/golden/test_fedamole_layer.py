"""The bank layer with FedAMoLE's gate against the published layer: output, loss, embeddings, every gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from coterie.nn.attach import Attached, attach
from coterie.types import NO_EXPERT, SHARED, Bank, GateSpec, Key, Part

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("fedamole_layer_*.npz"))
ROUTER = Key("0", NO_EXPERT, Part.ROUTER)


def tolerance(path: Path, wanted: Tensor) -> float:
    """Float64: 1e-10, and 1e-6 where the published code counts picks in float32. Float32: see decision 0009."""
    return 2e-6 * max(1.0, float(wanted.abs().max())) if "f32" in path.stem else 1e-10


def test_every_golden_layer_is_covered() -> None:
    cases = {p.stem.removeprefix("fedamole_layer_").rsplit("_", 1)[0] for p in FILES}
    assert cases == {"e2_k1", "e2_k2", "e4_k2", "e8_k2"}
    assert len(FILES) == 8


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_output_and_gradients(path: Path) -> None:
    golden, module, attached = attach_golden(path)
    x = golden["x"].clone().requires_grad_()
    y = module(x)
    (y * golden["probe"]).sum().backward()
    compare(path, golden, {"y": y.detach(), **gradients(golden, attached, x, "g")})


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_load_balance_loss_and_its_gradients(path: Path) -> None:
    golden, module, attached = attach_golden(path)
    x = golden["x"].clone().requires_grad_()
    attached.now.balance = []
    module(x)
    (loss,) = attached.now.balance
    loss.backward()
    found = gradients(golden, attached, x, "lb_g")
    assert set(found) == {"lb_gA", "lb_gB", "lb_gAs", "lb_gBs", "lb_gP", "lb_gx"}
    assert abs(float(loss.detach()) - float(golden["out_load_balance"])) < 1e-6
    for name, value in found.items():
        torch.testing.assert_close(value, golden[f"out_{name}"], rtol=0, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_weights_of_the_experts(path: Path) -> None:
    golden, module, attached = attach_golden(path)
    attached.now.usage = {}
    module(golden["x"])
    (sums,) = attached.now.usage.values()
    gates = golden["gates"].double()
    torch.testing.assert_close(sums[0, 1:], gates.sum(0), rtol=0, atol=1e-5 if "f32" in path.stem else 1e-10)
    torch.testing.assert_close(sums[1, 1:], (gates > 0).double().sum(0), rtol=0, atol=0)
    assert sums[:, 0].tolist() == [len(gates), len(gates)]  # the shared expert


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_embeddings_are_means_over_all_tokens_of_all_batches(path: Path) -> None:
    golden, module, attached = attach_golden(path)
    attached.now.embeddings, tokens = {}, 0
    batches = [golden[f"batch{i}"] for i in range(3)]
    for batch in batches:
        module(batch)
        tokens += batch.shape[0] * batch.shape[1]
    means = {key: value / tokens for key, value in attached.now.embeddings.items()}
    experts = len(golden["A"])
    assert means.keys() == {Key("0", e, Part.EMBEDDING) for e in (NO_EXPERT, *range(experts))}
    found = {"token_emb": means[Key("0", NO_EXPERT, Part.EMBEDDING)].unsqueeze(0)}
    found["expert_embs"] = torch.stack([means[Key("0", e, Part.EMBEDDING)] for e in range(experts)])
    golden["out_expert_embs"] = golden["out_expert_embs"][:-1]  # the last row is for the shared expert, which has none
    compare(path, golden, {name: value.to(golden["x"].dtype) for name, value in found.items()})


def compare(path: Path, golden: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, value in found.items():
        wanted = golden[f"out_{name}"]
        assert value.dtype == wanted.dtype
        torch.testing.assert_close(
            value, wanted, rtol=0, atol=tolerance(path, wanted), msg=lambda m, n=name: f"{n}: {m}"
        )


def gradients(golden: dict[str, Tensor], attached: Attached, x: Tensor, prefix: str) -> dict[str, Tensor]:
    """By the file's names; zero where nothing reaches a tensor."""
    experts = range(len(golden["A"]))

    def grad(expert: int, part: Part) -> Tensor:
        parameter = attached.parameters[Key("0", expert, part)]
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    return {
        f"{prefix}x": torch.zeros_like(x) if x.grad is None else x.grad,
        f"{prefix}A": torch.stack([grad(e, Part.A) for e in experts]),
        f"{prefix}B": torch.stack([grad(e, Part.B) for e in experts]),
        f"{prefix}As": grad(SHARED, Part.A),
        f"{prefix}Bs": grad(SHARED, Part.B),
        f"{prefix}P": grad(NO_EXPERT, Part.ROUTER),
    }


def attach_golden(path: Path) -> tuple[dict[str, Tensor], nn.Sequential, Attached]:
    file = np.load(path, allow_pickle=False)
    names = [name for name in file.files if file[name].dtype.kind == "f"]
    arrays = {name: torch.from_numpy(np.asarray(file[name])).to(tiny.DEVICE) for name in names}
    module = nn.Sequential(nn.Linear(12, 10, dtype=arrays["x"].dtype)).requires_grad_(False).to(tiny.DEVICE)
    module[0].weight.copy_(arrays["W"])
    module[0].bias.copy_(arrays.get("bias", torch.zeros(10, device=tiny.DEVICE)))
    tensors = {ROUTER: arrays["token_proj"]}
    tensors |= {Key("0", SHARED, Part.A): arrays["A_shared"], Key("0", SHARED, Part.B): arrays["B_shared"]}
    for e in range(len(arrays["A"])):
        tensors |= {Key("0", e, Part.A): arrays["A"][e], Key("0", e, Part.B): arrays["B"][e]}
    bank = Bank(tensors, GateSpec("scaled_dot_product", {"k": int(file["k"])}), float(file["scaling"]))
    return arrays, module, attach(module, bank, tensors)
