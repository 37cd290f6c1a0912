"""Function transforms of PyTorch (``torch.func``) on networks in evaluation: gradients for each
image, Jacobians, products with the Hessian."""

import pytest
import torch
from networks import batch, network
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F

from resnetv2_cli.layers import keep_layout
from resnetv2_cli.plans import UNITS
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.shortcuts import SHORTCUTS

# PyTorch's own, in forward mode
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
LAYOUTS = [torch.contiguous_format, torch.channels_last]
WAYS = [*[{"unit": u} for u in UNITS], *[{"shortcut": s} for s in SHORTCUTS], {"block": "single"}]


def loss(net: ResNet, weights: dict, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    logits = functional_call(net, weights, (x[None],))
    return F.cross_entropy(logits, label[None])


def told(way: dict) -> str:
    return "-".join(way.values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("way", WAYS, ids=told)
def test_gradients_for_each_image_are_those_of_images_alone(way, layout):
    net = network(8, **way).eval().to(memory_format=layout)
    x, labels = batch(3, 16)
    x = x.to(memory_format=layout)
    weights = {k: v.detach() for k, v in net.named_parameters()}
    each = vmap(lambda x, label: grad(lambda w: loss(net, w, x, label))(weights))(x, labels)
    for i in range(3):
        net.zero_grad()
        F.cross_entropy(net(x[i : i + 1]), labels[i : i + 1]).backward()
        for name, weight in net.named_parameters():
            torch.testing.assert_close(each[name][i], weight.grad)


@pytest.mark.parametrize("way", WAYS, ids=told)
def test_jacobians_of_both_modes_agree(way):
    net = network(8, **way).eval()
    x, _ = batch(1)
    expected = torch.autograd.functional.jacobian(net, x)
    torch.testing.assert_close(jacrev(net)(x), expected)
    torch.testing.assert_close(jacfwd(net)(x), expected)
    vectorized = torch.autograd.functional.jacobian(net, x, vectorize=True)
    torch.testing.assert_close(vectorized, expected)


@pytest.mark.parametrize("way", WAYS, ids=told)
def test_products_with_the_hessian_are_autograds(way):
    net = network(8, **way).eval()
    x, labels = batch(1)

    def cost(x):
        return F.cross_entropy(net(x), labels)

    direction = torch.randn_like(x)
    _, product = jvp(grad(cost), (x,), (direction,))
    _, expected = torch.autograd.functional.hvp(cost, x, direction)
    torch.testing.assert_close(product, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("given", LAYOUTS, ids=["from-nchw", "from-nhwc"])
def test_a_gradient_is_laid_out_as_its_tensor(layout, given):
    """Whatever the layout of the gradient that arrives, as that of pooling."""
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y, seen = (x * 1).to(memory_format=layout), []
    y.register_hook(seen.append)
    gradient = torch.randn(2, 3, 4, 4).to(memory_format=given)
    keep_layout(y).backward(gradient)
    [grad] = seen
    assert grad.is_contiguous(memory_format=layout) and torch.equal(grad, gradient)
