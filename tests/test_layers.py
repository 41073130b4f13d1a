"""Learning rates by layer: they fall towards the stem."""

import pytest
import torch
from torch import nn

from moco_fast.models.backbones import backbone
from moco_fast.train.layers import parameter_groups


def scales(groups, model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_learning_rates_fall_towards_the_stem():
    model = backbone("small_resnet", width=8, in_channels=1)(num_classes=3)
    found = scales(parameter_groups(model, 0.1, 0.5), model)
    assert set(found) == set(dict(model.named_parameters()))
    assert found["fc.weight"] == (1.0, 0.1) and found["fc.bias"] == (1.0, 0.0)
    assert found["layer4.0.conv1.weight"] == (0.5, 0.1) and found["layer4.0.bn1.weight"] == (0.5, 0.0)
    assert found["layer1.0.conv1.weight"] == (0.5**4, 0.1) and found["conv1.weight"] == (0.5**5, 0.1)
    assert {scale for scale, _ in scales(parameter_groups(model, 0.1), model).values()} == {1.0}


@pytest.mark.parametrize(("arch", "blocks"), [("small_vit", "blocks."), ("vit_b_16", "encoder_layer_")])
def test_learning_rates_of_transformers(arch, blocks):
    with torch.device("meta"):
        model = backbone(arch, width=8)(num_classes=3)
    found = scales(parameter_groups(model, 0.1, 0.5), model)
    depth = len({name.split(blocks)[1].split(".")[0] for name in found if blocks in name})
    assert not any(decay for name, (_, decay) in found.items() if "token" in name or "pos_embed" in name)
    for name, (scale, _) in found.items():
        if blocks in name:
            assert scale == 0.5 ** (depth - int(name.split(blocks)[1].split(".")[0]))
        else:
            head = name.startswith(("head", "norm", "encoder.ln"))
            assert scale == (1.0 if head else 0.5 ** (depth + 1)), name


def test_layer_decay_needs_layers():
    with pytest.raises(ValueError, match=r"layer_decay=0\.5 needs an encoder made of layers named"):
        parameter_groups(nn.Sequential(nn.Linear(2, 2)), 0.1, 0.5)
