"""What cannot work is refused with a message that says what to do, and the model is as it was."""

import copy
from contextlib import contextmanager

import pytest
import torch
from dense_laplace import KINDS, STRUCTURES, problem, untouched
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit import Laplace
from lapkit.curvature import Bernoulli, Categorical, Gaussian

NAN, INF = float("nan"), float("inf")


@contextmanager
def refused(model, error, message):
    with untouched(model), pytest.raises(error, match=message):
        yield


def data(kind="classification", *, x=None, y=None):
    case = problem(kind)
    return [(case.x if x is None else x, case.y if y is None else y)]


def fitted(kind="classification", **options):
    case = problem(kind)
    return Laplace(case.model, kind, "all", **options).fit(case.data)


# -- names and numbers that a Laplace is made with


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "softmax"}, "Unknown likelihood 'softmax'. Choose one of 'classification', 'regr"),
        ({"hessian_structure": "kfac"}, "Unknown hessian_structure 'kfac'. Choose one of 'diag', 'kron'"),
        ({"subset_of_weights": "last"}, "Unknown subset_of_weights 'last'. Choose 'all', 'last_layer', 'subn"),
        (
            {"subset_of_weights": ["5.weight"]},
            r"\['5.weight'\] name no trainable parameter.* Trainable are \['0.weight'",
        ),
        ({"subset_of_weights": ["0", "we"]}, r"\['we'\] name no trainable parameter"),
        ({"subset_of_weights": []}, "No parameter is selected"),
        ({"curvature": "fisher"}, "Unknown curvature 'fisher'. Choose one of 'ggn', 'mc', 'ef'"),
        ({"curvature": 3}, "Unknown curvature 3"),
        ({"prior_precision": 0.0}, "Prior precisions must be positive and finite"),
        ({"prior_precision": torch.tensor([1.0, NAN])}, "Prior precisions must be positive and finite"),
        ({"prior_precision": torch.ones(2, 2)}, r"a number or a vector, got shape \(2, 2\)"),
        ({"prior_mean": NAN}, "prior mean is a finite number or vector"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": NAN}, "temperature must be positive"),
        ({"temperature": INF}, "temperature must be positive and finite"),
        ({"sigma_noise": 0.5}, "sigma_noise=0.5 was given.* belongs to 'regression' only"),
        ({"likelihood": "binary", "sigma_noise": 0.5}, "belongs to 'regression' only"),
        ({"likelihood": Gaussian(0.3), "sigma_noise": 0.5}, "A Gaussian object has its own noise"),
        ({"likelihood": "regression", "sigma_noise": 0.0}, "noise must be one positive number"),
        ({"likelihood": "regression", "sigma_noise": NAN}, "noise must be one positive number"),
        ({"likelihood": "regression", "sigma_noise": torch.ones(2)}, "noise must be one positive number"),
    ],
    ids=str,
)
def test_what_a_laplace_is_made_with(options, message):
    model = problem("classification").fresh
    with refused(model, ValueError, message):
        Laplace(model, **{"likelihood": "classification"} | options)


@pytest.mark.parametrize("model", [lambda x: x, "net.pt", None])
def test_a_model_is_a_module(model):
    with pytest.raises(TypeError, match=r"Expected a torch.nn.Module, got"):
        Laplace(model, "classification")


@pytest.mark.parametrize("subset", ["all", "last_layer", ["0"]])
def test_all_parameters_frozen(subset):
    model = problem("classification").fresh.requires_grad_(False)
    with refused(model, ValueError, r"No parameter is selected.*requires_grad_\(True\)"):
        Laplace(model, "classification", subset)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_no_parameters(subset):
    model = nn.Sequential(nn.Flatten(), nn.Softmax(1))
    with refused(model, ValueError, "No parameter is selected: the model has none with requires_grad=True"):
        Laplace(model, "classification", subset)


# -- use before the fit


