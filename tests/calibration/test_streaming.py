"""Any batching, merging and any number of processes give the number of one pass over all data."""

import dataclasses
import json
import math
import socket
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, distributed

from lapkit.calibration import (
    ClasswiseCorp,
    ClasswiseEqualMass,
    ClasswiseReliability,
    Corp,
    EqualMass,
    EqualWidthReliability,
    FalsePositiveRate,
    Mean,
    Murphy,
    Ranked,
    SmoothCalibrationError,
    Streaming,
    SumMetric,
    TopKCorrect,
    accuracy,
    auroc,
    brier,
    brier_decomposition,
    brier_scores,
    classwise_reliability_curves,
    correct,
    event,
    event_reliability_curve,
    event_score_decomposition,
    flagged,
    fpr_at_tpr,
    log_losses,
    log_losses_from_logits,
    murphy_decomposition,
    nll,
    nll_from_logits,
    ranked_auroc,
    ranked_risks,
    reliability_curve,
    risk_coverage_curve,
    smooth_calibration_error,
    sweep_calibration_error,
    swept_error,
    top_k_accuracy,
)

COUNT = 211


def classes():
    """Rounded probabilities, so that confidences tie and lie on edges."""
    generator = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(COUNT, 3, generator=generator, dtype=torch.float64)).softmax(dim=1)
    p = (p * 10).round() / 10
    p[:, 0] = (1 - p[:, 1] - p[:, 2]).clamp(min=0)
    p = p / p.sum(dim=1, keepdim=True)
    return p, torch.multinomial(p, 1, generator=generator).squeeze(1)


def logits():
    generator = torch.Generator().manual_seed(1)
    return 30 * torch.randn(COUNT, 4, generator=generator), torch.randint(4, (COUNT,), generator=generator)


def events():
    p, y = classes()
    return p[:, 1], y == 1


def flags():
    generator = torch.Generator().manual_seed(2)
    outside = torch.rand(COUNT, generator=generator) < 0.3
    return (torch.randn(COUNT, generator=generator) + outside).round(decimals=1), outside


def kinds(function):
    return lambda s, o: function(s[~o], s[o])


# name: (metric, the function of all data, the data)
CASES = {
    "accuracy": (Mean(correct), accuracy, classes),
    "top 2": (Mean(TopKCorrect(2)), lambda p, y: top_k_accuracy(p, y, k=2), classes),
    "nll": (Mean(log_losses), lambda p, y: nll(p, y), classes),
    "nll of logits": (Mean(log_losses_from_logits), nll_from_logits, logits),
    "brier": (Mean(brier_scores), brier, classes),
    "equal width": (EqualWidthReliability(7), lambda p, y: reliability_curve(p, y, bins=7), classes),
    "equal mass": (Ranked(EqualMass(7)), lambda p, y: reliability_curve(p, y, bins=7, binning="equal_mass"), classes),
    "event": (EqualWidthReliability(7, event), lambda p, y: event_reliability_curve(p, y, bins=7), events),
    "classwise": (ClasswiseReliability(7), lambda p, y: classwise_reliability_curves(p, y, bins=7), classes),
    "classwise mass": (
        ClasswiseEqualMass(7),
        lambda p, y: classwise_reliability_curves(p, y, bins=7, binning="equal_mass"),
        classes,
    ),
    "sweep": (Ranked(swept_error), sweep_calibration_error, classes),
    "smooth": (SmoothCalibrationError(), smooth_calibration_error, classes),
    "CORP": (ClasswiseCorp(), brier_decomposition, classes),
    "CORP, log": (Ranked(Corp("log"), event), lambda p, y: event_score_decomposition(p, y, score="log"), events),
    "Murphy": (Murphy(7), lambda p, y: murphy_decomposition(p, y, bins=7), classes),
    "auroc": (Ranked(ranked_auroc, flagged), kinds(auroc), flags),
    "fpr95": (Ranked(FalsePositiveRate(), flagged), kinds(fpr_at_tpr), flags),
    "risk": (Ranked(ranked_risks), risk_coverage_curve, classes),
}


def numbers(value):
    """Every number of a result, flat."""
    if isinstance(value, Tensor):
        return value.reshape(-1).to(torch.float64).tolist()
    if isinstance(value, tuple):
        return [number for part in value for number in numbers(part)]
    if dataclasses.is_dataclass(value):
        return numbers(tuple(getattr(value, field.name) for field in dataclasses.fields(value)))
    return [float(value)]


def same(value):
    return pytest.approx(numbers(value), rel=1e-12, abs=1e-12, nan_ok=True)


def streamed(metric, batches):
    stream = Streaming(metric)
    for batch in batches:
        stream.update(*batch)
    return stream


def split(predictions, targets, sizes):
    return list(zip(predictions.split(sizes), targets.split(sizes), strict=True))


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    metric, function, data = request.param
    return metric, function, data()


@pytest.mark.parametrize("sizes", [1, 10, COUNT, [1, 200, 10]])
def test_any_batching_gives_the_number_of_all_data(case, sizes):
    metric, function, data = case
    expected = same(function(*data))
    assert numbers(streamed(metric, split(*data, sizes)).compute()) == expected
    assert numbers(metric(*data)) == expected


def test_any_order_gives_the_number_of_all_data(case):
    metric, function, data = case
    shuffle = torch.randperm(COUNT, generator=torch.Generator().manual_seed(3))
    shuffled = streamed(metric, split(*(part[shuffle] for part in data), 50))
    assert numbers(shuffled.compute()) == same(function(*data))


