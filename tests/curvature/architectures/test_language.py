"""What is peculiar to models of transformers and peft: their inputs, caches, adapters and modes."""

import warnings

import pytest
import torch
from networks import brute_force
from networks.cases import CASES, padded, tokens

from lapkit.curvature import GGN, Categorical, Engine, GGNDiagonal, Parameters, accumulate, borrowed

hf = pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture
def classifier():
    return CASES["bert sdpa"].build()


@pytest.fixture
def adapted():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return CASES["llama with lora sdpa"].build()


def engine_jacobian(model, x, **options):
    """(N, K, P)."""
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        return Engine(model, parameters, **options).jacobian(x)[1].to_dense().transpose(0, 1)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_a_tokenizers_output_is_spread_over_the_arguments(classifier):
    """A `BatchEncoding` is a mapping but no dict."""
    x = padded(3)
    expected = engine_jacobian(classifier, x)
    close(engine_jacobian(classifier, hf.BatchEncoding(x)), expected)
    close(engine_jacobian(classifier, x, forward_fn=lambda m, z: m(**z).logits), expected)
    logits_of_tuple = lambda m, z: m(**z, return_dict=False)[0]  # noqa: E731
    close(engine_jacobian(classifier, x, forward_fn=logits_of_tuple), expected)


def test_batches_of_encodings(classifier):
    parameters = Parameters.of(classifier)
    x, y = padded(4), torch.tensor([0, 2, 1, 0])
    diagonal = GGNDiagonal(parameters)
    batches = [(hf.BatchEncoding({k: v[part] for k, v in x.items()}), y[part]) for part in (slice(3), slice(3, 4))]
    totals = accumulate(classifier, parameters, Categorical(), GGN(), batches, [diagonal])
    assert totals.count == 4
    f, rows = brute_force.jacobian(classifier, x, 4, CASES["bert sdpa"].outputs)
    p = f.softmax(-1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    close(diagonal.result().operator().diagonal(), torch.einsum("nap,nab,nbp->p", rows, hessian, rows))


def test_padding_does_not_matter(classifier):
    """More of it, behind the mask, changes no derivative."""
    x = padded(3)
    longer = {key: torch.nn.functional.pad(value, (0, 2)) for key, value in x.items()}
    close(engine_jacobian(classifier, longer), engine_jacobian(classifier, x))


def test_key_value_caches_and_dropout(unchanged):
    """Caches are on by default in decoders; dropout is off while the model is borrowed."""
    model, x = CASES["gpt-2 sdpa"].build(), tokens(3)
    expected = engine_jacobian(model, x)
    model.config.use_cache = True
    model.train()
    with unchanged(model):
        close(engine_jacobian(model, x), expected)
    assert model.training


def test_adapters_alone_are_differentiated(adapted):
    """And the head's trainable copy; the frozen original beside it never runs."""
    names = Parameters.of(adapted).names
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    assert any("modules_to_save" in name for name in names)


def test_merged_adapters_are_refused(adapted):
    """They have become part of the frozen weights, and the forward pass does not use them any more."""
    adapted.merge_adapter()
    with pytest.raises(ValueError, match=r"never uses the selected parameters \['.*lora_A"):
        engine_jacobian(adapted, padded(3))
    adapted.unmerge_adapter()
    assert engine_jacobian(adapted, padded(3)).abs().max() > 0


def test_disabled_adapters_are_refused(adapted):
    with adapted.disable_adapter(), pytest.raises(ValueError, match="No parameter is selected"):
        engine_jacobian(adapted, padded(3))
