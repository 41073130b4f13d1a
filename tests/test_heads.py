"""The MLPs that take a head's place."""

import pytest
import torch
from torch import nn

from moco_fast.models import heads


@pytest.mark.parametrize("last_norm", [False, True])
def test_layers_of_an_mlp(last_norm):
    layers = list(heads.mlp([6, 5, 4, 3], last_norm=last_norm))
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear] + [nn.BatchNorm1d] * last_norm
    assert [type(layer) for layer in layers] == kinds
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linears] == [(5, 6), (4, 5), (3, 4)]
    assert all(layer.bias is None for layer in linears)
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm1d)]
    assert [layer.affine for layer in norms] == [True, True, False][: len(norms)]


def test_only_the_last_layer_may_have_a_bias():
    linears = [x for x in heads.mlp([6, 5, 4], last_norm=False, last_bias=True) if isinstance(x, nn.Linear)]
    assert [layer.bias is None for layer in linears] == [True, False]


def test_replacing_a_nested_head():
    encoder = nn.Module()
    encoder.classifier = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    heads.replace(encoder, heads.head_path(encoder), heads.mlp([6, 3], last_norm=False))
    assert encoder.classifier(torch.ones(4, 2, 3)).shape == (4, 3)


@pytest.mark.parametrize(
    ("dims", "error", "message"),
    [
        ([8], ValueError, r"dims must hold those of the input and of the output, got \[8\]"),
        ([8, 0], ValueError, r"dims\[1\] must be at least 1, got 0"),
        ([8, 4.0, 2], TypeError, r"dims\[1\] must be an integer, got float 4.0"),
    ],
)
def test_bad_mlps(dims, error, message):
    with pytest.raises(error, match=message):
        heads.mlp(dims, last_norm=True)