def test_merged_streams_give_the_number_of_all_data_and_stay_as_they_are(case):
    metric, function, data = case
    batches = split(*data, 30)
    first, second = streamed(metric, batches[:3]), streamed(metric, batches[3:])
    before = numbers(first.compute()), numbers(second.compute())
    assert numbers((second + first).compute()) == same(function(*data))
    assert numbers((Streaming(metric) + first + second + Streaming(metric)).compute()) == same(function(*data))
    assert (numbers(first.compute()), numbers(second.compute())) == (
        pytest.approx(before[0], rel=0, abs=0, nan_ok=True),
        pytest.approx(before[1], rel=0, abs=0, nan_ok=True),
    )


def test_a_state_goes_on_where_it_was_taken(case, tmp_path):
    metric, function, data = case
    batches = split(*data, 30)
    torch.save(streamed(metric, batches[:2]).state(), tmp_path / "state.pt")
    stream = Streaming(metric)
    stream.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for batch in batches[2:]:
        stream.update(*batch)
    assert numbers(stream.compute()) == same(function(*data))


def test_computing_does_not_disturb(case):
    metric, function, data = case
    stream = Streaming(metric)
    for batch in split(*data, 100):
        stream.update(*batch)
        if len(stream.state()["summary"]) > 150 or isinstance(metric, SumMetric):
            stream.compute()
    assert numbers(stream.compute()) == same(function(*data))


def test_sums_do_not_grow():
    p, y = classes()
    stream = streamed(Mean(correct), [(p, y)] * 350)
    assert stream.state()["summary"].shape == (2,)
    assert stream.state()["summary"][1] == 350 * COUNT


def squared(predictions, targets):
    return (predictions - targets).square()


def test_a_mean_of_your_own_and_its_root():
    x = torch.tensor([1.0, 2.0, 4.0])
    assert Mean(squared)(x, 0 * x) == 7
    assert streamed(Mean(squared, then=math.sqrt), [(x[:1], 0 * x[:1]), (x[1:], 0 * x[1:])]).compute() == math.sqrt(7)


@dataclass(frozen=True)
class Largest(SumMetric[float]):
    def summarise(self, predictions, targets):
        return predictions.amax()[None]

    def combine(self, parts):
        return torch.stack(list(parts)).amax(dim=0)

    def finish(self, summary):
        return summary.item()


def test_a_metric_of_your_own():
    x = torch.tensor([3.0, 1.0, 2.0])
    assert streamed(Largest(), [(x[:1], x[:1]), (x[1:], x[1:])]).compute() == 3


def test_what_streams_refuse():
    p, y = classes()
    empty = Streaming(Mean(correct))
    with pytest.raises(ValueError, match=r"no example, expected at least one. Call update"):
        empty.compute()
    assert empty.state() == {}
    with pytest.raises(ValueError, match=r"A stream of .*bins=10.*bins=15.*: expected equal metrics"):
        Streaming(EqualWidthReliability(10)) + Streaming(EqualWidthReliability(15))
    with pytest.raises(ValueError, match=r"expected equal metrics"):
        Streaming(Mean(correct)) + Streaming(Mean(brier_scores))
    with pytest.raises(ValueError, match=r"keys \['other'\], expected what state\(\) returned"):
        empty.load_state({"other": y})
    with pytest.raises(ValueError, match=r"returned shape \(211, 3\), expected \(N,\)"):
        Mean(squared)(p, torch.zeros(3))


def test_a_refused_batch_leaves_the_stream_as_it_was():
    p, y = classes()
    stream = streamed(Mean(correct), [(p, y)])
    for bad in [(p * 2, y), (p, y + 3), (p[:0], y[:0]), (p.where(p > 0.5, torch.nan), y)]:
        with pytest.raises(ValueError, match="expected"):
            stream.update(*bad)
    assert stream.compute() == accuracy(p, y)


def test_equal_metrics_may_be_merged():
    p, y = classes()
    both = streamed(Ranked(EqualMass(5)), [(p, y)]) + streamed(Ranked(EqualMass(5)), [(p, y)])
    assert both.compute().count.sum() == 2 * COUNT
    assert repr(both) == f"Streaming({Ranked(EqualMass(5))!r})"


def process(rank, port):
    """The first process has one batch, the second the rest; and again, the second all and the first none."""
    address = f"tcp://localhost:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    found = {}
    for name, (metric, _, data) in CASES.items():
        batches = split(*data(), 50)
        stream = streamed(metric, batches[:1] if rank == 0 else batches[1:])
        alone = streamed(metric, batches if rank == 1 else [])
        own = stream.state()["summary"].clone()
        found[name] = [numbers(part.all_reduce().compute()) for part in (stream, alone)]
        assert torch.equal(stream.state()["summary"], own)
    distributed.destroy_process_group()
    return found


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_give_the_number_of_all_data():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(rank)], **pipes) for rank in range(2)]
    ended = [(*one.communicate(timeout=100), one.returncode) for one in processes]
    for printed, errors, code in ended:
        assert code == 0, errors
        found = json.loads(printed.splitlines()[-1])
        for name, (_, function, data) in CASES.items():
            expected = same(function(*data()))
            assert all(value == expected for value in found[name]), name


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    print(json.dumps(process(int(sys.argv[2]), int(sys.argv[1]))))
