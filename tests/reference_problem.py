"""Problem REF: a small fixed network whose weights and data are formulas, with numbers known to ten digits.

Linear(3, 4) - Sigmoid - Linear(4, 5) - Tanh - Linear(5, 3): 59 parameters, 6 examples, 3 classes, float64,
softmax cross-entropy. No random number generator takes part. The numbers were computed with autograd and
with BackPACK 1.7.1. `MEAN` in a name: of the mean loss, as the seeds define curvature. The Laplace numbers
use the sum over the data, P = 6 G + tau I, and take the weights as they are for the mode (they are not one).
"""

import torch
from torch import nn
from torch.nn.utils import vector_to_parameters

EXAMPLES, CLASSES, PARAMETERS = 6, 3, 59


def model():
    """A fresh copy of the network: theta_k = 1.5 sin(0.61 k^2 + 0.7) over W1, b1, W2, ... row-major."""
    layers = [nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
    net = nn.Sequential(*layers).double()
    k = torch.arange(PARAMETERS, dtype=torch.float64)
    vector_to_parameters(1.5 * torch.sin(0.61 * k**2 + 0.7), net.parameters())
    return net


def inputs():
    """X (6, 3): cos(0.37 k^2 + 0.3), k = 3 n + i."""
    k = torch.arange(EXAMPLES * 3, dtype=torch.float64)
    return torch.cos(0.37 * k**2 + 0.3).reshape(EXAMPLES, 3)


def labels():
    """y (6,): n mod 3."""
    return torch.arange(EXAMPLES) % CLASSES


def targets():
    """Regression targets Y (6, 3): sin(0.9 k + 0.5), k = 3 n + i."""
    k = torch.arange(EXAMPLES * 3, dtype=torch.float64)
    return torch.sin(0.9 * k + 0.5).reshape(EXAMPLES, 3)


SQUARED_NORM_OF_PARAMETERS = 62.5927822545

# Mean cross-entropy
MEAN_LOSS = 1.254713282185
MEAN_GRADIENT_NORM = 0.471961145200
EXAMPLE_GRADIENT_NORMS = (3.2756029552, 1.4329547815, 1.7913389242, 3.1218213713, 1.3784346799, 1.9656999311)

# The GGN of the mean loss; per parameter tensor in the order W1, b1, W2, b2, W3, b3
GGN_MEAN_TRACE = 3.914906270053
GGN_MEAN_TRACES = (0.1244947255, 0.0510168282, 1.3281647351, 1.1715899633, 0.6262531457, 0.6133868722)
GGN_MEAN_TOP_EIGENVALUES = (2.949306386, 0.6986936659, 0.1679177219, 0.0509224987, 0.0290798445)
GGN_RANK = EXAMPLES * (CLASSES - 1)
HESSIAN_MEAN_TRACE = 3.492363613325
HESSIAN_MEAN_TRACES = (0.1329826302, 0.0249518212, 1.1176378138, 0.9771513302, 0.6262531457, 0.6133868722)
HESSIAN_MEAN_EXTREME_EIGENVALUES = (-0.4423715251, 2.782932993)

# KFAC with the exact output factor (KFLR), layers 1, 2, 3:
# A = mean_n a_n a_n^T, B = mean_n sum_k g_nk g_nk^T; weight block B (x) A in row-major order, bias block B.
KFLR_MEAN_TRACES_A = (1.821618315, 1.1803871148, 1.0243745426)
KFLR_MEAN_TRACES_B = (0.0510168282, 1.1715899633, 0.6133868722)
KFLR_RELATIVE_ERRORS = (0.6467504639, 0.1119410852, 0.05097211)  # Frobenius, of the three weight blocks

# Laplace, prior precision tau, prior mean zero. `block_diagonal` has one block per parameter tensor.
LOG_DET_PRECISION = {
    "full": 5.810190940457,
    "block_diagonal": 10.116067962636,
    "kron": 10.118680667664,
    "diag": 15.124552771515,
}
LOG_EVIDENCE = {  # at tau = 1
    "full": -41.729766290599,
    "block_diagonal": -43.882704801688,
    "kron": -43.884011154202,
    "diag": -46.386947206128,
}
BEST_PRIOR_PRECISION = {  # the tau that maximises the evidence
    "full": 0.0826858605,
    "block_diagonal": 0.1746454901,
    "kron": 0.1830627967,
    "diag": 0.3175399869,
}
BEST_LOG_EVIDENCE = {
    "full": -17.9217084870,
    "block_diagonal": -25.3188414801,
    "kron": -25.5776156003,
    "diag": -33.7669113208,
}
PREDICTIVE_VARIANCE = {  # the diagonal of J_0 P^-1 J_0^T at the first input, tau = 1
    "full": (7.80586428, 7.43260935, 7.64619754),
    "block_diagonal": (8.38531936, 7.88505537, 7.77377385),
    "kron": (8.36109917, 7.87453825, 7.77307705),
    "diag": (7.47536188, 8.12506230, 9.25568264),
}