@pytest.mark.parametrize(
    "use",
    [
        lambda la: la(problem("classification").x),
        lambda la: la.sample(),
        lambda la: la.log_marginal_likelihood(),
        lambda la: la.optimize_prior_precision(),
        lambda la: la.posterior_precision,
        lambda la: la.predictive_distribution(problem("classification").x),
        lambda la: la.functional_samples(problem("classification").x),
        lambda la: la.n_params,
        lambda la: la.log_likelihood,
        lambda la: la.scatter,
        lambda la: la.log_det_ratio,
    ],
)
def test_use_before_the_fit(use):
    model = problem("classification").fresh
    with refused(model, RuntimeError, r"has not been fitted: call la.fit\(train_loader\) first"):
        use(Laplace(model, "classification"))


# -- names and numbers of the methods


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        (
            "classification",
            lambda la, x: la(x, link_approx="logit"),
            "Unknown link_approx 'logit'. Choose one of 'probit', 'probit_centered', 'mean_field', 'bridge'",
        ),
        ("classification", lambda la, x: la(x, pred_type="gp"), "Unknown pred_type 'gp'. Choose one of 'glm'"),
        ("classification", lambda la, x: la(x, link_approx="mc", n_samples=0), "at least one sample, got n_samples=0"),
        ("classification", lambda la, x: la(x, joint=True), "joint predictive is defined for regression"),
        ("binary", lambda la, x: la(x, joint=True), "joint predictive is defined for regression"),
        (
            "classification",
            lambda la, x: la.optimize_prior_precision("cv"),
            "Unknown method 'cv'. Choose one of 'marglik', 'gridsearch'",
        ),
        (
            "classification",
            lambda la, x: la.optimize_prior_precision(prior_structure="full"),
            "Unknown prior_structure 'full'. Choose one of 'scalar', 'layer",
        ),
        (
            "classification",
            lambda la, x: la.optimize_prior_precision(tune_noise=True),
            "Categorical has no observation noise",
        ),
        (
            "classification",
            lambda la, x: la.log_marginal_likelihood(sigma_noise=0.5),
            "Categorical has no observation noise; only regression has",
        ),
        ("classification", lambda la, x: setattr(la, "sigma_noise", 0.5), "Categorical has no observation noise"),
        ("classification", lambda la, x: la.log_marginal_likelihood(-1.0), "must be positive and finite"),
        (
            "classification",
            lambda la, x: la.log_marginal_likelihood(torch.ones(5)),
            "Expected 1 prior precision, 6 .* or 59 .*, got 5",
        ),
        ("regression", lambda la, x: la.log_marginal_likelihood(sigma_noise=-1.0), "must be one positive number"),
    ],
)
def test_what_methods_are_asked_for(kind, call, message):
    la = fitted(kind)
    with refused(la.model, ValueError, message):
        call(la, problem(kind).new_x)


# -- data


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize(
    "loader",
    [[], iter(()), DataLoader(TensorDataset(torch.zeros(3, 3), torch.zeros(3)), batch_size=4, drop_last=True)],
    ids=["list", "iterator", "drop_last"],
)
def test_an_empty_loader(loader, subset):
    model = problem("classification").fresh
    with refused(model, ValueError, "The data is empty: .* Check the data loader"):
        Laplace(model, "classification", subset).fit(loader)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(4, 3),
        (torch.zeros(4, 3),),
        (torch.zeros(4, 3), torch.zeros(4), torch.zeros(4, dtype=torch.long)),
        {"x": torch.zeros(4, 3), "y": torch.zeros(4)},
        (torch.zeros(4, 3), 1),
        None,
    ],
    ids=["tensor", "one", "three", "dict", "a number", "None"],
)
def test_a_batch_that_is_not_a_pair(batch, subset):
    model = problem("classification").fresh
    with refused(model, TypeError, r"Batch 0 of the data is a .*expected a pair \(inputs, targets\).*collate_fn"):
        Laplace(model, "classification", subset).fit([batch])


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_a_data_set_without_a_loader(subset):
    case = problem("classification")
    with refused(case.model, TypeError, "a TensorDataset, which gives one example at a time.*DataLoader"):
        Laplace(case.model, "classification", subset).fit(TensorDataset(torch.zeros(3, 3), torch.zeros(3).long()))


