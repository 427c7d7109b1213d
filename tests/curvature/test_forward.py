"""How a batch reaches the model and its outputs come back as `(N, C)` or `(N, T, C)`, or an error that says why not."""

from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lapkit.curvature import Parameters
from lapkit.curvature.capture.forward import call, forward
from lapkit.curvature.parameters import unwrapped


class Spread(nn.Module):
    """Takes its inputs one by one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, scale, shift=None):
        out = self.layer(x) * scale
        return out if shift is None else out + shift


class Whole(nn.Module):
    """Takes its inputs as they come."""

    def __init__(self, pick):
        super().__init__()
        self.layer, self.pick = nn.Linear(3, 2), pick

    def forward(self, batch):
        x, scale = self.pick(batch)
        return self.layer(x) * scale


class Keywords(Spread):
    """Takes whatever it is given by name."""

    def forward(self, **inputs):
        return self.layer(inputs["x"]) * inputs["scale"]


class Returns(nn.Module):
    """Gives back what a function makes of a vector of outputs."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(3, 24), function

    def forward(self, x):
        return self.function(self.layer(x))


class Encoding(UserDict):
    """As tokenizers return: a mapping that is no dict, with further attributes."""

    encodings = None


Pair = namedtuple("Pair", ["x", "scale"])


@pytest.fixture
def inputs():
    return torch.randn(4, 3), torch.randn(4, 1)


def outputs(function, x=None, **arguments):
    model = Returns(function)
    x = torch.randn(4, 3) if x is None else x
    return model.layer(x), forward(model, x, Parameters.of(model), **arguments)


@pytest.mark.parametrize("kind", [dict, Encoding, tuple, list, "named tuple"])
def test_inputs_are_spread_over_a_model_that_takes_them_so(kind, inputs):
    model = Spread()
    x, scale = inputs
    batch = {
        dict: {"x": x, "scale": scale},
        Encoding: Encoding(x=x, scale=scale),
        tuple: (x, scale),
        list: [x, scale],
        "named tuple": Pair(x, scale),
    }[kind]
    expected = model.layer(x) * scale
    assert torch.equal(call(model, batch), expected)
    assert torch.equal(forward(model, batch, Parameters.of(model)), expected)


def test_optional_arguments_may_be_given_or_left_out(inputs):
    model = Spread()
    x, scale = inputs
    expected = model.layer(x) * scale + 1
    assert torch.equal(call(model, (x, scale, torch.ones(4, 2))), expected)
    assert torch.equal(call(model, {"scale": scale, "shift": torch.ones(4, 2), "x": x}), expected)
    torch.testing.assert_close(call(model, {"x": x, "scale": scale, "shift": None}), expected - 1)
    torch.testing.assert_close(call(model, (x, scale)), expected - 1)


def test_a_model_of_keywords_gets_a_mapping_spread(inputs):
    model = Keywords()
    x, scale = inputs
    assert torch.equal(call(model, Encoding(x=x, scale=scale)), model.layer(x) * scale)


@pytest.mark.parametrize("kind", [dict, Encoding, tuple, list])
def test_inputs_stay_whole_for_a_model_that_takes_one(kind, inputs):
    x, scale = inputs
    by_name = kind in (dict, Encoding)
    model = Whole(lambda b: (b["x"], b["scale"]) if by_name else b)
    batch = kind(x=x, scale=scale) if by_name else kind((x, scale))
    expected = model.layer(x) * scale
    assert torch.equal(call(model, batch), expected)
    assert torch.equal(forward(model, batch, Parameters.of(model)), expected)


def test_a_mapping_of_other_keys_than_names_stays_whole(inputs):
    model = Whole(lambda b: (b[0], b[1]))
    assert torch.equal(call(model, dict(enumerate(inputs))), model.layer(inputs[0]) * inputs[1])


def test_a_tensor_is_never_spread(inputs):
    model = Spread()
    with pytest.raises(TypeError, match="scale"):
        call(model, torch.randn(2, 3))  # two rows would fit two arguments


def test_forward_fn_takes_the_batch_as_it_is(inputs):
    model = Spread()
    seen = []

    def function(m, batch):
        seen.append((m, batch))
        return m(batch["x"], 2.0).exp()

    batch = {"x": inputs[0], "label": "a string"}
    actual = forward(model, batch, Parameters.of(model), forward_fn=function)
    assert torch.equal(actual, (2 * model.layer(inputs[0])).exp())
    assert seen == [(model, batch)]


