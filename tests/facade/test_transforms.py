"""Transforms of images: known cases, the group's laws, and derivatives in the ranges."""

import math

import pytest
import torch

from lapkit.transforms import LARGEST, AffineTransform


def at(transform, x, *u):
    """The image at one place."""
    return transform(x, torch.tensor([u]))[:, 0]


def full(*kinds):
    """Ranges within a millionth of the largest ones."""
    transform = AffineTransform(kinds, initial=0.5)
    transform.logit.fill_(14.0)
    return transform


def test_it_prints_its_ranges():
    assert repr(AffineTransform(("rotation", "shift_x"))) == "AffineTransform(rotation=0.3142, shift_x=0.1)"


def test_the_middle_of_all_ranges_leaves_the_image():
    x = torch.randn(2, 3, 6, 5)
    torch.testing.assert_close(at(AffineTransform(tuple(LARGEST)), x, *[0.0] * 6), x)


def test_a_quarter_turn_of_a_square_image():
    x = torch.randn(2, 1, 6, 6)
    turned = at(full("rotation"), x, 0.5)
    torch.testing.assert_close(turned, x.rot90(1, (2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 6), (4, 7)])
def test_half_a_turn_of_any_image(shape):
    x = torch.randn(1, 2, *shape)
    torch.testing.assert_close(at(full("rotation"), x, 1.0), x.flip((2, 3)), rtol=1e-4, atol=1e-4)


def test_a_quarter_turn_keeps_shapes_where_the_image_is_wide():
    """A bar across a wide image stands upright afterwards, as long as it was: what is outside is lost."""
    x = torch.zeros(1, 1, 5, 9)
    x[0, 0, 2, 3:6] = 1.0
    expected = torch.zeros(1, 1, 5, 9)
    expected[0, 0, 1:4, 4] = 1.0
    torch.testing.assert_close(at(full("rotation"), x, 0.5), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "axis"), [("shift_x", 3), ("shift_y", 2)])
def test_a_shift_by_whole_pixels(kind, axis):
    """Half the largest range is a quarter of the image: two of eight pixels; zeros come in."""
    x = torch.randn(1, 1, 8, 8)
    moved = at(full(kind), x, 0.5)
    expected = torch.zeros_like(x)
    expected.narrow(axis, 0, 6).copy_(x.narrow(axis, 2, 6))
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


def test_matrices_of_each_kind():
    u, s = torch.tensor([[1.0]]), torch.eye(3)
    c, d = math.cos(math.pi / 2), math.sin(math.pi / 2)
    known = {
        "rotation": s + torch.tensor([[c - 1, -d, 0], [d, c - 1, 0], [0, 0, 0]]),
        "shift_x": s + torch.tensor([[0, 0, 0.5], [0, 0, 0], [0, 0, 0]]),
        "shift_y": s + torch.tensor([[0, 0, 0], [0, 0, 0.5], [0, 0, 0]]),
        "stretch_x": torch.diag(torch.tensor([math.exp(0.35), 1, 1])),
        "stretch_y": torch.diag(torch.tensor([1, math.exp(0.35), 1])),
        "shear": s + torch.tensor([[0, 0.5, 0], [0, 0, 0], [0, 0, 0]]),
    }
    for kind, matrix in known.items():
        transform = AffineTransform((kind,), initial=0.5)
        assert transform.ranges[kind] == pytest.approx(LARGEST[kind] / 2)
        torch.testing.assert_close(transform.matrices(u)[0], matrix.to(u), rtol=1e-6, atol=1e-7)


def test_several_kinds_and_their_inverse():
    transform = AffineTransform(tuple(LARGEST), initial=0.3)
    u = torch.rand(4, 6) * 2 - 1
    product = transform.matrices(u, 1.5) @ transform.matrices(-u, 1.5)
    torch.testing.assert_close(product, torch.eye(3).expand(4, 3, 3), rtol=1e-5, atol=1e-6)


def test_derivatives_in_the_ranges():
    """Of a smooth image: the interpolation has kinks at the pixels."""
    side = torch.linspace(-1, 1, 12)
    x = (-(side**2)[:, None] - (side - 0.3) ** 2).exp()[None, None]
    transform, u = AffineTransform(("rotation", "shift_x"), initial=0.2), torch.tensor([[0.31, 0.57], [-0.7, 0.2]])
    transform.logit.requires_grad_()
    weights = torch.randn(2, 12, 12)

    def value():
        return (transform(x, u)[0, :, 0] * weights).sum()

    (gradient,) = torch.autograd.grad(value(), transform.logit)
    for i in range(2):
        sides = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                transform.logit[i] += sign * 1e-6
                sides.append(float(value()))
        assert float(gradient[i]) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5)


def test_what_is_refused():
    for kinds, initial in (((), 0.1), (("twist",), 0.1), (("rotation",), 0.0), (("rotation",), 1.0)):
        with pytest.raises(ValueError, match="kinds of"):
            AffineTransform(kinds, initial)
    with pytest.raises(ValueError, match="N, C, H, W"):
        AffineTransform()(torch.zeros(3, 64), torch.zeros(2, 1))
