import pytest
import torch
from torch.nn import functional as F

from dante_kernels import losses

TWINS = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": F.binary_cross_entropy_with_logits,
}


@pytest.mark.parametrize("loss", losses.CODES)
@pytest.mark.parametrize("class_indices", [True, False])
def test_value_and_gradient_equal_the_torch_namesake(loss, class_indices):
    torch.manual_seed(0)
    h = (3 * torch.randn(6, 4, dtype=torch.float64)).requires_grad_()
    target = torch.randint(0, 4, (6,)) if class_indices else torch.rand(6, 4, dtype=torch.float64)
    values = losses.as_values(target, 4, torch.float64)
    expected = TWINS[loss](h, values)
    (gradient,) = torch.autograd.grad(expected, h)
    code = losses.code(loss)
    torch.testing.assert_close(losses.value(code, h.detach(), values), expected.detach())
    torch.testing.assert_close(losses.gradient(code, h.detach(), values), gradient)


@pytest.mark.parametrize("loss", losses.CODES)
def test_huge_outputs_stay_finite(loss):
    h = torch.tensor([[300.0, -300.0]])
    values = torch.tensor([[0.0, 1.0]])
    assert losses.value(losses.code(loss), h, values).isfinite()
    assert losses.gradient(losses.code(loss), h, values).isfinite().all()


@pytest.mark.parametrize("label", [-1, 3, 10**9])
def test_a_class_out_of_range_is_nan_not_silence(label):
    values = losses.as_values(torch.tensor([0, label]), 3, torch.float32)
    assert values[0].tolist() == [1, 0, 0]
    assert values[1].isnan().all()


@pytest.mark.parametrize("loss", ["hinge", 0, None, ["mse"]])
def test_an_unknown_loss_is_refused_with_the_known_ones(loss):
    with pytest.raises(ValueError, match="loss: expected one of mse, cross_entropy, binary_cross_entropy"):
        losses.code(loss)
