import pytest
import torch
from torch import nn

from dante_kernels import GeneralizedReLU, network
from dante_kernels.activations import Activation


def test_layers_are_views_on_the_models_own_parameters():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    net = network.from_module(model, "mse")
    assert net.widths == [4, 3, 2]
    assert [layer.activation for layer in net.layers] == [Activation.RELU, Activation.IDENTITY]
    assert net.layers[1].bias is None
    net.layers[0].weight.fill_(7)
    net.layers[0].bias.fill_(8)
    assert bool((model[0].weight == 7).all())
    assert bool((model[0].bias == 8).all())


def test_nested_sequentials_are_one_chain_and_keep_their_names():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3), GeneralizedReLU(0.5, 2.0)), nn.Sequential(nn.Linear(3, 2), nn.Tanh()))
    net = network.from_module(model, "mse")
    assert net.names == ("0.0", "1.0")
    assert net.layers[0].activation == Activation("generalized_relu", 0.5, 2.0)


@pytest.mark.parametrize(
    ("last", "loss"),
    [(nn.Softmax(dim=1), "cross_entropy"), (nn.LogSoftmax(dim=-1), "cross_entropy"), (nn.Sigmoid(), "binary_cross_entropy")],
)
def test_an_output_module_that_the_loss_contains_is_not_applied_twice(last, loss):
    net = network.from_module(nn.Sequential(nn.Linear(4, 3), last), loss)
    assert net.layers[0].activation == Activation.IDENTITY
    assert last not in net.modules


def test_a_sigmoid_output_is_an_activation_for_other_losses():
    assert network.from_module(nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()), "mse").layers[0].activation == Activation.SIGMOID


def shared():
    linear = nn.Linear(3, 3)
    return nn.Sequential(linear, nn.ReLU(), linear)


def half_frozen():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].bias.requires_grad_(False)
    return model


def hooked():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_hook(lambda *_: None)
    return model


def hooked_container():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)))
    model[0].register_forward_hook(lambda *_: None)
    return model


def hooked_model():
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_forward_pre_hook(lambda *_: None)
    return model


def own_forward():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].forward = lambda x: x
    return model


def parametrized():
    model = nn.Sequential(nn.Linear(3, 3))
    nn.utils.parametrizations.spectral_norm(model[0])
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 2), nn.Dropout()), r"'1' \(Dropout\) is neither nn.Linear nor an activation"),
        (nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.GELU())), r"'1.0' \(GELU\)"),
        (nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2)), r"'1' \(Linear\) takes 3 features, but 2 come"),
        (nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), r"'0' \(ReLU\) stands before the first nn.Linear"),
        (nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Tanh()), r"'2' \(Tanh\) is a second activation"),
        (nn.Sequential(nn.Linear(3, 2), nn.Softmax(dim=1)), r"'1' \(Softmax\)"),
        (nn.Sequential(nn.Flatten(1, 2), nn.Linear(4, 3)), r"'0' \(Flatten\) flattens other dimensions"),
        (nn.Sequential(), "at least one nn.Linear"),
        (shared(), r"'2' \(Linear\) shares a parameter with '0'"),
        (half_frozen(), "frozen weight or bias"),
        (hooked(), "'0' .*has forward hooks"),
        (hooked_container(), "'0' .*has forward hooks"),
        (hooked_model(), "'model' .*has forward hooks"),
        (own_forward(), "'0' .*a forward of its own"),
        (parametrized(), "is parametrized"),
    ],
)
def test_what_is_no_chain_is_named_with_its_place(model, message):
    with pytest.raises(ValueError, match=f"model: .*{message}"):
        network.from_module(model, "mse")


def test_one_activation_module_may_stand_after_several_layers():
    phi = nn.ReLU()
    net = network.from_module(nn.Sequential(nn.Linear(4, 3), phi, nn.Linear(3, 2), phi), "mse")
    assert [layer.activation for layer in net.layers] == [Activation.RELU, Activation.RELU]


def test_a_model_that_is_no_sequential_is_refused():
    with pytest.raises(TypeError, match=r"model: expected an nn\.Sequential, .*got Linear"):
        network.from_module(nn.Linear(2, 2), "mse")


def test_a_sequential_with_a_forward_of_its_own_is_refused():
    class Doubled(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match=r"model: expected .*got Doubled"):
        network.from_module(Doubled(nn.Linear(2, 2)), "mse")
    with pytest.raises(ValueError, match=r"'0' \(Doubled\)"):
        network.from_module(nn.Sequential(Doubled(nn.Linear(2, 2))), "mse")


def test_a_leading_flatten_is_understood():
    net = network.from_module(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "mse")
    assert net.flattens
    assert net.names == ("1",)
    assert torch.equal(net.layers[0].weight, net.modules[0].weight)
