"""The chains of a saved adapter against those that the structure of the model gives now."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from ..adapt.structure import ChainPlan, names_of_experts, structural_chains
from ..layers.shortcuts import hands_on
from .adapter_format import CONFIG_NAME, SavedAdapter


def settled_chains(saved: SavedAdapter, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[ChainPlan]:
    """The chains to link in ``model``: those of the file, which the adapter was trained in.

    Earlier versions read chains off a run, by the last part of a name and the shapes of the tokens. Where the structure
    gives others, a warning says so.

    Raises:
        ValueError: in the file of an earlier version, layers of experts were handed the rows of other tokens, or took
            their own input twice, which is not computed any more.
    """
    structural = structural_chains(model, layers, saved.config)
    if saved.chains is None or saved.chains_from == "given":
        return saved.chains or structural
    experts = names_of_experts(structural)
    if saved.chains_from is None and experts and hands_on(saved.config.shortcut, saved.config.pre_num):
        raise ValueError(
            f"{CONFIG_NAME}: an earlier version trained this adapter with {saved.config.shortcut!r} along layers of "
            f"experts ({experts[0]!r} and {len(experts) - 1} more), which see a choice of the tokens and hand nothing "
            "on any more. Train it again, or leave those layers out with exclude_modules"
        )
    same = sorted(plan.names for plan in saved.chains) == sorted(plan.names for plan in structural)
    if not same:
        known = [plan.names for plan in structural]
        other = [f"{plan.title!r} ({', '.join(plan.names)})" for plan in saved.chains if plan.names not in known]
        warnings.warn(
            f"the adapter was trained in other chains than the model's structure gives: {'; '.join(other)}. They are "
            "used as stored; train a new adapter to use those of the structure",
            stacklevel=3,
        )
    return structural if same else saved.chains