def test_the_number_of_the_bad_batch_is_told():
    case = problem("classification")
    with pytest.raises(TypeError, match="Batch 2 of the data"):
        Laplace(case.model, "classification").fit([*case.data[:2], case.x])


@pytest.mark.parametrize(
    ("kind", "y", "error", "message"),
    [
        ("classification", torch.arange(13) % 4, ValueError, "between 0 and 3, but the model has 3 outputs.*Renumber"),
        ("classification", torch.arange(13) % 3 - 1, ValueError, "between -1 and 1, but the model has 3 outputs"),
        ("classification", torch.zeros(12, dtype=torch.long), ValueError, r"\(12,\) targets for outputs \(13, 3\)"),
        ("classification", torch.zeros(13, 3, dtype=torch.long), ValueError, r"One-hot rows become indices by .argmax"),
        ("classification", torch.zeros(13), TypeError, r"integer type, got torch.float\d+. Convert them with .long"),
        ("classification", torch.zeros(13, dtype=torch.bool), TypeError, r"integer type, got torch.bool"),
        ("classification", torch.tensor(1), ValueError, "one target an example is expected"),
        ("regression", torch.zeros(13), ValueError, r"targets of shape \(13, 2\) like the outputs, got \(13,\)"),
        ("regression", torch.zeros(13, 1), ValueError, r"targets of shape \(13, 2\) like the outputs, got \(13, 1\)"),
        ("regression", torch.zeros(12, 2), ValueError, r"\(12, 2\) targets for outputs \(13, 2\)"),
        ("regression", torch.full((13, 2), NAN), ValueError, "targets hold NaN or infinite values. Remove or impute"),
        ("regression", torch.full((13, 2), INF), ValueError, "targets hold NaN or infinite values"),
        ("binary", torch.zeros(13), ValueError, r"targets of shape \(13, 2\) \(one for each logit\), got \(13,\)"),
        ("binary", torch.full((13, 2), 2.0), ValueError, "Expected targets 0 or 1, got values between 2 and 2"),
        ("binary", torch.full((13, 2), 0.5), ValueError, "Expected targets 0 or 1, got values between 0.5 and 0.5"),
        ("binary", torch.full((13, 2), NAN), ValueError, "targets hold NaN"),
    ],
)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_targets_that_do_not_fit(kind, y, error, message, subset):
    model = problem(kind).fresh
    with refused(model, error, message):
        Laplace(model, kind, subset).fit(data(kind, y=y))


def test_a_single_logit_is_not_a_classification():
    model = nn.Linear(3, 1)
    with refused(model, ValueError, r"has 1 output.* use the likelihood lapkit.curvature.Bernoulli\(\)"):
        Laplace(model, "classification", "all").fit(data(y=torch.zeros(13, dtype=torch.long)))
    assert Laplace(model, Bernoulli(), "all").fit(data(y=torch.zeros(13))).fitted.outputs == 1


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_inputs_that_are_not_finite(bad, subset):
    case, model = problem("classification"), problem("classification").fresh
    x = case.x.clone()
    x[3, 1] = bad
    with refused(model, ValueError, "inputs hold NaN or infinite values. Remove or impute"):
        Laplace(model, "classification", subset).fit(data(x=x))
    la = Laplace(model, "classification", subset).fit(case.data)
    with refused(model, ValueError, "inputs hold NaN or infinite values"):
        la(x)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_weights_that_are_not_finite(bad):
    model = problem("classification").fresh
    with torch.no_grad():
        model[2].bias[1] = bad
    with refused(model, ValueError, r"\['2.bias'\] hold NaN or infinite values: training has diverged.*Train again"):
        Laplace(model, "classification", "all").fit(data())