FORMS = {  # name: (what the model makes of (4, 24), output_axis, what the engine sees of it)
    "vector": (lambda h: h[:, 0], None, lambda h: h[:, :1]),
    "one output": (lambda h: h[:, :1], None, lambda h: h[:, :1]),
    "table": (lambda h: h, None, lambda h: h),
    "table, axis named": (lambda h: h, 1, lambda h: h),
    "table, last axis": (lambda h: h, -1, lambda h: h),
    "sequence": (lambda h: h.reshape(4, 8, 3), None, lambda h: h.reshape(4, 8, 3)),
    "sequence, classes in the middle": (lambda h: h.reshape(4, 3, 8), 1, lambda h: h.reshape(4, 3, 8).mT),
    "sequence, last axis": (lambda h: h.reshape(4, 8, 3), 2, lambda h: h.reshape(4, 8, 3)),
    "image": (lambda h: h.reshape(4, 3, 2, 4), None, lambda h: h.reshape(4, 3, 8).mT),
    "image, classes last": (lambda h: h.reshape(4, 2, 4, 3), -1, lambda h: h.reshape(4, 8, 3)),
    "image, axis 2": (lambda h: h.reshape(4, 2, 3, 4), 2, lambda h: h.reshape(4, 2, 3, 4).mT.reshape(4, 8, 3)),
    "volume": (lambda h: h.reshape(4, 3, 2, 2, 2), None, lambda h: h.reshape(4, 3, 8).mT),
    "object with logits": (lambda h: SimpleNamespace(logits=h, loss=None), None, lambda h: h),
    "object with logits of a sequence": (
        lambda h: SimpleNamespace(logits=h.reshape(4, 8, 3)),
        None,
        lambda h: h.reshape(4, 8, 3),
    ),
}


