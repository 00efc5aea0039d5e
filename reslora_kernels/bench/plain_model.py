"""The paper's layers written plainly, in the place of ours in a model: the same chains, the same adapters, autograd."""

from __future__ import annotations

from torch import Tensor, nn

from reslora_kernels.adapt.record import adapted_layers, record_of
from reslora_kernels.layers.linear import ResLoRALinear


class PlainChain:
    """Inputs of the chain's layers in the current forward pass, as the paper's released layers keep them."""

    def __init__(self) -> None:
        self.layers: list[PlainLinear] = []
        self.inputs: list[Tensor] = []


class PlainLinear(nn.Module):
    """Eqs. 1 to 4; adapters in the weight's dtype."""

    def __init__(self, layer: ResLoRALinear, chain: PlainChain) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Parameter(layer.lora_A.detach().to(layer.weight.dtype))
        self.lora_B = nn.Parameter(layer.lora_B.detach().to(layer.weight.dtype))
        self.config = layer.config
        self.position = len(chain.layers)
        self.chain = chain
        chain.layers.append(self)

    def forward(self, x: Tensor) -> Tensor:
        n, shortcut, s = self.position, self.config.shortcut, self.config.scaling
        layers, inputs = self.chain.layers, self.chain.inputs
        if n == 0:
            inputs.clear()
        inputs.append(x)
        reach = n if self.config.pre_num == -1 else min(self.config.pre_num, n)
        y = nn.functional.linear(x, self.weight, self.bias)
        if shortcut == "none":
            return y + (x @ self.lora_A.T @ self.lora_B.T) * s
        if shortcut == "input":
            return y + ((x + inputs[max(n - 1, 0)]) @ self.lora_A.T @ self.lora_B.T) * s
        if shortcut == "block":
            for k in range(reach + 1):
                y = y + (x @ layers[n - k].lora_A.T @ layers[n - k].lora_B.T) * s
            return y
        h = x @ self.lora_A.T
        for k in range(1, reach + 1):
            h = h + inputs[n - k] @ layers[n - k].lora_A.T
        return y + (h @ self.lora_B.T) * s


def write_plainly(model: nn.Module) -> dict[str, nn.Parameter]:
    """Replace every adapted layer by a plain one of the same chain and place; returns A and B of all by name."""
    adapted = adapted_layers(model)
    names = {id(layer): name for name, layer in adapted.items()}
    found: dict[str, nn.Parameter] = {}
    for chain in record_of(model).chains:
        plain = PlainChain()
        for layer in chain.layers:
            name = names[id(layer)]
            assert isinstance(layer, ResLoRALinear)
            new = PlainLinear(layer, plain)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, new)
            found[f"{name}.lora_A"], found[f"{name}.lora_B"] = new.lora_A, new.lora_B
    return found