def test_a_body_whose_weights_are_not_finite():
    """They are not among the last layer's, and show in its outputs."""
    model = problem("classification").fresh
    with torch.no_grad():
        model[2].bias[1] = NAN
    with refused(model, ValueError, "outputs are NaN or infinite on finite inputs: check its weights"):
        Laplace(model, "classification", "last_layer").fit(data())


def test_outputs_that_are_not_finite():
    """Finite weights and inputs, and a logarithm of zero on the way."""

    class Log(nn.Module):
        def forward(self, x):
            return x.clamp_min(0).log()

    model = nn.Sequential(nn.Linear(3, 3), Log(), nn.Linear(3, 3))
    with refused(model, ValueError, "outputs are NaN or infinite on finite inputs: check its weights and the scale"):
        Laplace(model, "classification", "all").fit(data())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_inputs_of_another_type(dtype, subset):
    """Integers in a network of real weights, and real numbers of another precision."""
    case, model = problem("classification"), problem("classification").fresh
    x = (case.x > 0).to(dtype)
    message = r"with weights of type torch.float64, failed on inputs of type .*convert them: x.to\(torch.float64\)"
    with refused(model, TypeError, message):
        Laplace(model, "classification", subset).fit(data(x=x))
    la = Laplace(model, "classification", subset).fit(case.data)
    with refused(model, TypeError, message):
        la(x)


@pytest.mark.parametrize("shape", [(13, 4), (13,)])
def test_inputs_of_a_wrong_shape_are_for_the_model_to_refuse(shape):
    model = problem("classification").fresh
    la = Laplace(model, "classification", "all").fit(problem("classification").data)
    with refused(model, RuntimeError, "shapes cannot be multiplied|size mismatch"):
        Laplace(model, "classification", "all").fit(data(x=torch.zeros(shape)))
    with refused(model, RuntimeError, "shapes cannot be multiplied|size mismatch"):
        la(torch.zeros(shape))


def test_an_input_without_its_axis_of_examples():
    """Three features look like three examples of one output, which do influence each other."""
    la = fitted()
    with refused(la.model, ValueError, "changes with the other examples in its batch"):
        la(torch.ones(3))


def test_no_example_to_predict():
    la = fitted()
    with refused(la.model, ValueError, "at least one example"):
        la(torch.zeros(0, 3))


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(3, 3), function

    def forward(self, x):
        return self.function(self.layer(x))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda f: {"logits": f}, TypeError, r"must return a floating tensor.*it returned dict. Wrap it"),
        (lambda f: (f, f), TypeError, "it returned tuple"),
        (lambda f: f.argmax(1), TypeError, "it returned torch.int64"),
        (lambda f: f.sum(), ValueError, r"it returned \(\)"),
        (lambda f: f[:, :0], ValueError, r"it returned \(13, 0\)"),
        (lambda f: f.detach(), ValueError, "does not depend on the selected parameters.*detached"),
        (lambda f: f[:5], ValueError, r"\(13,\) targets for outputs \(5, 3\)|examples|batch"),
    ],
)
def test_outputs_of_a_wrong_kind(function, error, message):
    model = Returns(function)
    with refused(model, error, message):
        Laplace(model, "classification", "all").fit(data())


# -- examples that influence each other


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)),
        lambda: Returns(lambda f: f - f.mean(0)),
        lambda: Returns(lambda f: f @ f.T @ f),
    ],
    ids=["batch norm without running statistics", "centred", "attention over the batch"],
)
def test_batch_statistics(build, subset):
    model = build()
    with refused(
        model, (ValueError, RuntimeError), "changes with the other examples in its batch|mix examples|influence"
    ):
        Laplace(model, "classification", subset).fit(data())


def test_the_module_that_mixes_examples_is_named():
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 3))
    with refused(model, ValueError, r"first at module 1 \(BatchNorm1d\).*track_running_stats=True"):
        Laplace(model, "classification", "all").fit(data())


# -- priors and memory, before the pass over the data


class Counting:
    """A loader that counts the batches it has given."""

    def __init__(self, batches):
        self.batches, self.given = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.given += 1
            yield batch