class Wrapped(nn.Module):
    """Hides the signature of what it wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class OfMapping(nn.Linear):
    """Takes a mapping as it is."""

    def forward(self, data):
        return super().forward(data["x"])


def test_a_wrapper_that_hides_a_mapping_is_told_the_way_out():
    model, data = Wrapped(OfMapping(3, 2)), {"x": torch.randn(4, 3), "y": torch.zeros(4)}
    with pytest.raises(TypeError, match=r"unexpected keyword.*give forward_fn=lambda model, x: model\(x\)\.$"):
        forward(model, data, Parameters.of(model))
    actual = forward(model, data, Parameters.of(model), forward_fn=lambda model, x: model(x))
    assert torch.equal(actual, forward(model.model, data, Parameters.of(model.model)))
    with pytest.raises(TypeError, match=r"Expected one batch: a tensor"):
        forward(model, data, Parameters.of(model), forward_fn=lambda model, x: model(**x))
    with pytest.raises(TypeError, match=r"Expected one batch: a tensor"):
        forward(model.model, {"x": None}, Parameters.of(model.model))  # nothing was spread


@pytest.mark.parametrize("form", FORMS)
def test_outputs_have_one_form(form):
    function, axis, expected = FORMS[form]
    h, actual = outputs(function, output_axis=axis)
    assert torch.equal(actual, expected(h))
    assert actual.grad_fn is not None


def test_positions_of_an_image_are_row_major():
    h, actual = outputs(lambda h: h.reshape(4, 2, 3, 4))
    image = h.reshape(4, 2, 3, 4)
    for row in range(3):
        for column in range(4):
            assert torch.equal(actual[:, row * 4 + column], image[:, :, row, column])


REFUSED = {  # name: (what the model returns, arguments, error, words)
    "tuple": (lambda h: (h, h), {}, TypeError, r"it returned tuple.*forward_fn"),
    "none": (lambda h: None, {}, TypeError, "it returned NoneType"),
    "integers": (lambda h: h.argmax(1), {}, TypeError, "it returned torch.int64"),
    "complex numbers": (lambda h: h + 1j, {}, TypeError, "it returned torch.complex128"),
    "object without logits": (lambda h: SimpleNamespace(prediction=h), {}, TypeError, "it returned SimpleNamespace"),
    "logits that are no tensor": (lambda h: SimpleNamespace(logits=[h]), {}, TypeError, "it returned list"),
    "a single number": (lambda h: h.sum(), {}, ValueError, r"it returned \(\)"),
    "no outputs": (lambda h: h[:, :0], {}, ValueError, r"it returned \(4, 0\)"),
    "no positions": (lambda h: h.reshape(4, 8, 3)[:, :0], {}, ValueError, r"it returned \(4, 0, 3\)"),
    "no examples": (lambda h: h[:0], {}, ValueError, r"it returned \(0, 24\)"),
    "the axis of examples": (lambda h: h, {"output_axis": 0}, ValueError, "axis 0 holds the examples"),
    "the axis of examples from behind": (lambda h: h, {"output_axis": -2}, ValueError, "axis of classes"),
    "an axis that is not there": (lambda h: h, {"output_axis": 2}, ValueError, r"output_axis=2 .*\(4, 24\)"),
    "an axis before all": (lambda h: h.reshape(4, 8, 3), {"output_axis": -4}, ValueError, "output_axis=-4"),
    "a vector with an axis": (lambda h: h[:, 0], {"output_axis": 1}, ValueError, r"\(4,\)"),
    "NaN": (lambda h: h.log().abs() if (h < 0).any() else h, {}, ValueError, "outputs are NaN or infinite"),
    "infinity": (lambda h: h / 0, {}, ValueError, "outputs are NaN or infinite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_outputs(case):
    function, arguments, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        outputs(function, **arguments)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}, lambda x: {"x": (x, "label")}])
def test_inputs_with_nan_are_refused_wherever_they_are(wrap):
    model = Whole(lambda b: (b, 1))
    x = torch.randn(4, 3)
    x[2, 1] = float("nan")
    with pytest.raises(ValueError, match="inputs hold NaN"):
        forward(model, wrap(x), Parameters.of(model))


def test_infinite_inputs_are_refused_unless_they_may_be_a_mask():
    model = Whole(lambda b: (b["x"] if isinstance(b, dict) else b, 1))
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="inputs hold NaN or infinite"):
        forward(model, x / 0, Parameters.of(model))
    model = Whole(lambda b: ((b["scores"] + b["mask"]).softmax(-1), 1))
    mask = torch.tensor([0.0, -torch.inf, 0.0]).expand(4, 3)
    batch = {"scores": x, "mask": mask}
    assert torch.equal(forward(model, batch, Parameters.of(model)), model.layer((x + mask).softmax(-1)))
    with pytest.raises(ValueError, match="outputs are NaN or infinite"):
        forward(model, {**batch, "mask": torch.full_like(mask, -torch.inf)}, Parameters.of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_inputs_of_another_type_are_named(dtype):
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=rf"weights of type torch.float64, failed on inputs of type {dtype}.*x.to"):
        forward(model, torch.ones(4, 3, dtype=dtype), Parameters.of(model))


def test_an_error_of_the_model_itself_comes_out_with_the_shape_of_its_inputs():
    def fail(h):
        raise RuntimeError("a message of the model's own")

    with pytest.raises(RuntimeError, match=r"^The model failed on inputs of shape .*: a message of the model's own$"):
        outputs(fail)
    model = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        forward(model, torch.randn(4, 2), Parameters.of(model))


def test_a_plain_model_is_its_own_inside():
    model = nn.Linear(3, 2)
    assert unwrapped(model) is model


def test_the_module_inside_of_wrappers_is_found():
    model = nn.Sequential(nn.Linear(3, 2))
    parallel = nn.DataParallel(model)
    compiled = torch.compile(model, backend="eager")
    assert unwrapped(parallel) is model
    assert unwrapped(compiled) is model
    assert unwrapped(torch.compile(parallel, backend="eager")) is model
    assert unwrapped(nn.DataParallel(compiled)) is model


def test_compiled_parts_are_run_as_they_are_written():
    model = nn.Sequential(nn.Linear(3, 4), torch.compile(nn.Sequential(nn.Tanh(), nn.Linear(4, 2)), backend="eager"))
    x = torch.randn(5, 3)
    output = forward(model, x, Parameters.of(model))
    assert output.grad_fn.name() == "AddmmBackward0"
    assert torch.equal(output, forward(unwrapped(torch.compile(model, backend="eager")), x, Parameters.of(model)))
