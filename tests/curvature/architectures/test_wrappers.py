"""Models as training loops leave them: compiled, distributed, under autocast, with inputs of inference mode."""

import copy

import pytest
import torch
import torch.distributed as dist
from networks import brute_force
from networks.cases import CASES
from torch import nn

from lapkit.curvature import GGN, Categorical, Engine, GGNDense, GGNDiagonal, Parameters, accumulate, borrowed

NETWORKS = ["mlp", "resnet basic", "vit", "lstm outputs"]


def engine_jacobian(model, x):
    """(N, K, P)."""
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        return Engine(model, parameters).jacobian(x)[1].to_dense().transpose(0, 1)


def expected(name):
    """A case, its model, three examples, and the slow Jacobian (N, K, P)."""
    case = CASES[name]
    model, x = case.build(), case.inputs(3)
    rows = brute_force.jacobian(model, x, 3, case.outputs)[1]
    return model, x, rows.reshape(3, -1, rows.shape[-1])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@pytest.fixture
def compiler():
    """Leaves no compiled code behind."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_compiled_model_is_unwrapped(name, compiler):
    model, x, rows = expected(name)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    close(engine_jacobian(compiled, x), rows)


def test_a_model_compiled_in_place(compiler):
    model, x, rows = expected("mlp")
    model.compile(backend="eager")
    model(x)
    close(engine_jacobian(model, x), rows)
    model(x)  # and still runs compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's tracer
def test_a_compiled_part(compiler):
    model, x, rows = expected("resnet basic")
    model[3] = torch.compile(model[3], backend="aot_eager")
    model(x)
    close(engine_jacobian(model, x), rows)


def test_a_model_that_is_to_be_compiled_to_machine_code():
    """Which would happen at the first call, and take half a minute: the engine calls what is inside."""
    model, x, rows = expected("mlp")
    close(engine_jacobian(torch.compile(model), x), rows)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_distributed_model_is_unwrapped(name, process_group):
    model, x, rows = expected(name)
    wrapped = nn.parallel.DistributedDataParallel(model)
    close(engine_jacobian(wrapped, x), rows)
    wrapped(x).sum().backward()  # its own machinery still works
    assert all(p.grad is not None for p in model.parameters())


def test_a_data_parallel_model_is_unwrapped():
    model, x, rows = expected("mlp")
    close(engine_jacobian(nn.DataParallel(model), x), rows)


@pytest.mark.parametrize("name", ["mlp", "resnet basic", "vit"])
def test_autocast(name):
    """The model runs in bfloat16, 8 bits an operation, as in training; lapkit's own sums must not.

    So errors are those of activations and cotangents, some per cent after a few layers, and results are float32.
    """
    case = CASES[name]
    model, x = case.build().float(), case.inputs(3).float()
    rows = brute_force.jacobian(copy.deepcopy(model).double(), x.double(), 3, case.outputs)[1]
    rows = rows.reshape(3, -1, rows.shape[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = engine_jacobian(model, x)
    assert found.dtype == torch.float32
    assert (found - rows).norm() < 0.05 * rows.norm()


def test_sums_are_not_made_in_half_precision_under_autocast():
    """A thousand equal examples: their sum in bfloat16 would stop growing at 256 times one of them."""
    model = nn.Linear(2, 2, bias=False).float()
    parameters = Parameters.of(model)
    x = torch.ones(1000, 2, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        diagonal, dense = GGNDiagonal(parameters), GGNDense(parameters)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            batch = (x, torch.zeros(1000, dtype=torch.long))
            accumulate(model, parameters, Categorical(), GGN(), [batch], [diagonal, dense])
        results.append(torch.cat([diagonal.result().operator().to_dense(), dense.result().operator().to_dense()]))
        assert results[-1].dtype == torch.float32
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_made_in_inference_mode(name):
    model, x, _ = expected(name)
    parameters = Parameters.of(model)
    y = torch.zeros(model(x)[..., 0].shape, dtype=torch.long)
    results = []
    for mode in (torch.enable_grad, torch.inference_mode):
        diagonal = GGNDiagonal(parameters)
        with mode():
            accumulate(model, parameters, Categorical(), GGN(), [(x.clone(), y.clone())], [diagonal])
        results.append(diagonal.result().operator().diagonal())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_inference_tensors_given_to_the_engine_itself():
    model, x, rows = expected("mlp")
    with torch.inference_mode():
        made = x.clone()
    close(engine_jacobian(model, made), rows)