@pytest.mark.parametrize(("subset", "seen"), [("all", 0), ("last_layer", 1), (["0", "2"], 0)])
@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (
            {"prior_precision": torch.ones(5)},
            r"Expected 1 prior precision, \d \(one for each parameter tensor\) or \d+",
        ),
        ({"prior_mean": torch.zeros(5)}, r"Expected 1 prior mean, or \d+ \(one for each weight\), got 5"),
    ],
    ids=["precision", "mean"],
)
def test_a_prior_of_a_wrong_length_is_an_error_before_the_work(prior, message, subset, seen):
    """Only the last layer needs a batch to be found."""
    model, loader = problem("classification").fresh, Counting(problem("classification").data)
    la = Laplace(model, "classification", subset, **prior)
    with refused(model, ValueError, message):
        la.fit(loader)
    assert loader.given == seen


def test_a_full_matrix_that_no_memory_holds_is_an_error_before_the_work():
    """A million and a half weights: 16 TiB."""
    model = nn.Sequential(nn.Linear(3, 1200), nn.Linear(1200, 1200), nn.Linear(1200, 3))
    loader = Counting(problem("classification").data)
    with refused(
        model,
        ValueError,
        r"would take [\d.]+ GiB.*more than the [\d.]+ GiB that are free.*'kron' or 'diag'.*last_layer",
    ):
        Laplace(model, "classification", "all", "full").fit(loader)
    assert loader.given == 0


# -- and what looks bad but is not


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_example_is_data(kind, structure):
    case = problem(kind)
    la = Laplace(copy.deepcopy(case.model), kind, "all", structure).fit([(case.x[:1], case.y[:1])])
    assert la.fitted.count == 1
    assert torch.isfinite(la.log_marginal_likelihood())


def test_targets_with_an_axis_too_many_are_understood():
    case = problem("classification")
    plain = Laplace(case.model, "classification").fit(case.data)
    column = Laplace(case.model, Categorical()).fit([(x, y[:, None].int()) for x, y in case.data])
    assert torch.equal(plain.log_marginal_likelihood(), column.log_marginal_likelihood())


# -- where it is called


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("optimizer", ["lbfgs", "newton", "mackay"])
def test_everything_works_without_gradients_being_recorded(context, optimizer):
    model, x, y = nn.Linear(3, 2), torch.randn(20, 3), torch.arange(20) % 2
    expected = Laplace(model, "classification", "all").fit([(x, y)]).optimize_prior_precision(optimizer=optimizer)
    with context():
        la = Laplace(model, "classification", "all").fit([(x, y)])
        assert la.optimize_prior_precision(optimizer=optimizer).log_evidence == pytest.approx(expected.log_evidence)
        assert la(x).shape == (20, 2)


@pytest.mark.parametrize("structure", ["kron", "full", "lowrank"])
def test_one_input_without_an_axis_for_examples(structure):
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    la = Laplace(model, "classification", "all", structure).fit([(x, y)])
    for use in (la, la.functional_covariance, lambda x: la.functional_samples(x, joint=True)):
        with pytest.raises(ValueError, match=r"fitted to 3. .* x\[None\]|examples influence each other"):
            use(x[0])
    assert "60 examples, prior precision 1)" in repr(la)
    assert "not fitted" in repr(Laplace(model, "classification"))


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        ("diag", "'all', GGNDiagonal;"),
        ("kron_reduce", "'all', GGNKronecker(setting='reduce');"),
        ("ekfac", "'all', GGNKronecker + EKFACCorrection;"),
    ],
)
def test_a_posterior_says_which_it_is(structure, said, tmp_path):
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    la = Laplace(model, "classification", "all", structure, prior_precision=torch.tensor([1.0, 2.0, 3.0, 4.5]))
    la.fit([(x, y)]).save(tmp_path / "fit")
    assert said in repr(la)
    assert "prior precision 1 to 4.5)" in repr(la)
    assert repr(Laplace.load(tmp_path / "fit", model)) == repr(la)
